"""Do objectives pull the encoder the same way? Cosines, norms, curvature and signal of their gradients, and surgery.

All follows from Gram matrices, the products <g_i, g_j> of the terms' gradients, parameter by parameter: summed over all
of them, over a block or over a kind of layer they give cosines and norms, and what a method of surgery needs. cos < 0
is called a conflict; PCGrad (arXiv 2001.06782) asks two things more before it counts: a small magnitude similarity
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
EMBEDDINGS = "features"  # in a Gradient: with respect to the global embeddings, summed over the views of each picture


def term_gradients(terms: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Gradient]:
    """The gradient of each term's mean with respect to `parameters`, from one shared forward pass.

    A parameter that a term does not touch gets zeros. The sum over terms is the gradient of the loss.
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
    """<g_i, g_j> of t gradients for every parameter, summed in float64, on the CPU."""
    t = len(gradients)
    products = {}
    for name in gradients[0]:
        rows = [g[name].double() for g in gradients]  # products of small gradients would vanish in float32
        upper = {(i, j): (rows[i] * rows[j]).sum() for i in range(t) for j in range(i, t)}
        products[name] = torch.stack([upper[min(i, j), max(i, j)] for i in range(t) for j in range(t)])
    together = torch.stack(list(products.values())).cpu().view(-1, t, t)  # one transfer
    return dict(zip(products, together, strict=True))


def total_gram(gradients: Sequence[Gradient]) -> Float[Tensor, "t t"]:
    """<g_i, g_j> over all parameters; the embeddings are none."""
    return torch.stack([value for name, value in grams(gradients).items() if name != EMBEDDINGS]).sum(0)


def _cosine(gram: Tensor, i: int = 0, j: int = 1) -> float:
    size = (gram[i, i] * gram[j, j]).sqrt()
    return (gram[i, j] / size).item() if size else float("nan")


def groups_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Parameters by block (`block0`), by kind of layer (`kind/q`), and the embeddings (`features`)."""
    found: dict[str, list[str]] = {}
    weights = [name for name in names if name != EMBEDDINGS]
    for name in weights:
        found.setdefault(block_name(name), []).append(name)
    for name in weights:
        found.setdefault(f"kind/{layer_kind(name)}", []).append(name)
    return found | ({EMBEDDINGS: [EMBEDDINGS]} if EMBEDDINGS in names else {})


def conflict(a: Gradient, b: Gradient) -> dict[str, float]:
    """`cos` and `magnitude` of two gradients over all parameters, and the cosine of every part.

    `cos/<block>` for each part of the tower, `cos/kind/<kind>` for q, k, v, out, fc1, fc2, norm, embedding and
    projection, `cos/features` for the gradient in the embeddings if it is there. Cosines are in [-1, 1], the magnitude
    similarity in [0, 1]; NaN where a gradient is zero.
    """
    return {name: value for name, value in measure({"a": a, "b": b}).items() if not name.startswith("norm_")}


def measure(gradients: dict[str, Gradient]) -> dict[str, float]:
    """`norm_<term>` of every term and the `conflict` of every pair; of more than two terms behind `<one>~<other>:`."""
    terms, each = list(gradients), grams(list(gradients.values()))
    whole = torch.stack([value for name, value in each.items() if name != EMBEDDINGS]).sum(0)  # [t, t]
    out = {f"norm_{term}": whole[i, i].sqrt().item() for i, term in enumerate(terms)}
    parts = {label: torch.stack([each[n] for n in names]).sum(0) for label, names in groups_of(list(each)).items()}
    for i, j in combinations(range(len(terms)), 2):
        head = f"{terms[i]}~{terms[j]}:" if len(terms) > 2 else ""
        sizes = whole[i, i] + whole[j, j]
        out[f"{head}cos"] = _cosine(whole, i, j)
        out[f"{head}magnitude"] = (2 * (whole[i, i] * whole[j, j]).sqrt() / sizes).item() if sizes else float("nan")
        out |= {f"{head}cos/{label}": _cosine(part, i, j) for label, part in parts.items()}
    return out


def curvature(gradient: Gradient, again: Callable[[], Gradient], parameters: dict[str, Tensor], size: float) -> float:
    """u^T H u along u = -g / |g|, H averaged between theta and theta + size u: PCGrad's third condition over |g|^2.

    The integral of the Hessian along a step is a difference of gradients, (g(theta + size u) - g(theta)) / size, so one
    more gradient gives it without approximation. Units: loss over squared parameter.

    Args:
        gradient: g at the parameters as they are.
        again: () -> the gradient at the parameters as it finds them, same pictures and draws.
        parameters: moved and put back.
        size: length of the step, > 0.
    """
    length = total_gram([gradient])[0, 0].sqrt().item()
    if not length:
        return float("nan")
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p -= size / length * gradient[name]
    try:
        moved = again()
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept[name])
    products = total_gram([gradient, moved])
    return ((products[0, 0] - products[0, 1]) / (length * size)).item()


def signal(gram: Float[Tensor, "k k"], batch: int) -> dict[str, float]:
    """What k gradients of k batches have in common, from their Gram matrix (McCandlish et al., arXiv 1812.06162).

    Returns:
        `signal`: |G|^2 of the expected gradient, without bias, so noise may take it below 0; `noise`: tr(Sigma), the
        variance of one batch's gradient; `snr` = signal / noise; `noise_scale` = batch / snr, in pictures: the batch
        at which both are equal (infinite without signal).
    """
    k = len(gram)
    squared, mean = gram.diagonal().mean().item(), gram.mean().item()  # E|g|^2, |mean g|^2
    noise = (squared - mean) * k / (k - 1)
    found = mean - noise / k
    snr = found / noise if noise else float("inf")
    return {"signal": found, "noise": noise, "snr": snr, "noise_scale": batch / snr if snr > 0 else float("inf")}


def equal_norms(gram: Float[Tensor, "t t"]) -> Float[Tensor, " t"]:
    """Weights that bring all terms to their mean norm, as GradNorm aims at with equal rates; 1 for a zero gradient."""
    norms = gram.diagonal().sqrt()
    return torch.where(norms > 0, norms.mean() / norms, 1.0)


def _mean_to_sum(weighting: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A weighting that mends the mean of t gradients, for the sum: the plain sum where nothing conflicts."""
    return lambda gram: len(gram) * weighting(gram)


COMBINE: dict[str, Callable[[Tensor], Tensor]] = {  # name -> from the terms' Gram matrix to a weight for each
    "sum": lambda gram: torch.ones(len(gram), dtype=gram.dtype),
    "pcgrad": PCGradWeighting(),  # each projected away from the others it conflicts with
    "mgda": _mean_to_sum(MGDAWeighting()),  # the shortest vector between them
    "cagrad": _mean_to_sum(CAGradWeighting(c=0.5)),  # the worst-off term's best step near the mean (c = .5)
    "upgrad": _mean_to_sum(UPGradWeighting()),  # each projected onto the cone that hurts no other
    "equal-norms": equal_norms,
}


def combine(gradients: dict[str, Gradient], how: str) -> Gradient:
    """One gradient of the terms': their sum, or what a key of `COMBINE` makes of it."""
    terms = list(gradients.values())
    if len(terms) == 1:
        return {name: g for name, g in terms[0].items() if name != EMBEDDINGS}
    weights = [1.0] * len(terms) if how == "sum" else COMBINE[how](total_gram(terms)).tolist()
    return {
        name: sum(w * g[name] for w, g in zip(weights, terms, strict=True)) for name in terms[0] if name != EMBEDDINGS
    }
