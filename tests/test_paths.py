import os
import subprocess
import sys
from pathlib import Path

import pytest

from diva_lab import paths
from diva_lab.cli import main

NO_HOME = """
import os, pwd, sys
def unknown(*_): raise KeyError("uid")
pwd.getpwuid = unknown
from diva_lab.paths import CACHE, RUNS
from diva_lab.paths import CACHE as again
(CACHE / "kept").mkdir()
print(CACHE == again, CACHE)
"""


@pytest.mark.parametrize("changes", [{"HOME": None}, {"HOME": "/dev/null"}, {"DIVA_LAB_CACHE": "/dev/null/cache"}])
def test_where_no_cache_can_be_written_one_warning_says_so_and_what_was_kept_is_deleted_at_the_end(changes):
    variables = {name: value for name, value in (os.environ | changes).items() if value is not None}
    variables["PYTHONPATH"] = str(paths.ROOT)
    done = subprocess.run([sys.executable, "-c", NO_HOME], capture_output=True, encoding="utf-8", env=variables)
    same, folder = done.stdout.split()
    assert same == "True" and not Path(folder).exists()
    assert done.stderr.count("Warning") == 1 and "DIVA_LAB_CACHE" in done.stderr


def test_an_empty_variable_names_no_folder_and_a_tilde_is_the_home(monkeypatch):
    monkeypatch.setenv("DIVA_LAB_RUNS", "")
    assert paths.named_folder("DIVA_LAB_RUNS") is None
    monkeypatch.setenv("DIVA_LAB_RUNS", "~/runs")
    assert paths.named_folder("DIVA_LAB_RUNS") == Path.home() / "runs"


@pytest.mark.parametrize("verb", ["train", "run", "evaluate", "benchmark"])
def test_a_read_only_place_is_told_before_any_work_with_the_ways_to_name_another(verb, tmp_path, monkeypatch, capsys):
    command = {
        "train": ["train", "--preset", "openai-l14-dcr", "--out", str(tmp_path / "runs")],
        "run": ["run", "--out", str(tmp_path / "runs")],
        "evaluate": ["evaluate", "--encoder", "tiny", "--benchmarks", "emoji", "--out", str(tmp_path / "o.csv")],
        "benchmark": ["benchmark", "input", "--json", str(tmp_path / "o.json")],
    }[verb]
    assert paths.CACHE  # found before this machine becomes read-only
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path} is read-only" in said and "--out" in said and "DIVA_LAB_RUNS" in said


def test_a_folder_that_is_not_there_yet_can_be_written_and_one_inside_a_file_cannot(tmp_path):
    paths.check_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="file is no folder"):
        paths.check_writable(tmp_path / "file" / "b")
