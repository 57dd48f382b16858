import csv
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diva_lab.evaluation.emoji import EMOJI, EMOJI_SETS, emoji_report, match_pairs
from diva_lab.evaluation.pairs import pair_decisions, read_pairs, summarise
from diva_lab.paths import CACHE
from diva_lab.world import PATTERNS
from tools import emoji_pairs as emoji
from tools.emoji_pairs import IMAGES, NOTICE, write_emoji_pairs


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


def test_the_licences_of_both_sets_are_named_where_they_ship():
    text = (EMOJI / "NOTICE.md").read_text(encoding="utf-8")
    assert text == NOTICE
    for words in ("Noto Emoji", "Apache License 2.0", "Twemoji", "CC-BY 4.0", "Unicode License", "Changed here"):
        assert words in text


# --- the builder ------------------------------------------------------------------------------------------------

VENDORS = tuple(EMOJI_SETS.values())
FAKE = {"1F512": (200, 0, 0, 255), "1F513": (0, 0, 200, 128)}  # opaque, and half transparent


def write_packages(folder, vendors=VENDORS, codes=tuple(FAKE)):
    """Packages in the layout of the real ones, each picture of one colour; the vendors' greens differ."""
    for green, vendor in enumerate(vendors):
        package = folder / f"emoji-datasource-{vendor}"
        (package / "img" / vendor / "64").mkdir(parents=True)
        entries = [{"name": code, "unified": code, "image": f"{code.lower()}.png"} for code in FAKE]
        (package / "emoji.json").write_text(json.dumps(entries))
        for code in codes:
            red, _, blue, alpha = FAKE[code]
            picture = Image.new("RGBA", (64, 64), (red, 10 * green, blue, alpha))
            picture.save(package / "img" / vendor / "64" / f"{code.lower()}.png")
    return folder


@pytest.fixture
def table(tmp_path):
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        header = ("pattern", "name_1", "name_2", "unicode_1", "unicode_2")
        csv.writer(file).writerows([header, ("State", "lock", 'open "lock", really', "1F512", "1F513")])
    return tmp_path / "pairs.csv"


def test_the_builder_writes_the_expected_files(tmp_path, table):
    out = write_emoji_pairs(write_packages(tmp_path / "packages"), tmp_path / "out", table)
    for green, name in enumerate(EMOJI_SETS):
        lines = ["Question ID,Type,Statement", "1,State,lock", '2,State,"open ""lock"", really"', ""]
        assert (out / name / "Questions.csv").read_bytes() == "\n".join(lines).encode()
        for i, pixel in ((1, (200, 10 * green, 0)), (2, (127, 127 + 5 * green, 227))):  # 128 / 255 of it over white
            picture = Image.open(out / name / IMAGES / "State" / f"{i}.png")
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 64))
            assert abs(np.asarray(picture, dtype=int) - pixel).max() <= 1
    assert (out / "NOTICE.md").read_text() == NOTICE


def test_the_builder_writes_the_same_bytes_again_and_leaves_nothing_old(tmp_path, table):
    packages = write_packages(tmp_path / "packages")
    out = write_emoji_pairs(packages, tmp_path / "out", table)
    first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    stale = out / "noto" / IMAGES / "State" / "3.png"
    stale.write_bytes(b"")
    write_emoji_pairs(packages, out, table)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == first


def test_missing_packages_are_one_error_that_names_them(tmp_path, table, capsys):
    write_packages(tmp_path / "packages", vendors=("google",))
    with pytest.raises(FileNotFoundError, match=r"emoji-datasource-twitter; expected") as error:
        write_emoji_pairs(tmp_path / "packages", tmp_path / "out", table)
    assert "google" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"google nor in .*twitter"):
        write_emoji_pairs(tmp_path, tmp_path / "out", table)
    with pytest.raises(SystemExit) as stop:
        emoji.main(["--packages", str(tmp_path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "error: no emoji.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_picture_is_named_and_nothing_is_written(tmp_path, table):
    packages = write_packages(tmp_path / "packages", codes=("1F512",))
    with pytest.raises(ValueError, match="no picture of 1F513 in noto, 1F513 in twemoji"):
        write_emoji_pairs(packages, tmp_path / "out", table)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def real_packages(tmp_path):
    """A folder with both packages, their files kept in the cache; of each what the builder reads."""
    (tmp_path / "packages").mkdir()
    for vendor in VENDORS:
        name = f"emoji-datasource-{vendor}"
        file = CACHE / f"{name}-16.0.0.tgz"
        if not file.is_file():
            draft = tmp_path / "fetched"
            draft.mkdir(exist_ok=True)
            try:
                command = [shutil.which("npm") or "npm", "pack", f"{name}@16.0.0"]
                subprocess.run(command, cwd=draft, check=True, capture_output=True, timeout=30)
            except (OSError, subprocess.SubprocessError):
                pytest.skip("the emoji packages cannot be had")
            CACHE.mkdir(parents=True, exist_ok=True)
            shutil.move(draft / file.name, file)
        with tarfile.open(file) as tar:
            wanted = re.compile(rf"package/(emoji\.json|img/{vendor}/64/[^/]+)")
            members = [member for member in tar if wanted.fullmatch(member.name)]
            tar.extractall(tmp_path / name, members, filter="data")
        (tmp_path / name / "package").rename(tmp_path / "packages" / name)
    return tmp_path / "packages"


@pytest.mark.network
def test_the_builder_remakes_what_ships_from_the_packages(tmp_path, real_packages):
    out = write_emoji_pairs(real_packages, tmp_path / "out")
    shipped = {path.relative_to(EMOJI): path for path in EMOJI.rglob("*") if path.is_file()}
    made = {path.relative_to(out): path for path in out.rglob("*") if path.is_file()}
    shipped.pop(Path("pairs.csv"))  # what it is made of
    assert made.keys() == shipped.keys()
    for name, path in made.items():
        assert path.read_bytes() == shipped[name].read_bytes(), name


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
    """Two sets of one pair in one pattern, made of the fake packages."""

    def write(colours):
        rows = [("State", "red", "blue", "1F512", "1F513")]
        with open(tmp_path / "small.csv", "w", newline="") as file:
            csv.writer(file).writerows([("pattern", "name_1", "name_2", "unicode_1", "unicode_2"), *rows])
        out = write_emoji_pairs(write_packages(tmp_path / "packages"), tmp_path / "small", tmp_path / "small.csv")
        for name, pair in colours.items():
            for i, colour in enumerate(pair, 1):
                Image.new("RGB", (64, 64), colour).save(out / name / IMAGES / "State" / f"{i}.png")
        return out

    return write


def test_the_match_scores_the_cosines_of_the_pictures(small, encoder):
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
    out = small({})
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


def test_each_sets_pictures_are_asked_for_once_and_all_scores_are_made_of_them(small, encoder):
    out = small({"noto": ("red", "blue"), "twemoji": ("darkred", "darkblue")})
    asked = []

    def features(files):
        asked.append([(path.parts[-4], path.name) for path in files])
        rows = {("noto", "1.png"): (1.0, 0.0), ("noto", "2.png"): (0.0, 1.0)}
        return torch.tensor([(*rows.get(key, (0.6, 0.8)), *14 * [0.0]) for key in asked[-1]])

    report = emoji_report(encoder, out, features=features)
    assert asked == [[(name, "1.png"), (name, "2.png")] for name in ("noto", "twemoji")]
    assert report["emoji-match/mean"] == 0  # .6 = .6, a tie that counts against member 1
