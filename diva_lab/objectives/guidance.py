"""Guided DCR (ours): DCR on the difference that the condition makes to the prediction under the empty prompt."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diva_lab.objectives.dcr import dcr
from diva_lab.objectives.step import Step, needs_other_images


@torch.no_grad()
def unconditional(step: Step, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
    """The prediction for each noisy latent under the empty prompt, flattened, without a gradient."""
    empty = step.denoiser.empty.expand(len(x_t), -1, -1)  # [b, l, w]
    return step.denoiser.predict(x_t, t, empty).flatten(1)


@needs_other_images
def dcr_guidance(step: Step) -> dict[str, Tensor]:
    """DCR after the prediction under the empty prompt is subtracted from anchor, positives and negatives.

    What remains is the direction of classifier-free guidance. All predictions for one noisy latent share most of the
    noise: their cosines are near 1 under any condition, and DCR's softmax at tau = .1 is nearly flat. The subtraction
    removes the shared part. b^2 + 2 b evaluations of the denoiser.
    """
    return dcr(step, baseline=unconditional)
