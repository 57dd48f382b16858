"""ARO: whose attribute is it, who does what to whom, and in which order do the words stand?

Yuksekgonul et al. (arXiv 2210.01936). A folder holds `visual_genome_relation.json`, `visual_genome_attribution.json`
and their images; each image is cut to the box of its row. The authors report `macro accuracy`: the mean over relations,
without those that they list as symmetric (`SYMMETRIC`), and over pairs of attributes with 25 rows or more. `accuracy`
counts each row once. A tie is wrong: their code puts the false caption first. `all` is the mean of both macro
accuracies.

COCO and Flickr order: a folder with `coco-order` or `flickr-order` in its name holds the hub's parquet files `test`:
images, correct_caption, hard_text_1 to 4. The authors shuffle the wrong captions anew each time; only a fixed copy can
be compared, and not with numbers on another one. Here their code puts the right caption first: a tie is right.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from diva_lab.evaluation.choices import Choice, Score, answer, choice_benchmark, part_scores, read_choices
from diva_lab.evaluation.row_files import find_file, find_parts
from diva_lab.evaluation.task import Task

FILES = {"relation": "visual_genome_relation", "attribution": "visual_genome_attribution"}  # part -> file
ORDERS = {"coco order": "coco-order", "flickr order": "flickr-order"}  # part -> in the folder's name
BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
ENOUGH = 25  # rows of a pair of attributes
_SYMMETRIC = (
    "adjusting|around|attached to|beside|between|bigger than|biting|boarding|brushing|by|chewing|cleaning|climbing|"
    "close to|coming from|coming out of|contain|crossing|dragging|draped over|drinking|drinking from|driving|"
    "driving down|driving on|eating from|eating in|enclosing|exiting|facing|filled with|floating in|floating on|"
    "flying|flying above|flying in|flying over|flying through|full of|going down|going into|going through|grazing in|"
    "growing in|growing on|guiding|hanging from|hanging in|hanging off|hanging over|higher than|holding onto|hugging|"
    "in between|jumping off|jumping on|jumping over|kept in|larger than|leading|leaning over|leaving|licking|"
    "longer than|looking in|looking into|looking out|looking over|looking through|lying next to|lying on top of|"
    "making|mixed with|mounted on|moving|near|next to|of|on the back of|on the edge of|on the front of|"
    "on the other side of|on the side of|opening|painted on|parked at|parked beside|parked by|parked in|"
    "parked in front of|parked near|parked next to|perched on|petting|piled on|playing|playing in|playing on|"
    "playing with|pouring|reaching for|reading|reflected on|riding on|running in|running on|running through|"
    "seen through|sitting behind|sitting beside|sitting by|sitting in front of|sitting near|sitting next to|"
    "sitting under|skiing down|skiing on|sleeping in|sleeping on|smiling at|sniffing|splashing|sprinkled on|"
    "stacked on|standing against|standing around|standing behind|standing beside|standing in front of|standing near|"
    "standing next to|staring at|stuck in|surrounding|swimming in|swinging|talking to|topped with|touching|"
    "traveling down|traveling on|tying|typing on|underneath|wading in|waiting for|walking across|walking by|"
    "walking down|walking next to|walking through|with|working in|working on|worn on|wrapped around|wrapped in"
)
SYMMETRIC = frozenset(_SYMMETRIC.split("|"))


def order_of(folder: Path) -> str | None:
    """Which of `ORDERS` a folder's name says that it holds."""
    name = folder.name.lower().replace("_", "-")
    return next((part for part, word in ORDERS.items() if word in name), None)


def is_here(folder: Path) -> bool:
    whole = any(find_file(folder, stem) for stem in FILES.values())
    return whole or (order_of(folder) is not None and bool(find_parts(folder, "test")))


def boxed_choices(path: Path, part: str) -> Iterator[Choice]:
    """The choice of each row, whose group is a relation or a pair of attributes."""
    column = "relation_name" if part == "relation" else "attributes"
    captions = ("true_caption", "false_caption")
    for k, (row, choice) in enumerate(read_choices([path], "image_path", captions, [*BOX, column], part=part), 1):
        x, y, w, h = (row[name] for name in BOX)
        if not all(isinstance(value, int) for value in (x, y, w, h)) or min(w, h) < 1:
            raise ValueError(
                f"{path}, row {k}: box {x}, {y}, {w}, {h}; expected whole numbers, width and height from 1"
            )
        group = row[column] if part == "relation" else "_".join(map(str, row[column][:2]))
        yield replace(choice, group=group, box=(x, y, x + w, y + h))


def counted_in_macro(answers: pd.DataFrame) -> pd.DataFrame:
    """The answers whose groups the authors average over."""
    sizes = answers.groupby(["part", "group"])["group"].transform("size")
    relation = (answers["part"] == "relation") & ~answers["group"].isin(SYMMETRIC)
    return answers[relation | ((answers["part"] == "attribution") & (sizes >= ENOUGH))]


def scores(answers: pd.DataFrame) -> Iterator[Score]:
    """`accuracy` of each part that is there, `macro accuracy` of relation and attribution, and the mean of these."""
    yield from part_scores(answers)
    macro = counted_in_macro(answers)
    for name, own in macro.groupby("part", sort=False):
        yield Score(own, "macro accuracy", name, ("group",))
    if set(FILES) <= set(macro["part"]):
        yield Score(macro, "macro accuracy", by=("part", "group"))


@choice_benchmark(is_here, scores)
def aro(task: Task) -> pd.DataFrame:
    """Relation, attribution and order, as far as they are there."""
    files = {part: path for part, stem in FILES.items() if (path := find_file(task.folder, stem))}
    choices = [choice for part, path in files.items() for choice in boxed_choices(path, part)]
    if (part := order_of(task.folder)) and (parts := find_parts(task.folder, "test")):
        captions = ["correct_caption", *(f"hard_text_{k}" for k in (1, 2, 3, 4))]
        choices += [choice for _, choice in read_choices(parts, "images", captions, part=part, tie=True)]
    return answer(task, choices)
