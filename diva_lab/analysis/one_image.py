"""One image: what encoders say of it, and what the denoiser makes of each encoder's embedding of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from diva_lab.analysis.alignment import ALIGNMENT_TIMESTEPS, losses_at
from diva_lab.models.conditions import Conditioner
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.encoders import Encoder
from diva_lab.objectives.diva import reconstruction

Picture = UInt8[np.ndarray, "_ _ 3"]
Conditions = Mapping[str, Mapping[str, Tensor]]  # name -> what `Denoiser.predict` reads
STATEMENT_TIMESTEPS = ALIGNMENT_TIMESTEPS[4:]  # of much noise, as `known` of the instrument
STATEMENT_DRAWS = 4  # of noise, at each of them
EMPTY, CAPTION = "empty prompt", "caption"  # conditions beside those of the encoders


@dataclass(frozen=True)
class ImageModels:
    """Encoders that look at an image, and the denoiser that draws from their embeddings.

    Attributes:
        encoders: name -> encoder, the original first.
        denoiser, conditioner: as training builds them; None where no denoiser reads these embeddings.
    """

    encoders: Mapping[str, Encoder]
    denoiser: Denoiser | None = None
    conditioner: Conditioner | None = None

    @property
    def px(self) -> int:
        """Side in pixels of an image of which every model sees all that it can."""
        return max(model.px for model in (*self.encoders.values(), self.denoiser) if model is not None)

    @property
    def reads_text(self) -> bool:
        """Whether the denoiser reads prompts: a light one and an unCLIP decoder do not."""
        return self.denoiser is not None and not (self.denoiser.labelled or self.denoiser.scratch)

    def pixels(self, image: Picture) -> Float[Tensor, "1 3 h w"]:
        device = next(iter(self.encoders.values())).mean.device
        return torch.tensor(image).permute(2, 0, 1)[None].to(device).float() / 255

    @torch.no_grad()
    def conditions(self, image: Picture, caption: str = "") -> dict[str, dict[str, Tensor]]:
        """What `Denoiser.predict` reads: under the empty prompt, the caption (if there is one) and each embedding."""
        read = {}
        for name, encoder in self.encoders.items():
            features = encoder.features(self.pixels(image))
            if self.denoiser.labelled:
                f = features.embedding
                labels = self.denoiser.labels(f, 0, torch.zeros_like(f))
                read[name] = {"context": self.denoiser.empty_context(1), "labels": labels}
            else:
                read[name] = {"context": self.conditioner(features, self.denoiser.empty)}
        told = {CAPTION: {"context": self.denoiser.encode_text([caption])}} if caption and self.reads_text else {}
        return {EMPTY: self.denoiser.blank(next(iter(read.values()))), **told, **read}


@torch.no_grad()
def statement_similarities(models: ImageModels, image: Picture, statements: Sequence[str]) -> dict[str, list[float]]:
    """Encoder -> the cosine of each statement with the image."""
    pixels = models.pixels(image)
    return {
        name: (encoder.encode_text(list(statements)) @ encoder.encode_image(pixels)[0]).tolist()
        for name, encoder in models.encoders.items()
    }


@torch.no_grad()
def statement_losses(
    models: ImageModels, image: Picture, statements: Sequence[str], seed: int = 0
) -> Float[np.ndarray, "draws {len(statements)}"]:
    """L_rec of an image under each statement: `STATEMENT_DRAWS` draws of noise at each of `STATEMENT_TIMESTEPS`.

    The draws are the same for all statements. The denoiser prefers the statement of the smaller loss.
    """
    latents = models.denoiser.latents(models.pixels(image)).repeat(STATEMENT_DRAWS, 1, 1, 1)
    losses = []
    for context in models.denoiser.encode_text(list(statements)):
        repeated = context.expand(STATEMENT_DRAWS, -1, -1)
        each = [losses_at(models.denoiser, repeated, latents, t, seed, STATEMENT_DRAWS) for t in STATEMENT_TIMESTEPS]
        losses.append(np.concatenate(each))
    return np.stack(losses, axis=1)


@torch.no_grad()
def predict_clean(
    denoiser: Denoiser, image: Float[Tensor, "1 3 h w"], conditions: Conditions, t: int, seed: int = 0
) -> tuple[Picture, dict[str, tuple[Picture, float]]]:
    """An image with noise at timestep t, and under each condition the clean image that is predicted of it, with L_rec.

    Args:
        conditions: name -> what `Denoiser.predict` reads.
        t: from 0 (nearly clean) to `denoiser.timesteps` - 1 (nearly noise).
        seed: of the noise.
    """
    x0 = denoiser.latents(image)
    noise, steps = _draw_noise(x0, seed), torch.tensor([t], device=x0.device)
    x_t, predicted = denoiser.add_noise(x0, noise, steps), {}
    for name, read in conditions.items():
        eps = denoiser.predict(x_t, steps, **read)
        predicted[name] = _decode(denoiser, denoiser.clean(x_t, eps, steps)), reconstruction(eps, noise).item()
    return _decode(denoiser, x_t), predicted


def draw_images(
    denoiser: Denoiser, conditions: Conditions, seed: int = 0, guidance: float = 3.0, steps: int = 20
) -> dict[str, Picture]:
    """What the denoiser draws from the same noise under each condition: of an embedding, what the encoder saw.

    `guidance` and `steps` are as in `Denoiser.draw`.
    """
    blank = torch.zeros(1, 3, denoiser.px, denoiser.px, device=denoiser.device)
    noise = _draw_noise(denoiser.latents(blank), seed)
    return {name: _decode(denoiser, denoiser.draw(noise, each, guidance, steps)) for name, each in conditions.items()}


@torch.no_grad()
def patch_cosines(encoder: Encoder, image: Float[Tensor, "1 3 h w"], layer: int = -2) -> Float[np.ndarray, "p p"]:
    """The cosine of each patch token of an image with each other one, as they leave a block: see `Encoder.tokens`."""
    tokens = F.normalize(encoder.tokens(image, layer)[0].float(), dim=-1)  # [p, width]
    return (tokens @ tokens.T).cpu().numpy()


def _draw_noise(latents: Tensor, seed: int) -> Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)


def _decode(denoiser: Denoiser, latents: Float[Tensor, "1 c h w"]) -> Picture:
    return (denoiser.decode(latents)[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
