"""DCR's theory, both sides measured: two theorems, and what its condition can express (docs/method.md).

f is an image's feature; eps = eps(x_t, t, c(f)) is the denoiser's prediction for one noisy latent under its condition.

**Theorem 1.** Let m |f - f'| <= |eps - eps'| <= M |f - f'| for all pairs of images. S_inner and S_total are means of
squared distances over pairs, so S_inner <= S_inner^eps / m^2 and S_total >= S_total^eps / M^2. Since S_total = S_inner
+ S_inter for features and for predictions,

    S_inter >= kappa S_inter^eps - eta S_inner^eps,    kappa = 1 / M^2,    eta = 1 / m^2 - 1 / M^2.

This derivation is ours: we know the paper's theorem from a summary, not its assumptions. The second bound is not
trivial only if its right side is above zero, which means S_inter^eps / S_inner^eps > (M / m)^2 - 1.

**Theorem 2.** With well separated negatives L_dcr = lambda |eps_hat - eps|^2 + const. Unit vectors have |a - p|^2 = 2 -
2s. If negatives make up the denominator, L_dcr = (|a - view|^2 + |a - truth|^2) / 4 tau + const. Without negatives it
is ln 2cosh((s_view - s_truth) / 2 tau) with a shared denominator, and 0 with a denominator for each positive.

**The additive bias.** Keys W_k (u + v) move by one constant, which leaves the softmax unchanged; values move by W_v v,
the same at every position: the `global` condition enters each cross-attention as one vector.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Int
from torch import Tensor

from diva_lab.images import augment
from diva_lab.machine import generator
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.encoders import Encoder
from diva_lab.objectives.dcr import dcr_loss
from diva_lab.objectives.negatives import draw_others
from diva_lab.statistics import bootstrap_mean
from diva_lab.world import CLASSES, World, draw_scenes

THEORY_TIMESTEPS = (100, 400, 700, 950)
CONSTANTS = {"extremes": 0.0, "quantiles": 0.05}  # how m and M are estimated: the share of pairs dropped at each end
COSINES = (1.0, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.4, 0.2, 0.0, -0.5, -1.0)  # between the negatives and the anchor


def scatter(x: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> tuple[float, float]:
    """S_inner = mean |x - mu_class|^2 and S_inter = mean |mu_class - mu|^2, over samples; they sum to S_total."""
    x, (_, place) = x.double(), labels.unique(return_inverse=True)
    sums = x.new_zeros(int(place.max()) + 1, x.shape[1]).index_add(0, place, x)
    means = (sums / place.bincount()[:, None])[place]  # [n, d]
    inner, inter = (part.square().sum(1).mean().item() for part in (x - means, means - x.mean(0)))
    return inner, inter


def lipschitz(
    features: Float[Tensor, "n d"], predictions: Float[Tensor, "n e"], share: float = 0.0
) -> tuple[float, float]:
    """m and M: the smallest and largest |eps - eps'| / |f - f'| over pairs, or its quantiles `share` and 1 - `share`.

    Raises:
        ValueError: if two images have the same features: their ratio is not defined.
    """
    apart = torch.pdist(features.double())
    if (apart == 0).any():
        raise ValueError("two images have the same features; expected all of them distinct: leave one out")
    low, high = np.quantile((torch.pdist(predictions.double()) / apart).numpy(), [share, 1 - share])
    return float(low), float(high)


def scatter_bounds(inner_eps: float, inter_eps: float, m: float, M: float) -> tuple[float, float]:
    """Theorem 1: the upper bound of S_inner and the lower bound of S_inter (trivial if below zero)."""
    kappa, eta = M**-2, m**-2 - M**-2
    return inner_eps / m**2, kappa * inter_eps - eta * inner_eps


def split_in_halves(labels: Int[Tensor, " n"], random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of two random halves of the images, with half of every class in each."""
    order = torch.randperm(len(labels), generator=random)
    order = order[labels[order].argsort(stable=True)]  # sorted by class, shuffled within each
    return order[::2], order[1::2]


