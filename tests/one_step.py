"""What `training` hands to an objective in one step, built for a test."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diva_lab.machine import generator
from diva_lab.models.conditions import Conditioner
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.encoders import Encoder
from diva_lab.models.registry import load_denoiser
from diva_lab.objectives import OBJECTIVES
from diva_lab.training.build import build_conditioner, build_encoder, make_step
from diva_lab.training.settings import Settings
from diva_lab.world import World, draw_scenes

shared_denoiser = functools.cache(load_denoiser)  # frozen, so that tests may share it


def pictures(n: int, seed: int = 0) -> Tensor:
    """Pictures of the tiny world, uint8 [n, 3, 32, 32]."""
    return torch.from_numpy(World().render(draw_scenes(n, seed))).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class OneStep:
    """One step that can be taken again and again: always the same pictures, timesteps, noise and augmentation."""

    settings: Settings
    encoder: Encoder
    conditioner: Conditioner
    denoiser: Denoiser

    @classmethod
    def of(cls, settings: Settings) -> "OneStep":
        encoder, denoiser = build_encoder(settings), shared_denoiser(settings.denoiser)
        conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(False)
        return cls(settings, encoder.eval(), conditioner, denoiser)

    def terms(
        self, objective: str | None = None, random: torch.Generator | None = None, **changes
    ) -> dict[str, Tensor]:
        """The terms of `objective` (that of the settings if None), with another generator or settings where given."""
        settings = replace(self.settings, **changes)
        random = random or generator("a test", settings.seed)
        images = pictures(settings.batch, settings.seed).float() / 255
        step = make_step(images, self.encoder, self.conditioner, self.denoiser, random, settings)
        return OBJECTIVES[objective or settings.objective](step)

    def loss(self) -> Tensor:
        return sum(term.mean() for term in self.terms().values())


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
