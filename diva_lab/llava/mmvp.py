"""MMVP: questions about pairs of images that CLIP confuses; a pair counts if both are answered right.

Tong et al., "Eyes Wide Shut?" (arXiv 2401.06209). `Questions.csv` (Index, Question, Options, Correct Answer; two rows
that follow each other are a pair) beside the folder `MMVP Images` with INDEX.jpg. The paper lets a language model judge
the answers; here a rule reads the letter.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diva_lab.evaluation.pairs import read_csv
from diva_lab.evaluation.task import score_row
from diva_lab.image_files import Place
from diva_lab.llava.questions import LETTER, Question, read_letter, rights
from diva_lab.statistics import bootstrap_mean, wilson

COLUMNS = ("Index", "Question", "Options", "Correct Answer")
IMAGES = ("MMVP Images", "MMVP_Images")
SUFFIXES = (".jpg", ".jpeg", ".png")


def is_here(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in IMAGES)


def read(folder: Path) -> list[Question]:
    """The questions in the order of their rows."""
    path = folder / "Questions.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no Questions.csv; expected one with {', '.join(COLUMNS)}")
    rows = read_csv(path, COLUMNS)
    if len(rows) % 2:
        raise ValueError(f"{path}: {len(rows)} questions, which are not pairs; expected an even number of rows")
    images = next(folder / name for name in IMAGES if (folder / name).is_dir())
    questions = []
    for k, (index, text, options, answer) in enumerate(rows[list(COLUMNS)].itertuples(index=False)):
        parts = re.split(r"\(([a-z])\)", options)  # before (a), a, Standing, b, Sitting
        letters, words = [f"({letter})" for letter in parts[1::2]], [word.strip() for word in parts[2::2]]
        if len(letters) < 2 or answer.lower() not in letters or not index.isdecimal():
            raise ValueError(
                f"{path}, row {k + 1}: Index {index!r}, Options {options!r}, Correct Answer {answer!r}; expected a "
                "number, two options as '(a) Standing (b) Sitting', and one of their letters"
            )
        files = [images / f"{index}{suffix}" for suffix in SUFFIXES]
        image = Place(str(next((file for file in files if file.is_file()), files[0])))
        asked = f"{text} {options}{LETTER}"
        right = letters.index(answer.lower())
        questions.append(Question(index, image, asked, tuple(letters), right, tuple(words), {"pair": k // 2}))
    if len({q.id for q in questions}) < len(questions):
        raise ValueError(f"{path}: an Index stands twice; expected each once")
    return questions


def rule(answer: str, question: Question) -> int | None:
    return read_letter(answer, question)


def score(questions: Sequence[Question], chosen: Sequence[int | None], seed: int = 0) -> Iterator[dict]:
    """Rows of `pairs`, both of which are right, and of `questions`; their interval resamples pairs."""
    pairs = rights(questions, chosen).reshape(-1, 2)
    both = int(pairs.prod(1).sum())
    yield score_row("pairs", both / len(pairs), len(pairs), *wilson(both, len(pairs)), 0.25)
    yield score_row("questions", pairs.mean(), pairs.size, *bootstrap_mean([pairs.mean(1)], seed=seed), 0.5)


def correct(questions: Sequence[Question], labels: Mapping[int, int], source: Path) -> list[Question]:
    """The questions with other right answers: id -> 1 for (a), 2 for (b).

    Raises:
        ValueError: for an id that is not there, or a label that is right already.
    """
    known = {int(q.id): q for q in questions}
    for i, label in labels.items():
        if i not in known or known[i].right == label - 1:
            wrong = f"says {known[i].choices[label - 1]} as the set does" if i in known else "is not in the set"
            raise ValueError(f"{source}: id {i} {wrong}; expected an id of the set, and another label than its own")
    return [replace(q, right=labels.get(int(q.id), q.right + 1) - 1) for q in questions]
