"""Conflict and signal of the objectives' gradients, on batches that no objective is trained on.

In training both gradients come from one batch. A probe also takes the cosines of gradients of different batches, which
have no image in common: this is the null distribution of the cosine. Gradients of several batches also show how much
of a gradient is signal.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from diva_lab.gradients import Gradient, curvature, grams, groups_of, signal, term_gradients
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.step import Step
from diva_lab.statistics import paired_t

PROBED = ("contrastive", "diva", "dcr")
Sample = tuple[float, Gradient]  # loss and gradient of one batch


def probe_gradients(
    at: Callable[..., Step],
    parameters: dict[str, Tensor],
    objectives: Sequence[str] = PROBED,
    batches: int = 6,
    bins: int = 5,
    size: float = 0.01,
) -> list[dict]:
    """Gradients of several objectives on the same batches, timesteps and noise, for `tune(probe=...)`.

    Args:
        at: see `tune`. Every objective gets the same images, t and noise (one draw for each image).
        parameters: of the encoder, by name.
        objectives: keys of `OBJECTIVES`.
        batches: number k of batches; the cosines of different batches are the null.
        bins: equal parts of the timesteps, each probed alone, beside `all`, which draws t as the run does.
        size: length of the step over which the curvature is taken, in parameter space.

    Returns:
        Records `bin`, `of` (an objective, or two as `a~b`), `measure`, `value`. Of an objective: `loss`, `norm`,
        `snr`, `noise_scale` (images) and, in the bin `all`, `curvature`. Of two: `cos` of gradients of the same batch,
        its mean over the batches with `cos/low` and `cos/high` (95 %, t), `other` (mean over different batches) and
        `other/sd`, `magnitude`, `random/sd` (of random directions: n^-1/2), and `cos/<part>` as `gradients.conflict`.
    """
    batch, count = len(at(0).images), sum(p.numel() for p in parameters.values())
    rows: list[dict] = []
    samples: dict[str, list[Sample]] = {}
    for part in ("all", *range(bins)):
        changes = {"draws": 1, "parts": False}
        if part != "all":
            changes["timesteps"] = ",".join(str(int(k == part)) for k in range(bins))
        for name in objectives:
            if part == "all" or name != "contrastive":  # it has no timesteps
                samples[name] = [sample_gradient(at, parameters, name, k, changes) for k in range(batches)]
        records = compare_samples({name: samples[name] for name in objectives}, batch, count)
        for name in objectives if part == "all" else ():
            again = lambda n=name, c=changes: sample_gradient(at, parameters, n, 0, c)[1]  # noqa: E731
            records[name]["curvature"] = curvature(samples[name][0][1], again, parameters, size)
        for of, record in records.items():
            rows += [{"bin": str(part), "of": of, "measure": key, "value": value} for key, value in record.items()]
    return rows


def sample_gradient(
    at: Callable[..., Step], parameters: dict[str, Tensor], objective: str, number: int, changes: dict
) -> Sample:
    """Loss and gradient of an objective on probe batch `number`."""
    loss = sum(OBJECTIVES[objective](at(number, **changes)).values())
    return loss.mean().item(), term_gradients({objective: loss}, parameters)[objective]


def compare_samples(samples: dict[str, list[Sample]], batch: int, count: int) -> dict[str, dict[str, float]]:
    """The measures of each objective and of each two that `probe_gradients` returns, except the curvature.

    `samples`: k of each objective; `batch`: images in each; `count`: number of parameters.
    """
    k = len(next(iter(samples.values())))
    each = grams([gradient for sample in samples.values() for _, gradient in sample])
    whole = torch.stack(list(each.values())).sum(0)  # [objectives x k, objectives x k]
    parts = {label: torch.stack([each[n] for n in names]).sum(0) for label, names in groups_of(list(each)).items()}
    place = {name: slice(i * k, (i + 1) * k) for i, name in enumerate(samples)}
    records: dict[str, dict[str, float]] = {}
    for name, sample in samples.items():
        gram = whole[place[name], place[name]]
        loss, norm = float(np.mean([loss for loss, _ in sample])), gram.diagonal().sqrt().mean().item()
        facts = signal(gram, batch)
        records[name] = {"loss": loss, "norm": norm, "snr": facts["snr"], "noise_scale": facts["noise_scale"]}
    for a, b in combinations(samples, 2):
        record = compare_pair(whole, place[a], place[b]) | {"random/sd": count**-0.5}
        record |= {f"cos/{label}": _cosines(g, place[a], place[b]).diagonal().mean() for label, g in parts.items()}
        records[f"{a}~{b}"] = {key: float(value) for key, value in record.items()}
    return records


def compare_pair(gram: Tensor, a: slice, b: slice) -> dict[str, float]:
    """Cosine and magnitude similarity of two objectives' gradients at the places `a` and `b` of their Gram matrix."""
    cosines = _cosines(gram, a, b)
    mean, low, high = paired_t(cosines.diagonal())
    other = cosines[~np.eye(len(cosines), dtype=bool)]
    norm_a, norm_b = (np.sqrt(gram.diagonal()[place].numpy()) for place in (a, b))
    magnitude = 2 * norm_a * norm_b / (norm_a**2 + norm_b**2)
    record = {"cos": mean, "cos/low": low, "cos/high": high, "other": other.mean(), "other/sd": other.std(ddof=1)}
    return record | {"magnitude": magnitude.mean()}


def _cosines(gram: Tensor, a: slice, b: slice) -> np.ndarray:
    """Cosines of two groups of gradients, [k, k]."""
    norms = gram.diagonal().sqrt()
    return (gram[a, b] / norms[a, None] / norms[None, b]).numpy()
