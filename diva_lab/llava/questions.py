"""Questions about images as published files hold them: what is asked, which answers there are, and which one is right.

An answer is read in two ways, each a score of its own: by a rule from what the model generates, and by which of the
choices it finds the most likely.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from diva_lab.image_files import Place, open_picture, visible
from diva_lab.models.weights import one_line

LETTER = "\nAnswer with the option's letter from the given choices directly."  # LLaVA-1.5's words
READERS: dict[str, Callable[[Path], list[dict]]] = {
    ".parquet": lambda path: pd.read_parquet(path).to_dict("records"),
    ".jsonl": lambda path: read_lines(path),
    ".json": lambda path: _read_list(path),
}


@dataclass(frozen=True)
class Question:
    """A question about one image.

    Attributes:
        id: unlike that of any other question of the set.
        image: where its bytes lie, or the bytes.
        text: what is asked, word for word.
        choices: the answers, as they are said: `(a)`, `Yes`.
        right: index of the right one.
        options: what stands behind letters; the choices themselves where there are none.
        place: what scores are gathered by: a pair, an image, a split.
    """

    id: str
    image: Place | bytes
    text: str
    choices: tuple[str, ...]
    right: int
    options: tuple[str, ...] = ()
    place: dict[str, object] = field(default_factory=dict)


# --- files ------------------------------------------------------------------------------------------------------


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


def _read_list(path: Path) -> list[dict]:
    """The objects of a JSON list, or, as POPE's files are named, of JSON lines."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.lstrip().startswith("["):
        return read_lines(path)
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON list, cut off? {one_line(error)}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of JSON objects")
    return rows


def read_rows(path: Path, columns: Sequence[str]) -> list[dict]:
    """The rows of a .parquet, .jsonl or .json file.

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
        if missing := [name for name in columns if name not in row]:
            raise ValueError(f"{path}, row {number}: no {', '.join(missing)}; expected {', '.join(columns)}")
    return rows


def find_file(folder: Path, stem: str) -> Path | None:
    """The file `stem` in a folder, or in a folder `data` in it, in whichever of the formats there is."""
    places = [place / f"{stem}{suffix}" for place in (folder, folder / "data") for suffix in READERS]
    return next((path for path in places if path.is_file()), None)


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


def check_images(questions: Sequence[Question], source: Path) -> None:
    """Open every image once, before any is asked about.

    Raises:
        FileNotFoundError: where files are missing; says how many, and the first.
        ValueError: for one that cannot be read.
    """
    places = {q.image: q for q in questions}
    missing = [place.path for place in places if isinstance(place, Place) and not Path(place.path).is_file()]
    if missing:
        raise FileNotFoundError(f"{source}: {len(missing)} of {len(places)} images are not there, as {missing[0]}")
    for place, question in places.items():
        try:
            with open_picture(place):
                pass
        except ValueError as error:
            name = place if isinstance(place, Place) else f"of question {question.id}"
            raise ValueError(f"{source}: image {name} cannot be read: {error}") from error


def candidates(root: Path) -> list[Path]:
    """A root and the folders in it."""
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root}: no such folder")
    return [root, *sorted(path for path in visible(root) if path.is_dir())]


# --- rules ------------------------------------------------------------------------------------------------------


def _first(word: str, answer: str) -> int | None:
    found = re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE)
    return found and found.start()


def first_word(answer: str, words: Sequence[str]) -> int | None:
    """Which of some words stands first in an answer, whatever its case; None where none does."""
    places = {k: place for k, word in enumerate(words) if (place := _first(word, answer)) is not None}
    return min(places, key=places.get) if places else None


def read_letter(answer: str, question: Question) -> int | None:
    """Which option an answer chooses: by a letter in brackets, else by one at its start, else by the option's words.

    Words count only where they are those of one option alone. None where no option is chosen.
    """
    letters = [choice.strip("()").lower() for choice in question.choices]
    for pattern in (r"\(([a-z])\)", r"\s*([a-z])(?:[.:),]|\s*$)"):
        found = (re.search if pattern.startswith(r"\(") else re.match)(pattern, answer.lower())
        if found and found[1] in letters:
            return letters.index(found[1])
    named = [k for k, option in enumerate(question.options) if option and _first(option, answer) is not None]
    return named[0] if len(named) == 1 else None


def rights(questions: Sequence[Question], chosen: Sequence[int | None]) -> np.ndarray:
    """Whether each question was answered right, as 0. or 1."""
    return np.array([float(c == q.right) for q, c in zip(questions, chosen, strict=True)])
