"""Image files in folders, webdataset tars and Hugging Face datasets: where each image lies, and decoding."""

import functools
import glob
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import accumulate, count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CC3M = "pixparse/cc3m-wds"  # 576 tars to train on, cc3m-train-0000.tar ..., and 16 of validation
Sample = tuple[bytes | Path | ValueError, str, str | None]  # an image's file, or why there is none; its name; caption


def find_images(folder: Path) -> list[Path]:
    """The image files in a folder, at every depth, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def decode_square(data: bytes | Path | ValueError, px: int) -> UInt8[np.ndarray, "px px 3"]:
    """One image as RGB, upright, its shorter side resized to `px`, cut at the centre.

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


def find_tars(source: str) -> list[str]:
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


def _tar_images(tar: str, samples: Iterable[dict]) -> Iterator[Sample]:
    """Those of a tar's samples that hold an image; what follows a cut counts as one broken sample."""
    try:
        for sample in samples:
            name = next((key for key in sample if f".{key}".lower().endswith(SUFFIXES)), None)
            if name is not None:
                text = sample.get("txt", b"").decode(errors="replace").strip()
                yield sample[name], f"{tar}: {sample['__key__']}.{name}", text or None
    except Exception as error:  # of tarfile, of what unpacks it, of webdataset
        yield ValueError(f"{type(error).__name__}: not a whole tar"), tar, None


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

    return sum(1 for _ in _tar_images(tar, group_by_keys(_headers(tar))))


def read_tars(
    shards: list[str], seed: int = 0, first: int = 0, rank: int = 0, processes: int = 1, epochs: int | None = None
) -> Iterator[Sample]:
    """The images in a process's tars, from the sample number `first` on, over so many epochs (None: endless).

    The order of the shards is new each epoch, every process takes its part of it, and the samples are shuffled. Of the
    epochs before that of `first` only the tars' headers are read.
    """
    import webdataset as wds

    def order(epoch: int) -> list[str]:
        return [shards[i] for i in np.random.default_rng((seed, epoch)).permutation(len(shards))[rank::processes]]

    def samples(start: int) -> Iterator[Sample]:
        for epoch in islice(count(start), epochs):
            found = (s for tar in order(epoch) for s in _tar_images(tar, wds.tarfile_to_samples()([{"url": tar}])))
            sample = None
            for sample in wds.shuffle(1000, seed=(seed * 100_003 + epoch) * processes + rank)(found):
                yield sample
            if sample is None:
                raise FileNotFoundError(f"no image in {', '.join(shards)}; expected members like 000001.jpg")

    start = 0
    while first:
        length = 0
        for length in accumulate(map(_length, order(start))):
            if length > first:
                break
        if not 0 < length <= first:  # it lies in this epoch; or there is no image, as `samples` will say
            break
        first, start = first - length, start + 1
    return islice(samples(start), first, None)


def dealt_order(length: int, seed: int, first: int, rank: int, processes: int) -> Iterator[int]:
    """Numbers below `length` in a new order each epoch, dealt to the processes in turn; without a process's `first`."""
    epoch = -1
    for place in count(first * processes + rank, processes):
        if place // length != epoch:
            epoch = place // length
            order = np.random.default_rng((seed, epoch)).permutation(length)
        yield order[place % length]


def load_dataset(source: str):
    """The `datasets.Dataset` that `hf:FOLDER_OR_ID[:SPLIT]` names."""
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
            "Dataset.save_to_disk wrote, parquet files, or a folder of images"
        ) from error
    splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
    split = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if split not in splits:
        raise ValueError(
            f"images={source!r}: no split {split!r}; expected one of {', '.join(splits)}, as hf:NAME:SPLIT"
        )
    return splits[split]


def open_dataset(source: str, captions: str | None = None):
    """The images of `load_dataset`, not decoded, as the column `image`; with `captions` those as the column `caption`.

    The images are the first column of type `datasets.Image`; `captions` is as in `text_column`.
    """
    import datasets

    rows = load_dataset(source)
    image = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise ValueError(f"images={source!r}: only {', '.join(rows.features)}; expected a column of datasets.Image")
    names = {image: "image"} | ({} if captions is None else {text_column(source, rows, captions): "caption"})
    rows = rows.select_columns(list(names))
    return rows.rename_columns({a: b for a, b in names.items() if a != b}).cast_column(
        "image", datasets.Image(decode=False)
    )


def text_column(source: str, rows, name: str = "") -> str:
    """The column `name` of a dataset; of "" its only column of text, or the one that is called caption or text.

    Raises:
        ValueError: where there is none, or the choice is not clear; lists the columns of text.
    """
    texts = [key for key, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    named = [key for key in ("caption", "text") if key in texts][:1]
    chosen = [name] if name in texts else [] if name else texts if len(texts) == 1 else named
    if not chosen:
        found = ", ".join(texts) or f"none among {', '.join(rows.features)}"
        raise ValueError(f"{source}: captions={name!r}: no such column of text; found {found}; set captions=NAME")
    return chosen[0]


def dataset_cell(row: dict) -> bytes | Path | ValueError:
    """The image's file in a row."""
    image = row["image"]
    data, path = (image["bytes"], image["path"]) if image else (None, None)
    return data or (Path(path) if path else ValueError("no image in this row"))


class Place(NamedTuple):
    """Where an image's bytes lie: a whole file, or `size` bytes of one from `offset` on."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return self.path if self.size < 0 else f"{self.path} (byte {self.offset})"


def content_hash(places: Sequence[Place]) -> str:
    """A hash of all images' bytes, in their order."""
    whole = blake2b(digest_size=16)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(lambda place: blake2b(place.read(), digest_size=16).digest(), places):
            whole.update(part)
    return whole.hexdigest()
