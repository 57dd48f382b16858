"""Gradients of an objective's terms: cosines, norms, curvature, signal against noise, and surgery.

Everything is computed from Gram matrices, the products <g_i, g_j> of the terms' gradients for each parameter. Summed
over all parameters, over one block or over one kind of layer they give cosines and norms; summed over all parameters
they are also what every method of gradient surgery needs. Two terms conflict where their cosine is negative. PCGrad
(arXiv 2001.06782) names two further conditions under which a conflict does harm: a small magnitude similarity
2 |g1| |g2| / (|g1|^2 + |g2|^2), and a large `curvature`.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor
from torchjd.aggregation import CAGradWeighting, MGDAWeighting, PCGradWeighting, UPGradWeighting

from diva_lab.models.layers import block_name, layer_kind

Gradient = dict[str, Tensor]  # parameter name -> gradient
EMBEDDINGS = "features"  # key in a Gradient: the gradient in the global embeddings, summed over each image's views


def term_gradients(terms: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Gradient]:
    """The gradient of each term's mean, [b] -> scalar, from one shared forward pass; their sum is the loss's gradient.

    Where a term does not depend on a parameter, its gradient is zero.
    """
    gradients, names = {}, list(parameters)
    for k, (term, values) in enumerate(terms.items()):
        parts = torch.autograd.grad(
            values.mean(), list(parameters.values()), retain_graph=k < len(terms) - 1, allow_unused=True
        )
        gradients[term] = {
            n: torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, parts, strict=True)
        }
    return gradients


def grams(gradients: Sequence[Gradient]) -> dict[str, Float[Tensor, "t t"]]:
    """<g_i, g_j> of t gradients for each parameter, summed in float64, on the CPU."""
    t = len(gradients)
    products = {}
    for name in gradients[0]:
        rows = [g[name].double() for g in gradients]  # products of small gradients would vanish in float32
        upper = {(i, j): (rows[i] * rows[j]).sum() for i in range(t) for j in range(i, t)}
        products[name] = torch.stack([upper[min(i, j), max(i, j)] for i in range(t) for j in range(t)])  # [t * t]
    on_cpu = torch.stack(list(products.values())).cpu().view(-1, t, t)  # one transfer for all parameters
    return dict(zip(products, on_cpu, strict=True))


def total_gram(gradients: Sequence[Gradient]) -> Float[Tensor, "t t"]:
    """<g_i, g_j> of t gradients, summed over all parameters; `EMBEDDINGS` is not a parameter."""
    return torch.stack([value for name, value in grams(gradients).items() if name != EMBEDDINGS]).sum(0)


def _cosine(gram: Tensor, i: int, j: int) -> float:
    size = (gram[i, i] * gram[j, j]).sqrt()
    return (gram[i, j] / size).item() if size else float("nan")


def groups_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Parameter names grouped by block (`block0`) and by kind of layer (`kind/q`); `EMBEDDINGS` is its own group."""
    groups: dict[str, list[str]] = {}
    weights = [name for name in names if name != EMBEDDINGS]
    for name in weights:
        groups.setdefault(block_name(name), []).append(name)
    for name in weights:
        groups.setdefault(f"kind/{layer_kind(name)}", []).append(name)
    return groups | ({EMBEDDINGS: [EMBEDDINGS]} if EMBEDDINGS in names else {})


def measure(gradients: dict[str, Gradient]) -> dict[str, float]:
    """How long the terms' gradients are, and how far each pair of them agrees.

    Returns:
        `norm_<term>` of every term. For every pair, behind `<one>~<other>:` if there are more than two terms: `cos`,
        the cosine over all parameters, in [-1, 1]; `magnitude`, the magnitude similarity, in [0, 1]; the cosine in
        every group of `groups_of`: `cos/<block>`, `cos/kind/<kind>`, `cos/features`. NaN where a gradient is zero.
    """
    terms, by_parameter = list(gradients), grams(list(gradients.values()))
    whole = torch.stack([value for name, value in by_parameter.items() if name != EMBEDDINGS]).sum(0)  # [t, t]
    out = {f"norm_{term}": whole[i, i].sqrt().item() for i, term in enumerate(terms)}
    by_group = {
        group: torch.stack([by_parameter[n] for n in names]).sum(0)  # [t, t]
        for group, names in groups_of(list(by_parameter)).items()
    }
    for i, j in combinations(range(len(terms)), 2):
        pair = f"{terms[i]}~{terms[j]}:" if len(terms) > 2 else ""
        sizes = whole[i, i] + whole[j, j]
        out[f"{pair}cos"] = _cosine(whole, i, j)
        out[f"{pair}magnitude"] = (2 * (whole[i, i] * whole[j, j]).sqrt() / sizes).item() if sizes else float("nan")
        out |= {f"{pair}cos/{group}": _cosine(gram, i, j) for group, gram in by_group.items()}
    return out


