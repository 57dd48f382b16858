"""One training step, as `training` hands it to an objective, and a record of what happens in it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diva_lab.machine import generator
from diva_lab.models.conditions import Conditioner
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.encoders import Encoder, Features
from diva_lab.models.registry import load_denoiser
from diva_lab.models.teacher import Teacher
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.step import Step
from diva_lab.training.build import build_conditioner, build_encoder, build_teacher, make_step
from diva_lab.training.settings import Settings
from diva_lab.world import World, captions, draw_scenes

shared_denoiser = functools.cache(load_denoiser)  # frozen, so that tests may share it


def pictures(n: int, seed: int = 0) -> Tensor:
    """Images of the tiny world, uint8 [n, 3, 32, 32]."""
    return torch.from_numpy(World().render(draw_scenes(n, seed))).permute(0, 3, 1, 2).contiguous()


def predictions(b: int, d: int = 24, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Random (grid, augmented, truth), all similar to one another as a denoiser's predictions are."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.randn(b, d, generator=random, dtype=torch.float64)
    grid = truth[:, None] + 0.5 * torch.randn(b, b, d, generator=random, dtype=torch.float64)
    augmented = truth + 0.5 * torch.randn(b, d, generator=random, dtype=torch.float64)
    return grid.to(dtype), augmented.to(dtype), truth.to(dtype)


@dataclass(frozen=True)
class OneStep:
    """One step that can be taken again and again: always the same images, timesteps, noise and augmentation."""

    settings: Settings
    encoder: Encoder
    conditioner: Conditioner
    denoiser: Denoiser
    teacher: Teacher | None = None

    @classmethod
    def of(cls, settings: Settings) -> "OneStep":
        encoder, denoiser = build_encoder(settings), shared_denoiser(settings.denoiser)
        conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(False)
        teacher = build_teacher(settings) if "teacher" in settings.models else None
        return cls(settings, encoder.eval(), conditioner, denoiser, teacher)

    def images(self) -> Tensor:
        """The step's images, in [0, 1]."""
        return pictures(self.settings.batch, self.settings.seed).float() / 255

    def captions(self) -> list[str]:
        """Those of its images."""
        scenes = draw_scenes(self.settings.batch, self.settings.seed)
        return captions(scenes, 0.5, np.random.default_rng(self.settings.seed))

    def terms(
        self, objective: str | None = None, random: torch.Generator | None = None, **changes
    ) -> dict[str, Tensor]:
        """The terms of `objective` (that of the settings if None), with another generator or other settings."""
        settings = replace(self.settings, **changes)
        random = random or generator("a test", settings.seed)
        models = (self.encoder, self.conditioner, self.denoiser)
        given = {"captions": self.captions(), "teacher": self.teacher}
        step = make_step(self.images(), *models, random, settings, **given)
        return OBJECTIVES[objective or settings.objective](step)

    def loss(self) -> Tensor:
        return sum(term.mean() for term in self.terms().values())

    def descend(self, parameters: list[Tensor], steps: int = 6) -> list[float]:
        """The losses of so many steps down the gradient in `parameters`."""
        optimizer, losses = torch.optim.AdamW(parameters, lr=3e-3), []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


@dataclass
class Record:
    """What happens in a step.

    Attributes:
        predicted: the output of each call of the denoiser's network.
        draws: (x_t, t, noise) of each call of `Step.draw_noisy`.
        encoded: (images, features) of each call of the encoder.
    """

    predicted: list[Tensor] = field(default_factory=list)
    draws: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    encoded: list[tuple[Tensor, Features]] = field(default_factory=list)


@contextmanager
def record(one: OneStep) -> Iterator[Record]:
    """Record the steps that are taken inside the context."""
    seen, draw, resize, features = Record(), Step.draw_noisy, one.encoder.resize, one.encoder.read_pixels
    images: list[Tensor] = []

    def draw_and_keep(step: Step, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.draws.append(draw(step, x0))
        return seen.draws[-1]

    def encode_and_keep(pixels: Tensor) -> Features:
        seen.encoded.append((images.pop(), features(pixels)))
        return seen.encoded[-1][1]

    hook = one.denoiser.network.register_forward_hook(lambda *args: seen.predicted.append(args[2].sample.detach()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "draw_noisy", draw_and_keep)
        patch.setattr(one.encoder, "resize", lambda x: images.append(x) or resize(x))
        patch.setattr(one.encoder, "read_pixels", encode_and_keep)
        yield seen
    hook.remove()


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def open_lora(encoder: Encoder, size: float = 0.02) -> Encoder:
    """Fill LoRA's B, zero at first, so that A has a gradient and the adapted tower is not the original."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if "lora_B" in name:
                p.copy_(size * torch.randn(p.shape, generator=random))
    return encoder.eval()  # LoRA's layers come in training mode, and so their dropout
