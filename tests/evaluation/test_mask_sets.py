import re
import shutil
from functools import partial

import numpy as np
import pytest
from mask_writers import SHOWN, VOID, numbers_of, write_masks
from PIL import Image

from diva_lab.cli import main
from diva_lab.evaluation.features import prepare
from diva_lab.evaluation.mask_sets import SPLITS, VOC_CLASSES, is_masks, load_masks, read_masks
from diva_lab.evaluation.patches import IGNORED
from diva_lab.evaluation.table import benchmark_folders, evaluate

COUNTS = {"voc": 21, "ade20k": 150, "coco-stuff": 171}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("masks")
    for layout in SPLITS:
        write_masks(root / layout, layout)
    return root


def cut(px: int, squash: bool):
    return lambda image, how: prepare(image, px, how or "bicubic", squash)


@pytest.mark.parametrize("layout", SPLITS)
def test_both_splits_of_a_published_layout_are_read_with_the_names_of_its_classes(root, layout):
    test, train = read_masks(root / layout), read_masks(root / layout, "train")
    assert (len(train), len(test)) == (6, 5) and len(test.classes) == COUNTS[layout] == len(set(test.classes))
    assert all(SPLITS[layout][1] in str(path) for path in test.images + test.masks)
    assert test.rest == (layout == "voc") and is_masks(root / layout) and not is_masks(root)
    expected = {"voc": VOC_CLASSES, "ade20k": ("thing 1",), "coco-stuff": ("label 1",)}[layout]
    assert test.classes[: len(expected)] == expected
    last = {"voc": "tv monitor", "ade20k": "thing 150", "coco-stuff": "wall"}[layout]
    assert test.classes[-1] == last, "`-other` is no part of a name"


@pytest.mark.parametrize("layout", SPLITS)
def test_the_numbers_of_a_mask_are_the_sets_classes_and_the_void_counts_nowhere(root, layout):
    found = read_masks(root / layout)
    _, maps = load_masks(found, cut(48, squash=True), np.arange(5))
    expected = {"voc": [0, 1, 20], "ade20k": [0, 1, 149], "coco-stuff": [0, 11, 170]}[layout]
    for i, classes in enumerate(maps):
        numbers = np.asarray(Image.fromarray(numbers_of(layout, i, (48, 64))).resize((48, 48), 0))
        for number, k in zip((*SHOWN[layout], VOID[layout]), (*expected, IGNORED), strict=True):
            assert (classes[numbers == number] == k).all() and (numbers == number).any()


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("px", [32, 96])
def test_a_mask_is_resized_and_cut_as_its_image(tmp_path, squash, px):
    write_masks(tmp_path, "voc", size=(60, 100))
    images, maps = load_masks(read_masks(tmp_path), cut(px, squash), np.arange(5))
    assert images.shape == (5, px, px, 3) and maps.shape == (5, px, px)
    colours = np.random.default_rng(0).integers(256, size=(256, 3), dtype=np.uint8).astype(int)
    known = np.array([*SHOWN["voc"], VOID["voc"]])
    nearest = known[np.abs(images[:, :, :, None].astype(int) - colours[known]).sum(-1).argmin(-1)]
    assert (nearest == maps).mean() > 0.95, "but along the edges, where colours blend"


def test_only_the_chosen_images_are_read_and_in_their_order(root):
    found = read_masks(root / "ade20k")
    images, maps = load_masks(found, cut(32, False), np.array([1, 4]))
    whole = load_masks(found, cut(32, False), np.arange(5))
    assert np.array_equal(images, whole[0][[1, 4]]) and np.array_equal(maps, whole[1][[1, 4]])


# --- bad input --------------------------------------------------------------------------------------------------


def resave(path, change) -> None:
    with Image.open(path) as image:
        changed = change(image)
    changed.save(path)


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image).astype(np.uint16))


