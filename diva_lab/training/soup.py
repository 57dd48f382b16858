"""A soup: the mean of the weights of several runs that started from one encoder (Wortsman et al., arXiv 2203.05482)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diva_lab.machine import default_device
from diva_lab.models.lora import visual_weights
from diva_lab.paths import RUNS
from diva_lab.training.build import tuned_encoder
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.training.stages import Evaluate, open_run


@torch.no_grad()
def soup(runs: Sequence[Run], root: str | Path = RUNS, evaluate: Evaluate | None = None) -> Run:
    """Average the encoders of finished runs, LoRA merged: theta = mean of theta_k, over the visual tower's weights.

    Runs differ in their seed, their projector or another setting; what each learned by chance goes out of the mean.

    Args:
        runs: two or more, of `tune`, that tuned the same encoder.
        evaluate: called as `evaluate(encoder)`.

    Returns:
        A run of objective `soup` that holds the mean, to be read as every other; its settings are those of the first
        run, and `runs` lists all of them. Its evaluation is at the first one's last step.

    Raises:
        ValueError: for fewer than two runs, the same one twice, one that is not finished, or another encoder; as
            `open_run`, like what follows.
        RuntimeError, OSError: as `open_run`.
    """
    _check(runs)
    settings = replace(Settings.of(runs[0]), objective="soup")
    with open_run(settings, root, "soup", runs=" ".join(sorted(run.id for run in runs))) as made:
        if made.done or made.resume() is not None:  # saved last
            return made if made.done else made.finish()
        device = default_device()
        encoder = tuned_encoder(runs[0], device)
        mean: dict[str, Tensor] = visual_weights(encoder)
        for k, run in enumerate(runs[1:], 2):
            for name, weight in visual_weights(tuned_encoder(run, device)).items():
                mean[name].lerp_(weight, 1 / k)
        made.log("metrics", step=0, loss=0.0, seconds=0.0)
        if evaluate is not None:
            made.log("evaluations", step=settings.steps, **evaluate(encoder))
        made.save(settings.steps, mean, {}, 0.0)
        return made.finish()


def _check(runs: Sequence[Run]) -> None:
    """Raise ValueError where `soup` cannot average `runs`; names the run."""
    if len({run.id for run in runs}) < max(2, len(runs)):
        named = ", ".join(run.id for run in runs) or "nothing"
        raise ValueError(f"a soup of {named}: expected two or more runs, each once")
    for run in runs:
        if run.settings.get("stage") != "tune" or not run.done:
            raise ValueError(f"{run.folder}: expected the folder of a finished run of tune()")
    tuned = [(run.settings["encoder"], run.environment.get("weights", {}).get("encoder")) for run in runs]
    if other := [run.id for run, model in zip(runs, tuned, strict=True) if model != tuned[0]]:
        raise ValueError(f"run {other[0]} tuned another encoder than {runs[0].id}; expected runs of one")
