"""NaturalBench: two images and two questions whose answers differ between the images, so that blind guesses fail.

Li et al. (arXiv 2410.14669). Rows of `test` (parquet, or JSON with image files): Image_0, Image_1, Question_0,
Question_1, Image_I_Question_J (the answers) and Question_Type (`yes_no`, or `multiple_choice` with A and B).
Question accuracy asks that a question is right on both images, image accuracy that both questions are right on an
image, group accuracy that all four are. An answer is what stands first in it, as in the authors' code.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from diva_lab.evaluation.row_files import find_file, image_of, read_rows
from diva_lab.evaluation.task import score_row
from diva_lab.llava.questions import Question, first_word, rights
from diva_lab.statistics import bootstrap_mean, wilson

STEMS = ("test", "test-00000-of-00001", "naturalbench")
ANSWERS = {"yes_no": ("Yes", "No"), "multiple_choice": ("A", "B")}
ASK = {
    "yes_no": " Please answer Yes or No.",
    "multiple_choice": " Please output the letter corresponding to the correct option.",
}
CELLS = [(i, j) for i in (0, 1) for j in (0, 1)]  # image, question
COLUMNS = ["Image_0", "Image_1", "Question_0", "Question_1", "Question_Type"]
COLUMNS += [f"Image_{i}_Question_{j}" for i, j in CELLS]


def _file(folder: Path) -> Path | None:
    return next((path for stem in STEMS if (path := find_file(folder, stem))), None)


def is_here(folder: Path) -> bool:
    return "naturalbench" in folder.name.lower() and _file(folder) is not None


def read(folder: Path) -> list[Question]:
    """Four questions a row: image 0 with both questions, then image 1."""
    path = _file(folder)
    questions = []
    for k, row in enumerate(read_rows(path, COLUMNS)):
        kind = row["Question_Type"]
        for i, j in CELLS:
            answer = str(row[f"Image_{i}_Question_{j}"]).strip()
            if kind not in ANSWERS or answer not in ANSWERS[kind]:
                raise ValueError(
                    f"{path}, row {k + 1}: Question_Type {kind!r}, Image_{i}_Question_{j} {answer!r}; expected yes_no "
                    "with Yes or No, or multiple_choice with A or B"
                )
            choices = ANSWERS[kind]
            image, text = image_of(row[f"Image_{i}"], folder), row[f"Question_{j}"] + ASK[kind]
            questions.append(Question(f"{k}-{i}-{j}", image, text, choices, choices.index(answer), choices))
    return questions


def rule(answer: str, question: Question) -> int | None:
    return first_word(answer, question.choices)


def score(questions: Sequence[Question], chosen: Sequence[int | None], seed: int = 0) -> Iterator[dict]:
    """Rows of `group`, `image` and `question` accuracy, and of all answers; intervals resample groups of four."""
    right = rights(questions, chosen).reshape(-1, 2, 2)  # [groups, images, questions]
    n = len(right)
    group = right.prod((1, 2))
    yield score_row("group", group.mean(), n, *wilson(int(group.sum()), n), 1 / 16)
    for metric, values, chance in (
        ("image", right.prod(2), 1 / 4), ("question", right.prod(1), 1 / 4), ("answers", right.reshape(n, 4), 1 / 2),
    ):  # fmt: skip
        yield score_row(metric, values.mean(), values.size, *bootstrap_mean([values.mean(1)], seed=seed), chance)
