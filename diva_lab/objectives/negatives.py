"""Negatives: the other images that each image of a batch is contrasted with."""

import torch
from jaxtyping import Int
from torch import Tensor


def draw_others(b: int, k: int, generator: torch.Generator) -> Int[Tensor, "b k"]:
    """For each of b images the indices of k others: all b - 1 in order where k >= b - 1, else drawn, none twice."""
    if k >= b - 1:
        shift = torch.arange(1, b).expand(b, -1)  # [b, b - 1]
    else:
        shift = 1 + torch.rand(b, b - 1, generator=generator).argsort(1)[:, :k]  # [b, k]
    return (torch.arange(b)[:, None] + shift) % b
