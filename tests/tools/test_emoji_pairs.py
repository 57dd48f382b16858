import csv
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diva_lab.evaluation.emoji import EMOJI, EMOJI_SETS
from diva_lab.paths import CACHE
from tools import emoji_pairs
from tools.emoji_pairs import IMAGES, NOTICE, write_emoji_pairs

VENDORS = tuple(EMOJI_SETS.values())
FAKE = {"1F512": (200, 0, 0, 255), "1F513": (0, 0, 200, 128)}  # opaque, and half transparent


def write_packages(folder, vendors=VENDORS, codes=tuple(FAKE)):
    """Packages in the layout of the real ones, each image of one colour; the vendors' greens differ."""
    for green, vendor in enumerate(vendors):
        package = folder / f"emoji-datasource-{vendor}"
        (package / "img" / vendor / "64").mkdir(parents=True)
        entries = [{"name": code, "unified": code, "image": f"{code.lower()}.png"} for code in FAKE]
        (package / "emoji.json").write_text(json.dumps(entries))
        for code in codes:
            red, _, blue, alpha = FAKE[code]
            image = Image.new("RGBA", (64, 64), (red, 10 * green, blue, alpha))
            image.save(package / "img" / vendor / "64" / f"{code.lower()}.png")
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
            image = Image.open(out / name / IMAGES / "State" / f"{i}.png")
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
            assert abs(np.asarray(image, dtype=int) - pixel).max() <= 1
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
        emoji_pairs.main(["--packages", str(tmp_path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "error: no emoji.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_image_is_named_and_nothing_is_written(tmp_path, table):
    packages = write_packages(tmp_path / "packages", codes=("1F512",))
    with pytest.raises(ValueError, match="no image of 1F513 in noto, 1F513 in twemoji"):
        write_emoji_pairs(packages, tmp_path / "out", table)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def real_packages(tmp_path):
    """A folder with both packages, reduced to the files that the builder reads; downloads are kept in the cache."""
    (tmp_path / "packages").mkdir()
    for vendor in VENDORS:
        name = f"emoji-datasource-{vendor}"
        file = CACHE / f"{name}-16.0.0.tgz"
        if not file.is_file():
            download = tmp_path / "npm"
            download.mkdir(exist_ok=True)
            try:
                command = [shutil.which("npm") or "npm", "pack", f"{name}@16.0.0"]
                subprocess.run(command, cwd=download, check=True, capture_output=True, timeout=30)
            except (OSError, subprocess.SubprocessError):
                pytest.skip("no emoji packages: npm cannot fetch them")
            CACHE.mkdir(parents=True, exist_ok=True)
            shutil.move(download / file.name, file)
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
    written = {path.relative_to(out): path for path in out.rglob("*") if path.is_file()}
    shipped.pop(Path("pairs.csv"))  # the input
    assert written.keys() == shipped.keys()
    for name, path in written.items():
        assert path.read_bytes() == shipped[name].read_bytes(), name


def test_the_licences_of_both_sets_are_named_where_they_ship():
    text = (EMOJI / "NOTICE.md").read_text(encoding="utf-8")
    assert text == NOTICE
    for words in ("Noto Emoji", "Apache License 2.0", "Twemoji", "CC-BY 4.0", "Unicode License", "Changed here"):
        assert words in text
