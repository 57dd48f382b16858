"""Pairs to which an encoder is blind: found in any blocks as by hand, written in MMVP-VLM's layout."""

import csv

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import write_dinov2

from diva_lab.cli import main
from diva_lab.evaluation.blind_pairs import find_blind_pairs
from diva_lab.evaluation.pairs import read_pairs
from diva_lab.world import World, draw_scenes


def unit(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_blocks_of_any_size_find_the_pairs_of_a_search_by_hand():
    blind, seeing = unit(40, 4, 0), unit(40, 4, 1)
    alike, other = blind @ blind.T, seeing @ seeing.T
    wanted = {(i, j) for i in range(40) for j in range(i + 1, 40) if alike[i, j] >= 0.6 and other[i, j] <= 0.2}
    order = sorted(wanted, key=lambda pair: float(other[pair] - alike[pair]))
    chosen, taken = [], set()
    for pair in order:
        if not taken & set(pair):
            chosen.append(pair)
            taken |= set(pair)
    assert len(chosen) > 5
    for block in (1, 7, 40, 4096):
        found = find_blind_pairs(blind, seeing, 0.6, 0.2, block=block)
        assert list(zip(found["first"], found["second"], strict=True)) == chosen
        assert found["similar"].to_numpy() == pytest.approx([float(alike[pair]) for pair in chosen], abs=1e-6)
        assert (found["similar"] >= 0.6).all() and (found["apart"] <= 0.2).all()
    assert len(find_blind_pairs(blind, seeing, 0.6, 0.2, most=3)) == 3


def test_an_image_is_no_pair_with_itself_and_its_copy_is_none_where_the_other_sees_the_same():
    blind = unit(1, 4, 0).repeat(3, 1)
    assert find_blind_pairs(blind, blind).empty
    assert len(find_blind_pairs(blind, torch.eye(3))) == 1  # of three images, each in one pair at most


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A folder of a small DINOv2 with random weights."""
    return write_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images" / "deep"
    folder.mkdir(parents=True)
    for k, pixels in enumerate(World().render(draw_scenes(24, 0))):
        Image.fromarray(pixels).save(folder / f"{k}.{'webp' if k % 2 else 'jpg'}")
    return tmp_path / "images"


def test_the_command_writes_a_folder_that_evaluate_takes_once_statements_are_there(images, seeing, tmp_path, capsys):
    out = tmp_path / "pairs"
    args = ["blind-pairs", str(images), "--encoder", "tiny", "--against", str(seeing), "--out", str(out)]
    assert main([*args, "--similar", "0.2", "--apart", "0.999", "--most", "4"]) == 0
    n = int(capsys.readouterr().out.split("pairs: ")[1].split(" pairs")[0])
    assert 1 <= n <= 4
    sources = pd.read_csv(out / "sources.csv")
    assert sources["id"].tolist() == list(range(1, 2 * n + 1)) and sources["file"].is_unique
    with Image.open(out / "contact-1.png") as sheet:
        assert sheet.size[0] > 6 * 160
    with pytest.raises(ValueError, match=f"{2 * n} questions without a statement; write what each image shows"):
        read_pairs(out)
    rows = list(csv.reader((out / "Questions.csv").open()))
    with (out / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *([i, kind, f"what {i} shows"] for i, kind, _ in rows[1:])])
    assert len(read_pairs(out)) == n
    for file, path in zip(sources["file"], sorted((out / "MLLM_VLM Images" / "unsorted").iterdir(),
                                                  key=lambda p: int(p.stem)), strict=True):  # fmt: skip
        with Image.open(file) as one, Image.open(path) as copy:
            assert np.array_equal(np.asarray(one.convert("RGB")), np.asarray(copy.convert("RGB")))


def test_what_cannot_be_done_is_one_error_and_leaves_nothing(images, seeing, tmp_path, capsys):
    args = ["blind-pairs", str(images), "--encoder", "tiny", "--out", str(tmp_path / "pairs")]
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "full" / "x").mkdir(parents=True)
    for change, told in (
        (["--against", str(seeing), "--apart", "-1"], "none of 24 images has a partner"),
        (["--against", str(seeing), "--similar", "2"], "similar 2.0: expected a cosine"),
        (["--against", str(tmp_path / "bert")], "model type 'bert'; expected config.json of an image encoder"),
        (["--against", "nothing"], "unknown encoder 'nothing'"),
        (["--against", str(seeing), "--out", str(tmp_path / "full")], "exists and is not empty"),
    ):
        assert main([*args, *change]) == 2
        assert told in (error := capsys.readouterr().err) and len(error.splitlines()) == 1
    assert main([args[0], str(empty), *args[2:], "--against", str(seeing)]) == 2
    assert "0 images; expected a folder with at least two" in capsys.readouterr().err
    assert not (tmp_path / "pairs").exists()