def numbered(number: int, image: Image.Image) -> Image.Image:
    numbers = np.array(image)
    numbers[0, 0] = number
    return Image.fromarray(numbers)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("voc", lambda image: image.resize((64, 40)), "64 x 40 pixels; expected 64 x 48, as its image"),
        ("voc", lambda image: image.convert("RGB"), "mode RGB; expected a palette or 8 bits of grey"),
        ("ade20k", sixteen_bits, "mode I;16; expected a palette or 8 bits of grey"),
        ("voc", partial(numbered, 21), "number 21, which is no class; expected some of 0 to 20, or 255"),
        ("ade20k", partial(numbered, 151), "number 151, which is no class; expected some of 0 to 150, or 255"),
        ("coco-stuff", partial(numbered, 11), "number 11, which is no class; expected some of 0 to 181, or 255"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_naming_it_and_what_was_expected(tmp_path, layout, change, message):
    found = read_masks(write_masks(tmp_path, layout))
    for i in (1, 3):
        resave(found.masks[i], change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_masks(found, cut(32, False), np.arange(5))
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 of 5 images or their masks cannot be used:"
    assert [str(found.masks[i]) in line for i, line in zip((1, 3), lines[1:], strict=True)] == [True, True]


def test_an_image_and_a_mask_that_cannot_be_read_are_both_named(tmp_path):
    found = read_masks(write_masks(tmp_path, "voc"))
    found.images[0].write_bytes(b"no image")
    found.masks[1].write_bytes(found.masks[1].read_bytes()[:60])
    with pytest.raises(ValueError, match="2 of 5") as caught:
        load_masks(found, cut(32, False), np.arange(5))
    assert f"{found.images[0]}: not an image that can be read" in str(caught.value)
    assert f"{found.masks[1]}: not a mask that can be read" in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "gone", "message"),
    [
        (
            "voc",
            "SegmentationClass/val_2.png",
            r"1 files are missing, the first .*val_2.png; expected a .jpg",
        ),
        ("voc", "JPEGImages/val_0.jpg", r"1 files are missing, the first .*val_0.jpg"),
        ("voc", "ImageSets/Segmentation/val.txt", r"val.txt: no such file; it belongs to the set as it is published"),
        ("ade20k", "annotations/validation/validation_1.png", r"1 files are missing, the first .*validation_1.png"),
        ("ade20k", "objectInfo150.txt", r"objectInfo150.txt: no such file"),
        ("coco-stuff", "labels.txt", r"labels.txt: no such file"),
        ("coco-stuff", "images/val2017", r"no folder .*val2017; expected VOC's layout"),
        ("voc", "SegmentationClass", r"no masks in a layout that is known; expected VOC's layout \(JPEGImages"),
    ],
)
def test_a_set_with_a_part_missing_is_refused_in_one_line(tmp_path, layout, gone, message):
    folder = write_masks(tmp_path / "set", layout)
    shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_masks(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "file", "text", "message"),
    [
        ("voc", "ImageSets/Segmentation/val.txt", "\n\n", "val.txt: empty; expected the id of an image in each line"),
        ("ade20k", "objectInfo150.txt", "Idx,Name\n1,wall\n", "expected columns Idx, ..., Name between tabs"),
        ("ade20k", "objectInfo150.txt", "Idx\tName\n2\twall\n", "expected classes from 1 on, each once"),
        ("coco-stuff", "labels.txt", "0: unlabeled\n2: person\n", "labels.txt: line 2; expected '1: NAME'"),
        ("coco-stuff", "labels.txt", "0: unlabeled\n1: person\n", "1 classes; expected the 182"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_naming_its_file(tmp_path, layout, file, text, message):
    folder = write_masks(tmp_path / "set", layout)
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_masks(folder)


def test_a_mask_without_an_image_is_listed_and_no_part_of_the_set(tmp_path):
    folder = write_masks(tmp_path / "set", "ade20k")
    (folder / "images" / "validation" / "validation_4.jpg").unlink()
    found = read_masks(folder)
    assert len(found) == 4
    ((name, reason),) = found.left_out
    assert name.endswith("validation_4.png") and reason == "a mask without an image"


# --- from the command line --------------------------------------------------------------------------------------


def test_segmentation_runs_on_every_set_of_masks_and_other_benchmarks_pass_by_them(root, tmp_path):
    assert {path.name for path in benchmark_folders(root, "segmentation")} == set(SPLITS)
    assert benchmark_folders(root / "voc", "segmentation") == [root / "voc"]
    with pytest.raises(FileNotFoundError, match="no folder here for zero-shot"):
        benchmark_folders(root, "zero-shot")
    table = evaluate(["tiny"], ["segmentation"], root, tmp_path / "r.csv", max_images=4)
    assert set(table["set"]) == {f"{name}, layer -2" for name in SPLITS} and set(table["n"]) == {4}
    metrics = [f"miou, {how}" for how in ("k-means", "linear", "position", "zero-shot")]
    metrics += ["precision, zero-shot", "miou, oracle"]
    for _, rows in table.groupby("set"):
        whole = rows[rows["category"] == "all"].set_index("metric")
        assert list(whole.index) == metrics
        assert whole.loc["miou, oracle", "value"] == 1 and whole.loc["miou, linear", "value"] > 0.9
        assert not rows[["value", "low", "high", "chance"]].isna().any(axis=None)
    assert set(table["max_images"]) == {4} and set(table["features"]) == {"patches"}


def test_a_set_without_images_to_train_on_has_no_linear_head_and_says_so(tmp_path, capsys):
    folder = write_masks(tmp_path / "own", "coco-stuff")
    shutil.rmtree(folder / "images" / "train2017")
    table = evaluate(["tiny"], ["segmentation:own"], tmp_path)
    assert "own: no linear head, nothing to fit it on" in capsys.readouterr().out
    assert not table["metric"].str.contains("linear|position").any() and len(table)


def test_masks_without_a_pixel_that_counts_are_refused(tmp_path):
    found = read_masks(write_masks(tmp_path / "own", "voc"))
    for mask in found.masks:
        resave(mask, lambda image: Image.fromarray(np.full_like(np.asarray(image), 255)))
    with pytest.raises(ValueError, match="SegmentationClass: no pixel of any class in 5 masks"):
        evaluate(["tiny"], ["segmentation"], tmp_path)


def test_a_broken_set_is_listed_and_the_command_ends_with_code_2(tmp_path, capsys):
    folder = write_masks(tmp_path / "own", "voc")
    (folder / "SegmentationClass" / "val_0.png").unlink()
    arguments = ["--encoder", "tiny", "--root", str(tmp_path), "--out", str(tmp_path / "r.csv")]
    assert main(["evaluate", "--benchmarks", "segmentation", *arguments]) == 2
    said = capsys.readouterr().err
    assert "tiny, segmentation, own: " in said and "1 files are missing" in said and "Traceback" not in said
    assert main(["evaluate", "--benchmarks", "segmentation:nothing", *arguments]) == 2
    assert "no folder nothing for segmentation" in capsys.readouterr().err
