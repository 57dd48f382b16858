"""The control that no signal went into: weights moved at random, as far as a run moved them."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diva_lab.machine import default_device, generator
from diva_lab.models.encoders import embed, load_encoder
from diva_lab.models.lora import visual_weights
from diva_lab.paths import RUNS
from diva_lab.training.build import tuned_encoder
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.training.stages import Evaluate, _portable


@torch.no_grad()
def perturb(
    like: Run, images: Tensor, match: str = "norm", root: str | Path = RUNS, evaluate: Evaluate | None = None
) -> Run:
    """The control that no signal went into: move the weights at random, as far as the run `like` moved them.

    Args:
        like: a finished run of `tune`.
        images: held-out pictures, uint8 [n, 3, h, w], on which drift is measured.
        match: `norm` gives each tensor a Gaussian change of the norm that `like` gave it; `drift` scales that change,
            by bisection, until the mean of 1 - cos between old and new embeddings of `images` equals that of `like`.
        evaluate: called as `evaluate(encoder)`.

    Returns:
        A run of objective `perturb-norm` or `perturb-drift` that holds the moved weights; its evaluation is at step
        `like.settings["steps"]`, and its metrics hold the scale, the drift, and the drift of `like`.
    """
    if match not in ("norm", "drift"):
        raise ValueError(f"unknown match {match!r}; expected norm or drift")
    if not like.done:
        raise ValueError(f"run {like.id} is not finished; tune() it to its end first")
    settings = replace(Settings.of(like), objective=f"perturb-{match}")
    shown = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:8]
    run = Run.open({**_portable(settings), "stage": "perturb", "like": like.id, "held_out": shown}, root)
    if run.done:
        return run
    device = default_device()
    run.resume()
    encoder, tuned = load_encoder(settings.encoder, device), tuned_encoder(like, device)
    before, goal = embed(encoder, images), embed(tuned, images)
    original = {name: w.clone() for name, w in visual_weights(encoder).items()}
    random = generator("perturb", settings.seed)
    direction = {}
    for name, new in visual_weights(tuned).items():
        noise = torch.randn(new.shape, generator=random).to(new)
        direction[name] = noise * (torch.linalg.vector_norm(new - original[name]) / torch.linalg.vector_norm(noise))

    def drift(scale: float) -> float:
        for name, weight in visual_weights(encoder).items():
            weight.copy_(original[name] + scale * direction[name])
        return (1 - (embed(encoder, images) * before).sum(1)).mean().item()

    wanted = (1 - (goal * before).sum(1)).mean().item()
    low, high = 0.0, 1.0
    if match == "drift":
        while drift(high) < wanted and high < 1e4:
            low, high = high, 2 * high
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if drift(middle) < wanted else (low, middle)
    run.log("metrics", step=0, loss=0.0, scale=high, drift=drift(high), drift_like=wanted, seconds=0.0)
    if evaluate is not None:
        run.log("evaluations", step=settings.steps, **evaluate(encoder))
    run.save(settings.steps, visual_weights(encoder), {}, 0.0)
    return run.finish()
