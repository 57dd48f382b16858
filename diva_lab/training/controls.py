"""The control that no signal went into: weights moved at random, as far as a run moved them."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from diva_lab.machine import default_device, generator
from diva_lab.models.encoders import Encoder, embed, load_encoder
from diva_lab.models.lora import visual_weights
from diva_lab.paths import RUNS
from diva_lab.training.build import tuned_encoder
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.training.stages import Evaluate, open_run


class Push:
    """A random change of an encoder's weights, at any scale.

    Args:
        encoder: moved in place.
        tuned: each tensor's change gets the norm that it was moved by here.
        images: uint8 [n, 3, h, w], on which drift is measured.
        seed: of the directions.
    """

    def __init__(self, encoder: Encoder, tuned: Encoder, images: UInt8[Tensor, "n 3 h w"], seed: int):
        self.encoder, self.images, self.before = encoder, images, embed(encoder, images)
        self.original = {name: weight.clone() for name, weight in visual_weights(encoder).items()}
        self.direction, random = {}, generator("perturb", seed)
        for name, new in visual_weights(tuned).items():
            noise = torch.randn(new.shape, generator=random).to(new)
            length = torch.linalg.vector_norm(new - self.original[name])
            self.direction[name] = noise * (length / torch.linalg.vector_norm(noise))

    def drift_of(self, embeddings: Tensor) -> float:
        """Mean of 1 - cos between embeddings [n, d] of the images and those before."""
        return (1 - (embeddings * self.before).sum(1)).mean().item()

    def drift(self, scale: float) -> float:
        """Move the weights by `scale` times the change, and return the drift."""
        for name, weight in visual_weights(self.encoder).items():
            weight.copy_(self.original[name] + scale * self.direction[name])
        return self.drift_of(embed(self.encoder, self.images))

    def scale_of(self, drift: float) -> float:
        """The scale at which the drift is `drift`, by bisection to a millionth of its upper end."""
        low, high = 0.0, 1.0
        while self.drift(high) < drift and high < 1e4:
            low, high = high, 2 * high
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self.drift(middle) < drift else (low, middle)
        return high


@torch.no_grad()
def perturb(
    like: Run,
    images: Tensor,
    match: str = "norm",
    root: str | Path = RUNS,
    evaluate: Evaluate | None = None,
    mix: float = 1.0,
) -> Run:
    """Move the encoder's weights at random, as far as the run `like` moved them.

    Args:
        like: a finished run of `tune`.
        images: held-out images, uint8 [n, 3, h, w], on which drift is measured.
        match: `norm` gives each tensor a Gaussian change of the norm that `like` gave it; `drift` scales that change
            until the mean of 1 - cos between old and new embeddings of `images` equals that of `like`.
        evaluate: called as `evaluate(encoder)`.
        mix: as far as the encoder of `like` at this mix (`tuned_encoder`).

    Returns:
        A run of objective `perturb-norm` or `perturb-drift` that holds the moved weights; its evaluation is at step
        `like.settings["steps"]`, and its metrics hold the scale, the drift, and the drift of `like`.

    Raises:
        ValueError: for another `match`, and for a run that is not finished; as `open_run`, like what follows.
        RuntimeError, OSError: as `open_run`.
    """
    if match not in ("norm", "drift"):
        raise ValueError(f"unknown match {match!r}; expected norm or drift")
    if not like.done:
        raise ValueError(f"run {like.id} is not finished; tune() it to its end first")
    settings = replace(Settings.of(like), objective=f"perturb-{match}")
    held_out = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:8]
    more = {} if mix == 1 else {"mix": f"{mix:g}"}
    with open_run(settings, root, "perturb", like=like.id, held_out=held_out, **more) as run:
        if run.done or run.resume() is not None:  # saved last
            return run if run.done else run.finish()
        device = default_device()
        encoder, tuned = load_encoder(settings.encoder, device), tuned_encoder(like, device, mix)
        push = Push(encoder, tuned, images, settings.seed)
        goal = push.drift_of(embed(tuned, images))
        scale = push.scale_of(goal) if match == "drift" else 1.0
        run.log("metrics", step=0, loss=0.0, scale=scale, drift=push.drift(scale), drift_like=goal, seconds=0.0)
        if evaluate is not None:
            run.log("evaluations", step=settings.steps, **evaluate(encoder))
        run.save(settings.steps, visual_weights(encoder), {}, 0.0)
        return run.finish()
