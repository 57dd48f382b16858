"""What'sUp: which relation in space does an image show?

Kamath et al. (arXiv 2310.19785). The folder holds the authors' files, here or in `data/`, and the images below it:

    A, B     controlled_images_dataset, controlled_clevr_dataset: image_path, caption_options (four, the first is right)
    COCO     coco_qa_one_obj, coco_qa_two_obj: lists of a COCO image's number, a true and a false caption
    GQA      vg_qa_one_obj, vg_qa_two_obj: the same, by Visual Genome's number

As in the authors' code the nearest caption is chosen, and of equal ones the first, so that a tie with the right caption
counts as right. In A and B four images of two objects are a set of two pairs of opposite relations; a pair or a set is
right where all of its images are. `A and B`, COCO and GQA are means of two parts, as in the paper; `all`, ours, is that
of all six.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from diva_lab.evaluation.choices import Choice, answer, caption_cells, choice_benchmark, image_cell, part_scores
from diva_lab.evaluation.row_files import find_file, read_rows
from diva_lab.evaluation.task import Task

CONTROLLED = {"A": "controlled_images_dataset", "B": "controlled_clevr_dataset"}  # part -> file
SPATIAL = {"COCO one": "coco_qa_one_obj", "COCO two": "coco_qa_two_obj", "GQA one": "vg_qa_one_obj",
           "GQA two": "vg_qa_two_obj"}  # fmt: skip
PARTS = CONTROLLED | SPATIAL
MEANS = {"A and B": ("A", "B"), "COCO": ("COCO one", "COCO two"), "GQA": ("GQA one", "GQA two"), "all": tuple(PARTS)}
PAIRS = {"A": (("left", "right"), ("on", "under")), "B": (("left", "right"), ("in-front", "behind"))}
OPTIONS = tuple(f"caption option {k}" for k in range(1, 5))
COLUMNS = ("image_id", "caption_true", "caption_false")


def is_here(folder: Path) -> bool:
    return any(find_file(folder, stem) for stem in PARTS.values())


def relation_in(image: str) -> str:
    """The relation in the name of an image as OBJECT_RELATION[_of]_OBJECT."""
    return Path(image).stem.split("_")[1]


def controlled_choices(path: Path, part: str) -> list[Choice]:
    """The choices of A or B, whose units are the sets; each set must have all four relations."""
    choices, relations = [], {}
    for k, row in enumerate(read_rows(path, ["image_path", "caption_options"]), 1):
        where, options = f"{path}, row {k}", row["caption_options"]
        words = Path(str(row["image_path"])).stem.split("_")
        if not isinstance(options, list) or len(options) != 4 or len(words) < 3:
            raise ValueError(
                f"{where}: {str(options)[:40]!r} of {str(row['image_path'])[:40]!r}; expected four captions of "
                "an image named OBJECT_RELATION_OBJECT"
            )
        captions = caption_cells(dict(zip(OPTIONS, options, strict=True)), OPTIONS, where)
        unit = f"{part}: {words[0]}, {words[-1]}"
        relations.setdefault(unit, []).append(words[1])
        choices.append(Choice(image_cell(row, "image_path", where), captions, part, unit, tie=True))
    expected = sorted(relation for pair in PAIRS[part] for relation in pair)
    for unit, found in relations.items():
        if sorted(found) != expected:
            raise ValueError(f"{path}: set {unit}: {', '.join(found)}; expected each of {', '.join(expected)} once")
    return choices


def spatial_choices(path: Path, part: str) -> Iterator[Choice]:
    for k, row in enumerate(read_rows(path, COLUMNS), 1):
        name = str(row["image_id"]).zfill(12 if part.startswith("COCO") else 0)
        yield Choice(f"{name}.jpg", caption_cells(row, COLUMNS[1:], f"{path}, row {k}"), part, tie=True)


def set_answers(answers: pd.DataFrame, relations: Sequence[str], part: str) -> Iterator[pd.DataFrame]:
    """The answers of A or B, an item each pair and then each set; `relations` are those of the images."""
    sets = answers.assign(relation=relations).pivot(index="unit", columns="relation", values="right")
    pairs = pd.concat([sets[list(pair)].all(axis=1) for pair in PAIRS[part]])
    for metric, right, images in (("pairs", pairs, 2), ("sets", sets.all(axis=1), 4)):
        items = {"item": "", "metric": metric, "part": part, "group": "", "unit": right.index}
        yield pd.DataFrame(items | {"right": right.to_numpy(bool), "chance": 0.25**images})


@choice_benchmark(is_here, partial(part_scores, means=MEANS))
def whatsup(task: Task) -> pd.DataFrame:
    """The accuracy of each part that is there and of `MEANS`; of A and B the pair and set accuracy, too."""
    files = {part: path for part, stem in PARTS.items() if (path := find_file(task.folder, stem))}
    choices = [
        choice for part, path in files.items()
        for choice in (controlled_choices if part in CONTROLLED else spatial_choices)(path, part)
    ]  # fmt: skip
    answers = answer(task, choices)
    tables = [answers]
    for part in filter(files.get, CONTROLLED):
        relations = [relation_in(choice.image) for choice in choices if choice.part == part]
        tables += set_answers(answers[answers["part"] == part], relations, part)
    return pd.concat(tables, ignore_index=True)
