"""Is a detail lost in the tower or in its readout? Probes of patch tokens beside those of the embedding.

The embedding is one vector that the tower reads out of its last layer. A detail that a probe finds in the patch tokens
and not in the embedding was lost in the readout, and a model that reads patch tokens, as LLaVA does, can still have it.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diva_lab.evaluation.patches import read_layer, some_world_scenes
from diva_lab.evaluation.probes import fit_probe
from diva_lab.evaluation.task import Task, benchmark, score_row
from diva_lab.evaluation.world import PROBE_TRAIN, WORLD_SPLITS
from diva_lab.machine import generator
from diva_lab.models.encoders import embed
from diva_lab.statistics import bootstrap_mean, wilson
from diva_lab.world import DETAILS

HEADS = 4  # weighted means of the patch tokens that one detail's probe reads
STEPS, RATE, DECAY, BATCH = 400, 0.01, 0.1, 256


class AttentiveProbe(nn.Module):
    """Softmax regression on `HEADS` weighted means of the tokens [b, n, width] of an image.

    The weights of a mean are a softmax over the tokens, of their products with a learned query; all tokens are
    standardised by `mean` and `std` before.
    """

    def __init__(self, tokens: Float[Tensor, "b n width"], classes: int, random: torch.Generator):
        super().__init__()
        width = tokens.shape[2]
        self.mean, self.std = tokens.mean((0, 1)), tokens.std((0, 1)) + 1e-6
        self.query = nn.Parameter(torch.randn(HEADS, width, generator=random).to(tokens) * width**-0.5)
        self.readout = nn.Linear(HEADS * width, classes, device=tokens.device)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, tokens: Float[Tensor, "b n width"]) -> Float[Tensor, "b classes"]:
        tokens = (tokens - self.mean) / self.std
        weights = (tokens @ self.query.T).softmax(1)  # [b, n, heads]
        return self.readout((weights.transpose(1, 2) @ tokens).flatten(1))


def fit_attentive(
    tokens: Float[Tensor, "b n width"], labels: np.ndarray, classes: int, seed: int = 0
) -> AttentiveProbe:
    """An attentive probe after `STEPS` steps of AdamW on batches of `BATCH`; query and batches follow from the seed."""
    random, labels = generator("attentive probe", seed), torch.from_numpy(labels.astype(int)).to(tokens.device)
    probe = AttentiveProbe(tokens, classes, random)
    optimizer = torch.optim.AdamW(probe.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(tokens), (BATCH,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(probe(tokens[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


def probe_rows(metric: str, right: Mapping[str, Bool[np.ndarray, " n"]], seed: int) -> Iterator[dict]:
    """A row for each detail, from which images a probe of it reads rightly, and their mean, which resamples images."""
    for detail, hits in right.items():
        n, chance = len(hits), 1 / len(DETAILS[detail])
        yield score_row(metric, hits.mean(), n, *wilson(int(hits.sum()), n), chance, detail)
    whole, chance = np.mean(list(right.values()), axis=0), float(np.mean([1 / len(DETAILS[name]) for name in right]))
    yield score_row(metric, whole.mean(), len(whole), *bootstrap_mean([whole], seed=seed), chance)


@benchmark(data="nothing", fixed={"features": "patches", "precision": "no"}, layer=True)
def patch_probe(task: Task) -> Iterator[dict]:
    """Probes of the tiny world's details on the embedding, on the mean of the patch tokens, and on attentive means."""
    keys = PROBE_TRAIN, WORLD_SPLITS["measure"][2]
    (known, train), (asked, test) = (some_world_scenes(task.encoder, key, task.layer) for key in keys)
    device = task.encoder.mean.device
    tokens = [read_layer(task.encoder, images, task.layer) for images in (train, test)]
    pooled = {
        "probe of the embedding": [embed(task.encoder, images) for images in (train, test)],
        "probe of the patches' mean": [part.mean(1) for part in tokens],
    }
    for metric, (fitted, read) in pooled.items():
        right = {name: fit_probe(fitted, known[name]).predict(read.numpy()) == asked[name] for name in DETAILS}
        yield from probe_rows(metric, right, task.seed)
    right = {}
    for name, values in DETAILS.items():
        probe = fit_attentive(tokens[0].to(device), known[name], len(values), task.seed)
        with torch.no_grad():
            answers = torch.cat([probe(part.to(device)).argmax(1).cpu() for part in tokens[1].split(BATCH)])
        right[name] = answers.numpy() == asked[name]
    yield from probe_rows("attentive probe of the patches", right, task.seed)
