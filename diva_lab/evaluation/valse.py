"""VALSE: a caption against a foil, in which one linguistic phenomenon is changed.

Parcalabescu et al. (arXiv 2112.07566). The folder holds the files of the authors' `data`, here or in `data/`, as {id:
{image_file, caption, foil, mturk}}, and the images of Visual7W, COCO, SWiG and Visual Dialog below it. As in the
authors' code only valid items count, whose caption at least two of three annotators chose (`mturk["caption"]`), and the
pairwise accuracy is the share of items whose caption is nearer than the foil; a tie is wrong. `all` is the mean of the
eleven files; whether the paper weighs them alike could not be verified.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd

from diva_lab.evaluation.choices import Choice, answer, choice_benchmark, part_scores, read_choices
from diva_lab.evaluation.row_files import find_file
from diva_lab.evaluation.task import Task

INSTRUMENTS = (
    "existence", "plurals", "counting-hard", "counting-small-quant", "counting-adversarial", "relations",
    "action-replacement", "actant-swap", "coreference-standard", "coreference-hard", "foil-it",
)  # fmt: skip
VOTES = 2  # for the caption, of three


def is_here(folder: Path) -> bool:
    return any(find_file(folder, name) for name in INSTRUMENTS)


def valid_choices(path: Path) -> Iterator[Choice]:
    """The choices of a file that its annotators found valid."""
    for row, choice in read_choices([path], "image_file", ("caption", "foil"), ["mturk"], part=path.stem):
        votes = row["mturk"].get("caption") if isinstance(row["mturk"], dict) else None
        if not isinstance(votes, int):
            raise ValueError(f"{path}: mturk is {str(row['mturk'])[:40]!r}; expected votes, as {{'caption': 3}}")
        if votes >= VOTES:
            yield choice


@choice_benchmark(is_here, partial(part_scores, means={"all": INSTRUMENTS}))
def valse(task: Task) -> pd.DataFrame:
    """The pairwise accuracy of each file that is there, and their mean."""
    files = [path for name in INSTRUMENTS if (path := find_file(task.folder, name))]
    return answer(task, [choice for path in files for choice in valid_choices(path)])
