"""Image files in folders, webdataset tars and Hugging Face datasets: where each image lies, and decoding.

Training and evaluation find images by the same functions. Only regular files are opened: a pipe or a device may never
end. An image that lies in a source and is not handed out is listed with the reason.
"""

import functools
import glob
import io
import math
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from hashlib import blake2b
from itertools import accumulate, chain, count, groupby, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from diva_lab import messages, remote

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # of several images of one name in a tar the first of these wins
OTHER_SUFFIXES = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jfif", ".svg")  # never handed out
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000")  # by content; Pillow starts no program for them
MAX_PIXELS = 89_478_485  # of an image: where Pillow begins to warn, 268 MB as RGB
MAX_BYTES = 300 * 2**20  # of an image's file
LARGE = 2**24  # pixels, from which on threads decode one image at a time
MAX_TARS = 100_000  # names that a brace range may stand for
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
END = "its end"  # stands for a member where a tar does not end as it should
CC3M = "pixparse/cc3m-wds"  # 576 tars to train on, cc3m-train-0000.tar ..., and 16 of validation


class LeftOut(NamedTuple):
    """An image, or a place where images may lie, that is not handed out."""

    name: str
    reason: str


# --- files ------------------------------------------------------------------------------------------------------


def open_regular(path: str | Path) -> BinaryIO:
    """A file, opened to be read.

    Raises:
        ValueError: for a pipe, a device or a folder. OSError: where it is not there or may not be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: not a regular file")
    return open(path, "rb")


class Place(NamedTuple):
    """Where an image's bytes lie: a whole file, `size` bytes of one from `offset` on, or `data`, read from `path`.

    `box` is the part of the image that is meant, as left, top, right and bottom in pixels; () for all of it.
    """

    path: str
    offset: int = 0
    size: int = -1
    data: bytes | None = None
    box: tuple[int, ...] = ()

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        with open_regular(self.path) as file:
            size = os.fstat(file.fileno()).st_size if self.size < 0 else self.size
            if size > MAX_BYTES:
                raise ValueError(f"{self}: {size} bytes; expected at most {MAX_BYTES}")
            file.seek(self.offset)
            return file.read(size)

    def __str__(self) -> str:
        path = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in self.path)  # on one line
        path += " (an image in it)" if self.data is not None else "" if self.size < 0 else f" (byte {self.offset})"
        return f"{path} {self.box}" if self.box else path


class Sample(NamedTuple):
    """An image's file, or why there is none; its name and caption; what was left out beside it."""

    data: bytes | Place | ValueError
    name: str
    caption: str | None = None
    left_out: tuple[LeftOut, ...] = ()


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or made by a desktop: `.ipynb_checkpoints`, `._x.jpg`."""
    return (name.startswith(".") and name.strip(".") != "") or name in ("__MACOSX", "@eaDir")


def visible(folder: Path) -> Iterator[Path]:
    """What lies in a folder, in no order, without clutter."""
    return (path for path in folder.iterdir() if not is_clutter(path.name))


def find_images(folder: Path) -> tuple[list[Path], list[LeftOut]]:
    """The image files in a folder, at every depth, in the order of their paths; and what was left out.

    Links to folders are followed, after what lies in the folder itself. Each folder is read once, and a link to the
    folder itself or to one above it is not followed.
    """
    found: list[Path] = []
    left_out: list[LeftOut] = []
    root = Path(os.path.realpath(folder))
    names = {str(place): str(place) for place in root.parents}  # of each folder that is not to be read again

    def not_read(error: OSError) -> None:
        left_out.append(LeftOut(str(error.filename), f"a folder that cannot be read ({type(error).__name__})"))

    starts = [str(folder)]
    for start in starts:  # grows by the links
        for here, folders, files in os.walk(start, onerror=not_read):
            if (same := names.setdefault(os.path.realpath(here), here)) is not here:
                left_out.append(LeftOut(here, f"the same folder as {same}, which is read once"))
                folders.clear()
                continue
            left_out += [LeftOut(os.path.join(here, name), "hidden") for name in folders if is_clutter(name)]
            folders[:] = sorted(name for name in folders if not is_clutter(name))
            starts += filter(os.path.islink, (os.path.join(here, name) for name in folders))
            reasons = {os.path.join(here, name): _why_left_out(name) for name in files}
            found += [Path(path) for path, reason in reasons.items() if reason == ""]
            left_out += [LeftOut(path, reason) for path, reason in reasons.items() if reason]
    return sorted(found), sorted(left_out)


def _why_left_out(name: str) -> str | None:
    """Why an image of this name is not handed out; "" where it is, None where it is no image."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".tar":
        return "a tar; expected images here, and tars named as FOLDER/*.tar"
    if suffix not in SUFFIXES + OTHER_SUFFIXES:
        return None
    if any(map(is_clutter, name.split("/"))):
        return "hidden"
    return "" if suffix in SUFFIXES else f"expected one of {', '.join(SUFFIXES)}"


