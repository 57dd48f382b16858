"""DCR (arXiv 2603.04803): the contrast between predictions, one noisy latent under the conditions of all images."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diva_lab.objectives.negatives import draw_others
from diva_lab.objectives.rows import by_rows
from diva_lab.objectives.step import Step, needs_other_images


def dcr_loss(
    rows: Float[Tensor, "b m d"],
    augmented: Float[Tensor, "b d"],
    truth: Float[Tensor, "b d"],
    tau: float = 0.1,
    denominator: str = "shared",
) -> Float[Tensor, " b"]:
    """DCR's contrast on reconstructions, one value an example (METHOD: L_i).

    `rows[i]` holds the predictions for the noisy latent of image i: first under its own condition, the anchor a_i, then
    under other images' conditions, its negatives. With s the cosine and P_i = {augmented_i, truth_i},

        L_i = -1/2 sum_{p in P_i} log( exp(s(a_i, p) / tau) / sum_{q in D_p} exp(s(a_i, q) / tau) )

    where D_p is P_i and the negatives (`shared`, as published), or {p} and the negatives (`own`): with the negatives
    gone, `shared` only makes the two positives equal, while `own` has no such term. The paper's log-softmax, not the
    released code's exp and log, which overflow in half precision; cosines in float32, where .999 is not yet 1.

    Raises:
        ValueError: for another `denominator`.
    """
    positives, negatives = _scores(rows, augmented, truth, tau)
    return _denominators(positives, negatives, denominator).logsumexp(2).mean(1) - positives.mean(1)


def _scores(rows: Tensor, augmented: Tensor, truth: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """s(a, .) / tau of the positives, view and truth [b, 2], and of the negatives [b, m - 1], in float32 at least."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    rows, augmented, truth = (F.normalize(x.to(dtype), dim=-1) for x in (rows, augmented, truth))
    anchor = rows[:, 0]  # [b, d]
    negatives = (anchor[:, None] * rows[:, 1:]).sum(2) / tau  # in float32 as above
    return torch.stack([(anchor * augmented).sum(1), (anchor * truth).sum(1)], dim=1) / tau, negatives


def _denominators(positives: Tensor, negatives: Tensor, denominator: str) -> Tensor:
    """The scores that each denominator sums, [b, r, m + 1]: r = 1 shared one, or one a positive, the other at -inf."""
    if denominator == "shared":
        return torch.cat([positives, negatives], dim=1)[:, None]
    if denominator == "own":
        other = torch.eye(2, device=positives.device).log()  # 0 on the diagonal, -inf off it
        return torch.cat([positives[:, None] + other, negatives[:, None].expand(-1, 2, -1)], dim=2)
    raise ValueError(f"unknown denominator {denominator!r}; expected shared or own")


def dcr_parts(
    rows: Float[Tensor, "b m d"],
    augmented: Float[Tensor, "b d"],
    truth: Float[Tensor, "b d"],
    tau: float = 0.1,
    denominator: str = "shared",
) -> Float[Tensor, "b 3"]:
    """`dcr_loss` as three terms: the pull to the truth, the pull to the augmented view, the push from the negatives.

    log sum_q exp(z_q) = sum_q pi_q (z_q - log pi_q) with pi the softmax of z. Each score z_q = s(a, q) / tau keeps its
    own summand, less the positives' -z_p / 2, and pi is held fixed in the backward pass. So the three sum to the loss,
    and their gradients, each that of the loss through its own scores alone, to the loss's gradient.
    """
    positives, negatives = _scores(rows, augmented, truth, tau)
    each = _denominators(positives, negatives, denominator)  # [b, r, 2 + m - 1]
    share = each.detach().softmax(2)
    summands = (share * (each.nan_to_num(neginf=0.0) - share.clamp_min(1e-38).log())).mean(1)
    pulls = summands[:, :2] - positives / 2  # [b, 2]: view, truth
    return torch.stack([pulls[:, 1], pulls[:, 0], summands[:, 2:].sum(1)], dim=1)


def dcr_chance(b: int, truth_cosine: float, tau: float = 0.1) -> float:
    """DCR's loss where all conditions give the same prediction: ln(b + exp(-d / tau)) + d / 2 tau, d = 1 - cosine."""
    d = 1 - truth_cosine
    return math.log(b + math.exp(-d / tau)) + d / (2 * tau)


@needs_other_images
def dcr(step: Step, guided: bool = False) -> dict[str, Tensor]:
    """DCR: contrast the predictions for one noisy latent under all pictures' conditions; b^2 + b evaluations.

    L_i reads the noisy latent of image i alone, so `settings.rows` of them are taken at a time, forward and backward as
    far as the conditions. Approximations, off by default: `settings.negatives` of the other pictures, drawn anew for
    each, in place of all; without `settings.negative_gradient` none flows through them. With `settings.parts` the loss
    comes as the three terms of `dcr_parts`.
    """
    settings, b = step.settings, len(step.images)
    x0 = step.latents()
    x_t, t, noise = step.noised(x0)
    c = step.condition(step.encode(step.images))  # [b, l, c]
    c_augmented = step.condition(step.encode(step.augment(step.images)))
    truth = step.denoiser.target(settings.target, x0, noise, t).flatten(1)
    others = draw_others(b, settings.negatives or b - 1, step.generator).to(c.device)
    if guided:
        with torch.no_grad():
            common = step.denoiser.predict(x_t, t, step.denoiser.empty.expand(b, -1, -1)).flatten(1)
        truth = truth - common

    def predict(rows: slice, contexts: Tensor) -> Tensor:
        predicted = step.denoiser.predict(x_t[rows], t[rows], contexts.flatten(0, 1))
        predicted = predicted.flatten(1).unflatten(0, contexts.shape[:2])
        return predicted - common[rows, None] if guided else predicted

    def loss(rows: slice, own: Tensor, negatives: Tensor, form: Callable = dcr_loss) -> Tensor:
        if negatives.requires_grad:
            predicted = predict(rows, torch.cat([own, negatives], dim=1))
        else:
            with torch.no_grad():
                fixed = predict(rows, negatives)
            predicted = torch.cat([predict(rows, own), fixed], dim=1)
        kept = torch.cat([predicted[:, :1], predicted[:, 2:]], dim=1)
        return form(kept, predicted[:, 1], truth[rows], settings.tau, settings.denominator)

    own = torch.stack([c, c_augmented], dim=1)
    negatives = (c if settings.negative_gradient else c.detach())[others]  # [b, k, l, c]
    if settings.parts:
        return dict(zip(DCR_PARTS, loss(slice(None), own, negatives, dcr_parts).unbind(1), strict=True))
    return {"dcr": by_rows(loss, settings.rows, own, negatives)}


DCR_PARTS = ("truth", "view", "push")  # DCR's terms, in the order of `dcr_parts`
