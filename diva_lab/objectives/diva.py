"""DIVA (arXiv 2407.20171): reconstruct each image from its own condition. GenHancer: the same by a flow's own loss."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from diva_lab.models.encoders import Features
from diva_lab.objectives.step import Step


def reconstruction(predicted: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """L_rec = |eps_hat - eps|^2 / d, the mean over the d coordinates, one value per image; in float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def read_draw_weights(text: str, draws: int) -> list[float]:
    """The weights of the draws' losses: `text` split at its commas, or 1 / draws each where it is empty.

    Raises:
        ValueError: for anything but as many finite numbers from 0 on, one of them above 0.
    """
    try:
        weights = [float(number) for number in text.split(",")] if text else [1 / draws] * draws
    except ValueError:
        weights = []
    if len(weights) != draws or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise ValueError(
            f"setting draw_weights={text!r}: expected {draws} numbers from 0 on as '5,1', one for each of draws={draws}"
        )
    return weights


def sum_draws(step: Step, loss: Float[Tensor, " nb"]) -> Float[Tensor, " b"]:
    """The losses of the draws of each image, all images' first draws first, added with their weights."""
    weights = read_draw_weights(step.settings.draw_weights, step.settings.draws)
    return (loss.new_tensor(weights)[:, None] * loss.view(len(weights), -1)).sum(0)  # no matrix product: bf16


def reconstruct(step: Step, kind: str, condition: Callable[[Features], dict[str, Tensor]]) -> dict[str, Tensor]:
    """lambda_rec L_rec of each image, the losses of its `settings.draws` draws of (t, eps) added with their weights.

    Args:
        kind: what is predicted and compared: `noise`, or `native` for what the network itself predicts.
        condition: the features [b, ...] -> `context` [n b, l, w] and whatever else `Denoiser.predict` reads.
    """
    x0 = step.latents().repeat(step.settings.draws, 1, 1, 1)  # [n b, c, h, w]
    x_t, t, noise = step.draw_noisy(x0)  # [n b, c, h, w], [n b], [n b, c, h, w]
    read = condition(step.encode(step.images))
    target = step.denoiser.target(step.denoiser.native if kind == "native" else kind, x0, noise, t)  # [n b, c, h, w]
    loss = reconstruction(step.denoiser.predict(x_t, t, kind=kind, **read), target)  # [n b]
    return {"rec": step.settings.lambda_rec * sum_draws(step, loss)}  # [b]


def diva(step: Step, kind: str = "noise") -> dict[str, Tensor]:
    """`reconstruct` under each image's own condition.

    In the released code the first draw's backward pass is not divided by the 5 accumulation steps: `draw_weights` =
    `5,1`. With `token_draws` = `each` every draw has a condition of tokens of its own.
    """
    n = step.settings.draws

    def condition(features: Features) -> dict[str, Tensor]:
        if step.settings.token_draws == "each":
            return {"context": torch.cat([step.condition(features) for _ in range(n)])}  # [n b, l, w]
        return {"context": step.condition(features).repeat(n, 1, 1)}  # [n b, l, w]

    return reconstruct(step, kind, condition)


def genhancer(step: Step) -> dict[str, Tensor]:
    """GenHancer (arXiv 2503.19480): DIVA by the denoiser's own loss; of a flow |v_hat - v|^2 / d with v = eps - x0."""
    return diva(step, "native")