def theorem_1(
    features: Float[Tensor, "n d"],
    predictions: Float[Tensor, "n e"],
    labels: Int[Tensor, " n"],
    constants: str = "extremes",
    halvings: int = 20,
    seed: int = 0,
) -> dict[str, float]:
    """Estimate m and M on one half of the images, and both sides of both bounds on the other; means over halvings.

    Args:
        constants: a key of `CONSTANTS`.
        halvings: number of random halvings.
        seed: of the halvings.

    Returns:
        `m`, `M`, `inner`, `inter`, `inner_eps`, `inter_eps`, `inner_bound`, `inter_bound`; `inner_slack` = inner_bound
        / inner (the bound holds from 1 up) and `inter_slack` = inter_bound / inter (holds up to 1, trivial below 0),
        each with `/low` and `/high`, 95 % of the halvings; shares of the halvings in which a bound holds or is above
        zero: `inner_holds`, `inter_holds`, `inter_says`; `ratio` = inter_eps / inner_eps, `needed` = (M / m)^2 - 1.
    """
    random, rows = generator("halves", seed), []
    for _ in range(halvings):
        fit, held = split_in_halves(labels, random)
        m, M = lipschitz(features[fit], predictions[fit], CONSTANTS[constants])
        (inner, inter), (inner_eps, inter_eps) = (scatter(x[held], labels[held]) for x in (features, predictions))
        upper, lower = scatter_bounds(inner_eps, inter_eps, m, M)
        row = {"m": m, "M": M, "inner": inner, "inter": inter, "inner_eps": inner_eps, "inter_eps": inter_eps}
        row |= {"inner_bound": upper, "inter_bound": lower, "inner_slack": upper / inner, "inter_slack": lower / inter}
        row |= {"inner_holds": upper >= inner, "inter_holds": lower <= inter, "inter_says": lower > 0}
        rows.append(row | {"ratio": inter_eps / inner_eps, "needed": (M / m) ** 2 - 1})
    out = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    for name in ("inner_slack", "inter_slack"):
        ends = np.quantile([row[name] for row in rows], [0.025, 0.975])
        out |= {f"{name}/low": float(ends[0]), f"{name}/high": float(ends[1])}
    return out


@torch.no_grad()
def predict_under(
    denoiser: Denoiser, x_t: Float[Tensor, "k c h w"], t: int, contexts: Float[Tensor, "n l w2"], batch: int = 256
) -> Float[Tensor, "n e"]:
    """Predictions for the same k noisy latents under each of n contexts, divided by sqrt(k).

    So a squared distance of two rows is the mean over the latents.
    """
    step = torch.tensor([t])
    each = [torch.cat([denoiser.predict(x[None], step, part) for part in contexts.split(batch)]) for x in x_t]
    return torch.stack(each, dim=1).flatten(1).cpu() / len(x_t) ** 0.5


@torch.no_grad()
def theory_report(
    encoder: Encoder,
    conditioner: torch.nn.Module,
    denoiser: Denoiser,
    timesteps: Sequence[int] = THEORY_TIMESTEPS,
    n: int = 192,
    latents: int = 2,
    halvings: int = 20,
    world: World | None = None,
) -> dict[str, float]:
    """`theorem_1` on `n` held-out images of the world and `latents` others: "<features>/<t>/<constants>/<quantity>".

    Features are the condition vector that enters the denoiser, and the embedding at unit length, which zero-shot and
    clustering use. Not the raw embedding: the projector begins with a layer norm, so its length changes no prediction,
    and m is 0.
    """
    world, device = world or World(), denoiser.device
    scenes = draw_scenes(n + latents, (world.seed, 11))
    scenes["class"] = np.arange(len(scenes)) % len(CLASSES)
    images = torch.from_numpy(world.render(scenes)).permute(0, 3, 1, 2).to(device).float() / 255
    labels = torch.from_numpy(scenes["class"][:n].astype(int))
    encoded = encoder.features(images[:n])
    contexts = conditioner(encoded, denoiser.empty)
    features = {"condition": contexts.flatten(1).cpu(), "embedding": F.normalize(encoded.embedding, dim=1).cpu()}
    x0, out = denoiser.latents(images[n:]), {}
    noise = torch.randn(x0.shape, generator=generator("theory")).to(x0)
    for t in timesteps:
        eps = predict_under(denoiser, denoiser.add_noise(x0, noise, torch.tensor([t]).expand(latents)), t, contexts)
        for name, f in features.items():
            for kind in CONSTANTS:
                values = theorem_1(f, eps, labels, kind, halvings)
                out |= {f"{name}/{t}/{kind}/{key}": value for key, value in values.items()}
    return out


def at_cosine(anchor: Float[Tensor, "*b d"], others: Float[Tensor, "*b m d"], s: float) -> Float[Tensor, "*b m d"]:
    """Turn each of `others` in its plane with the anchor until its cosine to the anchor is `s`; at unit length."""
    a = F.normalize(anchor, dim=-1)[..., None, :]
    across = F.normalize(others - (others * a).sum(-1, keepdim=True) * a, dim=-1)
    return s * a + (1 - s**2) ** 0.5 * across


def affine_fit(x: Float[Tensor, "b p"], y: Float[Tensor, "b p"]) -> tuple[Tensor, Tensor]:
    """Slope and R^2, [b] each, of the least-squares line through each row's points; R^2 is NaN where y is constant."""
    x, y = (part - part.mean(1, keepdim=True) for part in (x, y))
    slope = (x * y).sum(1) / x.square().sum(1)
    return slope, 1 - (y - slope[:, None] * x).square().sum(1) / y.square().sum(1)


