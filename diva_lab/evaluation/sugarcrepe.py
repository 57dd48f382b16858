"""SugarCrepe: a caption of a COCO image against one in which a language model changed a detail, and stayed fluent.

Hsieh et al. (arXiv 2306.14610). The folder holds the seven files of the authors' `data`, here or in `data/`, as
{id: {filename, caption, negative_caption}}, and COCO's val2017 images. As in the authors' code a choice is right where
the caption is nearer than the negative one; a tie is wrong. `all`, ours, is the mean of the seven.
"""

from collections.abc import Iterator
from pathlib import Path

from diva_lab.evaluation.choices import answer, part_rows, read_choices
from diva_lab.evaluation.row_files import find_file
from diva_lab.evaluation.task import Task, benchmark

SUBSETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
CAPTIONS = ("caption", "negative_caption")


def is_here(folder: Path) -> bool:
    return any(find_file(folder, name) for name in SUBSETS)


@benchmark(data="own", is_here=is_here)
def sugarcrepe(task: Task) -> Iterator[dict]:
    """The accuracy of each subset that is there, and their mean."""
    files = {name: find_file(task.folder, name) for name in SUBSETS}
    choices = [
        choice for name, path in files.items() if path
        for _, choice in read_choices([path], "filename", CAPTIONS, part=name)
    ]  # fmt: skip
    yield from part_rows(answer(task, choices), SUBSETS, task.seed)
