"""Winoground: two captions of the same words in two orders, and an image of each.

Thrush et al. (arXiv 2204.03162). The folder's name has `winoground` in it; it holds `examples.jsonl` (image_0, image_1:
names without a suffix; caption_0, caption_1) and the images, or the hub's parquet files `test`, with images inside. The
three scores are the authors'; a tie is wrong. By chance, where the four similarities are drawn, text and image are 1/4
and group is 1/6.
"""

from collections.abc import Iterator
from pathlib import Path

from diva_lab.evaluation.choices import square_rows
from diva_lab.evaluation.row_files import find_parts
from diva_lab.evaluation.task import Task, benchmark

STEMS = ("examples", "test")


def is_here(folder: Path) -> bool:
    return "winoground" in folder.name.lower() and bool(find_parts(folder, *STEMS))


@benchmark(data="own", is_here=is_here)
def winoground(task: Task) -> Iterator[dict]:
    """The text, image and group score."""
    parts = find_parts(task.folder, *STEMS)
    if not parts:
        raise FileNotFoundError(f"{task.folder}: no examples.jsonl and no test*.parquet; expected one of them")
    yield from square_rows(task, parts, ("image_0", "image_1"), ("caption_0", "caption_1"))
