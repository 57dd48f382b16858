"""Questions about images as published files hold them: what is asked, which answers there are, and which one is right.

An answer is read in two ways, each a score of its own: by a rule from what the model generates, and by which of the
choices it finds the most likely.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diva_lab.image_files import Place, open_picture, visible

LETTER = "\nAnswer with the option's letter from the given choices directly."  # LLaVA-1.5's words


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
