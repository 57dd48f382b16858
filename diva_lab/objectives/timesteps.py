"""How the timesteps of a batch are drawn."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

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
