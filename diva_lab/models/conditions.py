"""From an encoder's features to the context that a denoiser's cross-attention reads.

A condition is one function and one line in `CONDITIONS`. Each adds projected visual tokens to the embedding of the
empty prompt; they differ in which tokens, and so in how much of the picture the denoiser is told.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diva_lab.models.encoders import Features


class Projector(nn.Sequential):
    """LayerNorm, Linear, GELU, Linear: encoder width -> cross-attention width (DCR, stage 1)."""

    def __init__(self, dim: int, width: int):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))


PROJECTIONS: dict[str, Callable[[int, int], nn.Module]] = {"mlp": Projector, "linear": nn.Linear}  # DCR's, DIVA's


def global_(
    features: Features, project: nn.Module, empty: Float[Tensor, "l c"], generator: torch.Generator | None
) -> Float[Tensor, "b 1 c"]:
    """DCR: the projected global embedding, added to every token of the empty prompt: see `Denoiser.predict`."""
    return project(features.embedding)[:, None]  # [b, 1, c]


def _class_and(features: Features, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n1 d"]:
    return torch.cat([features.embedding[:, None], patches], dim=1)


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
    return empty + project(_class_and(features, patches[:, index.to(patches.device)]))  # [b, l, c]


def _onto_mean(tokens: Float[Tensor, "b n d"], project: nn.Module, empty: Float[Tensor, "l c"]) -> Tensor:
    """Any number of tokens, the mean token of the empty prompt added to each: [b, n, c]."""
    return empty.mean(0) + project(tokens)


def recap_all(
    features: Features, project: nn.Module, empty: Float[Tensor, "l c"], generator: torch.Generator | None
) -> Float[Tensor, "b n c"]:
    """DIVA for MetaCLIP, and DFN at 224: class token and every patch token."""
    return _onto_mean(_class_and(features, features.patches), project, empty)


def recap_half(
    features: Features, project: nn.Module, empty: Float[Tensor, "l c"], generator: torch.Generator | None
) -> Float[Tensor, "b n c"]:
    """DIVA for DFN at 378: class token and half of the patch tokens; every second one without a generator."""
    patches = features.patches
    half = patches.shape[1] // 2
    index = (
        torch.arange(half) * 2 if generator is None else torch.randperm(patches.shape[1], generator=generator)[:half]
    )
    return _onto_mean(_class_and(features, patches[:, index.to(patches.device)]), project, empty)


def recap_pooled(
    features: Features,
    project: nn.Module,
    empty: Float[Tensor, "l c"],
    generator: torch.Generator | None,
    window: int = 6,
) -> Float[Tensor, "b n c"]:
    """DIVA for SigLIP: pooled token and patch tokens averaged along their sequence; window 6 at 224, 10 at 384."""
    pooled = F.avg_pool1d(features.patches.transpose(1, 2), window).transpose(1, 2)  # [b, n // window, d]
    return _onto_mean(_class_and(features, pooled), project, empty)


CONDITIONS: dict[str, Callable] = {
    "global": global_,
    "recap": recap,
    "recap-all": recap_all,
    "recap-half": recap_half,
    "recap-pool6": recap_pooled,
    "recap-pool10": partial(recap_pooled, window=10),
}


class Conditioner(nn.Module):
    """A condition together with its projector.

    Args:
        name: a key of `CONDITIONS`.
        dim: the encoder's width.
        width: the denoiser's cross-attention width.
        seed: of the projector's initial weights.
        projection: a key of `PROJECTIONS`.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """

    def __init__(self, name: str, dim: int, width: int, seed: int = 0, projection: str = "mlp"):
        super().__init__()
        if name not in CONDITIONS:
            raise ValueError(f"unknown condition {name!r}; expected one of {', '.join(CONDITIONS)}")
        self.name, self._function = name, CONDITIONS[name]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.projector = PROJECTIONS[projection](dim, width)

    def forward(
        self, features: Features, empty: Float[Tensor, "l c"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b _ c"]:
        return self._function(features, self.projector, empty, generator)
