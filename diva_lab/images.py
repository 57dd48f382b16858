"""Image sources: the tiny world, a folder of pictures, webdataset tars; and the augmentation of a batch.

A source hands out uint8 pictures [n, 3, px, px]. Which ones come at a step depends on (seed, step) alone, so a resumed
run sees what the uninterrupted one would have seen.
"""

import glob
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from diva_lab.world import World, draw_scenes

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def decode(data: bytes | str | Path, name: str, px: int) -> UInt8[np.ndarray, "px px 3"]:
    """One picture as RGB, upright, its shorter side resized to `px`, cut at the centre.

    Raises:
        ValueError: if the bytes are no picture that can be read; names `name`.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return np.asarray(
                ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (px, px), Image.Resampling.BICUBIC)
            )
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name}: not a picture that can be read ({error}); expected a whole {', '.join(SUFFIXES)} file. "
            "Remove or replace it and start again: nothing done so far is lost"
        ) from error


def _tensor(pictures: list[np.ndarray] | np.ndarray) -> UInt8[Tensor, "n 3 px px"]:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)


def _world_batches(world: World, n: int, seed: int, first: int) -> Iterator[Tensor]:
    step = first
    while True:
        yield _tensor(world.render(draw_scenes(n, (world.seed, 40, seed, step))))
        step += 1


def _folder_batches(files: list[Path], px: int, n: int, seed: int, first: int) -> Iterator[Tensor]:
    position, epoch, order = first * n, -1, np.zeros(0, int)
    while True:
        batch = []
        for k in range(position, position + n):
            if k // len(files) != epoch:
                epoch = k // len(files)
                order = np.random.default_rng((seed, epoch)).permutation(len(files))
            file = files[order[k % len(files)]]
            batch.append(decode(file, str(file), px))
        position += n
        yield _tensor(batch)


def _shard_batches(shards: list[str], px: int, n: int, seed: int, first: int) -> Iterator[Tensor]:
    import webdataset as wds

    def samples() -> Iterator[np.ndarray]:
        for epoch in range(10**9):
            order = np.random.default_rng((seed, epoch)).permutation(len(shards))
            data = wds.WebDataset([shards[i] for i in order], shardshuffle=False, empty_check=False)
            found = False
            for sample in data.shuffle(1000, seed=seed * 100_003 + epoch):
                name = next((key for key in sample if f".{key}".lower().endswith(SUFFIXES)), None)
                if name is not None:
                    found = True
                    yield sample[name], f"{sample['__url__']}: {sample['__key__']}.{name}"
            if not found:
                raise FileNotFoundError(f"no picture in {', '.join(shards)}; expected members like 000001.jpg")

    stream = samples()
    for _ in range(first * n):
        next(stream)
    while True:
        yield _tensor([decode(data, name, px) for data, name in (next(stream) for _ in range(n))])


def open_images(source: str | Path, px: int, n: int, seed: int, first: int = 0) -> Iterator[UInt8[Tensor, "n 3 px px"]]:
    """Endless batches of `n` pictures, starting with that of step `first`.

    Args:
        source: `world` or `world:SEED`; a folder, searched at every depth; or webdataset tars as a path, a glob
            (`cc3m/*.tar`) or a brace range (`cc3m/{0000..0331}.tar`).
        px: side of the pictures in pixels; the world renders at 32.

    Raises:
        FileNotFoundError: where there is no such folder or tar, or no picture in it.
        ValueError: when a picture cannot be read, naming it.
    """
    source = str(source)
    if source.partition(":")[0] == "world":
        if not source.partition(":")[2].isdecimal() and source != "world":
            raise ValueError(f"images={source!r}: expected 'world' or 'world:SEED' with a whole number, as 'world:3'")
        return _world_batches(World(int(source.partition(":")[2] or 0)), n, seed, first)
    if source.endswith(".tar"):
        import braceexpand

        shards = [path for part in braceexpand.braceexpand(source) for path in sorted(glob.glob(part))]
        if not shards:
            raise FileNotFoundError(f"images={source!r}: no such tar; expected webdataset shards")
        return _shard_batches(shards, px, n, seed, first)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"images={source!r}: no such folder; expected 'world', a folder of pictures, or tars")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"images={source!r}: no picture in this folder; expected {', '.join(SUFFIXES)} files")
    return _folder_batches(files, px, n, seed, first)


def augment(
    images: Float[Tensor, "b 3 h w"], generator: torch.Generator, flips: bool = True
) -> Float[Tensor, "b 3 h w"]:
    """DCR's augmentation of pictures in [0, 1], drawn anew for each: colour jitter, crop, flips.

    ColorJitter(.1, .1, .1, .05), RandomResizedCrop scale (.9, 1), ratio (.9, 1.1), and with `flips` a horizontal and a
    vertical flip with p = .5 each. As positives of a contrast the flips teach invariance to orientation and text, two
    of MMVP's nine patterns: an ablation. The released code augments after normalisation; here, as in the paper, before.
    """
    height, width = images.shape[-2:]
    draws = torch.rand(len(images), 10, generator=generator).tolist()
    views = []
    for image, u in zip(images, draws, strict=True):
        area, ratio = 0.9 + 0.1 * u[0], 0.9 * (1.1 / 0.9) ** u[1]
        h = min(height, round(height * (area / ratio) ** 0.5))
        w = min(width, round(width * (area * ratio) ** 0.5))
        top, left = round(u[2] * (height - h)), round(u[3] * (width - w))
        image = transforms.resized_crop(image, top, left, h, w, [height, width], antialias=True)
        image = transforms.adjust_brightness(image.clamp(0, 1), 0.9 + 0.2 * u[4])
        image = transforms.adjust_contrast(image, 0.9 + 0.2 * u[5])
        image = transforms.adjust_saturation(image, 0.9 + 0.2 * u[6])
        image = transforms.adjust_hue(image, 0.1 * u[7] - 0.05)
        if flips and u[8] < 0.5:
            image = image.flip(-1)
        if flips and u[9] < 0.5:
            image = image.flip(-2)
        views.append(image)
    return torch.stack(views)
