"""What a run is fed: images, with their captions, as its encoder reads them; and the gap between the two modalities."""

from dataclasses import replace
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from diva_lab.captions import open_captions
from diva_lab.images import augment, augment_pixels, open_images
from diva_lab.models.encoders import Encoder, all_finite
from diva_lab.training.settings import Settings

GAP_IMAGES, GAP_SEED = 2048, 2_000_000  # of which the gap is the mean; added to the seed for them


class Batches:
    """Endless micro-batches as the settings name them; iterating yields uint8 images and their captions.

    Args:
        settings: with `anchor="text"` the captions are those of other images or of a text file; without anchor none.
        px: side of the images in pixels.
        position: `images.position` when the process was left.
        number: micro-batches that were taken before.
        rank, processes: each process has batches of its own, unless `settings.shared_samples`.
    """

    def __init__(
        self, settings: Settings, px: int, position: int = 0, number: int = 0, rank: int = 0, processes: int = 1
    ):
        place = (0, 1) if settings.shared_samples else (rank, processes)
        crop = (settings.seed, rank) if settings.loader_crop else None
        captions = settings.captions if settings.reads_captions else None
        self.images = open_images(
            settings.images, px, settings.batch, settings.seed, position, *place, captions, settings.mentions, crop,
            settings.resampled, settings.workers,
        )  # fmt: skip
        self.captions = None
        if captions is None and settings.anchored:
            self.captions = open_captions(
                settings.images, settings.batch, settings.seed, number, *place, settings.mentions, settings.captions
            )

    @property
    def position(self) -> int:
        """How far this process is in its images."""
        return self.images.position

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Name and reason of images that could not be read; the loop clears it."""
        return self.images.skipped

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Tensor, list[str]]:
        images = next(self.images)
        return images, self.images.captions if self.captions is None else next(self.captions)


class Pixels:
    """An encoder's input in training, as `encoder_resize` and `normalise` say; in evaluation it is the encoder's own.

    Args:
        settings: of the run.
        encoder: the one that reads it.
    """

    def __init__(self, settings: Settings, encoder: Encoder):
        self.settings, self.encoder = settings, encoder
        self.mean, self.std = encoder.mean, encoder.std  # [1, 3, 1, 1] each
        if settings.normalise == "openai":
            pair = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
            self.mean, self.std = (encoder.mean.new_tensor(values).view(1, 3, 1, 1) for values in pair)

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 px px"]:
        """Resize and normalise images in [0, 1]."""
        if self.settings.encoder_resize == "bilinear":
            images = F.interpolate(images, (self.encoder.px, self.encoder.px), mode="bilinear")
        else:
            images = self.encoder.resize(images)
        return (images - self.mean) / self.std

    def augment(self, images: Float[Tensor, "b 3 h w"], random: torch.Generator) -> Float[Tensor, "b 3 _ _"]:
        """A view of each image, such that calling this with it gives the augmented input, as `augment_normalised` says.

        A view of normalised input may leave [0, 1].
        """
        if not self.settings.augment_normalised:
            return augment(images, random, self.settings.flips)
        return augment_pixels(self(images), random, self.settings.flips) * self.std + self.mean


@torch.no_grad()
def estimate_gap(settings: Settings, encoder: Encoder) -> Float[Tensor, " d"]:
    """The mean image embedding less the mean caption embedding, both of unit length, over `GAP_IMAGES` images.

    Zeros where `settings.anchor_shift` is off. Every process takes the same images.
    """
    device, n, pixels = encoder.mean.device, 64, Pixels(settings, encoder)
    if not settings.anchor_shift:
        return torch.zeros(encoder.dim, device=device)
    batches = Batches(replace(settings, batch=n, seed=settings.seed + GAP_SEED), encoder.px)
    gaps = []
    for images, captions in islice(batches, GAP_IMAGES // n):
        embedding = encoder.read_pixels(pixels(images.to(device).float() / 255)).embedding.float()  # [n, d]
        embedding = all_finite(F.normalize(embedding, dim=1), range(n), "images")
        gaps.append(embedding.mean(0) - encoder.encode_text(captions).mean(0))
    return torch.stack(gaps).mean(0)
