"""Published benchmarks of perception on small files in their real layouts, decisions and scores computed by hand.

The stub encoder's space is colour: an image is its mean colour, a caption the sum of the colours that it names. So
"a red ball" has cosine 1 with a red image, 0 with a green one; captions that name the same colours tie.
"""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from diva_lab.cli import main
from diva_lab.evaluation import table as table_module
from diva_lab.evaluation.aro import SYMMETRIC, aro
from diva_lab.evaluation.choices import Score, accuracy_row, square_decisions
from diva_lab.evaluation.colorswap import colorswap
from diva_lab.evaluation.countbench import WORDS, countbench, replace_number
from diva_lab.evaluation.features import FeatureStore
from diva_lab.evaluation.referee import measured_rows
from diva_lab.evaluation.row_files import find_parts, read_parts, read_rows
from diva_lab.evaluation.sugarcrepe import SUBSETS, sugarcrepe
from diva_lab.evaluation.table import PERCEPTION, benchmark_folders, count_sets, evaluate, perception_row
from diva_lab.evaluation.task import Task
from diva_lab.evaluation.valse import INSTRUMENTS, valse
from diva_lab.evaluation.verdicts import differences
from diva_lab.evaluation.whatsup import whatsup
from diva_lab.evaluation.winoground import winoground
from diva_lab.models.encoders import Encoder, Features, load_encoder
from diva_lab.statistics import independent_difference, paired_shares, wilson
from diva_lab.world import World, write_pairs

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Colours(Encoder):
    """Embeds images by their mean colour and texts by the colours that they name; counts what it embedded."""

    def __init__(self):
        nn.Module.__init__(self)
        self.px, self.interpolation, self.squash, self.asked = 8, "bicubic", False, []
        self.mean, self.resized = torch.zeros(1), 0

    def features(self, images):
        colour = images.mean((2, 3)) + 1e-3
        return Features(colour, colour[:, None])

    def encode_text(self, texts):
        self.asked += texts
        named = [[COLOURS[word] for word in re.findall("red|green|blue", text)] for text in texts]
        return F.normalize(torch.stack([torch.tensor(c, dtype=torch.float).sum(0) for c in named]), dim=-1)


def paint(path: Path, *colours: str) -> None:
    """An image of 8 x 8 pixels of each colour, side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (8 * len(colours), 8))
    for k, colour in enumerate(colours):
        image.paste(COLOURS[colour], (8 * k, 0, 8 * k + 8, 8))
    image.save(path, "PNG")


def packed(colour: str) -> dict:
    """An image as the parquet files of the hub hold it."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[colour]).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)


def task_on(folder: Path, encoder: Encoder | None = None) -> Task:
    encoder = encoder or Colours()
    return Task(encoder, FeatureStore(encoder, None), folder)


