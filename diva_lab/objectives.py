"""What the encoder is asked for: DIVA, contrastive, their naive sum, and DCR.

The mathematics are functions of tensors. An objective is a function of a `Step` that returns its terms by name, each
[b], one value an example, weights applied; the loss is the sum of the terms' means. Another objective is one function
and one line in `OBJECTIVES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diva_lab.denoisers import Denoiser
from diva_lab.encoders import Features

# --- the mathematics --------------------------------------------------------------------------------------------


def reconstruction(predicted: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """L_rec = mean over coordinates of (eps_hat - eps)^2, one value an example (DIVA, eq. of the denoising loss)."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def info_nce(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], tau: float = 0.1) -> Float[Tensor, " b"]:
    """InfoNCE between two views of a batch, both ways, cosine similarity over tau, log-sum-exp in float32."""
    a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
    scores = (a[:, None] * b).sum(2) / tau  # [b, b]; a matrix product would be in bf16 under autocast
    own = scores.diagonal()
    return (scores.logsumexp(1) + scores.logsumexp(0)) / 2 - own


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


def draw_others(b: int, k: int, generator: torch.Generator) -> Int[Tensor, "b k"]:
    """For each of `b` pictures `k` of the other b - 1: all of them in order, or a draw without replacement."""
    if k >= b - 1:
        shift = torch.arange(1, b).expand(b, -1)
    else:
        shift = 1 + torch.rand(b, b - 1, generator=generator).argsort(1)[:, :k]
    return (torch.arange(b)[:, None] + shift) % b


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, size, *inputs):
        losses, gradients, wanted = [], [], ctx.needs_input_grad[2:]
        for start in range(0, len(inputs[0]), size):
            rows = slice(start, start + size)
            leaves = [x[rows].detach().requires_grad_(need) for x, need in zip(inputs, wanted, strict=True)]
            with torch.enable_grad():
                value = loss(rows, *leaves)
                parts = iter(torch.autograd.grad(value.sum(), [leaf for leaf in leaves if leaf.requires_grad]))
            gradients.append([next(parts) if need else None for need in wanted])
            losses.append(value.detach())
        ctx.gradients = [torch.cat(part) if need else None for need, *part in zip(wanted, *gradients, strict=True)]
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        weighted = (
            None if g is None else g * upstream.view(-1, *(1,) * (g.ndim - 1)).to(g.dtype) for g in ctx.gradients
        )
        return None, None, *weighted


def by_rows(loss: Callable[..., Tensor], size: int, *inputs: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """`loss(rows, *inputs[rows])` for `size` rows at a time (0: all), where no row's loss reads another row's inputs.

    The gradient of each part is taken at once and its graph freed: the memory of one part, no second forward pass.
    """
    b = len(inputs[0])
    size = size or b
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        parts = (slice(i, i + size) for i in range(0, b, size))
        return torch.cat([loss(rows, *(x[rows] for x in inputs)) for rows in parts])
    return _ByRows.apply(loss, size, *inputs)


# --- timesteps --------------------------------------------------------------------------------------------------

TIMESTEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # from a uniform and a normal draw to t / T in [0, 1)
    "uniform": lambda u, z: u,
    "logit-normal": lambda u, z: z.sigmoid(),  # as GenHancer, with s = 1 as released
    "high-noise": lambda u, z: 0.5 + 0.5 * u,
}


def timestep_weights(kind: str) -> Tensor | None:
    """Relative weights of equal parts of the timesteps, from `0,0,1,3`; None for a key of `TIMESTEPS`.

    Raises:
        ValueError: for what is neither, names the known ones.
    """
    if kind in TIMESTEPS:
        return None
    try:
        weights = torch.tensor([float(number) for number in kind.split(",")])
        if (weights >= 0).all() and 0 < weights.sum() < float("inf"):
            return weights
    except ValueError:
        pass
    raise ValueError(
        f"unknown timesteps {kind!r}; expected one of {', '.join(TIMESTEPS)}, or weights of equal parts of all "
        "timesteps as '0,0,1,3'"
    )


