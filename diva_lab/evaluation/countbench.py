"""CountBench: which of nine numbers, `two` to `ten`, in an image's caption is nearest to the image?

Paiss et al., "Teaching CLIP to Count to Ten" (arXiv 2302.12066). The folder's name has `countbench` in it; it holds the
hub's parquet files `train`, or `countbench` in any of our formats: image, text, number. The authors' code for this
test was not released, and this follows their description from memory: the number's word in the caption is replaced by
each of the nine. Our choices where it says nothing: only the first such word is replaced; a tie is wrong; a digit
stands for a word that is not there. Images that the hub's copy lacks (49 of 540) and captions without their number are
left out, and their count is told: n says how many are scored.
"""

import re
from pathlib import Path

import pandas as pd

from diva_lab.evaluation.choices import Choice, answer, caption_cells, choice_benchmark, image_cell, part_scores
from diva_lab.evaluation.row_files import find_parts, read_parts
from diva_lab.evaluation.task import Task
from diva_lab.image_files import LeftOut

STEMS = ("train", "countbench", "CountBench")
WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}


def is_here(folder: Path) -> bool:
    return "countbench" in folder.name.lower() and bool(find_parts(folder, *STEMS))


def replace_number(text: str, number: int) -> tuple[str, ...]:
    """A caption and its eight variants with another number, the right one first; () where it lacks its number."""
    found = re.search(rf"\b{WORDS[number]}\b", text, re.IGNORECASE) or re.search(rf"\b{number}\b", text)
    if not found:
        return ()
    case = str.upper if found[0].isupper() else str.capitalize if found[0][0].isupper() else str
    others = [case(word) if found[0].isalpha() else str(k) for k, word in WORDS.items() if k != number]
    return text, *(text[: found.start()] + other + text[found.end() :] for other in others)


@choice_benchmark(is_here, part_scores)
def countbench(task: Task) -> pd.DataFrame:
    """The share of images whose number is chosen, among nine."""
    parts = find_parts(task.folder, *STEMS)
    if not parts:
        raise FileNotFoundError(f"{task.folder}: no train*.parquet and no countbench file; expected one of them")
    choices, left_out = [], []
    for k, row in enumerate(read_parts(parts, ["image", "text", "number"]), 1):
        where = f"{parts[0]}, row {k}"
        (text,) = caption_cells(row, ["text"], where)
        if row["number"] not in WORDS:
            raise ValueError(f"{where}: number is {row['number']!r}; expected one from 2 to 10")
        captions = replace_number(text, int(row["number"]))
        if row["image"] is None or not captions:
            left_out.append(LeftOut(where, "no image" if captions else f"no number {row['number']} in {text[:60]!r}"))
        else:
            choices.append(Choice(image_cell(row, "image", where), captions))
    task.tell_left_out(left_out)
    return answer(task, choices)