def curvature(
    gradient: Gradient, recompute: Callable[[], Gradient], parameters: dict[str, Tensor], size: float
) -> float:
    """u^T H u along u = -g / |g|, H being the Hessian averaged between theta and theta + size u.

    The integral of the Hessian along a step is a difference of gradients, (g(theta + size u) - g(theta)) / size. So one
    more gradient gives the averaged curvature exactly. PCGrad's third condition is this number times |g|^2.

    Args:
        gradient: g at the present parameters.
        recompute: () -> the gradient at the parameters' values at the time of the call, for the same images and draws.
        parameters: moved by one step, and restored.
        size: length of the step, > 0.

    Returns:
        The curvature, in units of the loss over squared parameter; NaN where g is zero.
    """
    length = total_gram([gradient])[0, 0].sqrt().item()
    if not length:
        return float("nan")
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p -= size / length * gradient[name]
    try:
        moved = recompute()
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
    products = total_gram([gradient, moved])  # [2, 2]
    return ((products[0, 0] - products[0, 1]) / (length * size)).item()


def signal(gram: Float[Tensor, "k k"], batch: int) -> dict[str, float]:
    """Signal and noise of k gradients of k batches, from their Gram matrix (McCandlish et al., arXiv 1812.06162).

    Args:
        gram: products of the gradients, k >= 2.
        batch: images in each batch.

    Returns:
        `signal`: |G|^2 of the expected gradient G, an unbiased estimate, which noise may make negative. `noise`:
        tr(Sigma), the variance of one batch's gradient. `snr`: signal / noise. `noise_scale`: batch / snr, the batch
        size in images at which signal and noise are equal; infinite without signal.
    """
    k = len(gram)
    mean_square, square_of_mean = gram.diagonal().mean().item(), gram.mean().item()  # mean of |g|^2, |mean of g|^2
    noise = (mean_square - square_of_mean) * k / (k - 1)
    unbiased = square_of_mean - noise / k
    snr = unbiased / noise if noise else float("inf")
    return {"signal": unbiased, "noise": noise, "snr": snr, "noise_scale": batch / snr if snr > 0 else float("inf")}


def equal_norms(gram: Float[Tensor, "t t"]) -> Float[Tensor, " t"]:
    """Weights that scale every gradient to the mean of the norms, GradNorm's aim with equal rates; 1 for a zero one."""
    norms = gram.diagonal().sqrt()  # [t]
    return torch.where(norms > 0, norms.mean() / norms, 1.0)


def _times_t(weighting: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A weighting for the mean of t gradients, scaled for their sum: all ones where nothing conflicts."""
    return lambda gram: len(gram) * weighting(gram)


COMBINE: dict[str, Callable[[Tensor], Tensor]] = {  # name -> function: Gram matrix of the terms -> weight of each
    "sum": lambda gram: torch.ones(len(gram), dtype=gram.dtype),
    "pcgrad": PCGradWeighting(),  # each is projected away from every other that it conflicts with
    "mgda": _times_t(MGDAWeighting()),  # the shortest vector in their convex hull
    "cagrad": _times_t(CAGradWeighting(c=0.5)),  # near the mean, the best step for the worst term (c = .5)
    "upgrad": _times_t(UPGradWeighting()),  # each is projected onto the cone that opposes no other
    "equal-norms": equal_norms,
}


def combine(gradients: dict[str, Gradient], how: str) -> Gradient:
    """One gradient from those of the terms, weighted as a key of `COMBINE` says; `EMBEDDINGS` is left out."""
    terms = list(gradients.values())
    if len(terms) == 1:
        return {name: g for name, g in terms[0].items() if name != EMBEDDINGS}
    weights = [1.0] * len(terms) if how == "sum" else COMBINE[how](total_gram(terms)).tolist()
    return {
        name: sum(w * g[name] for w, g in zip(weights, terms, strict=True)) for name in terms[0] if name != EMBEDDINGS
    }
