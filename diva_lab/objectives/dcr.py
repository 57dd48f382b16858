"""DCR (arXiv 2603.04803): a contrast between the denoiser's predictions for one noisy latent under many conditions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diva_lab.models.denoiser import Denoiser
from diva_lab.objectives.negatives import draw_others
from diva_lab.objectives.rows import by_rows
from diva_lab.objectives.step import Step, needs_other_images

DCR_PARTS = ("truth", "view", "push")  # the terms that `dcr_parts` returns, in this order


def dcr_loss(
    rows: Float[Tensor, "b m d"],
    augmented: Float[Tensor, "b d"],
    truth: Float[Tensor, "b d"],
    tau: float = 0.1,
    denominator: str = "shared",
) -> Float[Tensor, " b"]:
    """DCR's loss L_i, one value per image (the paper's loss; see docs/method.md).

    With s the cosine, a_i the anchor and the positives P_i = {augmented_i, truth_i},

        L_i = -1/2 sum_{p in P_i} log( exp(s(a_i, p) / tau) / sum_{q in D_p} exp(s(a_i, q) / tau) )

    where D_p is P_i and the negatives (`shared`, as published), or {p} and the negatives (`own`). Without negatives
    `shared` only makes the two positives equally similar to the anchor, and `own` is zero. As in the paper this is a
    log-softmax; the released code's exp and log overflow in half precision. Cosines are computed in float32 at least:
    bfloat16 rounds .999 to 1.

    Args:
        rows: flattened predictions for the noisy latent of image i: first the anchor, under its own condition, then
            the m - 1 negatives, under other images' conditions.
        augmented: the prediction under the condition of an augmented view of image i.
        truth: the target of the prediction.
        tau: temperature, > 0.
        denominator: `shared` or `own`.

    Raises:
        ValueError: for another `denominator`.
    """
    positives, negatives = _scores(rows, augmented, truth, tau)
    return _denominators(positives, negatives, denominator).logsumexp(2).mean(1) - positives.mean(1)


def _scores(rows: Tensor, augmented: Tensor, truth: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """s(a, .) / tau of the positives (view, truth) [b, 2] and of the negatives [b, m - 1], in float32 at least."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    rows, augmented, truth = (F.normalize(x.to(dtype), dim=-1) for x in (rows, augmented, truth))
    anchor = rows[:, 0]  # [b, d]
    negatives = (anchor[:, None] * rows[:, 1:]).sum(2) / tau  # a matrix product would run in bf16 under autocast
    return torch.stack([(anchor * augmented).sum(1), (anchor * truth).sum(1)], dim=1) / tau, negatives


def _denominators(positives: Tensor, negatives: Tensor, denominator: str) -> Tensor:
    """The scores in each denominator, [b, r, m + 1]: r = 1 if shared, else one per positive, the other at -inf."""
    if denominator == "shared":
        return torch.cat([positives, negatives], dim=1)[:, None]  # [b, 1, m + 1]
    if denominator == "own":
        other = torch.eye(2, device=positives.device).log()  # [2, 2], 0 on the diagonal, -inf off it
        return torch.cat([positives[:, None] + other, negatives[:, None].expand(-1, 2, -1)], dim=2)  # [b, 2, m + 1]
    raise ValueError(f"unknown denominator {denominator!r}; expected shared or own")


def dcr_parts(
    rows: Float[Tensor, "b m d"],
    augmented: Float[Tensor, "b d"],
    truth: Float[Tensor, "b d"],
    tau: float = 0.1,
    denominator: str = "shared",
) -> Float[Tensor, "b 3"]:
    """`dcr_loss` as a sum of three terms: the pull to the truth, the pull to the view, the push from the negatives.

    log sum_q exp(z_q) = sum_q pi_q (z_q - log pi_q), where pi is the softmax of the scores z_q = s(a, q) / tau. Each
    score keeps its own summand, and the positives also -z_p / 2. pi has no gradient. So the terms add up to the loss,
    and their gradients to its gradient: each is the loss's gradient through its own scores alone. The arguments are
    those of `dcr_loss`.
    """
    positives, negatives = _scores(rows, augmented, truth, tau)
    scores = _denominators(positives, negatives, denominator)  # [b, r, m + 1]
    share = scores.detach().softmax(2)  # [b, r, m + 1]
    summands = (share * (scores.nan_to_num(neginf=0.0) - share.clamp_min(1e-38).log())).mean(1)  # [b, m + 1]
    pulls = summands[:, :2] - positives / 2  # [b, 2]: view, truth
    return torch.stack([pulls[:, 1], pulls[:, 0], summands[:, 2:].sum(1)], dim=1)


