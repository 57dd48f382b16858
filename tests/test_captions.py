"""Captions of every kind of source: which comes with which image, and what is said where there is none."""

import csv
import itertools
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from image_writers import pixels, png, write_tar

from diva_lab.captions import list_captions, mention_details, open_captions
from diva_lab.images import open_images
from diva_lab.world import CLASSES, DETAILS, World, caption, draw_scenes

COUNT = 6  # images of each source


def words(k: int) -> str:
    return f"picture number {k}"


def write_source(kind: str, root: Path, without: tuple[int, ...] = ()) -> str:
    """`COUNT` captioned images as a source of open_images; those of `without` have no caption."""
    said = {k: words(k) for k in range(COUNT) if k not in without}
    if kind == "tar":
        members = {}
        for k in range(COUNT):
            members |= {f"{k}.png": png(k)} | ({f"{k}.txt": said[k].encode()} if k in said else {})
        write_tar(root / "shard.tar", members)
        return str(root / "shard.tar")
    if kind == "hf":
        features = datasets.Features({"image": datasets.Image(), "words": datasets.Value("string")})
        cells = {"image": [{"bytes": png(k), "path": None} for k in range(COUNT)],
                 "words": [said.get(k) for k in range(COUNT)]}  # fmt: skip
        datasets.Dataset.from_dict(cells, features).save_to_disk(root)
        return f"hf:{root}"
    (root / "deep").mkdir(parents=True)
    files = {k: Path("deep" if k % 2 else ".") / f"{k}.png" for k in range(COUNT)}
    for k, file in files.items():
        (root / file).write_bytes(png(k))
        if kind == "txt" and k in said:
            (root / file).with_suffix(".txt").write_text(said[k] + "\n")
    if kind == "csv":
        with open(root / "captions.csv", "w", newline="") as table:
            writer = csv.writer(table)
            writer.writerows([("image", "caption"), *((files[k], text) for k, text in said.items())])
    return str(root)


def numbers(images) -> list[int]:
    """Which of the written images these are."""
    known = {np.asarray(pixels(k)).tobytes(): k for k in range(COUNT)}
    return [known[image.permute(1, 2, 0).numpy().tobytes()] for image in images]


KINDS = pytest.mark.parametrize("kind", ["txt", "csv", "tar", "hf"])


@KINDS
def test_every_image_comes_with_its_own_caption(kind, tmp_path):
    stream = open_images(write_source(kind, tmp_path / "x"), 32, 4, seed=1, captions="")
    for images in itertools.islice(stream, 5):
        assert stream.captions == [words(k) for k in numbers(images)]


@KINDS
def test_captions_change_no_image_and_a_stream_without_them_has_none(kind, tmp_path):
    source = write_source(kind, tmp_path / "x")
    plain, captioned = open_images(source, 32, 4, 1), open_images(source, 32, 4, 1, captions="")
    for one, two in itertools.islice(zip(plain, captioned, strict=False), 4):
        assert one.equal(two) and plain.captions == []


@KINDS
def test_an_image_without_a_caption_is_skipped_and_listed(kind, tmp_path):
    stream = open_images(write_source(kind, tmp_path / "x", without=(2,)), 32, 5, seed=0, captions="")
    batches = [numbers(images) for images in itertools.islice(stream, 4)]
    assert all(2 not in batch for batch in batches)
    assert {reason for _, reason in stream.skipped} == {"no caption, or none in UTF-8"} and len(stream.skipped) in (
        3,
        4,
        5,
    )
    assert stream.position == 20 + len(stream.skipped)


@KINDS
def test_a_source_without_captions_is_refused_before_anything_is_read_of_it(kind, tmp_path):
    source = write_source(kind, tmp_path / "x", without=tuple(range(COUNT)))
    message = "100 samples in a row" if kind == "hf" else "no captions|found image|no rows"
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        next(open_images(source, 32, 2, 0, captions=""))
    assert str(tmp_path) in str(caught.value)


@KINDS
def test_captions_alone_are_those_of_the_source_in_an_order_of_the_seed(kind, tmp_path):
    source = write_source(kind, tmp_path / "x", without=(4,))
    expected = sorted(words(k) for k in range(COUNT) if k != 4)
    assert sorted(list_captions(source)) == expected
    one, two, other = ([*itertools.chain(*itertools.islice(open_captions(source, 5, s), 4))] for s in (0, 0, 1))
    assert one == two != other and sorted(one[:5]) == sorted(one[5:10]) == expected


def test_a_dataset_with_several_texts_asks_which_and_takes_the_one_named(tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), "a": datasets.Value("string"), "b": datasets.Value("string")}
    )
    cells = {"image": [{"bytes": png(0), "path": None}], "a": ["one"], "b": ["two"]}
    datasets.Dataset.from_dict(cells, features).save_to_disk(tmp_path / "x")
    source = f"hf:{tmp_path / 'x'}"
    for name in ("", "image", "c"):
        with pytest.raises(ValueError, match=r"found a, b; set captions=NAME"):
            open_images(source, 32, 1, 0, captions=name)
    stream = open_images(source, 32, 1, 0, captions="b")
    next(stream)
    assert stream.captions == ["two"]


def test_a_dataset_of_prompts_needs_no_images(tmp_path):
    datasets.Dataset.from_dict({"text": ["one", "two"], "other": ["x", "y"]}).save_to_disk(tmp_path / "x")
    assert list_captions(f"hf:{tmp_path / 'x'}") == ["one", "two"]
    assert list_captions(f"hf:{tmp_path / 'x'}", "other") == ["x", "y"]


