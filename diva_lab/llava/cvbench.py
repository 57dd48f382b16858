"""CV-Bench: counting and relations in 2D, depth and distance in 3D.

Tong et al., "Cambrian-1" (arXiv 2406.16860). `test_2d` and `test_3d` (parquet, or jsonl with image files under
`filename`): prompt, choices, answer as `(C)`, task and source. The 2D score is the mean of the accuracies on ADE20K and
COCO, the 3D score the accuracy on Omni3D.
"""

import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from diva_lab.evaluation.row_files import find_file, image_of, read_rows
from diva_lab.evaluation.task import score_row
from diva_lab.llava.questions import LETTER, Question, read_letter, rights
from diva_lab.statistics import bootstrap_mean, wilson

COLUMNS = ("idx", "prompt", "choices", "answer", "task", "source")
PARTS = {"2D": ("test_2d", ("ADE20K", "COCO")), "3D": ("test_3d", ("Omni3D",))}  # score -> file, sources


def is_here(folder: Path) -> bool:
    return any(find_file(folder, stem) for stem, _ in PARTS.values())


def read(folder: Path) -> list[Question]:
    """The questions of the parts that are there."""
    questions = []
    for part, (stem, sources) in PARTS.items():
        path = find_file(folder, stem)
        for k, row in enumerate(read_rows(path, COLUMNS) if path else []):
            options = tuple(map(str, row["choices"]))
            choices = tuple(f"({letter})" for letter in string.ascii_uppercase[: len(options)])
            if row["answer"] not in choices or row["source"] not in sources:
                raise ValueError(
                    f"{path}, row {k + 1}: answer {row['answer']!r} of {len(options)}, source {row['source']!r}; "
                    f"expected a letter as (A), and {' or '.join(sources)}"
                )
            image = image_of(row["image"] if "image" in row else row.get("filename"), folder)
            place = {"part": part, "source": row["source"], "task": row["task"]}
            right, text = choices.index(row["answer"]), row["prompt"] + LETTER
            questions.append(Question(f"{part}-{row['idx']}", image, text, choices, right, options, place))
    if len({q.id for q in questions}) < len(questions):
        raise ValueError(f"{folder}: an idx stands twice in a part; expected each once")
    return questions


def rule(answer: str, question: Question) -> int | None:
    return read_letter(answer, question)


def score(questions: Sequence[Question], chosen: Sequence[int | None], seed: int = 0) -> Iterator[dict]:
    """Rows of `2D`, the mean over its sources, of `3D`, and the accuracy of each task. Raises where a source lacks."""
    right = rights(questions, chosen)
    chances = [1 / len(q.choices) for q in questions]

    def of(key: str, name: object) -> list[int]:
        return [k for k, q in enumerate(questions) if q.place[key] == name]

    for part, (stem, sources) in PARTS.items():
        groups = [of("source", source) for source in sources]
        if not any(groups):
            continue
        if not all(groups):
            raise ValueError(f"{stem}: no question of {sources[groups.index([])]}; expected {' and '.join(sources)}")
        values = [right[group] for group in groups]
        chance = sum(sum(chances[k] for k in group) / len(group) for group in groups) / len(groups)
        mean, n = sum(value.mean() for value in values) / len(values), sum(map(len, values))
        yield score_row(part, mean, n, *bootstrap_mean(values, seed=seed), chance)
    for task in dict.fromkeys(q.place["task"] for q in questions):
        group = of("task", task)
        hits, n = int(right[group].sum()), len(group)
        chance = sum(chances[k] for k in group) / n
        yield score_row("accuracy", hits / n, n, *wilson(hits, n), chance, task)
