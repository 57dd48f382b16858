"""The distribution from which a batch's timesteps are drawn."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from diva_lab import messages

TIMESTEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (uniform draw, normal draw) -> t / T in [0, 1)
    "uniform": lambda u, z: u,
    "logit-normal": lambda u, z: z.sigmoid(),  # GenHancer's, with s = 1 as released
    "high-noise": lambda u, z: 0.5 + 0.5 * u,
}


def timestep_weights(kind: str) -> Tensor | None:
    """The weights of a piecewise constant distribution such as `0,0,1,3`; None for a key of `TIMESTEPS`.

    k weights stand for k equal parts of all timesteps; only their ratios matter.

    Raises:
        ValueError: for anything else; names the possible values.
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
        f"unknown timesteps {kind!r}; {messages.expected(kind, TIMESTEPS)}, or weights of equal parts of all "
        "timesteps as '0,0,1,3'"
    )


def draw_timesteps(kind: str, b: int, timesteps: int, generator: torch.Generator) -> Int[Tensor, " b"]:
    """Draw b timesteps in [0, timesteps).

    Args:
        kind: a key of `TIMESTEPS`, or weights: see `timestep_weights`.

    Raises:
        ValueError: for an unknown `kind`.
    """
    weights = timestep_weights(kind)
    u, z = torch.rand(b, generator=generator), torch.randn(b, generator=generator)  # [b], [b]
    if weights is None:
        share = TIMESTEPS[kind](u, z)  # [b]
    else:  # the inverse of the distribution function at u
        upper = weights.cumsum(0) / weights.sum()  # [k]
        part = torch.searchsorted(upper, u, right=True).clamp(max=len(weights) - 1)  # [b]
        width = weights[part] / weights.sum()  # [b]
        share = (part + 1 - (upper[part] - u) / width.clamp_min(1e-12)) / len(weights)  # [b]
    return (share * timesteps).long().clamp(0, timesteps - 1)
