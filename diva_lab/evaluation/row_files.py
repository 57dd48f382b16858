"""Rows of published files: parquet, JSON lines or JSON, with images inside them or beside them."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from diva_lab.image_files import Place
from diva_lab.models.weights import one_line

READERS: dict[str, Callable[[Path], list]] = {
    ".parquet": lambda path: pd.read_parquet(path).to_dict("records"),
    ".jsonl": lambda path: read_lines(path),
    ".json": lambda path: _read_json(path),
}


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines.

    Raises:
        ValueError: names the first line that is none, as the last one of a file that was written half.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(None)
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {number}: {line[:40]!r}; expected a JSON object, a line each: cut off?")
    return rows


def _read_json(path: Path) -> list:
    """The rows of a JSON list, of objects by their ids, or, as POPE's files are named, of JSON lines."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text)
    except ValueError as error:
        if not text.lstrip().startswith("["):
            return read_lines(path)
        raise ValueError(f"{path}: not a JSON list, cut off? {one_line(error)}") from error
    if isinstance(found, dict):  # by ids, or a single line
        return list(found.values()) if all(isinstance(row, dict) for row in found.values()) else [found]
    return found if isinstance(found, list) else []


def read_rows(path: Path, columns: Sequence[str]) -> list[dict]:
    """The rows of a .parquet, .jsonl or .json file; a row that is a list holds `columns` in their order.

    Raises:
        ValueError: for a file that cannot be read, without rows, or with a row that lacks one of `columns`.
    """
    try:
        rows = READERS[path.suffix](path)
    except (OSError, ValueError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: not a {path.suffix[1:]} file: {one_line(error)}") from error
    if not rows:
        raise ValueError(f"{path}: no rows; expected some with {', '.join(columns)}")
    for number, row in enumerate(rows, 1):
        if isinstance(row, list) and len(row) == len(columns):
            row = rows[number - 1] = dict(zip(columns, row, strict=True))
        missing = [name for name in columns if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path}, row {number}: no {', '.join(missing)}; expected {', '.join(columns)}")
    return rows


def find_file(folder: Path, stem: str) -> Path | None:
    """The file `stem` in a folder, or in a folder `data` in it, in whichever of the formats there is."""
    places = [place / f"{stem}{suffix}" for place in (folder, folder / "data") for suffix in READERS]
    return next((path for path in places if path.is_file()), None)


def find_parts(folder: Path, *stems: str) -> list[Path]:
    """The file of the first of `stems` that is there, as `find_file`; or its parts, as the hub splits parquet files."""
    for stem in stems:
        if path := find_file(folder, stem):
            return [path]
        for place in (folder, folder / "data"):
            if parts := sorted(place.glob(f"{stem}-[0-9]*-of-[0-9]*.parquet")):
                return parts
    return []


def read_parts(parts: Sequence[Path], columns: Sequence[str]) -> list[dict]:
    """The rows of all parts of a file, as `read_rows`.

    Raises:
        ValueError: where parts are missing, too.
    """
    named = re.search(r"-of-(\d+)", parts[0].stem)
    if named and int(named[1]) != len(parts):
        raise ValueError(f"{parts[0].parent}: {len(parts)} of {int(named[1])} parts of {parts[0].name}; expected all")
    return [row for path in parts for row in read_rows(path, columns)]


def image_of(value: object, folder: Path) -> Place | bytes:
    """An image of a row: the bytes that parquet files hold, or the file that is named.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    name = value.get("path") if isinstance(value, dict) else value
    if not isinstance(name, str) or not name:
        raise ValueError(f"an image is {str(value)[:40]!r}; expected bytes or the name of a file")
    return Place(str(folder / name))
