"""Patch tokens of images and what each patch shows: the grid of a tower, classes by patch, the tiny world's tokens."""

from functools import partial
from math import isqrt

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from diva_lab.evaluation.world import WORLD, world_scenes
from diva_lab.models.encoders import Encoder, embed_patches

IGNORED = 255  # of a map of classes: a pixel that does not count
HELD = 2**28  # numbers of patch tokens that are held at once, 1 GB
BATCH = 64


def pixel_patches(px: int, side: int) -> Int[np.ndarray, " px"]:
    """The row (or column) of the patch grid that each row of pixels belongs to; px need not be a multiple of `side`.

    A tower whose patches do not fill its image leaves a few pixels out at the end; they count to the last patch.
    """
    return (np.arange(px) // (px // side)).clip(max=side - 1)


def count_classes(
    maps: UInt8[np.ndarray, "n px px"], patches: int, classes: int
) -> Int[np.ndarray, "n {patches} {classes}"]:
    """How many pixels of each class every patch shows; those of another number, as `IGNORED`, are left out."""
    rows = pixel_patches(maps.shape[1], isqrt(patches))
    cells = 256 * (rows[:, None] * isqrt(patches) + rows)  # [px, px]
    counts = [np.bincount((cells + image).ravel(), minlength=256 * patches) for image in maps]
    return np.array(counts).reshape(len(maps), patches, 256)[..., :classes]


def paint_patches(values: Int[np.ndarray, "n p"], px: int) -> Int[np.ndarray, "n {px} {px}"]:
    """A number for each patch as one for each pixel."""
    side = isqrt(values.shape[1])
    rows = pixel_patches(px, side)
    return values.reshape(-1, side, side)[:, rows][:, :, rows]


def read_layer(
    encoder: Encoder, images: UInt8[Tensor, "n 3 h w"], layer: int, batch: int = BATCH
) -> Float[Tensor, "n p width"]:
    """Patch tokens of a layer; see `Encoder.tokens`."""
    return embed_patches(partial(encoder.tokens, layer=layer), images, encoder.mean.device, batch)


def some_world_scenes(encoder: Encoder, key: int, layer: int) -> tuple[np.ndarray, UInt8[Tensor, "n 3 px px"]]:
    """The scenes of `world_scenes` and their images, of a large tower as many as `HELD` allows."""
    scenes, images = world_scenes(WORLD, key)
    n = max(1, HELD // read_layer(encoder, images[:1], layer).numel())
    return scenes[:n], images[:n]
