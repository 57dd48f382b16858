"""Whether two objectives pull the encoder the same way: cosines and norms of their gradients on one batch.

cos(g1, g2) below zero is called a conflict. With it goes the magnitude similarity 2 |g1| |g2| / (|g1|^2 + |g2|^2) of
PCGrad's second condition: 1 for equal norms, near 0 where one term drowns the other.
"""

from itertools import combinations

import torch
from torch import Tensor

from diva_lab.encoders import block_of

Gradient = dict[str, Tensor]  # parameter name -> gradient


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


def _dot(a: Gradient, b: Gradient, names: list[str]) -> float:
    return float(sum((a[n].double() * b[n].double()).sum() for n in names))


def conflict(a: Gradient, b: Gradient) -> dict[str, float]:
    """`cos` and `magnitude` of two gradients over all parameters, and `cos/<block>` for each part of the tower.

    Cosines are in [-1, 1], the magnitude similarity in [0, 1]; NaN where a gradient is zero.
    """
    groups: dict[str, list[str]] = {}
    for name in a:
        groups.setdefault(block_of(name), []).append(name)
    out = {}
    for label, names in {"": list(a), **groups}.items():
        aa, bb, ab = _dot(a, a, names), _dot(b, b, names), _dot(a, b, names)
        size = (aa * bb) ** 0.5
        out[f"cos/{label}" if label else "cos"] = ab / size if size else float("nan")
        if not label:
            out["magnitude"] = 2 * size / (aa + bb) if aa + bb else float("nan")
    return out


def measure(gradients: dict[str, Gradient]) -> dict[str, float]:
    """`norm_<term>` of every term, and the conflict of the first two if there are two or more."""
    out = {f"norm_{term}": _dot(g, g, list(g)) ** 0.5 for term, g in gradients.items()}
    for one, two in list(combinations(gradients, 2))[:1]:
        out |= conflict(gradients[one], gradients[two])
    return out
