import csv

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diva_lab.evaluation.pairs import IMAGE_FOLDERS, pair_decisions, read_pairs, score_pairs, summarise
from diva_lab.world import PATTERNS, World, write_pairs

HEADER = ("Question ID", "Type", "Statement")


def write(folder, rows, images=None, name=IMAGE_FOLDERS[0], header=HEADER, suffix=".png"):
    """A folder with `rows` (id, type, statement) and an image for each of `images` (type, id); for all rows if None."""
    for kind, i in images if images is not None else [(kind, i) for i, kind, _ in rows]:
        (folder / name / kind).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(256, size=(8 + i, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / kind / f"{i}{suffix}")
    with open(folder / "Questions.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)
    return folder


ROWS = [(1, "Texts", "a"), (2, "Texts", "b"), (3, "Camera", "c, d"), (4, "Camera", "e")]


# --- on disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGE_FOLDERS)
@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png"])
def test_every_known_folder_name_and_suffix_is_read(tmp_path, name, suffix):
    pairs = read_pairs(write(tmp_path, ROWS, name=name, suffix=suffix))
    assert list(pairs["pattern"]) == ["Texts", "Viewpoint and Perspective"]
    assert list(pairs["statement_1"]) == ["a", "c, d"]
    assert [path.name for path in pairs["image_2"]] == [f"2{suffix}", f"4{suffix}"]


def test_the_worlds_own_pairs_are_read(tmp_path):
    pairs = read_pairs(write_pairs(tmp_path, World(px=8), per_pattern=2, seed=7))
    assert list(pairs["pattern"]) == [pattern for pattern in PATTERNS.values() for _ in range(2)]
    assert list(pairs["id_1"]) == list(range(1, 37, 2))
    assert (pairs["statement_1"] != pairs["statement_2"]).all()


def test_a_pattern_is_what_the_csv_says_wherever_its_pairs_stand(tmp_path):
    rows = [(i, f"type {(i - 1) // 2 % 2}", f"statement {i}") for i in range(1, 13)]
    assert list(read_pairs(write(tmp_path, rows))["pattern"]) == ["type 0", "type 1"] * 3


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    straight, shuffled = write(tmp_path / "a", ROWS), write(tmp_path / "b", [ROWS[i] for i in (3, 0, 2, 1)])
    columns = ["pattern", "id_1", "id_2", "statement_1", "statement_2"]
    pd.testing.assert_frame_equal(read_pairs(straight)[columns], read_pairs(shuffled)[columns])


def test_each_image_lies_in_the_folder_of_its_own_type(tmp_path):
    pairs = read_pairs(write(tmp_path, [(1, "Texts", "a"), (2, "Letters", "b")]))
    assert [pairs[f"image_{n}"][0].parent.name for n in (1, 2)] == ["Texts", "Letters"]


def test_an_empty_folder_is_told_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        read_pairs(tmp_path / "nowhere")
    message = str(error.value)
    for words in (str(tmp_path / "nowhere"), "Questions.csv", *IMAGE_FOLDERS, "no image folder"):
        assert words in message


def test_missing_files_alone_are_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        read_pairs(write(tmp_path, ROWS, images=[("Texts", 1)]))
    message = str(error.value)
    assert "Texts/2.jpg" in message and "no folder 'Camera'" in message and "Texts/1.jpg" not in message


def test_one_error_lists_everything_that_is_wrong(tmp_path):
    rows = [(1, "Texts", "a"), (2, "Texts", "b"), (2, "Texts", "c"), (7, "Gone", "d"), ("x", "Texts", "e")]
    with pytest.raises(ValueError) as error:
        read_pairs(write(tmp_path, rows, images=[("Texts", 1)], header=None))
    message = str(error.value)
    problems = ("no header", "5 questions", "id 2 stands twice", "'x,Texts,e'", "id 7 without its partner 8")
    for words in (str(tmp_path), *problems, "Texts/2.jpg", "no folder 'Gone'"):
        assert words in message


@pytest.mark.parametrize("rows", [[], [(1, "Texts", "a")]])
def test_no_rows_and_an_odd_number_of_rows_are_refused(tmp_path, rows):
    (tmp_path / IMAGE_FOLDERS[0]).mkdir()
    with pytest.raises(ValueError, match=f"{len(rows)} questions, which are not pairs"):
        read_pairs(write(tmp_path, rows))


def test_ids_2k_and_2k_plus_1_are_no_pair(tmp_path):
    with pytest.raises(ValueError, match="id 2 without its partner 1"):
        read_pairs(write(tmp_path, [(2, "Texts", "a"), (3, "Texts", "b")]))


def test_a_statement_may_hold_quoted_commas_and_line_breaks_and_the_file_a_mark_of_byte_order(tmp_path):
    folder = write(tmp_path, [(1, "Texts", 'a, "b"'), (2, "Texts", "c\nd")])
    (folder / "Questions.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "Questions.csv").read_bytes() + b"\n\n")
    assert read_pairs(folder)[["statement_1", "statement_2"]].iloc[0].tolist() == ['a, "b"', "c\nd"]


def test_an_image_that_cannot_be_read_is_named(tmp_path, encoder):
    path = write(tmp_path, ROWS) / IMAGE_FOLDERS[0] / "Texts" / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"Texts/2\.png: not a picture"):
        score_pairs(encoder, tmp_path)


# --- the rule ---------------------------------------------------------------------------------------------------


def official(table):
    """The published rule word by word, for one pair's [texts][images]."""
    right = []
    for (one, two), question in zip(table, (1, 2), strict=True):
        scaled = np.array([100 * one, 100 * two], dtype=np.float64)
        p = np.exp(scaled - scaled.max())
        prediction = "img1" if (p / p.sum())[0] > 0.5 else "img2"
        right.append(prediction == ("img1" if question % 2 == 1 else "img2"))
    return all(right)


def test_decisions_are_the_official_ones_ties_included():
    rng = np.random.default_rng(0)
    coarse = rng.integers(-2, 3, size=(2000, 2, 2)) / 4.0  # many ties
    fine = rng.uniform(-1, 1, size=(2000, 2, 2))
    for tables in (coarse, fine):
        expected = [official(table) for table in tables]
        assert pair_decisions(tables)["correct"].tolist() == expected
        assert 0 < sum(expected) < len(tables)
    assert pair_decisions(coarse)["tie"].sum() > 500 and pair_decisions(fine)["tie"].sum() == 0


def test_decisions_by_hand():
    tables = np.array(
        [
            [[0.9, 0.1], [0.1, 0.9]],  # right in both directions
            [[0.6, 0.5], [0.8, 0.9]],  # text -> image right; image 1 prefers text 2
            [[0.1, 0.9], [0.9, 0.1]],  # both wrong
            [[0.5, 0.5], [0.1, 0.9]],  # text 1's tie goes to image 2: wrong
            [[0.9, 0.1], [0.5, 0.5]],  # text 2's tie goes to image 2: right
        ]
    )
    decisions = pair_decisions(tables)
    assert decisions["chosen"].tolist() == [[1, 2], [1, 2], [2, 1], [2, 2], [1, 2]]
    assert decisions["correct"].tolist() == [True, True, False, False, True]
    assert decisions["tie"].tolist() == [False, False, False, True, True]
    assert decisions["image_to_text"].tolist() == [True, False, False, True, True]


def test_an_encoder_that_sees_no_difference_scores_nothing():
    decisions = pair_decisions(np.full((10, 2, 2), 0.3))
    assert not decisions["correct"].any() and decisions["tie"].all()


def test_decisions_do_not_depend_on_the_scale_of_the_logits():
    tables = np.random.default_rng(1).uniform(-1, 1, size=(1000, 2, 2))
    for key, value in pair_decisions(tables).items():
        assert np.array_equal(value, pair_decisions(64 * tables)[key])


def test_a_similarity_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        pair_decisions(np.full((1, 2, 2), np.nan))


def test_scores_are_the_cosines_of_the_prefixed_statements(tmp_path, encoder):
    scores = score_pairs(encoder, write(tmp_path, ROWS))
    assert encoder.asked == [["a photo of a", "a photo of b", "a photo of c, d", "a photo of e"]]
    for pair, ids in enumerate(((1, 2), (3, 4))):
        for t, i in ((t, i) for t in (0, 1) for i in (0, 1)):
            path = tmp_path / IMAGE_FOLDERS[0] / ROWS[2 * pair][1] / f"{ids[i]}.png"
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255
            text = encoder.encode_text(["a photo of " + ROWS[2 * pair + t][2]])
            cosine = (encoder.encode_image(pixels) * text).sum().item()
            assert scores[f"t{t + 1}i{i + 1}"][pair] == pytest.approx(cosine, abs=1e-6)


def test_an_encoder_that_knows_each_statements_picture_scores_all(tmp_path, make_encoder):
    folder, encoder = write(tmp_path, ROWS), make_encoder()
    for i, kind, statement in ROWS:
        pixels = np.array(Image.open(folder / IMAGE_FOLDERS[0] / kind / f"{i}.png"))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        encoder.texts["a photo of " + statement] = encoder.encode_image(image)[0].detach()
    scores = score_pairs(encoder, folder)
    assert scores["correct"].all() and not scores["tie"].any()
    assert summarise(scores)["mean"] == 1


def test_the_summary_is_the_mean_of_the_patterns_and_not_of_the_pairs():
    scores = pd.DataFrame({"pattern": ["a"] * 8 + ["b"] * 2, "correct": [True] * 8 + [False] * 2})
    scores = scores.assign(tie=scores["pattern"] == "b", image_to_text=True, group=True)
    report = summarise(scores)
    assert (report["a"], report["b"], report["mean"]) == (1, 0, 0.5)
    assert (report["ties"], report["image_to_text"]) == (0.5, 1)
    assert report["a/low"] == pytest.approx(0.67559, abs=1e-5) and report["a/high"] == 1
    assert report["mean/low"] == report["mean/high"] == 0.5
