"""A loss whose rows are independent, taken a few rows at a time: the same gradients in a fraction of the memory."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


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
