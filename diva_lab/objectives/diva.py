"""DIVA (arXiv 2407.20171): reconstruct each image from its own condition. GenHancer: the same by a flow's own loss."""

from jaxtyping import Float
from torch import Tensor

from diva_lab.objectives.step import Step


def reconstruction(predicted: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """L_rec = |eps_hat - eps|^2 / d, the mean over the d coordinates, one value per image; in float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def diva(step: Step, kind: str = "noise") -> dict[str, Tensor]:
    """lambda_rec L_rec under each image's own condition, averaged over `settings.draws` draws of (t, eps).

    In the released code the first draw's gradient is not divided by the accumulation steps. Here the draws are
    averaged, as in the paper.

    Args:
        kind: what is predicted and compared: `noise`, or `native` for what the network itself predicts.
    """
    x0, n = step.latents().repeat(step.settings.draws, 1, 1, 1), step.settings.draws  # [n b, c, h, w]
    x_t, t, noise = step.draw_noisy(x0)  # [n b, c, h, w], [n b], [n b, c, h, w]
    context = step.condition(step.encode(step.images)).repeat(n, 1, 1)  # [n b, l, w]
    target = step.denoiser.target(step.denoiser.native if kind == "native" else kind, x0, noise, t)  # [n b, c, h, w]
    loss = reconstruction(step.denoiser.predict(x_t, t, context, kind), target)  # [n b]
    return {"rec": step.settings.lambda_rec * loss.view(n, -1).mean(0)}  # [b]


def genhancer(step: Step) -> dict[str, Tensor]:
    """GenHancer (arXiv 2503.19480): DIVA by the denoiser's own loss; of a flow |v_hat - v|^2 / d with v = eps - x0."""
    return diva(step, "native")
