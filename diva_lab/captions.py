"""Captions: of images in folders, webdataset tars and Hugging Face datasets, and of plain text files."""

import csv
import os
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import numpy as np

from diva_lab.image_files import (
    OTHER_SUFFIXES,
    dealt_order,
    find_images,
    find_tars,
    is_dataset,
    load_dataset,
    read_caption,
    read_tars,
    text_column,
)
from diva_lab.world import World, captions, draw_scenes, named_world

csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 kB, is less than a caption may have
TABLE = "captions.csv"  # in a folder of images: image,caption
MOST = 100_000  # captions that are read of tars to train on without their images


def folder_captions(folder: Path, files: Sequence[Path]) -> dict[Path, str]:
    """file -> caption, of `captions.csv` in the folder (image, caption; a row an image) or else of NAME.txt beside it.

    Files without a caption, or with one that is not UTF-8 in NAME.txt, are left out.

    Raises:
        ValueError: for a table that cannot be understood; names its rows.
        FileNotFoundError: where no file has a caption; says what was expected.
    """
    table = folder / TABLE
    if table.is_file():
        found = _read_table(table, files)
    else:
        beside = {file: file.with_suffix(".txt") for file in files}
        found = {file: read_caption(text.read_bytes()) for file, text in beside.items() if text.is_file()}
    found = {file: found[file] for file in files if found.get(file)}
    if not found:
        raise FileNotFoundError(
            f"images={str(folder)!r}: no captions; expected {TABLE} with the columns image and caption, or NAME.txt "
            "beside NAME.jpg"
        )
    return found


def refuse_column(source: str, column: str | None) -> None:
    """Refuse the name of a column of captions, given to a source that has no columns."""
    if column:
        raise ValueError(
            f"captions={column!r}: images={source!r} has no columns; expected '' for its own captions, or with "
            "anchor='text' an existing text file, a prompt a line"
        )


def _read_table(table: Path, files: Sequence[Path]) -> dict[Path, str]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{table}: not a csv in UTF-8 ({error}); expected rows under image and caption") from error
    if not rows or not {"image", "caption"} <= rows[0].keys():
        header = ", ".join(map(str, rows[0])) if rows else "no rows"
        raise ValueError(f"{table}: expected rows under image and caption; found {header}")
    known, found, wrong = set(files), {}, []
    for number, row in enumerate(rows, 2):
        image = table.parent / os.path.normpath(row["image"] or ".")
        if None in row:
            wrong.append(f"row {number}: more cells than the header has; a caption with commas needs quotes around it")
        elif not row["image"] or not os.path.isfile(image):
            wrong.append(f"row {number}: no image {row['image']!r}")
        elif image in found:
            wrong.append(f"row {number}: a second caption of {row['image']!r}")
        elif image not in known and image.suffix.lower() not in OTHER_SUFFIXES:  # those are listed as left out
            wrong.append(f"row {number}: {row['image']!r} is none of the images that are read of this folder")
        else:
            found[image] = (row["caption"] or "").strip()
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{table}: {'; '.join(wrong[:5])}{more}; expected one row an image")
    return found


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"captions={str(path)!r}: no such file; expected a text file, a prompt a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"captions={str(path)!r}: not UTF-8 ({error}); expected a text file, a prompt a line"
        ) from error
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"captions={str(path)!r}: empty; expected a text file, a prompt a line")
    return lines


def list_captions(source: str, column: str = "") -> list[str]:
    """All captions of a source other than the world, without its images; of tars at most `MOST`.

    Args:
        source: a text file, a prompt a line (.txt); else as `images.open_images`.
        column: of a Hugging Face dataset; "" for its only text.

    Raises:
        FileNotFoundError, ValueError: where there is none, or no caption in it.
    """
    path = Path(source)
    if is_dataset(source):
        rows = load_dataset(source)
        texts = [(text or "").strip() for text in rows[text_column(source, rows, column)]]
    elif source.endswith(".tar") and not path.is_dir():
        tars = find_tars(source)
        texts = [sample.caption or "" for sample in islice(read_tars(tars, epochs=1), MOST)]
    elif path.is_dir():
        texts = list(folder_captions(path, find_images(path)[0]).values())
    else:
        return _read_lines(path)
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"captions={source!r}: no caption in it; expected .txt members, or a column of text")
    return texts


def open_captions(
    source: str, n: int, seed: int, first: int = 0, rank: int = 0, processes: int = 1, mentions: float = 1.0,
    chosen: str = "",
) -> Iterator[list[str]]:  # fmt: skip
    """Endless batches of `n` captions without images, from the batch `first` on; each process has its own.

    Args:
        source: `world` or `world:SEED`, whose scenes are others than those that are shown; else as `list_captions`.
        mentions: the world's captions mention each detail with p ~ U(0, mentions), drawn for each scene.
        chosen: "" for the source's own captions; a text file in their place, a prompt a line; or the column of a
            Hugging Face dataset. What exists as a file is that file.

    Raises:
        FileNotFoundError, ValueError: as `list_captions`, and for a column of a source that has none.
    """
    if chosen.endswith(".txt") or Path(chosen).is_file():
        texts = _read_lines(Path(chosen))
    else:
        if not is_dataset(source):
            refuse_column(source, chosen)
        if (world := named_world(source)) is not None:
            return _world_captions(world, n, seed, first, rank, mentions)
        texts = list_captions(source, chosen)
    order = dealt_order(len(texts), seed, first * n, rank, processes)
    return ([texts[i] for i in islice(order, n)] for _ in count())


def _world_captions(world: World, n: int, seed: int, first: int, rank: int, mentions: float) -> Iterator[list[str]]:
    for number in count(first):
        place = (world.seed, 42, seed, number, *([rank] if rank else []))
        yield mention_details(draw_scenes(n, place), (*place, 1), mentions)


def mention_details(scenes: np.ndarray, seed: Sequence[int], mentions: float) -> list[str]:
    """A caption a scene that mentions each detail with p ~ U(0, mentions), drawn for each scene."""
    random = np.random.default_rng(seed)
    return captions(scenes, mentions * random.random((len(scenes), 1)), random)
