import csv

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diva_lab.evaluation.image_sets import IMAGE_FOLDERS
from diva_lab.evaluation.pairs import (
    embed_files,
    is_pairs,
    pair_decisions,
    read_corrections,
    read_pairs,
    score_pairs,
    strict_differences,
    summarise,
)
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


@pytest.mark.parametrize(
    "header", [("Type", "Question ID", "Statement"), ("Question ID", "Statement", "Type"), ("a", "b", "c"), ("ID",)]
)
def test_a_wrong_or_permuted_header_is_refused(tmp_path, header):
    with pytest.raises(ValueError, match=f"the header '{','.join(header)}'; expected id, type and statement, in this"):
        read_pairs(write(tmp_path, ROWS, header=header))


def test_a_table_that_is_not_utf8_is_refused(tmp_path):
    folder = write(tmp_path, ROWS)
    text = (folder / "Questions.csv").read_text().replace("Texts,a", "Texts,Bär")
    (folder / "Questions.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"Questions\.csv is not UTF-8"):
        read_pairs(folder)


def test_names_off_by_case_are_told_all_at_once(tmp_path):
    folder = write(tmp_path, ROWS)
    (folder / IMAGE_FOLDERS[0] / "Camera").rename(folder / IMAGE_FOLDERS[0] / "camera")
    with pytest.raises(FileNotFoundError, match=r"no folder 'Camera' in .*; rename 'camera', whose case differs"):
        read_pairs(folder)
    (folder / "Questions.csv").rename(folder / "questions.csv")
    (folder / IMAGE_FOLDERS[0]).rename(folder / "mllm_vlm_images")
    with pytest.raises(FileNotFoundError, match=r"(?s)rename 'questions\.csv', whose.*rename 'mllm_vlm_images', whose"):
        read_pairs(folder)


def test_images_that_cannot_be_read_are_told_with_what_is_missing(tmp_path, encoder):
    folder = write(tmp_path, ROWS)
    images = folder / IMAGE_FOLDERS[0]
    for name in ("Texts/1.png", "Camera/3.png"):
        (images / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)2 images:.*Texts/1\.png: not an image.*Camera/3\.png: not an image"):
        score_pairs(encoder, folder)
    (images / "Texts" / "2.png").unlink()
    with pytest.raises(
        ValueError, match=r"(?s)no image .*Texts/2\.jpg.*Texts/1\.png: not.*Camera/3\.png: not an image"
    ):
        read_pairs(folder)


def test_what_is_meant_as_pairs_is_known_though_it_is_wrong(tmp_path):
    (tmp_path / "a" / "mllm_vlm_images").mkdir(parents=True)
    (tmp_path / "b").mkdir(), (tmp_path / "c").mkdir()
    (tmp_path / "b" / "questions.csv").write_text("")
    (tmp_path / "quoted.csv").write_text('"image1","image2","text1","text2","pattern"\n')
    (tmp_path / "short.csv").write_text("image1,image2,text1,text2\n")
    (tmp_path / "results.csv").write_text("encoder,benchmark,pattern\n")
    names = ("a", "b", "c", "quoted.csv", "short.csv", "results.csv", "none")
    assert [is_pairs(tmp_path / name) for name in names] == [True, True, False, True, True, False, False]


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
    with pytest.raises(ValueError, match=r"Texts/2\.png: not an image"):
        score_pairs(encoder, tmp_path)


def test_the_folders_of_the_benchmark_have_the_papers_names(tmp_path):
    rows = [(i, FOLDERS[(i - 1) // 2], f"statement {i}") for i in range(1, 19)]
    assert tuple(read_pairs(write(tmp_path, rows))["pattern"]) == OFFICIAL


def test_types_of_ones_own_that_would_share_a_name_keep_their_own(tmp_path):
    kinds = ("Text size", "text colour", "Spatial")
    rows = [(i, kinds[(i - 1) // 2], f"statement {i}") for i in range(1, 7)]
    assert list(read_pairs(write(tmp_path, rows))["pattern"]) == ["Text size", "text colour", OFFICIAL[4]]


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
    assert decisions["group"].tolist() == [True, False, False, False, True]


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


def test_an_encoder_that_knows_each_statements_image_scores_all(tmp_path, make_encoder):
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
    assert (report["ties/low"], report["ties/high"], report["group/low"]) == (0.5, 0.5, 1)


def test_the_other_scores_have_intervals_that_hold_them():
    rng = np.random.default_rng(0)
    flags = {key: rng.random(60) < 0.4 for key in ("correct", "tie", "image_to_text", "group")}
    report = summarise(pd.DataFrame({"pattern": ["a"] * 30 + ["b"] * 30, **flags}))
    for key in ("mean", "ties", "image_to_text", "group"):
        assert report[f"{key}/low"] < report[key] < report[f"{key}/high"]


# --- as the official script counts it ---------------------------------------------------------------------------


def by_script(folder, encoder):
    """Its loop in our words: two rows at a time, the first row's folder, parity of the id, the category by place."""
    rows = list(csv.reader((folder / "Questions.csv").open(encoding="utf-8")))[1:]
    right = np.zeros(len(rows) // 30)
    for k in range(0, len(rows), 2):
        kind = rows[k][1]
        both = embed_files(encoder, [folder / IMAGE_FOLDERS[0] / kind / f"{row[0]}.jpg" for row in rows[k : k + 2]])
        fits = []
        for i, _, statement in rows[k : k + 2]:
            p = (100 * encoder.encode_text(["a photo of " + statement]) @ both.T).double().softmax(1)
            prediction = "img1" if p[0, 0] > 0.5 else "img2"
            fits.append(prediction == ("img1" if int(i) % 2 == 1 else "img2"))
        right[k // 2 // 15] += all(fits)
    return right / 15


def test_the_strict_count_is_that_of_the_script_whatever_the_order_of_the_rows(tmp_path, encoder):
    folder = write_pairs(tmp_path, World(px=8), 15, seed=3)
    rows = list(csv.reader((folder / "Questions.csv").open(encoding="utf-8")))
    own = score_pairs(encoder, folder)
    assert score_pairs(encoder, folder, strict=True).equals(own)
    assert by_script(folder, encoder).mean() == pytest.approx(summarise(own)["mean"])
    rng = np.random.default_rng(0)
    pairs = [rows[1 + 2 * k : 3 + 2 * k][:: rng.choice((1, -1))] for k in rng.permutation(135)]
    with (folder / "Questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([rows[0], *(row for pair in pairs for row in pair)])
    strict = score_pairs(encoder, folder, strict=True)
    assert strict["correct"].groupby(np.arange(135) // 15).mean().tolist() == pytest.approx(by_script(folder, encoder))
    assert score_pairs(encoder, folder).equals(own)
    said = strict_differences(folder, own, strict)
    turned = [int(pair[0][0]) for pair in pairs if int(pair[0][0]) % 2 == 0]
    assert said[-1] == f"{len(turned)} pairs whose rows stand in another order than their ids: {turned}"
    assert said[0].startswith(f"as the script counts {by_script(folder, encoder).mean():.4f}, by the rule ")
    kind = {row[0]: row[1] for row in rows[1:]}
    moved = [int(pair[0][0]) for k, pair in enumerate(pairs) if kind[pair[0][0]] != list(PATTERNS.values())[k // 15]]
    assert said[1] == f"by position {len(moved)} pairs are of another category than the CSV says: {moved}"


OFFICIAL = ("Orientation and Direction", "Presence of Specific Features", "State and Condition", "Quantity and Count",
            "Positional and Relational Context", "Color and Appearance", "Structural Characteristics", "Texts",
            "Viewpoint and Perspective")  # fmt: skip
FOLDERS = ("Orientation", "Presence", "State", "Quantity", "Spatial", "Color", "Structural Character", "Text",
           "Camera_Perspective")  # fmt: skip


def test_strict_patterns_are_those_of_the_fixed_list_by_position(tmp_path, make_encoder):
    """By hand: the types stand in reverse order, and the encoder is right about 3 pairs of the first, 1 of the last."""
    rows = [(i, FOLDERS[8 - (i - 1) // 30], f"statement {i}") for i in range(1, 271)]
    folder, encoder, right = write(tmp_path, rows), make_encoder(), {1, 3, 5, 269}
    pairs = read_pairs(folder)
    embeddings = embed_files(encoder, [*pairs["image_1"], *pairs["image_2"]])
    for k, i in enumerate(pairs["id_1"]):
        one, two = embeddings[k], embeddings[k + 135] if i in right else embeddings[k]
        encoder.texts |= {f"a photo of statement {i}": one, f"a photo of statement {i + 1}": two}
    strict, own = (summarise(score_pairs(encoder, folder, strict=strict)) for strict in (True, False))
    for report, first, last in ((strict, OFFICIAL[0], OFFICIAL[8]), (own, OFFICIAL[8], OFFICIAL[0])):
        expected = dict.fromkeys(OFFICIAL, 0.0) | {first: 3 / 15, last: 1 / 15}
        assert {name: report[name] for name in OFFICIAL} == pytest.approx(expected)
        assert report["mean"] == pytest.approx(4 / 135)
    assert list(dict.fromkeys(read_pairs(folder, strict=True)["pattern"])) == list(OFFICIAL)


@pytest.mark.parametrize("pairs", [1, 134, 136])
def test_a_strict_count_of_other_than_135_pairs_is_refused(pairs, tmp_path):
    folder = write(tmp_path, [(i, "Texts", f"statement {i}") for i in range(1, 2 * pairs + 1)])
    with pytest.raises(ValueError, match=f"{pairs} pairs, where the official script's list has 9 patterns of 15 pairs"):
        read_pairs(folder, strict=True)
    assert len(read_pairs(folder)) == pairs


def test_ties_and_images_of_the_first_rows_folder_are_told(tmp_path, make_encoder):
    encoder = make_encoder()
    rows = [(i, "Letters" if i == 2 else "Texts", f"statement {i}") for i in range(1, 271)]
    folder = write(tmp_path, rows)
    images = folder / IMAGE_FOLDERS[0]
    (images / "Texts" / "2.png").write_bytes((images / "Texts" / "1.png").read_bytes())  # the same image: a tie
    own, strict = score_pairs(encoder, folder), score_pairs(encoder, folder, strict=True)
    said = "\n".join(strict_differences(folder, own, strict))
    assert "1 pairs with a tie, which counts for image 2: [1]" in said
    assert "1 images taken from the folder of the first row's type: [2]" in said


# --- corrected labels -------------------------------------------------------------------------------------------


def write_table(path, *rows, header="set,id,label,source"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_corrections_are_read_by_set_and_id(tmp_path):
    rows = ('MMVP, 7 ,2,"issue 14, by hand"', "wds_cars,2,1,me", "mmvp,8,1,me")
    assert read_corrections(write_table(tmp_path / "a.csv", *rows)) == {"mmvp": {7: 2, 8: 1}, "cars": {2: 1}}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["mmvp,7,2,me", "mmvp,8,3,me"], "row 2: label '3'; expected 1 or 2"),
        (["mmvp,7,2,me", "MMVP,7,2,me"], "row 2: id '7'; expected the number of a question, each once in a set"),
        (["mmvp,-7,2,me"], "row 1: id '-7'"), (["mmvp,7.0,2,me"], "row 1: id '7.0'"),
        (["mmvp,7,2,"], "row 1: no set or no source"), ([",7,2,me"], "row 1: no set or no source"),
        (["mmvp,7,2"], "row 1: no set or no source"), (["mmvp,7,1,me"], "what the rule says of id 7 already"),
        (["mmvp,8,2,me"], "what the rule says of id 8 already"), ([], "found 0 under set, id, label, source"),
        (["mmvp,7,2,issue 14, me"], "more cells than its header"), (["mmvp,7,2,me", "mmvp,9,2,a, b"], "not a csv"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_file_of_corrections_is_refused_in_one_line(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        read_corrections(write_table(tmp_path / "a.csv", *rows))
    assert str(caught.value).startswith(str(tmp_path / "a.csv")) and "\n" not in str(caught.value)


def test_corrections_under_other_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected rows under set, id, label, source; found 1 under set, question"):
        read_corrections(write_table(tmp_path / "a.csv", "mmvp,7", header="set,question"))


def test_a_table_with_a_cell_of_200_kilobytes_is_read(tmp_path):
    (tmp_path / "other.csv").write_text("name," + "x" * 200_000 + "\n")
    assert not is_pairs(tmp_path / "other.csv")
