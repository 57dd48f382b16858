"""From an encoder's features to the context that a denoiser's cross-attention reads.

A condition is one function and one line in `CONDITIONS`. Each adds projected visual tokens to the embedding of the
empty prompt; they differ in which tokens, and so in how much of the picture the denoiser is told.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diva_lab.encoders import Features


class Projector(nn.Sequential):
    """LayerNorm, Linear, GELU, Linear: encoder width -> cross-attention width (DCR, stage 1)."""

    def __init__(self, dim: int, width: int):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))


def global_(
    features: Features, project: nn.Module, empty: Float[Tensor, "l c"], generator: torch.Generator | None
) -> Float[Tensor, "b 1 c"]:
    """DCR: the projected global embedding, added to every token of the empty prompt: see `Denoiser.predict`."""
    return project(features.embedding)[:, None]  # [b, 1, c]


def recap(
    features: Features, project: nn.Module, empty: Float[Tensor, "l c"], generator: torch.Generator | None
) -> Float[Tensor, "b l c"]:
    """DIVA for OpenAI's CLIP: class token and l - 1 random patch tokens, added position by position.

    The patches are drawn with replacement, one draw for the whole batch; without a generator (evaluation) they are
    spread evenly instead. DIVA's released code draws unseeded, at evaluation too.
    """
    count, patches = len(empty) - 1, features.patches
    if generator is None:
        index = torch.linspace(0, patches.shape[1] - 1, count).round().long()
    else:
        index = torch.randint(patches.shape[1], (count,), generator=generator)
    tokens = torch.cat([features.embedding[:, None], patches[:, index.to(patches.device)]], dim=1)  # [b, l, d]
    return empty + project(tokens)  # [b, l, c]


CONDITIONS: dict[str, Callable] = {"global": global_, "recap": recap}


class Conditioner(nn.Module):
    """A condition together with its projector.

    Args:
        name: a key of `CONDITIONS`.
        dim: the encoder's width.
        width: the denoiser's cross-attention width.
        seed: of the projector's initial weights.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """

    def __init__(self, name: str, dim: int, width: int, seed: int = 0):
        super().__init__()
        if name not in CONDITIONS:
            raise ValueError(f"unknown condition {name!r}; expected one of {', '.join(CONDITIONS)}")
        self.name, self._function = name, CONDITIONS[name]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.projector = Projector(dim, width)

    def forward(
        self, features: Features, empty: Float[Tensor, "l c"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b _ c"]:
        return self._function(features, self.projector, empty, generator)
