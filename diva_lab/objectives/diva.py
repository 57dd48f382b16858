"""DIVA (arXiv 2407.20171): reconstruct each image from its own condition. GenHancer: the same under a flow's loss."""

from jaxtyping import Float
from torch import Tensor

from diva_lab.objectives.step import Step


def reconstruction(predicted: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """L_rec = mean over coordinates of (eps_hat - eps)^2, one value an example (DIVA, eq. of the denoising loss)."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def diva(step: Step, kind: str = "noise") -> dict[str, Tensor]:
    """DIVA: reconstruct the picture from its own condition; mean over `draws` draws of (t, eps) an image.

    The released code steps twice and forgets to divide the first draw; here the draws are averaged, as in the paper.
    """
    x0, n = step.latents().repeat(step.settings.draws, 1, 1, 1), step.settings.draws
    x_t, t, noise = step.noised(x0)
    context = step.condition(step.encode(step.images)).repeat(n, 1, 1)
    target = step.denoiser.target(step.denoiser.native if kind == "native" else kind, x0, noise, t)
    loss = reconstruction(step.denoiser.predict(x_t, t, context, kind), target)
    return {"rec": step.settings.lambda_rec * loss.view(n, -1).mean(0)}


def genhancer(step: Step) -> dict[str, Tensor]:
    """GenHancer: as DIVA, by the denoiser's own loss: of a flow ||v_hat - v||^2 with v = eps - x0."""
    return diva(step, "native")
