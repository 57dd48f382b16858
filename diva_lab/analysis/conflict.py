"""Conflict and signal of the objectives' gradients, on batches that no objective is trained on.

In training both gradients come from one batch. In a probe every gradient meets those of other batches too: such a
cosine says what two objectives have to do with each other when the images have nothing in common. That is the null
distribution of the cosine. Gradients of several batches also say how much of one is signal.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diva_lab.gradients import curvature, grams, groups_of, signal, term_gradients
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.step import Step
from diva_lab.statistics import paired_t

PROBED = ("contrastive", "diva", "dcr")


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
        at: see `tune`. Every objective sees the same pictures, t and noise (one draw an image).
        parameters: of the encoder, by name.
        objectives: keys of `OBJECTIVES`.
        batches: k of them; the cosines of different batches are the null.
        bins: equal parts of the timesteps, each probed alone, beside `all`, the run's own way to draw them.
        size: length of the step over which the curvature is taken, in parameter space.

    Returns:
        Records `bin`, `of` (an objective, or two as `a~b`), `measure`, `value`. Of an objective: `loss`, `norm`,
        `snr`, `noise_scale` (pictures) and, in the bin `all`, `curvature`. Of two: `cos` of a batch's own gradients,
        its mean over the batches with `cos/low` and `cos/high` (95 %, t), `other` (mean over different batches) and
        `other/sd`, `magnitude`, `random/sd` (of random directions: n^-1/2), and `cos/<part>` as `gradients.conflict`.
    """
    rows: list[dict] = []
    kept: dict[str, list] = {}
    for part in ("all", *range(bins)):
        changes = {"draws": 1, "parts": False}
        if part != "all":
            changes["timesteps"] = ",".join(str(int(k == part)) for k in range(bins))

        def gradient(name: str, number: int, changes: dict = changes):
            loss = sum(OBJECTIVES[name](at(number, **changes)).values())
            return loss.mean().item(), term_gradients({name: loss}, parameters)[name]

        found = {}
        for name in objectives:
            if part == "all" or name != "contrastive":  # which has no timesteps
                kept[name] = [gradient(name, number) for number in range(batches)]
            found[name] = [g for _, g in kept[name]]
        each = grams([g for name in objectives for g in found[name]])
        place = {name: slice(i * batches, (i + 1) * batches) for i, name in enumerate(objectives)}
        whole = torch.stack(list(each.values())).sum(0)
        parts = {label: torch.stack([each[n] for n in names]).sum(0) for label, names in groups_of(list(each)).items()}

        def add(of: str, part: object = part, **values: float) -> None:
            rows.extend({"bin": str(part), "of": of, "measure": name, "value": value} for name, value in values.items())

        for name in objectives:
            own = whole[place[name], place[name]]
            batch = len(at(0).images)
            facts = {key: value for key, value in signal(own, batch).items() if key in ("snr", "noise_scale")}
            add(name, loss=float(np.mean([loss for loss, _ in kept[name]])), norm=own.diagonal().sqrt().mean().item())
            add(name, **facts)
            if part == "all":
                bend = curvature(found[name][0], lambda n=name: gradient(n, 0)[1], parameters, size)
                add(name, curvature=bend)
        for i, a in enumerate(objectives):
            for b in objectives[i + 1 :]:
                cosines = _cosines(whole, place[a], place[b])
                own, other = cosines.diagonal(), cosines[~np.eye(batches, dtype=bool)]
                mean, low, high = paired_t(own)
                norms = [np.sqrt(whole.diagonal()[place[name]].numpy()) for name in (a, b)]
                similar = 2 * norms[0] * norms[1] / (norms[0] ** 2 + norms[1] ** 2)
                count = sum(p.numel() for p in parameters.values())
                values = {"cos": mean, "cos/low": low, "cos/high": high, "other": other.mean()}
                values |= {"other/sd": other.std(ddof=1), "magnitude": similar.mean(), "random/sd": count**-0.5}
                values |= {
                    f"cos/{label}": _cosines(gram, place[a], place[b]).diagonal().mean()
                    for label, gram in parts.items()
                }
                add(f"{a}~{b}", **{name: float(value) for name, value in values.items()})
    return rows


def _cosines(gram: Tensor, a: slice, b: slice) -> np.ndarray:
    """Cosines of two groups of gradients, [k, k]."""
    norms = gram.diagonal().sqrt()
    return (gram[a, b] / norms[a, None] / norms[None, b]).numpy()
