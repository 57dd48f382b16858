"""ColorSwap: two captions of the same words in which the colours are swapped, and an image of each.

Burapacheep et al. (arXiv 2402.04492). The folder's name has `colorswap` in it; it holds `test.json` (image_1, image_2,
caption_1, caption_2) and the images, or the hub's parquet files `test`, with images inside. The scores are
Winoground's. The authors' script for encoders could not be read: that a tie is wrong is Winoground's rule.
"""

from pathlib import Path

import pandas as pd

from diva_lab.evaluation.choices import answer_squares, choice_benchmark, part_scores
from diva_lab.evaluation.row_files import find_parts
from diva_lab.evaluation.task import Task


def is_here(folder: Path) -> bool:
    return "colorswap" in folder.name.lower() and bool(find_parts(folder, "test"))


@choice_benchmark(is_here, part_scores)
def colorswap(task: Task) -> pd.DataFrame:
    """The text, image and group score."""
    parts = find_parts(task.folder, "test")
    if not parts:
        raise FileNotFoundError(f"{task.folder}: no test.json and no test*.parquet; expected one of them")
    return answer_squares(task, parts, ("image_1", "image_2"), ("caption_1", "caption_2"))
