"""What a run is fed: images, with captions where stage 1 is anchored, and the gap between the two modalities."""

from dataclasses import replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from diva_lab.captions import open_captions
from diva_lab.images import open_images
from diva_lab.models.encoders import Encoder, embed
from diva_lab.training.settings import Settings

GAP_IMAGES, GAP_SEED = 2048, 2_000_000  # of which the gap is the mean; added to the seed for them


class Batches:
    """Endless micro-batches as the settings name them; iterating yields uint8 images and their captions.

    Args:
        settings: with `anchor="text"` the captions are those of other images or of a text file; without anchor none.
        px: side of the images in pixels.
        position: `images.position` when the process was left.
        number: micro-batches that were taken before.
        rank, processes: each process has batches of its own.
    """

    def __init__(
        self, settings: Settings, px: int, position: int = 0, number: int = 0, rank: int = 0, processes: int = 1
    ):
        place = (rank, processes)
        captions = settings.captions if settings.reads_captions else None
        self.images = open_images(
            settings.images, px, settings.batch, settings.seed, position, *place, captions, settings.mentions
        )
        self.captions = None
        if captions is None and settings.anchored:
            self.captions = open_captions(
                settings.images, settings.batch, settings.seed, number, *place, settings.mentions, settings.captions
            )

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Tensor, list[str]]:
        images = next(self.images)
        return images, self.images.captions if self.captions is None else next(self.captions)


def estimate_gap(settings: Settings, encoder: Encoder) -> Float[Tensor, " d"]:
    """The mean image embedding less the mean caption embedding, both of unit length, over `GAP_IMAGES` images.

    Zeros where `settings.anchor_shift` is off. Every process takes the same images.
    """
    device, n = encoder.mean.device, 64
    if not settings.anchor_shift:
        return torch.zeros(encoder.dim, device=device)
    batches = Batches(replace(settings, batch=n, seed=settings.seed + GAP_SEED), encoder.px)
    gaps = [
        embed(encoder, images).to(device).mean(0) - encoder.encode_text(captions).mean(0)
        for images, captions in islice(batches, GAP_IMAGES // n)
    ]
    return torch.stack(gaps).mean(0)
