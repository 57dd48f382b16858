"""Which of the other images each image is contrasted with."""

import torch
from jaxtyping import Int
from torch import Tensor


def draw_others(b: int, k: int, generator: torch.Generator) -> Int[Tensor, "b k"]:
    """For each of `b` pictures `k` of the other b - 1: all of them in order, or a draw without replacement."""
    if k >= b - 1:
        shift = torch.arange(1, b).expand(b, -1)
    else:
        shift = 1 + torch.rand(b, b - 1, generator=generator).argsort(1)[:, :k]
    return (torch.arange(b)[:, None] + shift) % b