def _predict(
    denoiser: Denoiser, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], contexts: Float[Tensor, "b k l c2"]
) -> Float[Tensor, "b k d"]:
    """The flattened predictions for each noisy latent under its k contexts."""
    predicted = denoiser.predict(x_t, t, contexts.flatten(0, 1))  # [b k, c, h, w]
    return predicted.flatten(1).unflatten(0, contexts.shape[:2])


def _predict_all(denoiser: Denoiser, x_t: Tensor, t: Tensor, own: Tensor, negatives: Tensor) -> Tensor:
    """Predictions under own conditions [b, 2, l, c2] and negatives [b, k, l, c2]: [b, 2 + k, d].

    Where no gradient flows to the negatives, nothing is kept for their backward pass.
    """
    if negatives.requires_grad:
        return _predict(denoiser, x_t, t, torch.cat([own, negatives], dim=1))
    with torch.no_grad():
        fixed = _predict(denoiser, x_t, t, negatives)  # [b, k, d]
    return torch.cat([_predict(denoiser, x_t, t, own), fixed], dim=1)


@needs_other_images
def dcr(step: Step, baseline: Callable[[Step, Tensor, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """DCR: contrast the predictions for one noisy latent under the conditions of all images of the batch.

    b^2 + b evaluations of the denoiser. L_i depends on the noisy latent of image i alone, so `settings.rows` of them
    are processed at a time, forward and backward as far as the conditions. Two approximations are off by default:
    `settings.negatives` random other images in place of all, and no gradient through the negatives
    (`settings.negative_gradient`). The parts may be weighted (`truth_weight`, `view_weight`, `push_weight`): ours.

    Args:
        baseline: (step, x_t, t) -> [b, d], subtracted from the truth and from every prediction for x_t.

    Returns:
        The term `dcr`, or with `settings.parts` the three terms `DCR_PARTS`; [b] each.
    """
    settings, b = step.settings, len(step.images)
    x0 = step.latents()  # [b, c, h, w]
    x_t, t, noise = step.draw_noisy(x0)  # [b, c, h, w], [b], [b, c, h, w]
    anchor = step.condition(step.encode(step.images))  # [b, l, c2]
    view = step.condition(step.encode(step.augment(step.images)))  # [b, l, c2]
    others = draw_others(b, settings.negatives or b - 1, step.generator).to(anchor.device)  # [b, k]

    own = torch.stack([anchor, view], dim=1)  # [b, 2, l, c2]
    negatives = (anchor if settings.negative_gradient else anchor.detach())[others]  # [b, k, l, c2]
    truth = step.denoiser.target(settings.target, x0, noise, t).flatten(1)  # [b, d]
    common = None if baseline is None else baseline(step, x_t, t)  # [b, d]
    if common is not None:
        truth = truth - common

    def loss(rows: slice, own: Tensor, negatives: Tensor, form: Callable) -> Tensor:
        predicted = _predict_all(step.denoiser, x_t[rows], t[rows], own, negatives)  # [r, 2 + k, d]
        if common is not None:
            predicted = predicted - common[rows, None]
        anchor_and_negatives = torch.cat([predicted[:, :1], predicted[:, 2:]], dim=1)  # [r, 1 + k, d]
        return form(anchor_and_negatives, predicted[:, 1], truth[rows], settings.tau, settings.denominator)

    weights = torch.tensor([settings.truth_weight, settings.view_weight, settings.push_weight], device=x0.device)
    if settings.parts:
        parts = weights * loss(slice(None), own, negatives, dcr_parts)  # [b, 3]
        return dict(zip(DCR_PARTS, parts.unbind(1), strict=True))
    published = bool((weights == 1).all())
    form = dcr_loss if published else lambda *given: (weights * dcr_parts(*given)).sum(1)
    return {"dcr": by_rows(lambda *given: loss(*given, form), settings.rows, own, negatives)}
