"""The data, models and random draws that one training step hands to an objective."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diva_lab.models.denoiser import Denoiser
from diva_lab.models.encoders import Features
from diva_lab.models.teacher import Teacher
from diva_lab.objectives.timesteps import draw_timesteps


def needs_other_images(objective: Callable) -> Callable:
    """Mark an objective that contrasts the images of a batch with each other: its batches hold at least 2 images."""
    objective.needs_other_images = True
    return objective


def reads(*models: str) -> Callable[[Callable], Callable]:
    """Mark an objective that reads other models than `projector` and `denoiser`.

    Args:
        models: `decoder`, an unCLIP decoder in place of both; `teacher`, an encoder without text, in place of both.
    """

    def mark(objective: Callable) -> Callable:
        objective.models = models
        return objective

    return mark


def models_of(objective: Callable | None) -> tuple[str, ...]:
    """The models beside the encoder that an objective reads."""
    return getattr(objective, "models", ("projector", "denoiser"))


def reads_captions(objective: Callable) -> Callable:
    """Mark an objective of stage 2 that learns from the captions of its images."""
    objective.reads_captions = True
    return objective


@dataclass(frozen=True)
class Step:
    """Everything that an objective may use in one step.

    Attributes:
        images: [b, 3, h, w] in [0, 1], on the device.
        encode: images -> `Features`, with gradient.
        condition: `Features` -> context [b, l, w] for the denoiser, with gradient.
        augment: images -> one augmented view of each.
        denoiser: frozen; None where the objective reads none.
        generator: for timesteps and noise, on the CPU.
        settings: a `training.settings.Settings`, or any object with its fields.
        captions: as many as images; of other images where `settings.anchor` is `text`; empty without captions.
        embed_text: texts -> their embeddings [n, d], of unit length, without gradient.
        gap: the mean image embedding less the mean caption embedding [d], of an anchored projector; else None.
        teacher: of an objective that reads one; else None.
        encode_before: images -> `Features` of the encoder before it was tuned; for an objective with a teacher.
    """

    images: Float[Tensor, "b 3 h w"]
    encode: Callable[[Tensor], Features]
    condition: Callable[[Features], Tensor]
    augment: Callable[[Tensor], Tensor]
    denoiser: Denoiser | None
    generator: torch.Generator
    settings: object
    captions: Sequence[str] = ()
    embed_text: Callable[[Sequence[str]], Tensor] | None = None
    gap: Tensor | None = None
    teacher: Teacher | None = None
    encode_before: Callable[[Tensor], Features] | None = None

    def latents(self) -> Float[Tensor, "b c h w"]:
        """Latents x0 of the images: the posterior's mean (DIVA) or a sample (DCR's code), by `settings.latent`."""
        return self.denoiser.latents(self.images, self.generator if self.settings.latent == "sample" else None)

    def draw_noisy(self, x0: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a timestep and noise for each latent: x_t [b, c, h, w], t [b] and eps [b, c, h, w]."""
        t = draw_timesteps(self.settings.timesteps, len(x0), self.denoiser.timesteps, self.generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=self.generator).to(x0)
        return self.denoiser.add_noise(x0, noise, t), t, noise
