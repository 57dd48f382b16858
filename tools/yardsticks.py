"""What the tiny models can do: how well the denoiser draws, and the pair score that supervision reaches.

`python -m tools.yardsticks quality` reads the denoiser's samples with a classifier that is trained on the world.
`python -m tools.yardsticks ceiling` tunes the visual tower by supervision against the frozen text tower: the pair score
of each pattern afterwards is the ceiling of every unsupervised objective, its zero-shot accuracy and its clusters are
what supervision costs.

They write tables that ship: data/results/quality.csv; data/results/ceiling.csv and ceiling_report.csv.
"""

import argparse
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diva_lab.evaluation.world import WORLD_MEASURES, world_report
from diva_lab.machine import autocast
from diva_lab.models.encoders import load_encoder
from diva_lab.models.lora import make_trainable
from diva_lab.models.registry import load_denoiser
from diva_lab.paths import DATA
from diva_lab.provenance import environment, sha256
from diva_lab.statistics import wilson
from diva_lab.world import ATTRIBUTES, DETAILS, World, captions, draw_scenes
from tools.pretrain import CLIP_WEIGHTS, WORDS, MinimalPairs, Pool, clip_loss, fit


class Classifier(nn.Module):
    """Images [n, 3, 32, 32] in [0, 1] -> logits of every attribute, by name."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128)
        layers = [
            layer
            for a, b in pairwise(widths)
            for layer in (nn.Conv2d(a, b, 3, 2 if a > 3 else 1, 1), nn.BatchNorm2d(b), nn.ReLU())
        ]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 64, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(images * 2 - 1)
        return {name: head(hidden) for name, head in self.heads.items()}


def train_classifier(world: World, seed: int = 0, steps: int = 300) -> Classifier:
    """A classifier of all attributes, trained on images of the world."""
    torch.manual_seed(seed)
    model, pool = Classifier(), Pool(world, draw_scenes(60_000, (world.seed, 1)))

    def loss_of(_: int, rng: np.random.Generator) -> Tensor:
        index = rng.integers(len(pool.scenes), size=128)
        with autocast():
            logits = model(pool.batch(index))
        labels = {name: torch.from_numpy(pool.scenes[name][index].astype(int)) for name in ATTRIBUTES}
        return sum(F.cross_entropy(logits[name].float(), labels[name]) for name in ATTRIBUTES)

    fit(f"classifier-{world.seed}-{seed}", {"model": model}, loss_of, steps, 2e-3, seed, decay=0.99)
    model.train()  # the running statistics are those of the raw weights: compute them again for the averaged weights
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over all batches that follow
    with torch.no_grad():
        for part in np.arange(4096).reshape(-1, 256):
            model(pool.batch(part))
    return model.eval()


@torch.no_grad()
def read_attributes(model: Classifier, images: Tensor) -> dict[str, np.ndarray]:
    """The classifier's value of every attribute, [n] each."""
    return {name: logits.argmax(1).numpy() for name, logits in model(images).items()}


def sample_quality(world: World, n: int = 256, guidance: float = 3.0, seed: int = 0) -> pd.DataFrame:
    """Share of the denoiser's samples in which the classifier reads what the full caption says.

    Returns a row for each attribute: share, its Wilson interval, n, and the classifier's own accuracy on images of the
    world.
    """
    model, denoiser = train_classifier(world), load_denoiser("tiny")
    scenes = draw_scenes(n, (world.seed, 6, seed))
    texts = captions(scenes, 1.0, np.random.default_rng(seed))
    with autocast():
        parts = [denoiser.sample(texts[i : i + 128], guidance, seed=seed + i) for i in range(0, n, 128)]
    images = torch.cat(parts).float()
    test = draw_scenes(2000, (world.seed, 2))
    on_world = read_attributes(model, Pool(world, test).batch(np.arange(len(test))))
    rows = []
    for name, read in read_attributes(model, images).items():
        hits = int((read == scenes[name]).sum())
        low, high = wilson(hits, n)
        accuracy = float((on_world[name] == test[name]).mean())
        rows.append({"attribute": name, "share": hits / n, "low": low, "high": high, "n": n, "classifier": accuracy})
    return pd.DataFrame(rows)


def supervised_ceiling(world: World, seed: int = 0, steps: int = 1500, lr: float = 5e-4) -> dict[str, pd.DataFrame]:
    """Tune all visual weights on captioned minimal pairs; before and after, the pair score of each detail, and P and D.

    Returns:
        `ceiling`, a row for each detail: its pair score. `ceiling_report`, a row for each of `WORLD_MEASURES`.
    """
    encoder, pairs = load_encoder("tiny"), MinimalPairs(world)
    reports = {"before": world_report(encoder, world)}
    make_trainable(encoder, rank=0)

    def loss_of(_: int, rng: np.random.Generator) -> Tensor:
        index, texts = pairs.draw(128, WORDS, rng)
        with autocast():
            image = encoder.encode_image(pairs.pool.batch(index))
        return clip_loss(image, encoder.encode_text(texts), encoder.model.logit_scale)

    name = f"ceiling-{world.seed}-{seed}-{lr}-{sha256(DATA / 'tiny' / 'clip' / CLIP_WEIGHTS)[:6]}"
    fit(name, {"visual": encoder.model.visual, "proj": encoder.proj}, loss_of, steps, lr, seed)
    reports["after"] = world_report(encoder, world)
    table = pd.DataFrame(reports)
    ceiling = table.loc[[f"pairs/{name}" for name in DETAILS]].set_index(pd.Index(DETAILS, name="detail"))
    report = table.loc[[name for name in WORLD_MEASURES if name in table.index]].rename_axis("measure")
    return {"ceiling": ceiling.reset_index(), "ceiling_report": report.reset_index()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.yardsticks", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("quality", "ceiling"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=3.0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    facts = {"seed": args.seed, "git": environment()["git"]}
    if args.what == "quality":
        table = sample_quality(World(), guidance=args.guidance, seed=args.seed)
        tables = {"quality": table.assign(guidance=args.guidance)}
    else:
        tables = supervised_ceiling(World(), args.seed)
    for name, table in tables.items():
        path = DATA / "results" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.assign(**facts).round(5).to_csv(path, index=False)
        print(table.round(3).to_string(index=False), f"\nwritten to {path}")


if __name__ == "__main__":
    main()