# --- decoding ---------------------------------------------------------------------------------------------------


@contextmanager
def open_picture(
    data: bytes | Path | Place, upright: bool = False, large: AbstractContextManager | None = None
) -> Iterator[Image.Image]:
    """An image as RGB; `upright` turns it as its EXIF says. One of more than `LARGE` pixels is decoded within `large`.

    Raises:
        ValueError: if it cannot be read; says why.
    """
    box = data.box if isinstance(data, Place) else ()
    try:
        if not isinstance(data, bytes):
            data = (Place(str(data)) if isinstance(data, Path) else data).read()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; expected at most {MAX_PIXELS} in all")
            with (large if pixels > LARGE else None) or nullcontext():
                rgb = _to_rgb(image, upright)
                yield rgb.crop(box) if box else rgb
    except Exception as error:  # Pillow's readers let through whatever a broken file makes them raise
        reason = str(error).partition(" <_io.")[0]  # without an address in memory
        raise ValueError(f"{type(error).__name__}: {reason}") from error


def _to_rgb(image: Image.Image, upright: bool) -> Image.Image:
    if upright:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # Pillow would cut at 255. Of 16-bit RGB it takes the upper byte, as here
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32 bits a pixel (mode {image.mode}), in a range that is not known; expected 8 or 16")
    return image if image.mode == "RGB" else image.convert("RGB")  # without a copy: large images fill the memory


