import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diva_lab.evaluation.emoji import EMOJI, EMOJI_SETS, emoji_report, match_pairs
from diva_lab.evaluation.pairs import pair_decisions, read_pairs, summarise
from diva_lab.world import PATTERNS


@pytest.fixture(scope="module")
def shipped():
    return {name: read_pairs(EMOJI / name) for name in EMOJI_SETS}


# --- what ships -------------------------------------------------------------------------------------------------


def test_both_sets_are_read_and_hold_the_pairs_of_the_table(shipped):
    table = pd.read_csv(EMOJI / "pairs.csv")
    for pairs in shipped.values():
        assert pairs["pattern"].tolist() == table["pattern"].tolist()
        for n in (1, 2):
            assert pairs[f"statement_{n}"].tolist() == table[f"name_{n}"].tolist()
            assert pairs[f"id_{n}"].tolist() == list(range(n, 2 * len(table) + 1, 2))


def test_at_least_200_pairs_over_mmvps_nine_patterns_in_six_megabytes(shipped):
    counts = shipped["noto"]["pattern"].value_counts()
    assert counts.sum() >= 200 and set(counts.index) == set(PATTERNS.values()) and counts.min() >= 20
    assert sum(file.stat().st_size for file in EMOJI.rglob("*") if file.is_file()) <= 6e6


def test_no_pair_and_no_emoji_under_two_names_stands_twice():
    table = pd.read_csv(EMOJI / "pairs.csv")
    codes = [frozenset(pair) for pair in zip(table["unicode_1"], table["unicode_2"], strict=True)]
    assert len(set(codes)) == len(codes) and all(len(pair) == 2 for pair in codes)
    members = pd.concat([table[[f"name_{n}", f"unicode_{n}"]].set_axis(["name", "code"], axis=1) for n in (1, 2)])
    assert (members.groupby("code")["name"].nunique() == 1).all()
    assert (members.groupby("name")["code"].nunique() == 1).all()


def test_both_sets_show_every_difference_in_their_pixels(shipped):
    for name, pairs in shipped.items():
        for row in pairs.itertuples():
            one, two = (np.asarray(Image.open(path), dtype=float) for path in (row.image_1, row.image_2))
            assert one.shape == two.shape == (64, 64, 3), (name, row.id_1)
            assert (abs(one - two).max(axis=2) > 32).mean() > 0.01, (name, row.statement_1, row.statement_2)


def test_no_pair_swaps_skin_tone_or_gender():
    table = pd.read_csv(EMOJI / "pairs.csv")
    words = {word for n in (1, 2) for name in table[f"name_{n}"] for word in re.findall(r"\w+", name)}
    gendered = "man men woman women boy boys girl girls male female mens womens prince princess king queen"
    assert not words & {*gendered.split(), "skin", "tone", "fitzpatrick"}
    codes = " ".join([*table["unicode_1"], *table["unicode_2"]])
    assert not re.search(r"1F3F[B-F]|2640|2642", codes)


def test_names_are_lower_case():
    table = pd.read_csv(EMOJI / "pairs.csv")
    assert all(name == name.lower().strip() for n in (1, 2) for name in table[f"name_{n}"])


# --- the scores -------------------------------------------------------------------------------------------------


def test_a_match_by_hand():
    similarity = np.array(
        [
            [[0.9, 0.8], [0.7, 0.8]],  # each member's nearest is its own
            [[0.9, 0.8], [0.9, 0.8]],  # both choose member 1: the difference is not seen
            [[0.8, 0.9], [0.9, 0.8]],  # crossed
            [[0.9, 0.2], [0.5, 0.5]],  # a tie counts for member 2, as in MMVP-VLM
            [[0.5, 0.5], [0.2, 0.9]],  # and so against member 1
        ]
    )
    assert pair_decisions(similarity)["correct"].tolist() == [True, False, False, True, False]


@pytest.fixture
def small(tmp_path):
    """Two sets of one pair in one pattern, each image of one colour."""

    def write(colours):
        for name, pair in colours.items():
            folder = tmp_path / "small" / name / "MLLM_VLM Images" / "State"
            folder.mkdir(parents=True)
            for i, colour in enumerate(pair, 1):
                Image.new("RGB", (64, 64), colour).save(folder / f"{i}.png")
            rows = "Question ID,Type,Statement\n1,State,red\n2,State,blue\n"
            (tmp_path / "small" / name / "Questions.csv").write_text(rows)
        return tmp_path / "small"

    return write


def test_the_match_scores_the_cosines_of_the_images(small, encoder):
    out = small({"noto": ("red", "blue"), "twemoji": ("darkred", "darkblue")})
    scores = match_pairs(encoder, out / "noto", out / "twemoji")
    assert encoder.asked == []  # no word is read
    again = match_pairs(encoder, out / "twemoji", out / "noto")
    for i, j in ((1, 1), (1, 2), (2, 1), (2, 2)):
        assert scores[f"a{i}b{j}"][0] == pytest.approx(again[f"a{j}b{i}"][0], abs=1e-6)
    assert scores["image_to_text"].tolist() == again["correct"].tolist()


def test_a_set_matches_itself_and_not_its_exchange(small, encoder):
    out = small({"noto": ("red", "blue"), "twemoji": ("blue", "red")})
    assert summarise(match_pairs(encoder, out / "noto", out / "noto"))["mean"] == 1
    assert summarise(match_pairs(encoder, out / "noto", out / "twemoji"))["mean"] == 0


def test_sets_of_other_pairs_are_refused(small, encoder):
    out = small({"noto": ("red", "blue"), "twemoji": ("red", "blue")})
    questions = out / "twemoji" / "Questions.csv"
    questions.write_text(questions.read_text().replace("blue", "green"))
    with pytest.raises(ValueError, match="do not hold the same pairs"):
        match_pairs(encoder, out / "noto", out / "twemoji")


def test_the_report_is_flat_and_averages_the_sets(encoder):
    report = emoji_report(encoder)
    patterns = [*PATTERNS.values(), "mean"]
    prefixes = ("emoji", "emoji/noto", "emoji/twemoji", "emoji-match")
    assert set(report) == {f"{p}/{name}{end}" for p in prefixes for name in patterns for end in ("", "/low", "/high")}
    for prefix in prefixes:
        for name in patterns:
            key = f"{prefix}/{name}"
            assert 0 <= report[f"{key}/low"] <= report[key] <= report[f"{key}/high"] <= 1
    for name in patterns:
        assert report[f"emoji/{name}"] == pytest.approx(
            (report[f"emoji/noto/{name}"] + report[f"emoji/twemoji/{name}"]) / 2
        )


def test_each_sets_images_are_asked_for_once_and_all_scores_are_made_of_them(small, encoder):
    out = small({"noto": ("red", "blue"), "twemoji": ("darkred", "darkblue")})
    asked = []

    def features(files):
        asked.append([(path.parts[-4], path.name) for path in files])
        rows = {("noto", "1.png"): (1.0, 0.0), ("noto", "2.png"): (0.0, 1.0)}
        return torch.tensor([(*rows.get(key, (0.6, 0.8)), *14 * [0.0]) for key in asked[-1]])

    report = emoji_report(encoder, out, features=features)
    assert asked == [[(name, "1.png"), (name, "2.png")] for name in ("noto", "twemoji")]
    assert report["emoji-match/mean"] == 0  # .6 = .6, a tie that counts against member 1
