"""Row-wise backward: a loss of independent rows and its gradient, a few rows at a time, in a fraction of the memory."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


class _ByRows(torch.autograd.Function):
    """The forward pass already computes the gradients of all rows; the backward pass only scales them."""

    @staticmethod
    def forward(ctx, loss, size, *inputs):
        losses, gradients, needed = [], [], ctx.needs_input_grad[2:]
        for start in range(0, len(inputs[0]), size):
            rows = slice(start, start + size)
            leaves = [x[rows].detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
            with torch.enable_grad():
                value = loss(rows, *leaves)  # [size]
                parts = iter(torch.autograd.grad(value.sum(), [leaf for leaf in leaves if leaf.requires_grad]))
            gradients.append([next(parts) if need else None for need in needed])
            losses.append(value.detach())
        ctx.gradients = [torch.cat(part) if need else None for need, *part in zip(needed, *gradients, strict=True)]
        return torch.cat(losses)  # [b]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        weighted = (
            None if g is None else g * upstream.view(-1, *(1,) * (g.ndim - 1)).to(g.dtype) for g in ctx.gradients
        )
        return None, None, *weighted


def by_rows(loss: Callable[..., Tensor], size: int, *inputs: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """`loss(rows, *(x[rows] for x in inputs))` for `size` rows at a time; values and gradients are those of one call.

    The gradient of each part is computed at once, and its graph is freed: only one part's graph is ever in memory, and
    there is no second forward pass.

    Args:
        loss: (rows, *inputs of these rows) -> [rows], where `rows` is a slice and no row's loss depends on another
            row's inputs. Gradients flow to the inputs only.
        size: rows at a time, 0 for all.
    """
    b = len(inputs[0])
    size = size or b
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        parts = (slice(i, i + size) for i in range(0, b, size))
        return torch.cat([loss(rows, *(x[rows] for x in inputs)) for rows in parts])
    return _ByRows.apply(loss, size, *inputs)
