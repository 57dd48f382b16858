"""Winoground: two captions of the same words in two orders, and an image of each.

Thrush et al. (arXiv 2204.03162). The folder's name has `winoground` in it; it holds `examples.jsonl` (image_0, image_1:
names without a suffix; caption_0, caption_1) and the images, or the hub's parquet files `test`, with images inside. The
three scores are the authors'; a tie is wrong. By chance, where the four similarities are drawn, text and image are 1/4
and group is 1/6.
"""

from pathlib import Path

import pandas as pd

from diva_lab.evaluation.choices import answer_squares, choice_benchmark, part_scores
from diva_lab.evaluation.row_files import find_parts
from diva_lab.evaluation.task import Task

STEMS = ("examples", "test")


def is_here(folder: Path) -> bool:
    return "winoground" in folder.name.lower() and bool(find_parts(folder, *STEMS))


@choice_benchmark(is_here, part_scores)
def winoground(task: Task) -> pd.DataFrame:
    """The text, image and group score."""
    parts = find_parts(task.folder, *STEMS)
    if not parts:
        raise FileNotFoundError(f"{task.folder}: no examples.jsonl and no test*.parquet; expected one of them")
    return answer_squares(task, parts, ("image_0", "image_1"), ("caption_0", "caption_1"))
