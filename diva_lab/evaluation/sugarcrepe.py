"""SugarCrepe: a caption of a COCO image against one in which a language model changed a detail, and stayed fluent.

Hsieh et al. (arXiv 2306.14610). The folder holds the seven files of the authors' `data`, here or in `data/`, as
{id: {filename, caption, negative_caption}}, and COCO's val2017 images. As in the authors' code a choice is right where
the caption is nearer than the negative one; a tie is wrong. `all`, ours, is the mean of the seven.
"""

from functools import partial
from pathlib import Path

import pandas as pd

from diva_lab.evaluation.choices import answer, choice_benchmark, part_scores, read_choices
from diva_lab.evaluation.row_files import find_file
from diva_lab.evaluation.task import Task

SUBSETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
CAPTIONS = ("caption", "negative_caption")


def is_here(folder: Path) -> bool:
    return any(find_file(folder, name) for name in SUBSETS)


@choice_benchmark(is_here, partial(part_scores, means={"all": SUBSETS}))
def sugarcrepe(task: Task) -> pd.DataFrame:
    """The accuracy of each subset that is there, and their mean."""
    files = {name: find_file(task.folder, name) for name in SUBSETS}
    choices = [
        choice for name, path in files.items() if path
        for _, choice in read_choices([path], "filename", CAPTIONS, part=name)
    ]  # fmt: skip
    return answer(task, choices)