def draw_box(
    width: int, height: int, random: np.random.Generator, ratios: tuple[float, float] = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part of an image, as torchvision's RandomResizedCrop draws it.

    It has .9 to 1 of the area, and its width is to its height as `ratios` say. Where ten draws do not fit into the
    image, it is the largest part at the centre whose sides are within these ratios.
    """
    low, high = ratios
    for _ in range(10):
        area = random.uniform(0.9, 1) * width * height
        ratio = math.exp(random.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(width - w + 1)), int(random.integers(height - h + 1)), w, h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (width - w) // 2, (height - h) // 2, w, h


def crop_square(image: Image.Image, px: int, random: np.random.Generator) -> Image.Image:
    """A random part of an image (see `draw_box`), squashed into a square of `px` on each side, bicubic."""
    left, top, w, h = draw_box(*image.size, random)
    return image.crop((left, top, left + w, top + h)).resize((px, px), Image.Resampling.BICUBIC)


def decode_square(
    data: bytes | Path | Place | ValueError,
    px: int,
    large: AbstractContextManager | None = None,
    random: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "px px 3"]:
    """One image as RGB, upright, its shorter side resized to `px`, cut at the centre; `large` as in `open_picture`.

    With `random` it is cut as in `crop_square`.

    Raises:
        ValueError: if it cannot be read; says why.
    """
    if isinstance(data, ValueError):
        raise data
    with open_picture(data, True, large) as image:
        if random is not None:
            return np.asarray(crop_square(image, px, random))
        return np.asarray(ImageOps.fit(image, (px, px), Image.Resampling.BICUBIC))


# --- tars -------------------------------------------------------------------------------------------------------


def find_tars(source: str) -> list[str]:
    """The webdataset tars that a path, a glob or a brace range names.

    A path that exists is taken as it is, and so are the existing folders that a pattern begins with: `[`, `{` and `*`
    have a meaning only behind them. A URL has one of the schemes of `remote.SCHEMES`.

    Raises:
        FileNotFoundError: where there is none, or for another scheme; of CC3M's it says what fetches them.
        ValueError: for braces that cannot be understood.
        ModuleNotFoundError, ConnectionError: as `remote.list_shards`.
    """
    if remote.scheme_of(source):
        found = [url for name in _expand_braces(source, source) for url in remote.list_shards(name)]
        if not found:
            raise FileNotFoundError(f"images={source!r}: no such tar; expected webdataset shards")
        return found
    place, rest = Path(), list(Path(source).parts)
    while rest and os.path.exists(place / rest[0]):
        place /= rest.pop(0)
    if not rest:
        return [str(place)]
    root = glob.escape(str(place)) if place.parts else ""
    names = _expand_braces(source, "/".join(rest))
    found = [path for name in names for path in sorted(glob.glob(os.path.join(root, name)))]
    if not found:
        whole, fetch = Path(source), ""
        if whole.name.startswith("cc3m-"):
            fetch = f"; fetch with network: hf download --repo-type dataset {CC3M} --local-dir {whole.parent}"
        raise FileNotFoundError(
            f"images={source!r}: no such tar{messages.read_from(source)}; expected webdataset shards{fetch}"
        )
    return found


def _expand_braces(source: str, pattern: str) -> list[str]:
    import braceexpand

    names = []
    try:
        if all(abs(int(a) - int(b)) < MAX_TARS for a, b in re.findall(r"{(-?\d+)\.\.(-?\d+)", pattern)):
            names = list(islice(braceexpand.braceexpand(pattern), MAX_TARS + 1))
    except ValueError as error:
        raise ValueError(f"images={source!r}: {error}; expected a brace range such as {{0000..0575}}") from error
    if not 0 < len(names) <= MAX_TARS:
        raise ValueError(f"images={source!r}: more than {MAX_TARS} names; expected a smaller range, or *.tar")
    return names


def tar_members(file: BinaryIO) -> Iterator[tuple[str, Place | ValueError]]:
    """Name and place of each file in a tar, in its order, or why it is not to be read; webdataset's `__x__` left out.

    Raises:
        ValueError: where this is not one whole tar without compression; says why.
    """
    start = file.read(6)
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"compressed ({kind}); expected a plain tar: unpack it first")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield from _whole_members(tar, file)
    except Exception as error:  # of tarfile, whatever a broken header makes it raise
        raise ValueError(f"{type(error).__name__}: not a whole tar") from error


def _whole_members(tar: tarfile.TarFile, file: BinaryIO) -> Iterator[tuple[str, Place | ValueError]]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # they would be kept until the end
        if member.isdir() or re.match(r"__[^/]*__($|/)", member.name):
            continue
        file.seek(member.offset_data + max(0, member.size - 1))
        if member.isreg() and not member.issparse() and member.size and not file.read(1):
            raise tarfile.ReadError("cut off")
        yield member.name, _member_place(file.name, member)
    file.seek(tar.offset)
    end = file.read(2 * tarfile.RECORDSIZE)
    if not end or end.strip(b"\0"):  # cut between two members; a broken header; a second tar behind it
        yield END, ValueError("no mark of a tar's end; the tar is cut off, or what follows is not read")


def _member_place(path: str, member: tarfile.TarInfo) -> Place | ValueError:
    if any(map(is_clutter, member.name.split("/"))):
        return ValueError("hidden")
    if not member.isreg() or member.issparse():
        return ValueError("a link or another special member; expected a regular file")
    if member.size > MAX_BYTES:
        return ValueError(f"{member.size} bytes; expected at most {MAX_BYTES}")
    return Place(path, member.offset_data, member.size)


class TarImage(NamedTuple):
    """An image of a tar: its name; its place, or why it is not to be used; what belongs to it: kind -> place."""

    name: str
    place: Place | ValueError
    parts: dict[str, Place]


def choose_images(key: str, members: Sequence[tuple[str, Place]]) -> tuple[list[TarImage], list[LeftOut]]:
    """The images among the members of one key (their endings and places), and those that are left out.

    KEY.jpg is the image, and KEY.seg.png beside it is left out. Where there is no KEY.jpg the dots belong to the names:
    KEY.01.jpg and KEY.02.jpg are two images. To each belongs its own KEY.01.txt, or else KEY.txt.
    """
    stems: dict[str, dict[str, Place]] = {"": {}}  # what stands between key and kind -> kind -> place
    repeated = set()
    for ending, place in members:
        stem, _, kind = ending.rpartition(".")
        if kind in stems.setdefault(stem, {}):
            repeated.add(stem)
        stems[stem][kind] = place
    images = [(stem, kind) for stem, kinds in stems.items() for kind in kinds if f".{kind}" in SUFFIXES]
    plain = [image for image in images if not image[0]]
    chosen = [min(plain, key=lambda image: SUFFIXES.index(f".{image[1]}"))] if plain else images
    names = {image: ".".join(filter(None, (key, *image))) for image in images}
    found, left_out = [], []
    for stem, kind in chosen:
        wrong = ValueError("stands twice in this tar; expected every name once") if stem in repeated else None
        found.append(TarImage(names[stem, kind], wrong or stems[stem][kind], stems[""] | stems[stem]))
    if plain:
        reason = f"beside {found[0].name}, which is taken for the image"
        left_out = [LeftOut(names[image], reason) for image in images if image != chosen[0]]
    return found, left_out


def _tar_items(tar: str, path: str | Path, read: bool) -> Iterator[Sample | LeftOut]:
    """The samples of a tar, which is read from `path`, and what is left out."""
    aside: list[LeftOut] = []
    try:
        with open_regular(path) as file:
            for key, group in groupby(keyed_members(file, aside), key=lambda member: member[0]):
                images, beside = choose_images(key, [member[1:] for member in group])
                yield from (_tar_sample(tar, file, image, read) for image in images)
                yield from (LeftOut(f"{tar}: {name}", reason) for name, reason in aside + beside)
                aside.clear()
    except (ValueError, OSError) as error:
        yield Sample(ValueError(str(error)), tar)
    yield from (LeftOut(f"{tar}: {name}", reason) for name, reason in aside)


def keyed_members(file: BinaryIO, aside: list[LeftOut]) -> Iterator[tuple[str, str, Place]]:
    """Key, ending and place of each member of a tar, split at the first dot of its name, as webdataset does.

    Images that are not to be read go to `aside`. Raises ValueError as `tar_members`.
    """
    for name, place in tar_members(file):
        reason = _why_left_out(name)
        if isinstance(place, ValueError) and (reason is not None or name == END):
            aside.append(LeftOut(name, str(place)))
        elif reason:
            aside.append(LeftOut(name, reason))
        elif isinstance(place, Place) and (parts := re.match(r"((?:.*/)?[^.]+)[.]([^/]*)$", name)):
            yield parts[1], parts[2].lower(), place


def read_caption(data: bytes) -> str | None:
    """The text of a .txt beside an image; None where there is none, or none in UTF-8."""
    with suppress(UnicodeDecodeError):
        return data.decode("utf-8-sig").strip() or None


def _tar_sample(tar: str, file: BinaryIO, image: TarImage, read: bool) -> Sample:
    def data(place: Place) -> bytes:
        file.seek(place.offset)
        return file.read(place.size)

    name, text = f"{tar}: {image.name}", image.parts.get("txt")
    if isinstance(image.place, ValueError) or not read:
        return Sample(image.place, name)
    return Sample(data(image.place), name, read_caption(data(text)) if text else None)


def tar_images(tar: str, read: bool = True) -> Iterator[Sample]:
    """A tar's images with their captions, in its order; what follows a cut counts as one broken sample.

    Without `read` the samples are only to be counted: nothing but the tar's headers is read. One that `remote` fetches
    is fetched whole all the same.
    """
    if not remote.scheme_of(tar):
        yield from _tar_samples(tar, tar, read)
        return
    number = count()
    with remote.fetch(tar) as path:
        for sample in _tar_samples(tar, path, read):
            next(number)
            yield sample
    remote.remember_length(tar, next(number))


def _tar_samples(tar: str, path: str | Path, read: bool) -> Iterator[Sample]:
    sample, left_out = None, []
    for item in _tar_items(tar, path, read):
        if isinstance(item, LeftOut):
            left_out.append(item)
            continue
        if sample:
            yield sample._replace(left_out=tuple(left_out))
            left_out.clear()
        sample = item
    if left_out and not sample:
        sample = Sample(ValueError(f"no image to be read in this tar, but {len(left_out)} that are left out"), tar)
    if sample:
        yield sample._replace(left_out=tuple(left_out))


@functools.cache
def _length(tar: str) -> int:
    """How many samples `tar_images` makes of a tar, broken ones included."""
    if remote.scheme_of(tar) and (known := remote.known_length(tar)) is not None:
        return known
    return sum(1 for _ in tar_images(tar, read=False))


def read_tars(
    shards: list[str], seed: int = 0, first: int = 0, rank: int = 0, processes: int = 1, epochs: int | None = None,
    resampled: bool = False,
) -> Iterator[Sample]:  # fmt: skip
    """The images in a process's tars, from the sample number `first` on, over so many epochs (None: endless).

    The order of the shards is new each epoch, every process takes its part of it, and the samples are shuffled. Where
    there are fewer shards than processes, each process reads all of them and takes its part of every shard's samples.
    With `resampled` a process draws its shards with replacement, as many an epoch as it would have. Of the epochs
    before that of `first` only the tars' headers are read.
    """
    import webdataset as wds

    few = len(shards) < processes

    def order(epoch: int) -> list[tuple[str, int, int]]:
        """Tars, each with the first of its samples that is taken, and the step to the next ones."""
        if resampled:
            drawn = np.random.default_rng((seed, epoch, rank)).integers(len(shards), size=-(-len(shards) // processes))
            return [(shards[i], 0, 1) for i in drawn]
        drawn = np.random.default_rng((seed, epoch)).permutation(len(shards))
        if few:
            return [(shards[i], (rank + k) % processes, processes) for k, i in enumerate(drawn)]
        return [(shards[i], 0, 1) for i in drawn[rank::processes]]

    def samples(start: int) -> Iterator[Sample]:
        for epoch in islice(count(start), epochs):
            taken = (islice(tar_images(tar), begin, None, step) for tar, begin, step in order(epoch))
            found = chain.from_iterable(taken)
            sample = None
            for sample in wds.shuffle(1000, seed=(seed * 100_003 + epoch) * processes + rank)(found):
                yield sample
            if sample is None:
                raise FileNotFoundError(f"no image in {', '.join(shards)}; expected members like 000001.jpg")

    start = 0
    while first:
        length = 0
        for length in accumulate(len(range(a, _length(tar), b)) for tar, a, b in order(start)):
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


# --- Hugging Face datasets --------------------------------------------------------------------------------------


def is_dataset(source: str) -> bool:
    """Whether a source is a Hugging Face dataset; `hf://` is a place of files."""
    return source.startswith("hf:") and not source.startswith("hf://")


def load_dataset(source: str):
    """The `datasets.Dataset` that `hf:FOLDER_OR_ID[:SPLIT]` names; no code that lies in it is run."""
    import datasets
    from huggingface_hub import snapshot_download

    name, split = source.removeprefix("hf:"), ""
    if not Path(name).expanduser().is_dir():  # a folder's name may have a colon
        name, _, split = name.partition(":")
    if not name:
        raise ValueError(f"images={source!r}: no name; expected hf:FOLDER_OR_ID, or hf:FOLDER_OR_ID:SPLIT")
    folder = Path(name).expanduser().absolute()  # a bare name such as `pandas` would be a reader of datasets' own
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
        raise ValueError(f"images={source!r}: no split {split!r}; {messages.expected(split, splits)}, as hf:NAME:SPLIT")
    return splits[split]


def open_dataset(source: str, captions: str | None = None):
    """The images of `load_dataset`, not decoded, as the column `image`; with `captions` those as the column `caption`.

    The images are the first column of type `datasets.Image`; `captions` is as in `text_column`.
    """
    import datasets

    rows = load_dataset(source)
    if not len(rows):
        raise ValueError(f"images={source!r}: no row in it; expected a column of images")
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


def dataset_cell(row: dict) -> bytes | Place | ValueError:
    """The image's file in a row."""
    image = row["image"]
    data, path = (image["bytes"], image["path"]) if image else (None, None)
    return data or (Place(path) if path else ValueError("no image in this row"))


def byte_hashes(places: Sequence[Place]) -> list[bytes]:
    """A hash of the bytes of each image."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda place: blake2b(place.read(), digest_size=16).digest(), places))


def content_hash(places: Sequence[Place]) -> str:
    """A hash of all images' bytes, in their order, and of the part of each that is meant."""
    whole = blake2b(digest_size=16)
    for place, part in zip(places, byte_hashes(places), strict=True):
        whole.update(part + (str(place.box).encode() if place.box else b""))
    return whole.hexdigest()
