"""Endless batches of images to train on, and their augmentation.

A source yields uint8 images [n, 3, px, px], with captions where they are asked for. Which ones come depends on the seed
and the position alone, so a resumed run sees what an uninterrupted one would have seen. An image that cannot be read,
or has no caption, is skipped and listed.

In training all models see one square, cut at the centre: the denoiser is to reconstruct what the encoder saw. The
encoder's own resize mode, such as SigLIP's and DFN's `squash`, is used in evaluation only. The papers' released code
draws the square's place and shape; see `crop_square`.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import chain, count, islice
from multiprocessing import get_context
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from diva_lab import messages, remote
from diva_lab.captions import folder_captions, mention_details, refuse_column
from diva_lab.image_files import (
    SUFFIXES,
    LeftOut,
    Place,
    Sample,
    crop_square,
    dataset_cell,
    dealt_order,
    decode_square,
    draw_box,
    find_images,
    find_tars,
    is_dataset,
    open_dataset,
    read_tars,
)
from diva_lab.world import World, draw_scenes, named_world

PATIENCE = 100  # unreadable samples in a row that are taken for a broken source
# images; their captions, if asked for; what was skipped before them; how many samples were taken for them
Batch = tuple[Tensor, list[str], list[LeftOut], int]
Crop = tuple[int, ...] | None


class Images:
    """Endless batches of images.

    Attributes:
        position: samples taken for the batches handed out so far, broken ones included.
        captions: of the last batch that was handed out; empty where they were not asked for.
        skipped: name and reason of each broken one among them, and of each image that the source holds and does not
            hand out: a folder's at once, a tar's with the sample beside it. May be cleared once it is read.
    """

    def __init__(self, batches: Iterator[Batch], position: int, skipped: Sequence[LeftOut] = ()):
        self.batches, self.position = batches, position
        self.captions: list[str] = []
        self.skipped: list[LeftOut] = list(skipped)

    def __iter__(self) -> "Images":
        return self

    def __next__(self) -> UInt8[Tensor, "n 3 px px"]:
        images, self.captions, skipped, taken = next(self.batches)
        self.position += taken
        self.skipped += skipped
        return images


def _tensor(images: list[np.ndarray] | np.ndarray) -> UInt8[Tensor, "n 3 px px"]:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def _world_batches(
    world: World, n: int, seed: int, first: int, rank: int, mentions: float | None, crop: Crop
) -> Iterator[Batch]:
    for step in count(first // n):
        place = (seed, step, *([rank] if rank else []))
        scenes = draw_scenes(n, (world.seed, 40, *place))
        texts = [] if mentions is None else mention_details(scenes, (world.seed, 41, *place), mentions)
        images = world.render(scenes)
        if crop is not None:
            images = np.stack(
                [
                    np.asarray(crop_square(Image.fromarray(image), len(image), _crop_draws(crop, n * step + i)))
                    for i, image in enumerate(images)
                ]
            )
        yield _tensor(images), texts, [], n


def _crop_draws(crop: Crop, number: int) -> np.random.Generator | None:
    return None if crop is None else np.random.default_rng((*crop, number))


def _decoded(samples: Iterator[tuple], px: int, n: int, source: str, captioned: bool, workers: int) -> Iterator[Batch]:
    """Batches of `n` of the samples and their draws, decoded in a pool, the next one while the last is used."""
    images, texts, skipped, taken = [], [], [], 0  # the batch so far
    unread = []  # the broken ones since the last readable image
    with ProcessPoolExecutor(workers, get_context("spawn")) if workers else ThreadPoolExecutor(os.cpu_count()) as pool:
        for sample, image, reason in _decode_ahead(samples, px, 2 * n, pool):
            taken += 1
            if captioned and not sample.caption and not reason:
                reason = "no caption, or none in UTF-8"
            if reason:
                unread.append(LeftOut(sample.name, reason))
                skipped.append(unread[-1])
            else:
                images.append(image)
                texts += [sample.caption] if captioned else []
                unread = []
            skipped += sample.left_out
            if len(unread) == PATIENCE:
                raise _too_many(unread, source)
            if len(images) == n:
                yield _tensor(images), texts, skipped, taken
                images, texts, skipped, taken = [], [], [], 0


def _decode_ahead(
    samples: Iterator[tuple[Sample, np.random.Generator | None]], px: int, ahead: int, pool: Executor
) -> Iterator[tuple[Sample, np.ndarray | None, str]]:
    """Each sample without its data, its image or None, and why there is none; `ahead` of them are being decoded."""
    queue: deque = deque()
    large = Lock() if isinstance(pool, ThreadPoolExecutor) else None
    for sample, random in samples:
        queue.append((sample._replace(data=b""), pool.submit(decode_square, sample.data, px, large, random)))
        if len(queue) <= ahead:
            continue
        sample, image = queue.popleft()
        try:
            yield sample, image.result(), ""
        except ValueError as error:
            yield sample, None, str(error)


def _too_many(unread: list[LeftOut], source: str) -> ValueError:
    name, reason = unread[0]
    return ValueError(
        f"images={source!r}: {len(unread)} samples in a row ({len(set(unread))} different ones) cannot be read, "
        f"the first is {name} ({reason}); expected whole {', '.join(SUFFIXES)} files. Replace or remove what is "
        "broken and start again: nothing done so far is lost"
    )


def open_images(
    source: str | Path,
    px: int,
    n: int,
    seed: int,
    first: int = 0,
    rank: int = 0,
    processes: int = 1,
    captions: str | None = None,
    mentions: float = 1.0,
    crop: Crop = None,
    resampled: bool = False,
    workers: int = 0,
) -> Images:
    """Endless batches of `n` images, uint8 [n, 3, px, px], from the sample `first` on; each process has its own.

    Args:
        source: `world` or `world:SEED`; a folder, searched at every depth; webdataset tars as a path or a URL of
            `remote.SCHEMES`, with a glob (`cc3m/cc3m-train-*.tar`) or a brace range (`{0000..0575}`); or
            `hf:FOLDER_OR_ID[:SPLIT]`, a Hugging Face dataset that was saved to disk, a folder that
            `datasets.load_dataset` reads, or one of the hub. Its images are the first column of type `datasets.Image`,
            its split is `train` or the only one.
        px: side of the images in pixels; the world renders at 32.
        first: `position` of the process's `Images` when it was left, with the same `n`.
        captions: None for images alone; "" for captions too, or of a Hugging Face dataset the name of their column
            (see `text_column`). A folder's lie in `captions.csv` or NAME.txt, a tar's in its .txt members. No other
            source takes a name.
        mentions: the world's captions mention each detail with p ~ U(0, mentions), drawn for each image.
        crop: None for the square at an image's centre; or numbers, of which with that of the sample the draws of
            `crop_square` are made.
        resampled: whether each process draws its tars with replacement; read of tars alone.
        workers: processes that decode; 0 for threads. The images and their order are the same.

    Raises:
        FileNotFoundError: where there is no such folder, tar or dataset, no image in it, or no caption asked for.
        ValueError: for a source that cannot be understood, and when a hundred samples in a row cannot be read.
        ConnectionError: where a tar cannot be fetched.
    """
    source = str(source)
    if not is_dataset(source):
        refuse_column(source, captions)
    if (world := named_world(source)) is not None:
        mentioned = None if captions is None else mentions
        return Images(_world_batches(world, n, seed, first, rank, mentioned, crop), first)
    left_out: list[LeftOut] = []
    if is_dataset(source):
        rows = open_dataset(source, captions)
        order = dealt_order(len(rows), seed, first, rank, processes)
        samples = _dataset_samples(rows, order, source)
    elif source.endswith(".tar") and not Path(source).is_dir():
        samples = read_tars(find_tars(source), seed, first, rank, processes, resampled=resampled)
        samples = samples if captions is None else _require_caption(samples, source)
    else:
        files, left_out = _folder_images(source)
        texts = {} if captions is None else folder_captions(Path(source), files)
        order = (files[i] for i in dealt_order(len(files), seed, first, rank, processes))
        samples = (Sample(Place(str(file)), str(file), texts.get(file)) for file in order)
    told = left_out if first == 0 and rank == 0 else []
    drawn = ((sample, _crop_draws(crop, first + i)) for i, sample in enumerate(samples))
    return Images(_decoded(drawn, px, n, source, captions is not None, workers), first, told)


def _folder_images(source: str) -> tuple[list[Path], list[LeftOut]]:
    """The images in a folder and what was left out; refused where there is none, saying what there is instead."""
    if remote.scheme_of(source):
        raise ValueError(f"images={source!r}: of a URL only webdataset tars are read; expected one that ends in .tar")
    if not source.strip() or not os.path.isdir(source):
        found = "a file, not a folder" if os.path.exists(source) else "empty"
        if source.strip() and not os.path.exists(source):
            found = f"no such folder{messages.read_from(source)}"
        raise FileNotFoundError(
            f"images={source!r}: {found}; expected 'world', a folder of images, tars (.tar), or 'hf:DATASET'"
        )
    files, left_out = find_images(Path(source))
    if files:
        return files, left_out
    instead = f"; {len(left_out)} left out, the first: {': '.join(left_out[0])}" if left_out else ""
    if tars := [name for name, _ in left_out if name.lower().endswith(".tar")]:
        instead = f", but {len(tars)} tars; name them as images={str(Path(tars[0]).parent / '*.tar')!r}"
    raise FileNotFoundError(
        f"images={source!r}: no image in this folder{instead}; expected {', '.join(SUFFIXES)} files"
    )


def _dataset_samples(rows, order: Iterator[int], source: str) -> Iterator[Sample]:
    for i in order:
        row = rows[int(i)]
        yield Sample(dataset_cell(row), f"{source}: row {i}", (row.get("caption") or "").strip() or None)


def _require_caption(samples: Iterator[Sample], source: str) -> Iterator[Sample]:
    """The same samples; refused where none of the first `PATIENCE` has a caption."""
    first = list(islice(samples, PATIENCE))
    if not any(sample.caption for sample in first):
        raise FileNotFoundError(f"images={source!r}: no captions; expected .txt members beside the images")
    return chain(first, samples)


def augment(
    images: Float[Tensor, "b 3 h w"], generator: torch.Generator, flips: bool = True
) -> Float[Tensor, "b 3 h w"]:
    """DCR's augmentation of images in [0, 1], drawn anew for each: colour jitter, crop, flips.

    ColorJitter(.1, .1, .1, .05), RandomResizedCrop scale (.9, 1), ratio (.9, 1.1), and with `flips` a horizontal and a
    vertical flip with p = .5 each. As positives of a contrast the flips teach invariance to orientation and text, two
    of MMVP's nine patterns: an ablation. The released code augments after normalisation: `augment_pixels`.
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


