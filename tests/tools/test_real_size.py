"""Presets at real size: `pytest -m real_size` runs them, one at a time; the page says what was run."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from diva_lab.paths import DATA, ROOT
from diva_lab.training.presets import BACKBONES, preset
from tools.real_size import CASES, COLUMNS, describe, keep, read_record

RECORD = DATA / "results" / "real_size.csv"
MOST_GB = {"dfn-h14-378-dcr": 23, "metaclip-h14-diva-anchored": 20.5}  # of memory, where it is more than 20


@pytest.fixture(scope="session")
def models():
    """A folder for models; the denoiser, 5 GB, is written once, and of the encoders one is kept at a time."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.real_size
@pytest.mark.parametrize("name", CASES)
def test_a_preset_trains_is_evaluated_and_exported_at_real_size(name, models):
    for other in models.iterdir():
        if other.name not in (preset(name).encoder, "sd21-base"):
            shutil.rmtree(other)
    record = ["--record", path] if (path := os.environ.get("DIVA_LAB_RECORD")) else []
    done = subprocess.run(
        [sys.executable, "-m", "tools.real_size", name, "--models", str(models), *record],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["preset"] == name and row.keys() == set(COLUMNS)
    assert row["peak_gb"] <= MOST_GB.get(name, 20)


def test_a_row_takes_the_place_of_an_older_one_of_its_preset_and_device(tmp_path):
    row = {
        "device": "cpu",
        "seconds": 90,
        "peak_gb": 9.5,
        "date": "2026-01-01",
        "machine": "m",
        "git": "g",
        "torch": "2",
    }
    for change in (
        {"preset": CASES[5]},
        {"preset": CASES[1]},
        {"preset": CASES[5], "device": "cuda"},
        {"preset": CASES[5], "seconds": 80},
    ):
        keep(row | change, tmp_path / "new" / "record.csv")
    found = [(r["preset"], r["device"], r["seconds"]) for r in read_record(tmp_path / "new" / "record.csv")]
    assert found == [(CASES[1], "cpu", "90"), (CASES[5], "cpu", "80"), (CASES[5], "cuda", "90")]


def test_the_page_says_of_each_backbone_what_the_record_says():
    lines = (ROOT / "docs" / "backbones.md").read_text().splitlines()
    table = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    head = next(row for row in table if "CPU, real size" in row)
    cells = {
        row[0]: row[head.index("CPU, real size")] for row in table if row[0] in BACKBONES and len(row) == len(head)
    }
    rows = read_record(RECORD)
    assert rows and cells == {backbone: describe(rows, backbone) for backbone in BACKBONES}
