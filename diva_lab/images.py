"""Image sources: the tiny world, a folder, webdataset tars, Hugging Face datasets; and the augmentation of a batch.

A source hands out uint8 pictures [n, 3, px, px]. Which ones come depends on the seed and the position alone, so a
resumed run sees what the uninterrupted one would have seen. A picture that cannot be read is skipped and listed.

In training all models see one square, cut at the centre: the denoiser is to reconstruct what the encoder saw. A resize
mode of the encoder's own, as SigLIP's and DFN's `squash`, so only tells in evaluation. DIVA's released code too gives
SigLIP the denoiser's square, made smaller, but draws its place and shape: RandomResizedCrop, scale (.9, 1).
"""

import functools
import glob
import io
import math
import os
import re
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from diva_lab.world import World, draw_scenes

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PATIENCE = 100  # unreadable samples in a row that are taken for a broken source
CC3M = "pixparse/cc3m-wds"  # 576 tars to train on, cc3m-train-0000.tar ..., and 16 of validation

Sample = tuple[bytes | Path | ValueError, str]  # a picture's file, or why there is none; its name
Batch = tuple[Tensor, list[tuple[str, str]]]  # pictures; name and reason of what was skipped on the way to them


class Images:
    """Endless batches of pictures.

    Attributes:
        position: samples taken for the batches handed out so far, broken ones included.
        skipped: name and reason of each broken one among them; may be cleared once it is read.
    """

    def __init__(self, batches: Iterator[Batch], position: int):
        self.batches, self.position = batches, position
        self.skipped: list[tuple[str, str]] = []

    def __iter__(self) -> "Images":
        return self

    def __next__(self) -> UInt8[Tensor, "n 3 px px"]:
        images, broken = next(self.batches)
        self.position += len(images) + len(broken)
        self.skipped += broken
        return images


def decode(data: bytes | Path | ValueError, px: int) -> UInt8[np.ndarray, "px px 3"]:
    """One picture as RGB, upright, its shorter side resized to `px`, cut at the centre.

    Raises:
        ValueError: if it cannot be read; says why.
    """
    if isinstance(data, ValueError):
        raise data
    try:
        with Image.open(io.BytesIO(data if isinstance(data, bytes) else data.read_bytes())) as image:
            return np.asarray(
                ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (px, px), Image.Resampling.BICUBIC)
            )
    except Exception as error:  # Pillow's readers let through whatever a broken file makes them raise
        reason = str(error).partition(" <_io.")[0]  # without an address in memory
        raise ValueError(f"{type(error).__name__}: {reason}") from error


def _tensor(pictures: list[np.ndarray] | np.ndarray) -> UInt8[Tensor, "n 3 px px"]:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)