def augment_pixels(
    pixels: Float[Tensor, "b 3 h w"], generator: torch.Generator, flips: bool = True
) -> Float[Tensor, "b 3 h w"]:
    """DCR's augmentation as its released code has it: image by image, of an encoder's *normalised* input.

    torchvision's colour jitter, in a random order of its four parts, clamps what it is given to [0, 1]: of the
    normalised values all below 0 and above 1 are lost.
    """
    views = []
    for view in pixels.float():
        u = torch.rand(6, generator=generator).tolist()
        jitter = (
            lambda x, u=u: transforms.adjust_brightness(x, 0.9 + 0.2 * u[0]),
            lambda x, u=u: transforms.adjust_contrast(x, 0.9 + 0.2 * u[1]),
            lambda x, u=u: transforms.adjust_saturation(x, 0.9 + 0.2 * u[2]),
            lambda x, u=u: transforms.adjust_hue(x, 0.1 * u[3] - 0.05),
        )
        for i in torch.randperm(4, generator=generator).tolist():
            view = jitter[i](view)
        if flips and u[4] < 0.5:
            view = view.flip(2)
        if flips and u[5] < 0.5:
            view = view.flip(1)
        random = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        left, top, w, h = draw_box(view.shape[2], view.shape[1], random, (0.9, 1.1))
        views.append(transforms.resized_crop(view, top, left, h, w, list(view.shape[1:]), antialias=True))
    return torch.stack(views)