def theorem_2(
    rows: Float[Tensor, "b m d"],
    augmented: Float[Tensor, "b d"],
    truth: Float[Tensor, "b d"],
    cosines: Sequence[float] = COSINES,
    tau: float = 0.1,
    points: int = 21,
) -> list[dict]:
    """How affine DCR's loss is in the reconstruction error while an anchor goes from its prediction to the truth.

    The negatives keep the same cosine to the anchor on the whole path, each of `cosines` in turn, or stay where they
    are. The view's prediction moves with the anchor (one encoder makes both), or stays.

    Args:
        rows, augmented, truth: as `dcr_loss` takes them.
        cosines: of the turned negatives to the anchor.
        tau: temperature of the loss.
        points: of the path.

    Returns:
        Records `denominator`, `view` (moves, stays), `negatives` (turned, as they are), `cosine` (their mean at the
        start), `distance` (`raw`: |a - eps|^2 / d, as L_rec; `unit`: 2 - 2s), `slope` and `r2` of the line, means over
        the b images with `/low` and `/high` (95 %, bootstrap over images).
    """
    rows, augmented, truth = (x.double()[:, None] for x in (rows, augmented, truth))  # [b, 1, (m,) d]
    path = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    start, still = rows[:, :, 0], rows[:, :, 1:].expand(-1, points, -1, -1)
    anchor = start + path * (truth - start)  # [b, p, d]
    distances = {"raw": (anchor - truth).square().mean(2)}
    distances["unit"] = 2 - 2 * F.cosine_similarity(anchor, truth, dim=2)  # [b, p]
    views = {"moves": augmented + path * (truth - augmented), "stays": augmented.expand_as(anchor)}
    out, cosine = [], F.cosine_similarity(start[:, :, None], rows[:, :, 1:], dim=3).mean().item()
    for s in (None, *cosines):
        others = still if s is None else at_cosine(anchor, still, s)
        anchors = torch.cat([anchor[:, :, None], others], dim=2).flatten(0, 1)
        negatives = {"negatives": "as they are" if s is None else "turned", "cosine": cosine if s is None else s}
        for (view, positions), denominator in product(views.items(), ("shared", "own")):
            positives = (x.expand_as(anchor).flatten(0, 1) for x in (positions, truth))
            loss = dcr_loss(anchors, *positives, tau, denominator).unflatten(0, anchor.shape[:2])  # [b, p]
            for distance, x in distances.items():
                place = {"denominator": denominator, "view": view, **negatives, "distance": distance}
                out.append(place | describe_line(x, loss))
    return out


def describe_line(x: Float[Tensor, "b p"], y: Float[Tensor, "b p"]) -> dict[str, float]:
    """`slope` and `r2` of `affine_fit`, means over the rows, with `/low` and `/high` (95 %, bootstrap over rows)."""
    record = {}
    for name, values in zip(("slope", "r2"), affine_fit(x, y), strict=True):
        low, high = bootstrap_mean([values.numpy()])
        record |= {name: values.mean().item(), f"{name}/low": low, f"{name}/high": high}
    return record


@torch.no_grad()
def dcr_predictions(
    encoder: Encoder, conditioner: torch.nn.Module, denoiser: Denoiser, images: Float[Tensor, "b 3 h w"], t: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The predictions that DCR contrasts in one batch at timestep t, as `dcr_loss` takes them.

    Returns:
        rows [b, b, d], views [b, d] and truth [b, d]. All draws depend only on t; views are flipped as in DCR's recipe.
    """
    random, b = generator("dcr", t), len(images)
    x0 = denoiser.latents(images)
    noise, steps = torch.randn(x0.shape, generator=random).to(x0), torch.full((b,), t, device=x0.device)
    x_t = denoiser.add_noise(x0, noise, steps)
    c, view = (conditioner(encoder.features(x), denoiser.empty) for x in (images, augment(images, random)))
    order = torch.cat([torch.arange(b)[:, None], draw_others(b, b - 1, random)], dim=1).to(c.device)
    rows = denoiser.predict(x_t, steps, c[order].flatten(0, 1)).flatten(1).unflatten(0, (b, b))
    return rows.cpu(), denoiser.predict(x_t, steps, view).flatten(1).cpu(), noise.flatten(1).cpu()


@torch.no_grad()
def first_messages(
    denoiser: Denoiser, x_t: Float[Tensor, "1 c h w"], t: int, contexts: Float[Tensor, "n l w2"]
) -> Float[Tensor, "n p c2"]:
    """Output of the UNet's first cross-attention at each of p positions of one noisy latent, under each context."""
    outputs: list[Tensor] = []
    first = next(m for m in denoiser.network.modules() if isinstance(m, Attention) and m.is_cross_attention)
    hook = first.register_forward_hook(lambda module, args, out: outputs.append(out))
    try:
        for context in contexts:
            denoiser.network(x_t.to(denoiser.network.dtype), t, context[None].to(denoiser.network.dtype))
    finally:
        hook.remove()
    return torch.cat(outputs)
