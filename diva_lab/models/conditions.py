"""CONDITIONS: from an encoder's features to the context that a denoiser's cross-attention reads.

Every condition adds projected visual tokens to the embedding of the empty prompt. They differ in which tokens they use,
and so in how much of the image reaches the denoiser. To add one, write one function and one line in `CONDITIONS`. Its
arguments:

    features    an encoder's `Features`: embedding [b, d], patch tokens [b, n, d]
    project     the projector, d -> c
    empty       the embedding of the empty prompt, [l, c]
    generator   of random draws; None (evaluation) for a fixed choice of tokens

Those that draw tokens (`DRAWN`) have one argument more: `each`, whether they are drawn for each image.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diva_lab import messages
from diva_lab.models.encoders import Features


class Projector(nn.Sequential):
    """LayerNorm, Linear, GELU, Linear: from an encoder's width to a cross-attention's width (DCR, stage 1)."""

    def __init__(self, dim: int, width: int):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))


class Projectors(nn.ModuleDict):
    """Projectors by name that read the same features; what they return stands side by side in one token."""

    def forward(self, features: Float[Tensor, "*b d"]) -> Float[Tensor, "*b c"]:
        return torch.cat([project(features) for project in self.values()], dim=-1)


PROJECTIONS: dict[str, Callable[[int, int], nn.Module]] = {"mlp": Projector, "linear": nn.Linear}  # DCR's, DIVA's


def global_(
    features: Features, project: nn.Module, empty: Float[Tensor, "l c"], generator: torch.Generator | None
) -> Float[Tensor, "b 1 c"]:
    """DCR: the projected global embedding; `Denoiser.predict` adds this one token to each token of the empty prompt."""
    return project(features.embedding)[:, None]  # [b, 1, c]


def _embedding_and(features: Features, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n1 d"]:
    return torch.cat([features.embedding[:, None], patches], dim=1)  # [b, 1 + n, d]


def _draw_each(patches: Float[Tensor, "b n d"], count: int, generator: torch.Generator) -> Float[Tensor, "b m d"]:
    """`count` of each image's patch tokens, drawn with replacement."""
    index = torch.randint(patches.shape[1], (len(patches), count), generator=generator)  # [b, m]
    return patches.take_along_dim(index[..., None].to(patches.device), dim=1)


def recap(
    features: Features,
    project: nn.Module,
    empty: Float[Tensor, "l c"],
    generator: torch.Generator | None,
    each: bool = False,
) -> Float[Tensor, "b l c"]:
    """DIVA for OpenAI's CLIP: the global embedding and l - 1 patch tokens, added position by position.

    The patch tokens are drawn at random with replacement, one draw for the whole batch, or for each image as in DIVA's
    released code, which draws without a seed and at evaluation too. Without a generator they are evenly spaced.
    """
    count, patches = len(empty) - 1, features.patches
    if generator is None:
        patches = patches[:, torch.linspace(0, patches.shape[1] - 1, count).round().long().to(patches.device)]
    elif each:
        patches = _draw_each(patches, count, generator)
    else:
        patches = patches[:, torch.randint(patches.shape[1], (count,), generator=generator).to(patches.device)]
    return empty + project(_embedding_and(features, patches))  # [b, l, c]


def _add_mean(tokens: Float[Tensor, "b n d"], project: nn.Module, empty: Float[Tensor, "l c"]) -> Tensor:
    """Project any number of tokens and add the empty prompt's mean token to each."""
    return empty.mean(0) + project(tokens)  # [b, n, c]


def recap_all(
    features: Features, project: nn.Module, empty: Float[Tensor, "l c"], generator: torch.Generator | None
) -> Float[Tensor, "b n c"]:
    """DIVA for MetaCLIP, and for DFN at 224 px: the global embedding and every patch token."""
    return _add_mean(_embedding_and(features, features.patches), project, empty)


def recap_half(
    features: Features,
    project: nn.Module,
    empty: Float[Tensor, "l c"],
    generator: torch.Generator | None,
    each: bool = False,
) -> Float[Tensor, "b n c"]:
    """DIVA for DFN at 378 px: the global embedding and half of the patch tokens, none twice.

    Without a generator it is every second token. With `each` they are drawn for each image and with replacement, as in
    DIVA's released code.
    """
    patches = features.patches
    half = patches.shape[1] // 2
    if generator is None:
        patches = patches[:, : 2 * half : 2]
    elif each:
        patches = _draw_each(patches, half, generator)
    else:
        patches = patches[:, torch.randperm(patches.shape[1], generator=generator)[:half].to(patches.device)]
    return _add_mean(_embedding_and(features, patches), project, empty)


def recap_pooled(
    features: Features,
    project: nn.Module,
    empty: Float[Tensor, "l c"],
    generator: torch.Generator | None,
    window: int = 6,
) -> Float[Tensor, "b n c"]:
    """DIVA for SigLIP: the global embedding and means of `window` consecutive patch tokens; 6 at 224 px, 10 at 384."""
    pooled = F.avg_pool1d(features.patches.transpose(1, 2), window).transpose(1, 2)  # [b, n // window, d]
    return _add_mean(_embedding_and(features, pooled), project, empty)


CONDITIONS: dict[str, Callable] = {
    "global": global_,
    "recap": recap,
    "recap-all": recap_all,
    "recap-half": recap_half,
    "recap-pool6": recap_pooled,
    "recap-pool10": partial(recap_pooled, window=10),
}
DRAWN = ("recap", "recap-half")  # conditions that draw tokens


class Conditioner(nn.Module):
    """A condition together with its projector.

    Args:
        name: a key of `CONDITIONS`.
        dim: the encoder's width d.
        width: the denoiser's cross-attention width c; or the widths that add up to it, for a projector each, by name.
        seed: of the projector's initial weights.
        projection: a key of `PROJECTIONS`.
        each: whether a condition of `DRAWN` draws its tokens for each image, not once for a batch.

    Attributes:
        gap: the mean image embedding less the mean text embedding [d], both of unit length, of a projector that is
            anchored in captions: it reads embeddings at unit length. None for any other projector.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """

    gap: Tensor | None

    def __init__(
        self,
        name: str,
        dim: int,
        width: int | dict[str, int],
        seed: int = 0,
        projection: str = "mlp",
        each: bool = False,
    ):
        super().__init__()
        if name not in CONDITIONS:
            raise ValueError(f"unknown condition {name!r}; {messages.expected(name, CONDITIONS)}")
        self.name, self._function = name, CONDITIONS[name]
        if each and name in DRAWN:
            self._function = partial(self._function, each=True)
        self.register_buffer("gap", None)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            new = partial(PROJECTIONS[projection], dim)
            several = isinstance(width, dict)
            self.projector = Projectors({part: new(w) for part, w in width.items()}) if several else new(width)

    def forward(
        self, features: Features, empty: Float[Tensor, "l c"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b _ c"]:
        """The context of a batch; its number of tokens depends on the condition."""
        if self.gap is not None:
            features = replace(features, embedding=F.normalize(features.embedding.float(), dim=-1))
        return self._function(features, self.projector, empty, generator)