def _world_batches(world: World, n: int, seed: int, first: int, rank: int) -> Iterator[Batch]:
    place = (rank,) if rank else ()
    for step in count(first // n):
        yield _tensor(world.render(draw_scenes(n, (world.seed, 40, seed, step, *place)))), []


def _decoded(samples: Iterator[Sample], px: int, n: int, source: str) -> Iterator[Batch]:
    """Batches of `n`, decoded by threads, the next one while the last is used."""
    row: list[tuple[str, str]] = []  # the broken ones since the last readable picture
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = deque((name, pool.submit(decode, data, px)) for data, name in islice(samples, 2 * n))
        while True:
            pictures, broken = [], []
            while len(pictures) < n:
                name, picture = ahead.popleft()
                data, following = next(samples)
                ahead.append((following, pool.submit(decode, data, px)))
                try:
                    pictures.append(picture.result())
                    row = []
                except ValueError as error:
                    row.append((name, str(error)))
                    broken.append(row[-1])
                    if len(row) == PATIENCE:
                        raise ValueError(
                            f"images={source!r}: {PATIENCE} samples in a row ({len(set(row))} different ones) cannot "
                            f"be read, the first is {row[0][0]} ({row[0][1]}); expected whole {', '.join(SUFFIXES)} "
                            "files. Replace or remove what is broken and start again: nothing done so far is lost"
                        ) from error
            yield _tensor(pictures), broken


def _order(length: int, seed: int, first: int, rank: int, processes: int) -> Iterator[int]:
    """Numbers below `length` in a new order each epoch, dealt to the processes in turn; without a process's `first`."""
    epoch = -1
    for place in count(first * processes + rank, processes):
        if place // length != epoch:
            epoch = place // length
            order = np.random.default_rng((seed, epoch)).permutation(length)
        yield order[place % length]


def tars(source: str) -> list[str]:
    """The webdataset tars that a path, a glob or a brace range names.

    Raises:
        FileNotFoundError: where there is none; of CC3M's it says what fetches them.
    """
    import braceexpand

    found = [path for part in braceexpand.braceexpand(source) for path in sorted(glob.glob(part))]
    if not found:
        place, fetch = Path(source), ""
        if place.name.startswith("cc3m-"):
            fetch = f"; fetch with network: hf download --repo-type dataset {CC3M} --local-dir {place.parent}"
        raise FileNotFoundError(f"images={source!r}: no such tar; expected webdataset shards{fetch}")
    return found


def _pictures(tar: str, samples: Iterable[dict]) -> Iterator[Sample]:
    """Those of a tar's samples that hold a picture; what follows a cut counts as one broken sample."""
    try:
        for sample in samples:
            name = next((key for key in sample if f".{key}".lower().endswith(SUFFIXES)), None)
            if name is not None:
                yield sample[name], f"{tar}: {sample['__key__']}.{name}"
    except Exception as error:  # of tarfile, of what unpacks it, of webdataset
        yield ValueError(f"{type(error).__name__}: not a whole tar"), tar


def _headers(tar: str) -> Iterator[dict]:
    """A tar's members as webdataset hands them to its grouping, but without their data, which is passed over."""
    with tarfile.open(tar) as file:
        for member in file:
            if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
                data = file.extractfile(member)
                data.seek(max(0, member.size - 1))
                data.read(1)  # raises where the tar is cut off before
                yield {"fname": member.name, "data": b"", "__url__": tar}


@functools.cache
def _length(tar: str) -> int:
    """How many samples `_members` makes of a tar, broken ones included, from its headers alone."""
    from webdataset.tariterators import group_by_keys

    return sum(1 for _ in _pictures(tar, group_by_keys(_headers(tar))))


def _members(shards: list[str], seed: int, first: int, rank: int, processes: int) -> Iterator[Sample]:
    """The pictures in a process's tars, from the sample number `first` on.

    The order of the shards is new each epoch, every process takes its part of it, and the samples are shuffled. Of the
    epochs before that of `first` only the tars' headers are read.
    """
    import webdataset as wds

    def order(epoch: int) -> list[str]:
        return [shards[i] for i in np.random.default_rng((seed, epoch)).permutation(len(shards))[rank::processes]]

    def samples(start: int) -> Iterator[Sample]:
        for epoch in count(start):
            found = (s for tar in order(epoch) for s in _pictures(tar, wds.tarfile_to_samples()([{"url": tar}])))
            sample = None
            for sample in wds.shuffle(1000, seed=(seed * 100_003 + epoch) * processes + rank)(found):
                yield sample
            if sample is None:
                raise FileNotFoundError(f"no picture in {', '.join(shards)}; expected members like 000001.jpg")

    start = 0
    while first:
        length = 0
        for length in accumulate(map(_length, order(start))):
            if length > first:
                break
        if not 0 < length <= first:  # it lies in this epoch; or there is no picture, as `samples` will say
            break
        first, start = first - length, start + 1
    return islice(samples(start), first, None)


def _dataset(source: str):
    """The `datasets.Dataset` that `hf:FOLDER_OR_ID[:SPLIT]` names, only its pictures, not decoded."""
    import datasets
    from huggingface_hub import snapshot_download

    name, _, split = source.removeprefix("hf:").partition(":")
    folder = Path(name).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(name, repo_type="dataset"))
    except (OSError, ValueError) as error:  # what the hub's client raises is one of the two
        raise FileNotFoundError(
            f"images={source!r}: no folder {name}, and no dataset of this id on the hub or in its cache "
            f"({type(error).__name__}); fetch it, with network: hf download --repo-type dataset {name}"
        ) from error
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        found = datasets.load_from_disk(folder) if saved else datasets.load_dataset(str(folder))
    except Exception as error:  # of datasets, of pyarrow, of what reads a card
        raise ValueError(
            f"images={source!r}: datasets cannot load {folder} ({type(error).__name__}: {error}); expected what "
            "Dataset.save_to_disk wrote, parquet files, or a folder of pictures"
        ) from error
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    split = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if split not in splits:
        raise ValueError(
            f"images={source!r}: no split {split!r}; expected one of {', '.join(splits)}, as hf:NAME:SPLIT"
        )
    rows = splits[split]
    column = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise ValueError(f"images={source!r}: only {', '.join(rows.features)}; expected a column of datasets.Image")
    return rows.select_columns(column).cast_column(column, datasets.Image(decode=False))


def _cell(row: dict) -> bytes | Path | ValueError:
    """The file in the only column of a row."""
    (image,) = row.values()
    data, path = (image["bytes"], image["path"]) if image else (None, None)
    return data or (Path(path) if path else ValueError("no picture in this row"))


def open_images(
    source: str | Path, px: int, n: int, seed: int, first: int = 0, rank: int = 0, processes: int = 1
) -> Images:
    """Endless batches of `n` pictures, uint8 [n, 3, px, px], from the sample `first` on; each process has its own.

    Args:
        source: `world` or `world:SEED`; a folder, searched at every depth; webdataset tars as a path, a glob
            (`cc3m/cc3m-train-*.tar`) or a brace range (`{0000..0575}`); or `hf:FOLDER_OR_ID[:SPLIT]`, a Hugging Face
            dataset that was saved to disk, a folder that `datasets.load_dataset` reads, or one of the hub. Its pictures
            are the first column of type `datasets.Image`, its split is `train` or the only one.
        px: side of the pictures in pixels; the world renders at 32.
        first: `position` of the process's `Images` when it was left, with the same `n`.

    Raises:
        FileNotFoundError: where there is no such folder, tar or dataset, or no picture in it.
        ValueError: for a source that cannot be understood, and when a hundred samples in a row cannot be read.
    """
    source = str(source)
    kind, _, rest = source.partition(":")
    if kind == "world":
        if not rest.isdecimal() and source != "world":
            raise ValueError(f"images={source!r}: expected 'world' or 'world:SEED' with a whole number, as 'world:3'")
        return Images(_world_batches(World(int(rest or 0)), n, seed, first, rank), first)
    if kind == "hf":
        rows = _dataset(source)
        samples = ((_cell(rows[i]), f"{source}: row {i}") for i in _order(len(rows), seed, first, rank, processes))
    elif source.endswith(".tar"):
        shards = tars(source)
        if len(shards) < processes:
            raise ValueError(f"images={source!r}: {len(shards)} tars for {processes} processes; expected one each")
        samples = _members(shards, seed, first, rank, processes)
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"images={source!r}: no such folder; expected 'world', a folder of pictures, tars, or 'hf:DATASET'"
            )
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise FileNotFoundError(
                f"images={source!r}: no picture in this folder; expected {', '.join(SUFFIXES)} files"
            )
        samples = ((files[i], str(files[i])) for i in _order(len(files), seed, first, rank, processes))
    return Images(_decoded(samples, px, n, source), first)


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