@pytest.mark.parametrize(
    "data, message",
    [(b"\n \n", "empty"), (b"\xff\xfe\x00", "not UTF-8"), (None, "no such file")],
)
def test_a_text_file_that_holds_no_prompts_is_refused(data, message, tmp_path):
    path = tmp_path / "prompts.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_captions(str(path), 2, 0)
    assert str(path) in str(caught.value)


def test_a_text_file_is_a_prompt_a_line_dealt_to_the_processes(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt {k}" for k in range(8)) + "\n\n", encoding="utf-8-sig")
    parts = [next(open_captions(str(path), 4, 3, 0, rank, 2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == [f"prompt {k}" for k in range(8)]
    stream = open_captions(str(path), 3, 3)
    whole = [next(stream) for _ in range(5)]
    assert next(open_captions(str(path), 3, 3, first=4)) == whole[4]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "prompts.caption"])
def test_a_captions_setting_that_is_a_file_is_that_file_whatever_its_ending(name, tmp_path):
    (tmp_path / name).write_text("one\ntwo\n")
    for source in ("world", "world:3", write_source("txt", tmp_path / "x"), write_source("hf", tmp_path / "y")):
        assert sorted(next(open_captions(source, 2, 0, chosen=str(tmp_path / name)))) == ["one", "two"]


@KINDS
def test_a_captions_setting_that_a_source_cannot_use_is_refused(kind, tmp_path):
    for source in ("world", "world:3", write_source(kind, tmp_path / "x")):
        for name in ("nowhere", str(tmp_path)):
            for opened in (partial(open_captions, chosen=name), partial(open_images, px=32, captions=name)):
                with pytest.raises(ValueError, match=r"captions=.*(has no columns|no such column)"):
                    opened(source, n=2, seed=0)
        with pytest.raises(FileNotFoundError, match="no such file"):
            open_captions(source, 2, 0, chosen=str(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize("source", ["world:x", "world:", "world:-1", "world:1.5", "world:²"])
def test_captions_and_images_name_a_world_by_one_rule(source):
    for opened in (partial(open_captions, source, 2, 0), partial(open_images, source, 32, 2, 0)):
        with pytest.raises(ValueError, match="'world:3'"):
            opened()


def test_a_long_caption_is_read_whole_and_one_that_may_be_cut_or_misread_is_refused(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    table = tmp_path / "captions.csv"
    table.write_text(f"image,caption\n0.png,{'x' * 200_000}\n")
    stream = open_images(tmp_path, 32, 1, 0, captions="")
    next(stream)
    assert stream.captions == ["x" * 200_000]
    for text, message in (
        (b"a,b", "row 2: more cells"),
        (b'"a\n1.png,b', "not a csv"),
        (b"\xe9", "not a csv in UTF-8"),
    ):
        table.write_bytes(b"image,caption\n0.png," + text + b"\n")
        with pytest.raises(ValueError, match=rf"captions\.csv: {message}"):
            open_images(tmp_path, 32, 1, 0, captions="")


@pytest.mark.parametrize(
    "rows, message",
    [
        ("image,caption\nnowhere.png,x\n", r"row 2: no image 'nowhere.png'"),
        ("image,caption\n0.png,x\n0.png,y\n", r"row 3: a second caption of '0.png'"),
        ("file,text\n0.png,x\n", "found file, text"),
        ("", "no rows"),
    ],
)
def test_a_table_of_captions_that_cannot_be_understood_is_refused_by_row(rows, message, tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "captions.csv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path, 32, 1, 0, captions="")


# --- of the world -----------------------------------------------------------------------------------------------


def test_the_worlds_captions_name_the_class_and_details_of_their_own_image():
    stream = open_images("world:3", 32, 50, seed=2, captions="")
    images = next(stream)
    scenes = draw_scenes(50, (3, 40, 2, 0))
    assert images.permute(0, 2, 3, 1).numpy().tobytes() == World(3).render(scenes).tobytes()
    for scene, text in zip(scenes, stream.captions, strict=True):
        full = caption(scene, tuple(DETAILS)).split()
        assert CLASSES[scene["class"]] in text.split() and set(text.split()) <= set(full)


@pytest.mark.parametrize("mentions, low, high", [(1.0, 0.45, 0.55), (0.2, 0.08, 0.12), (0.0, 0.0, 0.0)])
def test_a_detail_is_mentioned_in_half_of_the_most_mentions(mentions, low, high):
    scenes = draw_scenes(2000, 0)
    texts = mention_details(scenes, (1,), mentions)
    said = np.mean([scene["colour"] >= 0 and DETAILS["colour"][scene["colour"]] in text.split()
                    for scene, text in zip(scenes, texts, strict=True)])  # fmt: skip
    assert low <= said <= high


def test_captions_without_images_are_of_other_scenes_and_each_process_has_its_own():
    shown = draw_scenes(64, (0, 40, 5, 0))
    captions = {caption(scene, tuple(DETAILS)) for scene in shown}
    alone = [next(open_captions("world", 64, 5, 0, rank, 2, mentions=1.0)) for rank in range(2)]
    assert alone[0] != alone[1] and not captions & set(alone[0])
    stream = open_captions("world", 64, 5)
    assert [next(stream), next(stream)][1] == next(open_captions("world", 64, 5, first=1))
