"""Image sources: the tiny world, a folder of pictures, webdataset tars; and the augmentation of a batch.

A source hands out uint8 pictures [n, 3, px, px]. Which ones come at a step depends on (seed, step) alone, so a resumed
run sees what the uninterrupted one would have seen.
"""

import glob
import io
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

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


def _world_batches(world: World, n: int, seed: int, first: int, rank: int) -> Iterator[Tensor]:
    place = (rank,) if rank else ()
    for step in count(first):
        yield _tensor(world.render(draw_scenes(n, (world.seed, 40, seed, step, *place))))


def _decoded(samples: Iterator[tuple[bytes | Path, str]], px: int, n: int) -> Iterator[Tensor]:
    """Batches of `n`, decoded by threads, the next one while the last is used; an unreadable picture is met in turn."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead: deque[Future] = deque()
        while True:
            while len(ahead) < 2 * n:
                ahead.append(pool.submit(decode, *next(samples), px))
            yield _tensor([ahead.popleft().result() for _ in range(n)])


def _own(samples: Iterator, n: int, rank: int, processes: int) -> Iterator:
    """Of every `processes` batches of `n` samples the one of number `rank`."""
    return (sample for i, sample in enumerate(samples) if i // n % processes == rank)


def _files(files: list[Path], seed: int, first: int) -> Iterator[tuple[Path, str]]:
    """The files in a new order each epoch, from the sample number `first` on."""
    for epoch in count(first // len(files)):
        order = np.random.default_rng((seed, epoch)).permutation(len(files))
        for place in order[first % len(files) if epoch == first // len(files) else 0 :]:
            yield files[place], str(files[place])


def _members(shards: list[str], seed: int, first: int, rank: int, processes: int) -> Iterator[tuple[bytes, str]]:
    """The pictures in a process's tars, from the sample number `first` on.

    The order of the shards is new each epoch, every process takes its part of it, and the samples are shuffled.
    """
    import webdataset as wds

    def samples() -> Iterator[tuple[bytes, str]]:
        for epoch in count():
            order = np.random.default_rng((seed, epoch)).permutation(len(shards))[rank::processes]
            data = wds.WebDataset([shards[i] for i in order], shardshuffle=False, empty_check=False)
            found = False
            for sample in data.shuffle(1000, seed=(seed * 100_003 + epoch) * processes + rank):
                name = next((key for key in sample if f".{key}".lower().endswith(SUFFIXES)), None)
                if name is not None:
                    found = True
                    yield sample[name], f"{sample['__url__']}: {sample['__key__']}.{name}"
            if not found:
                raise FileNotFoundError(f"no picture in {', '.join(shards)}; expected members like 000001.jpg")

    return islice(samples(), first, None)


def open_images(
    source: str | Path, px: int, n: int, seed: int, first: int = 0, rank: int = 0, processes: int = 1
) -> Iterator[UInt8[Tensor, "n 3 px px"]]:
    """Endless batches of `n` pictures, starting with that of step `first`; each process has its own.

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
        return _world_batches(World(int(source.partition(":")[2] or 0)), n, seed, first, rank)
    if source.endswith(".tar"):
        import braceexpand

        shards = [path for part in braceexpand.braceexpand(source) for path in sorted(glob.glob(part))]
        if not shards:
            raise FileNotFoundError(f"images={source!r}: no such tar; expected webdataset shards")
        if len(shards) < processes:
            raise ValueError(f"images={source!r}: {len(shards)} tars for {processes} processes; expected one each")
        return _decoded(_members(shards, seed, first * n, rank, processes), px, n)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"images={source!r}: no such folder; expected 'world', a folder of pictures, or tars")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"images={source!r}: no picture in this folder; expected {', '.join(SUFFIXES)} files")
    return _decoded(_own(_files(files, seed, first * n * processes), n, rank, processes), px, n)


def augment(
    images: Float[Tensor, "b 3 h w"], generator: torch.Generator, flips: bool = True
) -> Float[Tensor, "b 3 h w"]:
    """DCR's augmentation of pictures in [0, 1], drawn anew for each: colour jitter, crop, flips.

    ColorJitter(.1, .1, .1, .05), RandomResizedCrop scale (.9, 1), ratio (.9, 1.1), and with `flips` a horizontal and a
    vertical flip with p = .5 each. As positives of a contrast the flips teach invariance to orientation and text, two
    of MMVP's nine patterns: an ablation. The released code augments after normalisation; here, as in the paper, before.
    """
    from kornia import enhance

    u = torch.rand(len(images), 10, generator=generator).T[..., None].to(images.device)  # [10, b, 1]
    area, ratio = 0.9 + 0.1 * u[0], 0.9 * (1.1 / 0.9) ** u[1]
    sides = []
    for size, length, place, flip in (
        (images.shape[-1], (area * ratio).sqrt(), u[2], u[8]),
        (images.shape[-2], (area / ratio).sqrt(), u[3], u[9]),
    ):
        length = length.clamp(max=1)  # of the crop, in parts of the side; coordinates run from -1 to 1
        way = torch.where(flip < 0.5, -1.0, 1.0) if flips else 1.0
        step = (torch.arange(size, device=images.device) + 0.5) * (2 / size) - 1
        sides.append((2 * place - 1) * (1 - length) + length * way * step)  # [b, size]
    x, y = sides[0][:, None, :], sides[1][:, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # [b, h, w, 2]
    images = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).clamp(0, 1)
    images = enhance.adjust_brightness_accumulative(images, 0.9 + 0.2 * u[4, :, 0])
    images = enhance.adjust_contrast_with_mean_subtraction(images, 0.9 + 0.2 * u[5, :, 0])
    images = enhance.adjust_saturation_with_gray_subtraction(images, 0.9 + 0.2 * u[6, :, 0])
    return enhance.adjust_hue(images, 2 * math.pi * (0.1 * u[7, :, 0] - 0.05))