def scores(benchmark, folder: Path) -> dict[tuple[str, str], dict]:
    """(metric, category) -> row."""
    rows = list(benchmark(task_on(folder)))
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    found = {(row["metric"], row["category"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def values(benchmark, folder: Path) -> dict[tuple[str, str], float]:
    return {key: row["value"] for key, row in scores(benchmark, folder).items()}


# --- the layouts, small -----------------------------------------------------------------------------------------


def write_sugarcrepe(folder: Path, subsets=SUBSETS) -> Path:
    """In each subset a right choice, a wrong one, a tie and one more that is right, on two images that all share."""
    paint(folder / "val2017" / "000000000001.jpg", "red")
    paint(folder / "val2017" / "000000000002.jpg", "green")
    for name in subsets:
        rows = [("1", "a red ball", "a green ball"), ("1", "a blue ball", "a red ball"),
                ("2", "a green cup", "cup, green"), ("2", "a green cup", "a red cup")]  # fmt: skip
        keys = "filename", "caption", "negative_caption"
        write(folder / "data" / f"{name}.json",
              {str(k): dict(zip(keys, (f"00000000000{i}.jpg", *texts), strict=True)) for k, (i, *texts) in
               enumerate(rows)})  # fmt: skip
    return folder


SQUARES = [  # captions, colours of the images: both ways right; the second image is wrong; a tie of the captions
    ("a red cup", "a green cup", "red", "green"),
    ("a red cup", "a green cup", "red", "red"),
    ("red, then a cup", "a cup, then red", "red", "green"),
]


def write_winoground(folder: Path) -> Path:
    lines = []
    for k, (one, other, *colours) in enumerate(SQUARES):
        for i, colour in enumerate(colours):
            paint(folder / "data" / "images" / f"ex_{k}_img_{i}.png", colour)
        names = {f"image_{i}": f"ex_{k}_img_{i}" for i in (0, 1)}
        lines.append(json.dumps({"id": k, "caption_0": one, "caption_1": other, "collapsed_tag": "Object", **names}))
    (folder / "data" / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_colorswap(folder: Path) -> Path:
    rows = []
    for k, (one, other, *colours) in enumerate(SQUARES):
        for i, colour in enumerate(colours, 1):
            paint(folder / "images" / f"img_{k}_{i}.png", colour)
        names = {f"image_{i}": f"images/img_{k}_{i}.png" for i in (1, 2)}
        rows.append({"id": k, "caption_1": one, "caption_2": other, **names, "image_source": "midjourney"})
    write(folder / "test.json", rows)
    return folder


def write_whatsup(folder: Path) -> Path:
    """A: a set that is right and one whose `left` is wrong; B: one set, right by ties; four spatial files."""
    right, wrong, tie = (["a red cup", "green", "blue", "green blue"], ["blue", "red", "green", "blue"],
                         ["a red cup", "red", "red too", "blue"])  # fmt: skip
    rows = []
    for first, last, left in (("mug", "plate", right), ("cup", "table", wrong)):
        for relation in ("left_of", "right_of", "on", "under"):
            name = f"{first}_{relation}_{last}.jpeg"
            paint(folder / "controlled_images" / name, "red")
            options = left if relation == "left_of" else right
            rows.append({"image_path": f"data/controlled_images/{name}", "caption_options": options})
    write(folder / "controlled_images_dataset.json", rows)
    rows = []
    for relation in ("left_of", "right_of", "in-front_of", "behind"):
        paint(folder / "controlled_clevr" / f"cup_{relation}_fork.jpeg", "red")
        rows.append({"image_path": f"data/controlled_clevr/cup_{relation}_fork.jpeg", "caption_options": tie})
    write(folder / "controlled_clevr_dataset.json", rows)
    paint(folder / "val2017" / "000000000139.jpg", "red")
    paint(folder / "vg_images" / "23.jpg", "green")
    write(folder / "coco_qa_one_obj.json", [[139, "a red cup", "a blue cup"], [139, "a blue cup", "a red cup"]])
    write(folder / "coco_qa_two_obj.json", [[139, "a red cup", "red, a cup"]])
    write(folder / "vg_qa_one_obj.json", [[23, "a red cup", "a green cup"]])
    write(folder / "vg_qa_two_obj.json", [[23, "a green cup", "a red cup"]])
    return folder


def write_aro(folder: Path) -> Path:
    """Images whose left half is red and whose right half is green; the captions are of the left half."""
    left = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 8, "bbox_h": 8}
    paint(folder / "images" / "7.jpg", "red", "green")
    paint(folder / "images" / "8.jpg", "red", "green")
    right, wrong, tie = (("a red cup", "a green cup"), ("a green cup", "a red cup"), ("a red cup", "cup, red"))
    rows = [("on", right, "7.jpg"), ("on", wrong, "8.jpg"), ("on", tie, "7.jpg"), ("wearing", right, "7.jpg"),
            ("near", wrong, "8.jpg")]  # fmt: skip
    assert "near" in SYMMETRIC and not {"on", "wearing"} & SYMMETRIC
    write(folder / "visual_genome_relation.json",
          [dict(zip(("true_caption", "false_caption"), texts, strict=True), relation_name=name, image_path=i, **left)
           for name, texts, i in rows])  # fmt: skip
    attributes = [(("old", "red"), right)] * 20 + [(("old", "red"), wrong)] * 5 + [(("new", "red"), wrong)] * 24
    write(folder / "visual_genome_attribution.json",
          [dict(zip(("true_caption", "false_caption"), texts, strict=True), attributes=pair, image_path="8.jpg", **left)
           for pair, texts in attributes])  # fmt: skip
    return folder


def write_order(folder: Path) -> Path:
    """Two files of one table: right; a tie, which is right; one of four is nearer."""
    rows = [("red cup", "green", "green", "blue", "blue"), ("red cup", "cup red", "green", "blue", "blue"),
            ("green cup", "blue", "blue", "blue", "red")]  # fmt: skip
    columns = ["correct_caption", *(f"hard_text_{k}" for k in (1, 2, 3, 4))]
    table = [{"images": packed("red"), **dict(zip(columns, texts, strict=True))} for texts in rows]
    write_parquet(folder / "data" / "test-00000-of-00002.parquet", table[:2])
    write_parquet(folder / "data" / "test-00001-of-00002.parquet", table[2:])
    return folder


def write_countbench(folder: Path) -> Path:
    """Four that count, one without an image and one without its number. (The stub cannot count: all of them tie.)"""
    rows = [("Three red cups", 3, "red"), ("ten red cups", 10, "green"), ("a set of 5 blue cups", 5, "blue"),
            ("two red dogs, two hats", 2, "red"), ("six red cups", 6, None), ("many red cups", 4, "red")]  # fmt: skip
    table = [{"image": packed(c) if c else None, "text": text, "number": n, "image_url": ""} for text, n, c in rows]
    write_parquet(folder / "data" / "train-00000-of-00001-cf54c241.parquet", table)
    return folder


def write_valse(folder: Path, instruments=INSTRUMENTS) -> Path:
    """In each file one right, one wrong and one tie that are valid, and one right one that two annotators rejected."""
    paint(folder / "visual7w" / "images" / "v7w_1.jpg", "red")
    rows = [("a red cup", "a green cup", 3), ("a blue cup", "a red cup", 2), ("a red cup", "cup, red", 3),
            ("a red cup", "a green cup", 1)]  # fmt: skip
    for name in instruments:
        write(folder / "data" / f"{name}.json",
              {f"{name}_{k}": {"image_file": "v7w_1.jpg", "caption": caption, "foil": foil,
                               "mturk": {"caption": votes, "foil": 0, "other": 3 - votes}}
               for k, (caption, foil, votes) in enumerate(rows)})  # fmt: skip
    return folder


LAYOUTS = {
    "SugarCrepe": (sugarcrepe, write_sugarcrepe),
    "winoground": (winoground, write_winoground),
    "colorswap": (colorswap, write_colorswap),
    "whatsup": (whatsup, write_whatsup),
    "ARO": (aro, write_aro),
    "ARO-COCO-order": (aro, write_order),
    "countbench": (countbench, write_countbench),
    "VALSE": (valse, write_valse),
}


# --- scores by hand ---------------------------------------------------------------------------------------------


def test_sugarcrepe_wants_the_caption_nearer_and_a_tie_is_wrong(tmp_path):
    found = scores(sugarcrepe, write_sugarcrepe(tmp_path / "s"))
    assert list(found) == [("accuracy", name) for name in sorted(SUBSETS)] + [("accuracy", "all")]
    assert all(row["value"] == pytest.approx(0.5) == row["chance"] for row in found.values())
    assert found["accuracy", "all"]["n"] == 28 and found["accuracy", "swap_obj"]["n"] == 4


def test_a_mean_stands_only_where_all_parts_are_there(tmp_path):
    assert list(values(sugarcrepe, write_sugarcrepe(tmp_path / "s", SUBSETS[:6]))) == [
        ("accuracy", name) for name in SUBSETS[:6]
    ]
    assert ("accuracy", "all") not in values(valse, write_valse(tmp_path / "v", INSTRUMENTS[1:]))


def test_each_image_and_each_caption_is_embedded_once(tmp_path):
    task = task_on(write_sugarcrepe(tmp_path / "s"))
    list(sugarcrepe(task))
    assert task.store.images == 2 and len(task.encoder.asked) == len(set(task.encoder.asked)) == 6


@pytest.mark.parametrize(("benchmark", "writer"), [(winoground, write_winoground), (colorswap, write_colorswap)])
def test_the_squares_of_winoground_and_colorswap(benchmark, writer, tmp_path):
    found = scores(benchmark, writer(tmp_path / "x"))
    for metric, right, chance in (("text", 1, 1 / 4), ("image", 1, 1 / 4), ("group", 1, 1 / 6)):
        row = found[metric, "all"]
        assert (row["value"], row["n"], row["chance"]) == (pytest.approx(right / 3), 3, chance)
        assert (row["low"], row["high"]) == wilson(right, 3)


def test_parquet_files_of_the_hub_give_the_same_as_files_beside_them(tmp_path):
    rows = [{"caption_0": a, "caption_1": b, "image_0": packed(one), "image_1": packed(other)}
            for a, b, one, other in SQUARES]  # fmt: skip
    write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", rows)
    assert values(winoground, tmp_path / "hub") == values(winoground, write_winoground(tmp_path / "files"))


def test_square_decisions_by_hand():
    similarity = np.array([
        [[0.9, 0.1], [0.2, 0.8]],  # [caption, image]: all right
        [[0.9, 0.7], [0.2, 0.6]],  # image 2 is nearer to caption 1; each caption is nearest to its own image
        [[0.9, 0.1], [0.95, 0.96]],  # image 1 is nearer to caption 2
        [[0.5, 0.9], [0.1, 0.95]],  # captions choose image 2 both times; image 2 chooses its own
        [[0.5, 0.5], [0.1, 0.6]],  # caption 1 ties between the images
        [[0.5, 0.1], [0.5, 0.6]],  # image 1 ties between the captions
    ])  # fmt: skip
    found = {name: right.tolist() for name, right in square_decisions(similarity).items()}
    assert found["text"] == [True, False, False, True, True, False]
    assert found["image"] == [True, True, True, False, False, True]
    assert found["group"] == [True, False, False, False, False, False]


def test_four_random_similarities_score_a_quarter_a_quarter_and_a_sixth():
    found = square_decisions(np.random.default_rng(0).normal(size=(40_000, 2, 2)))
    assert [right.mean() for right in found.values()] == pytest.approx([1 / 4, 1 / 4, 1 / 6], abs=0.01)


def test_whatsup_takes_a_tie_for_right_and_counts_pairs_and_sets(tmp_path):
    found = scores(whatsup, write_whatsup(tmp_path / "w"))
    expected = {("accuracy", "A"): 7 / 8, ("pairs", "A"): 3 / 4, ("sets", "A"): 1 / 2, ("accuracy", "B"): 1,
                ("pairs", "B"): 1, ("sets", "B"): 1, ("accuracy", "COCO one"): 1 / 2, ("accuracy", "COCO two"): 1,
                ("accuracy", "GQA one"): 0, ("accuracy", "GQA two"): 1, ("accuracy", "A and B"): 15 / 16,
                ("accuracy", "COCO"): 3 / 4, ("accuracy", "GQA"): 1 / 2}  # fmt: skip
    expected["accuracy", "all"] = (15 / 16 + 3 / 4 + 1 / 2) / 3
    assert {key: row["value"] for key, row in found.items()} == pytest.approx(expected)
    chances = {key: found[key]["chance"] for key in (("pairs", "A"), ("sets", "A"), ("accuracy", "A"))}
    assert list(chances.values()) == [1 / 16, 1 / 256, 1 / 4]
    assert found["accuracy", "COCO"]["chance"] == 0.5 and found["accuracy", "all"]["chance"] == pytest.approx(2.5 / 6)
    assert [found[name, "A"]["n"] for name in ("accuracy", "pairs", "sets")] == [8, 4, 2]


def test_aro_cuts_to_the_box_and_averages_as_its_authors_do(tmp_path):
    found = scores(aro, write_aro(tmp_path / "aro"))
    expected = {("accuracy", "relation"): 2 / 5, ("accuracy", "attribution"): 20 / 49}
    expected |= {("macro accuracy", "relation"): (1 / 3 + 1) / 2, ("macro accuracy", "attribution"): 20 / 25}
    expected["macro accuracy", "all"] = (2 / 3 + 4 / 5) / 2
    assert {key: row["value"] for key, row in found.items()} == pytest.approx(expected)
    assert {row["chance"] for row in found.values()} == {0.5}
    assert found["macro accuracy", "relation"]["n"] == 4 and found["macro accuracy", "attribution"]["n"] == 25


def test_aro_without_the_box_would_choose_otherwise(tmp_path):
    folder = write_aro(tmp_path / "aro")
    rows = json.loads((folder / "visual_genome_relation.json").read_text())
    write(folder / "visual_genome_relation.json", [row | {"bbox_x": 8} for row in rows])
    assert values(aro, folder)["accuracy", "relation"] == 2 / 5  # the two wrong ones; the others are now wrong
    task = task_on(folder)
    list(aro(task))
    assert task.store.images == 3  # both halves of one image, the right half of the other's


def test_the_order_of_words_is_one_of_five_and_a_tie_is_right(tmp_path):
    found = scores(aro, write_order(tmp_path / "ARO-COCO-order"))
    assert list(found) == [("accuracy", "coco order")]
    row = found["accuracy", "coco order"]
    assert (row["value"], row["n"], row["chance"]) == (pytest.approx(2 / 3), 3, pytest.approx(0.2))


def test_countbench_asks_nine_numbers_and_leaves_out_what_cannot_be_asked(tmp_path, capsys):
    task = task_on(write_countbench(tmp_path / "countbench"))
    (row,) = countbench(task)
    assert (row["value"], row["n"], row["chance"]) == (0, 4, pytest.approx(1 / 9))  # all nine tie: wrong
    assert "2 left out, the first:" in capsys.readouterr().out
    assert {text.split()[0] for text in task.encoder.asked if text.endswith("red cups")} >= {"Three", "Ten", "two"}


def test_countbench_chooses_the_number_in_the_caption_that_is_nearest(tmp_path, monkeypatch):
    for number, word in WORDS.items():  # images whose colour says a number, and captions that know the colour
        monkeypatch.setitem(COLOURS, word, (255, 28 * (number - 2), 0))
    monkeypatch.setattr(re, "findall", lambda _, text: [word for word in WORDS.values() if word in text.lower()])
    rows = [("Three cups", 3, "three"), ("seven cups", 7, "five")]
    table = [{"image": packed(colour), "text": text, "number": n} for text, n, colour in rows]
    write_parquet(tmp_path / "countbench" / "train.parquet", table)
    (row,) = countbench(task_on(tmp_path / "countbench"))
    assert row["value"] == 0.5 and (row["low"], row["high"]) == wilson(1, 2)


def test_the_number_of_a_caption_is_replaced_in_its_own_case():
    captions = replace_number("Six cups, SIX", 6)
    assert captions[0] == "Six cups, SIX" and len(set(captions)) == 9 and "Ten cups, SIX" in captions
    assert "SEVEN cups" in replace_number("SIX cups", 6) and "4 cups" in replace_number("6 cups", 6)
    assert replace_number("sixty cups", 6) == () == replace_number("16 cups", 6)


def test_valse_counts_valid_items_alone_and_a_tie_is_wrong(tmp_path):
    found = scores(valse, write_valse(tmp_path / "VALSE"))
    assert all(row["value"] == pytest.approx(1 / 3) for row in found.values())
    assert {row["n"] for key, row in found.items() if key[1] != "all"} == {3} and found["accuracy", "all"]["n"] == 33
    assert all(row["chance"] == pytest.approx(0.5) for row in found.values())


# --- intervals --------------------------------------------------------------------------------------------------


def table_of(right, unit, **columns) -> pd.DataFrame:
    return pd.DataFrame({"right": np.array(right, bool), "unit": unit, "chance": 0.5, **columns})


def test_the_interval_is_wilsons_where_answers_are_independent_and_wider_where_they_share_an_image():
    right = [1, 0] * 50
    alone = accuracy_row(Score(table_of(right, range(100))))
    shared = accuracy_row(Score(table_of(np.repeat([1, 0] * 10, 5), np.repeat(range(20), 5))))
    assert (alone["low"], alone["high"]) == wilson(50, 100) and shared["value"] == alone["value"] == 0.5
    assert shared["high"] - shared["low"] > 1.5 * (alone["high"] - alone["low"])


def test_groups_count_alike_and_inner_groups_within_outer_ones():
    answers = table_of([1, 1, 1, 0, 0, 1], range(6), part=list("aaabbb"), group=list("xxyxyy"))
    assert accuracy_row(Score(answers, by=["part"]))["value"] == pytest.approx((1 + 1 / 3) / 2)
    assert accuracy_row(Score(answers, by=["part", "group"]))["value"] == pytest.approx((1 + (0 + 1 / 2) / 2) / 2)
    rare = table_of([1] * 30 + [0], range(31), group=["x"] * 30 + ["y"])
    row = accuracy_row(Score(rare, by=["group"]))
    assert row["value"] == 0.5 and row["high"] == 1  # a third of the samples lack y, and none is lost


# --- paired differences -----------------------------------------------------------------------------------------


class Guesses(Colours):
    """Embeds each caption at a place that its letters and a seed decide."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def encode_text(self, texts):
        draws = [np.random.default_rng([self.seed, *text.encode()]).normal(size=3) for text in texts]
        return F.normalize(torch.tensor(np.array(draws), dtype=torch.float), dim=-1)


def answers_of(benchmark, folder: Path, encoder: Encoder | None = None) -> tuple[pd.DataFrame, dict]:
    """The answers, and (metric, category) -> value."""
    task = task_on(folder, encoder)
    found = {(row["metric"], row["category"]): row["value"] for row in benchmark(task)}
    return task.answers[0], found


def differences_of(benchmark, before: pd.DataFrame, after: pd.DataFrame) -> dict[tuple[str, str], dict]:
    rows, pairs = benchmark.reads.compare(before, after, 0)
    assert pairs is None
    return {(row["metric"], row["category"]): row for row in rows}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_difference_is_that_of_both_scores_and_no_change_is_zero(name, tmp_path):
    benchmark, writer = LAYOUTS[name]
    folder = writer(tmp_path / name)
    before, old = answers_of(benchmark, folder)
    others = (answers_of(benchmark, folder, Guesses(seed)) for seed in range(20))
    after, new = next(found for found in others if found[1] != old)
    found, same = differences_of(benchmark, before, after), differences_of(benchmark, after, after)
    assert {key for key in found if ", " not in key[0]} == old.keys()
    for key, value in new.items():
        assert found[key]["value"] == pytest.approx(value - old[key], abs=1e-12)
        assert found[key]["low"] <= found[key]["value"] <= found[key]["high"]
        assert same[key]["value"] == 0 and same[f"{key[0]}, p", key[1]]["value"] == 1
        resampled = (f"{key[0]}, gained", key[1]) not in found
        assert (same[key]["low"], same[key]["high"]) == (
            (0, 0) if resampled else paired_shares(0, 0, same[key]["n"])[1:]
        )


def answer_table(*columns: tuple, **same) -> pd.DataFrame:
    """Answers from columns of (name, values); units are all their own unless given."""
    table = pd.DataFrame(dict(columns)).assign(**{name: value for name, value in same.items()})
    blank = {"item": "", "metric": "accuracy", "part": "all", "group": "", "unit": table.index, "chance": 0.5}
    return table.assign(**{name: value for name, value in blank.items() if name not in table})


def with_right(table: pd.DataFrame, right) -> pd.DataFrame:
    return table.assign(right=np.array(right, bool))


def test_the_differences_of_aro_sugarcrepe_and_winoground_by_hand():
    """ARO: `on` 1/3 up, `wearing` down, `near` does not count; `old red` 1/5 up, `new red` of 24 does not count."""
    groups = ["on"] * 3 + ["wearing", "near"] + ["old_red"] * 25 + ["new_red"] * 24
    table = answer_table(("group", groups), ("part", ["relation"] * 5 + ["attribution"] * 49))
    before, after = [1, 0, 0, 1, 0] + [0] * 49, [1, 1, 0, 0, 1] + [1] * 5 + [0] * 20 + [1] * 24
    found = differences_of(aro, with_right(table, before), with_right(table, after))
    assert found["macro accuracy", "relation"]["value"] == pytest.approx((1 / 3 - 1) / 2)
    assert found["macro accuracy", "attribution"]["value"] == pytest.approx(1 / 5)
    assert found["macro accuracy", "all"]["value"] == pytest.approx((-1 / 3 + 1 / 5) / 2)
    assert found["accuracy, gained", "relation"]["value"] == 2 / 5  # each row is a unit here: paired shares
    assert ("macro accuracy, gained", "all") not in found

    table = answer_table(("part", [*SUBSETS, *[SUBSETS[0]] * 3]))  # one item of each subset, four of the first
    before, after = [1] * 7 + [0] * 3, [1] * 6 + [0, 1, 0, 0]  # one of four is gained, one of one is lost
    found = differences_of(sugarcrepe, with_right(table, before), with_right(table, after))
    assert found["accuracy", "all"]["value"] == pytest.approx((1 / 4 - 1) / 7)

    table = pd.concat([answer_table(("unit", range(10)), metric=name) for name in ("text", "group")], ignore_index=True)
    before, after = [0] * 20, [0] * 10 + [1] * 3 + [0] * 7
    found = differences_of(winoground, with_right(table, before).assign(right=[False] * 19 + [True]),
                           with_right(table, after))  # fmt: skip
    row = found["group", "all"]
    assert (row["value"], row["low"], row["high"]) == paired_shares(3, 1, 10) and row["n"] == 10
    assert found["group, p", "all"]["value"] == pytest.approx(10 / 16)  # 2 (1 + 4) / 2^4
    assert [found[f"group, {name}", "all"]["value"] for name in ("gained", "lost")] == [0.3, 0.1]


def test_a_paired_interval_is_narrower_than_an_independent_one_where_encoders_mostly_agree():
    rng = np.random.default_rng(0)
    table = answer_table(("part", list(SUBSETS) * 200), ("unit", np.arange(1400) // 4))
    before = rng.random(1400) < 0.7
    after = before ^ (rng.random(1400) < 0.05)
    tables = with_right(table, before), with_right(table, after)
    row = differences_of(sugarcrepe, *tables)["accuracy", "all"]
    scores = [[one[name] for name in ("value", "low", "high")] for one in
              (accuracy_row(Score(each, by=("part",))) for each in tables)]  # fmt: skip
    difference, low, high, _ = independent_difference(*map(tuple, scores))
    assert row["value"] == pytest.approx(difference) and row["high"] - row["low"] < 0.5 * (high - low)


CHANGES = {
    "rows in another order": lambda rows: dict(reversed(rows.items())),
    "another caption": lambda rows: rows | {"0": rows["0"] | {"caption": "a red hat"}},
    "one item less": lambda rows: {key: row for key, row in rows.items() if key != "3"},
}


@pytest.mark.parametrize("kind", [*CHANGES, "another image of the same name"])
def test_answers_to_other_items_are_not_compared(kind, tmp_path):
    folder = write_sugarcrepe(tmp_path)
    before, _ = answers_of(sugarcrepe, folder)
    path = folder / "data" / "add_att.json"
    if kind in CHANGES:
        write(path, CHANGES[kind](json.loads(path.read_text())))
    else:
        paint(folder / "val2017" / "000000000001.jpg", "blue")
    after, _ = answers_of(sugarcrepe, folder)
    with pytest.raises(ValueError, match=r"^its items are not those that the first encoder answered; expected"):
        sugarcrepe.reads.compare(before, after, 0)


# --- bad input, before anything is embedded ---------------------------------------------------------------------


def damage(folder: Path, old: str, new: str) -> None:
    """Replace text in every JSON file."""
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")]):
        path.write_text(path.read_text().replace(old, new))


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[0]


BAD = {
    "an image is missing": ("SugarCrepe", lambda f: first(f, "*1.jpg").unlink(), r"1 of 2 images are not there, as '0"),
    "a name is two files": ("SugarCrepe", lambda f: paint(f / "b" / "000000000001.jpg", "red"), "is two files"),
    "a caption is missing": ("SugarCrepe", lambda f: damage(f, "negative_caption", "x"), "no negative_caption"),
    "a caption is empty": ("SugarCrepe", lambda f: damage(f, "a red ball", " "), r"row 1: caption is ' '"),
    "a file is empty": ("SugarCrepe", lambda f: write(f / "data" / "add_att.json", {}), "no rows; expected"),
    "a file is a number": ("SugarCrepe", lambda f: write(f / "data" / "add_att.json", 3), "no rows; expected"),
    "JSON is cut off": ("VALSE", lambda f: (p := first(f, "*.json")).write_text(p.read_text()[:-9]), "cut off?"),
    "a list is cut off": ("whatsup", lambda f: (p := first(f, "c*.json")).write_text(p.read_text()[:-9]), "cut off?"),
    "votes are missing": ("VALSE", lambda f: damage(f, '"mturk"', '"x"'), "no mturk; expected"),
    "votes are no numbers": ("VALSE", lambda f: damage(f, '"caption": 3', '"c": 3'), "mturk is"),
    "no item is valid": ("VALSE", lambda f: [damage(f, f'n": {k}', 'n": 0') for k in (2, 3)], "no question in it"),
    "a line is cut off": ("winoground", lambda f: (p := first(f, "*.jsonl")).write_text(p.read_text()[:-9]), "line 3"),
    "an image has no name": ("winoground", lambda f: damage(f, '"ex_0_img_0"', "null"), r"row 1: an image is 'None'"),
    "a column is missing": ("colorswap", lambda f: damage(f, "caption_2", "x"), "row 1: no caption_2; expected"),
    "a set lacks a relation": ("whatsup", lambda f: damage(f, "mug_on", "mug_by"), "mug, plate: left, right, by, "),
    "three captions of four": ("whatsup", lambda f: damage(f, '"green blue"', "5"), "caption option 4 is '5'"),
    "a row of two": ("whatsup", lambda f: write(f / "vg_qa_one_obj.json", [[23, "a red"]]), "row 1: no image_id"),
    "a box is empty": ("ARO", lambda f: damage(f, '"bbox_w": 8', '"bbox_w": 0'), r"row 1: box 0, 0, 0, 8; expected"),
    "a box is missing": ("ARO", lambda f: damage(f, '"bbox_w"', '"w"'), "row 1: no bbox_w; expected"),
    "a part is missing": ("ARO-COCO-order", lambda f: first(f, "*1-of*").unlink(), "1 of 2 parts of test-00000"),
    "parquet is cut off": ("countbench", lambda f: (p := first(f, "*.par*")).write_bytes(p.read_bytes()[:-9]), "not a"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_error_that_names_the_file_before_anything_is_embedded(kind, tmp_path):
    name, break_it, message = BAD[kind]
    benchmark, writer = LAYOUTS[name]
    break_it(writer(tmp_path / name))
    task = task_on(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        list(benchmark(task))
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / name))
    assert task.store.images == 0 and task.encoder.asked == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_without_the_files_says_what_was_expected(name, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=f"{tmp_path}: no .*expected"):
        list(LAYOUTS[name][0](task_on(tmp_path)))


def test_a_number_beyond_ten_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [{"image": packed("red"), "text": "eleven red cups", "number": 11}])
    with pytest.raises(ValueError, match="row 1: number is 11; expected one from 2 to 10"):
        list(countbench(task_on(tmp_path)))


def test_rows_are_read_from_every_form_of_json(tmp_path):
    row = {"a": 1, "b": {"c": 2}}
    for name, content in {
        "ids.json": {"x": row, "y": row},
        "list.json": [row, row],
        "tuples.json": [[1, {"c": 2}]] * 2,
    }.items():
        assert read_rows(write(tmp_path / name, content), ["a", "b"]) == [row, row]
    (tmp_path / "lines.json").write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    (tmp_path / "one.json").write_text(json.dumps(row))
    assert read_rows(tmp_path / "lines.json", ["a"]) == [row, row] and read_rows(tmp_path / "one.json", ["a"]) == [row]


def test_parts_of_a_file_are_read_in_their_order(tmp_path):
    for k in (1, 0):
        write_parquet(tmp_path / "data" / f"test-0000{k}-of-00002.parquet", [{"a": k}])
    assert read_parts(find_parts(tmp_path, "train", "test"), ["a"]) == [{"a": 0}, {"a": 1}]
    assert find_parts(tmp_path, "train") == []


# --- the table --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("perception")
    for name, (_, writer) in LAYOUTS.items():
        writer(root / name)
    write_pairs(root / "mmvp", World(), 2, seed=3)
    return root


def test_each_benchmark_finds_its_own_folders_and_no_other(root):
    for benchmark, names in {"sugarcrepe": ["SugarCrepe"], "aro": ["ARO", "ARO-COCO-order"], "valse": ["VALSE"],
                             "winoground": ["winoground"], "colorswap": ["colorswap"], "whatsup": ["whatsup"],
                             "countbench": ["countbench"]}.items():  # fmt: skip
        assert [path.name for path in benchmark_folders(root, benchmark)] == names
        assert benchmark_folders(root / names[0], benchmark) == [root / names[0]]
        with pytest.raises(
            FileNotFoundError, match=f"no folder here for {benchmark}; see diva_lab.evaluation.{benchmark}$"
        ):
            benchmark_folders(root / "mmvp", benchmark)


def test_no_such_folder_is_taken_for_a_set_of_images(root):
    for folder in (root, root / "SugarCrepe", root / "whatsup", root / "ARO"):
        with pytest.raises(FileNotFoundError, match="no folder here for zero-shot"):
            benchmark_folders(folder, "zero-shot")


def test_one_command_measures_all_and_averages_p(root, tmp_path, capsys):
    out = tmp_path / "results.csv"
    words = ["--encoder", "tiny", "--benchmarks", ",".join(PERCEPTION), "--root", str(root), "--out", str(out)]
    assert main(["evaluate", *words]) == 0
    table = pd.read_csv(out)
    assert set(table["benchmark"]) == {*PERCEPTION, "p average"}
    assert not table[["value", "low", "high"]][table["benchmark"] != "mmvp-vlm"].isna().any(axis=None)
    own = [
        table[(table.benchmark == b) & (table.metric == m) & (table.category == "all")] for b, m in PERCEPTION.items()
    ]
    mean = table[table["benchmark"] == "p average"].iloc[0]
    assert mean["value"] == pytest.approx(np.mean([rows["value"].item() for rows in own]), abs=1e-5)
    assert (mean["metric"], mean["set"], mean["n"]) == ("mean", "8 benchmarks", 8)
    assert "tiny, perception: 8 of 8 benchmarks, averaged" in capsys.readouterr().out


def rows_of_perception() -> list[dict]:
    ends = {"encoder": "e", "category": "all", "n": 9, "low": 0.4, "high": 0.8, "chance": 0.25, "seed": 0, "note": ""}
    return [
        ends | {"benchmark": name, "set": "s", "metric": metric, "value": 0.5} for name, metric in PERCEPTION.items()
    ]


def test_the_average_of_p_stands_only_where_all_benchmarks_are_there_once():
    rows = rows_of_perception()
    (row,) = perception_row([*rows, rows[0] | {"metric": "group"}, rows[1] | {"category": "add_att"}])
    assert (row["benchmark"], row["metric"], row["value"], row["n"]) == ("p average", "mean", 0.5, 8)
    ends = [0.5 - 0.1 / np.sqrt(8), 0.5 + 0.3 / np.sqrt(8), 0.25]  # eight distances of .1 and of .3, their mean
    assert [row["low"], row["high"], row["chance"]] == pytest.approx(ends)
    assert perception_row(rows[1:]) == [] == perception_row([*rows, rows[0] | {"set": "two"}])


def test_the_missing_benchmarks_of_the_average_are_named():
    rows = rows_of_perception()
    assert count_sets(pd.DataFrame(rows)) == ["e, perception: 8 of 8 benchmarks, averaged"]
    assert count_sets(pd.DataFrame(rows[:1])) == []
    assert count_sets(pd.DataFrame([*rows[:-1], rows[1] | {"set": "two"}])) == [
        "e, perception: 6 of 8 benchmarks, no p average without one set of sugarcrepe, valse"
    ]


def test_a_second_evaluation_reads_the_embeddings_of_the_first(root, tmp_path, monkeypatch):
    for benchmark in ("aro:ARO", "countbench"):  # boxes, and bytes inside a file
        first = evaluate(["tiny"], [benchmark], root, cache=tmp_path / "cache")
        monkeypatch.setattr(FeatureStore, "_embed", lambda *args: pytest.fail("embedded again"))
        second = evaluate(["tiny"], [benchmark], root, cache=tmp_path / "cache")
        monkeypatch.undo()
        pd.testing.assert_frame_equal(first, second)


# --- resumed and compared ---------------------------------------------------------------------------------------

PAIRED = ["mmvp-vlm", "winoground", "aro:ARO"]


@pytest.fixture
def two_encoders(monkeypatch):
    """`a` is the tiny CLIP, `b` is it with other weights; returns the cells that are measured."""
    measured = []

    def opened(name, device):
        encoder = load_encoder("tiny")
        with torch.no_grad():
            weight = encoder.proj.weight
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            weight.add_((name == "b") * weight.std() * noise)
        return encoder

    def measure(benchmark, task, inner=table_module._measure_draws):
        measured.append((benchmark, task.store.fingerprint))
        return inner(benchmark, task)

    monkeypatch.setattr(table_module, "open_encoder", opened)
    monkeypatch.setattr(table_module, "_measure_draws", measure)
    return measured


def test_an_original_of_an_earlier_call_is_compared_item_by_item_and_the_referee_says_paired(
    root, tmp_path, two_encoders
):
    out, cache = tmp_path / "r.csv", tmp_path / "cache"
    whole = evaluate(["a", "b"], PAIRED, root, cache=cache)
    evaluate(["a"], PAIRED, root, out, cache=cache, resume=True)
    two_encoders.clear()
    resumed = evaluate(["a", "b"], PAIRED, root, out, cache=cache, resume=True)
    assert len(two_encoders) == len({*two_encoders}) == len(PAIRED), "each cell of b, none of a"
    pd.testing.assert_frame_equal(resumed, whole, atol=1e-6)
    shutil.rmtree(tmp_path / "r.answers")  # as an earlier version, which kept no such answers
    pd.testing.assert_frame_equal(evaluate(["a", "b"], PAIRED, root, out, cache=cache, resume=True), whole, atol=1e-6)
    assert len(two_encoders) == 3 * len(PAIRED)

    changes = differences(measured_rows(whole, {"none": "a", "b": "b"}, ""), "a")
    tested = changes[[PERCEPTION[row.benchmark] == row.metric for row in changes.itertuples()]].set_index("benchmark")
    assert tested["how"].eq("paired").all() and tested["holm"].notna().all() and len(tested) == 3
    assert tested.index[tested["gained"].isna()].tolist() == ["aro"], "it alone is a mean over groups"
    captions = tested.loc[["winoground", "aro"]]
    np.testing.assert_allclose(captions["difference"], captions["after"] - captions["before"], atol=1e-9)


def test_a_folder_that_was_changed_between_two_calls_is_one_error_and_the_rest_stands(tmp_path, two_encoders):
    write_winoground(tmp_path / "data" / "winoground")
    path = write_sugarcrepe(tmp_path / "data" / "s") / "data" / "add_att.json"
    names, out = ["sugarcrepe", "winoground"], tmp_path / "r.csv"
    evaluate(["a"], names, tmp_path / "data", out, cache=None, resume=True)
    write(path, CHANGES["rows in another order"](json.loads(path.read_text())))
    for _ in range(2):  # also when it is asked again
        with pytest.raises(ValueError, match="1 of 4 failed:\n- b, sugarcrepe, s: its items are not those") as error:
            evaluate(["a", "b"], names, tmp_path / "data", out, cache=None, resume=True)
        assert set(error.value.table.query("encoder == 'b'")["benchmark"]) == {"winoground"}
    assert pd.read_csv(out).query("encoder == 'b'")["benchmark"].eq("winoground").all()


def test_a_comparison_is_made_anew_when_the_first_encoder_is_another(root, tmp_path, two_encoders):
    out, names = tmp_path / "r.csv", ["winoground", "mmvp-vlm"]
    evaluate(["a", "b"], names, root, out, cache=None, resume=True)
    measured = len(two_encoders)
    table = evaluate(["b", "a"], names, root, out, cache=None, resume=True)
    assert len(two_encoders) == measured
    pd.testing.assert_frame_equal(table, evaluate(["b", "a"], names, root, cache=None), atol=1e-6)
    assert not pd.read_csv(out)["category"].eq("against a").any()