def draw_timesteps(kind: str, b: int, timesteps: int, generator: torch.Generator) -> Int[Tensor, " b"]:
    """`b` timesteps in [0, timesteps), drawn by a key of `TIMESTEPS` or by `timestep_weights`.

    Raises:
        ValueError: for an unknown `kind`; lists the known ones.
    """
    weights = timestep_weights(kind)
    u, z = torch.rand(b, generator=generator), torch.randn(b, generator=generator)
    if weights is None:
        share = TIMESTEPS[kind](u, z)
    else:
        upper = weights.cumsum(0) / weights.sum()
        part = torch.searchsorted(upper, u, right=True).clamp(max=len(weights) - 1)
        width = weights[part] / weights.sum()
        share = (part + 1 - (upper[part] - u) / width.clamp_min(1e-12)) / len(weights)
    return (share * timesteps).long().clamp(0, timesteps - 1)


# --- the objectives ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """All that an objective may use in one step.

    Attributes:
        images: [b, 3, h, w] in [0, 1], on the device.
        encode: pictures -> `Features`; carries the gradient.
        condition: `Features` -> context [b, l, c]; carries the gradient.
        augment: pictures -> an augmented view of each.
        denoiser: frozen.
        generator: of timesteps and noise, on the CPU.
        settings: a `training.Settings`, or anything with its fields.
    """

    images: Float[Tensor, "b 3 h w"]
    encode: Callable[[Tensor], Features]
    condition: Callable[[Features], Tensor]
    augment: Callable[[Tensor], Tensor]
    denoiser: Denoiser
    generator: torch.Generator
    settings: object

    def latents(self) -> Float[Tensor, "b c h w"]:
        """Clean latents: the posterior's mean (DIVA) or a sample (DCR), by `settings.latent`."""
        return self.denoiser.latents(self.images, self.generator if self.settings.latent == "sample" else None)

    def noised(self, x0: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """One draw of (x_t, t, eps) for each latent."""
        t = draw_timesteps(self.settings.timesteps, len(x0), self.denoiser.timesteps, self.generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=self.generator).to(x0)
        return self.denoiser.add_noise(x0, noise, t), t, noise


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


def contrastive(step: Step) -> dict[str, Tensor]:
    """InfoNCE between the embeddings of two augmented views of each picture."""
    one, two = (step.encode(step.augment(step.images)).embedding for _ in range(2))
    return {"con": step.settings.lambda_con * info_nce(one, two, step.settings.tau)}


def naive(step: Step) -> dict[str, Tensor]:
    """The naive sum lambda_con L_con + lambda_rec L_rec, whose gradients are said to fight."""
    return contrastive(step) | diva(step)


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
        return dict(zip(PARTS, loss(slice(None), own, negatives, dcr_parts).unbind(1), strict=True))
    return {"dcr": by_rows(loss, settings.rows, own, negatives)}


def dcr_guidance(step: Step) -> dict[str, Tensor]:
    """Ours: DCR on what the *condition* contributes, not on the noise that all predictions share.

    The prediction under the empty prompt, without gradient, is subtracted from anchor, positives and negatives before
    they are normalised: the direction of classifier-free guidance. Raw predictions for one noisy latent have cosines
    near 1 whatever the condition, which leaves a softmax at tau = .1 flat. b^2 + 2b evaluations.
    """
    return dcr(step, guided=True)


PARTS = ("truth", "view", "push")  # DCR's terms, in the order of `dcr_parts`
OBJECTIVES: dict[str, Callable[[Step], dict[str, Tensor]]] = {
    "diva": diva,
    "contrastive": contrastive,
    "naive": naive,
    "dcr": dcr,
    "dcr-guidance": dcr_guidance,
    "genhancer": genhancer,
}
COMPARED = ("diva", "contrastive", "naive", "dcr")  # in the shipped results: those that share one denoiser
