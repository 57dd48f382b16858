import errno
import fcntl
import hashlib
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from diva_lab import provenance as runs
from diva_lab.provenance import PACKAGES, environment, sha256
from diva_lab.training.runs import Run, list_runs

SETTINGS = {"stage": "tune", "objective": "dcr", "seed": 3, "lr": 0.1}
WEIGHTS = {"b": torch.arange(3.0), "a": torch.ones(2, 2)[:, :1]}


@pytest.fixture
def run(tmp_path):
    return Run.open(SETTINGS, tmp_path)


def fill(run: Run, steps: int) -> None:
    for step in range(steps):
        run.log("metrics", step=step, loss=1 / (step + 1))


def test_sha256_is_that_of_the_files_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"diva" * 1000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"diva" * 1000).hexdigest()


def test_the_environment_names_git_sha_versions_machine_and_time():
    facts = environment()
    assert set(facts) == {"git", "python", "versions", "machine", "time"}
    assert set(facts["versions"]) == set(PACKAGES) and all(facts.values())


def test_the_environment_is_told_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert environment()["git"] == "unknown"


def test_an_id_names_stage_objective_and_seed_and_depends_on_all_settings(run, tmp_path):
    assert run.id == run.folder.name and run.id.startswith("tune-dcr-s3-")
    assert Run.open(dict(reversed(SETTINGS.items())), tmp_path / "elsewhere").id == run.id
    ids = {Run.open({**SETTINGS, **change}, tmp_path).id for change in ({}, {"lr": 0.2}, {"seed": 4}, {"x": None})}
    assert len(ids) == 4


def test_a_run_opened_again_keeps_its_settings_and_the_environment_of_the_first_time(run, tmp_path):
    (run.folder / "environment.json").write_text(json.dumps({"git": "abc", "versions": {"torch": "9"}}))
    again = Run.open(SETTINGS, tmp_path)
    assert again == run and again.settings == SETTINGS
    assert again.source == f"run {run.id} · git abc · torch 9"


def test_a_run_is_done_once_it_is_finished(run):
    assert not run.done
    assert run.finish() == run and run.done


def test_logged_values_come_back_as_a_table(run):
    assert run.metrics().empty and run.evaluations().empty
    run.log("metrics", step=0, loss=0.1 + 0.2, cos=float("nan"))
    run.log("metrics", step=1, loss=1e-30)
    run.log("evaluations", step=0, nmi=0.5)
    assert list(run.metrics()["loss"]) == [0.1 + 0.2, 1e-30] and np.isnan(run.metrics()["cos"]).all()
    pd.testing.assert_frame_equal(run.evaluations(), pd.DataFrame([{"step": 0, "nmi": 0.5}]))


def test_weights_come_back_as_they_were_saved(run):
    run.save(2, WEIGHTS, {"state": {0: torch.ones(1)}}, 1.5)
    assert all(torch.equal(run.weights()[name], weight) for name, weight in WEIGHTS.items())
    state = run.resume()
    assert (state["step"], state["seconds"]) == (2, 1.5) and torch.equal(state["optimizer"]["state"][0], torch.ones(1))


def test_a_run_without_a_checkpoint_says_so(run):
    with pytest.raises(FileNotFoundError, match=f"run {run.id} has no checkpoint in"):
        run.weights()


def test_resuming_cuts_the_records_back_to_the_checkpoint(run):
    fill(run, 5)
    for step in (0, 2, 4):
        run.log("evaluations", step=step, nmi=0.5)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    run.save(2, WEIGHTS, {}, 0.0)
    run.resume()
    assert list(run.metrics()["step"]) == [0, 1] and list(run.evaluations()["step"]) == [0, 2]


def test_resuming_without_a_checkpoint_starts_with_empty_records(run):
    fill(run, 5)
    assert run.resume() is None and run.metrics().empty


@pytest.mark.parametrize("moment", ["torch.save", "first rename", "second rename"])
def test_killed_while_saving_the_last_whole_checkpoint_is_kept(run, monkeypatch, moment):
    def killed(*_):
        raise KeyboardInterrupt

    run.save(2, WEIGHTS, {}, 0.0)
    path, calls = type(run.folder), []
    rename = path.rename
    if moment == "torch.save":
        monkeypatch.setattr(torch, "save", killed)
    else:
        last = 1 if moment == "first rename" else 2
        monkeypatch.setattr(
            path, "rename", lambda *args: (calls.append(1), rename(*args) if len(calls) < last else killed())[1]
        )
    with pytest.raises(KeyboardInterrupt):
        run.save(4, {name: -weight for name, weight in WEIGHTS.items()}, {}, 0.0)
    monkeypatch.undo()
    assert run.resume()["step"] == 2 and torch.equal(run.weights()["b"], WEIGHTS["b"])
    run.save(6, {name: 2 * weight for name, weight in WEIGHTS.items()}, {}, 0.0)
    assert run.resume()["step"] == 6 and torch.equal(run.weights()["b"], 2 * WEIGHTS["b"])
    assert [p.name for p in run.folder.glob("checkpoint*")] == ["checkpoint"]


def test_all_runs_of_a_root_are_listed_with_their_settings(tmp_path):
    assert list_runs(tmp_path).empty and list_runs(tmp_path / "nowhere").empty
    done = Run.open(SETTINGS, tmp_path).finish()
    other = Run.open({"stage": "align", "seed": 0}, tmp_path)
    (tmp_path / "no run").mkdir()
    table = list_runs(tmp_path).set_index("run")
    assert dict(table["done"]) == {done.id: True, other.id: False}
    assert table.loc[done.id, "objective"] == "dcr" and table.loc[other.id, "stage"] == "align"


# --- one process at a time --------------------------------------------------------------------------------------


def test_a_lock_names_its_holder_until_it_ends(run):
    with run.lock(), pytest.raises(RuntimeError, match=rf"{run.id} is being trained by process {os.getpid()} on "):  # noqa: SIM117
        with run.lock():
            pass
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock():
        assert run.settings == SETTINGS


def test_where_there_are_no_locks_it_is_said_and_the_run_goes_on(run, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run.lock():
        assert "no locks here (Function not implemented); train it by one process at a time" in capsys.readouterr().out


# --- what is damaged --------------------------------------------------------------------------------------------


def break_line(path, number: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[number] = text
    path.write_text("".join(f"{line}\n" for line in lines))


DAMAGE = {  # file -> what was done to it
    "settings.json": lambda path: path.write_text(path.read_text()[:20]),
    "settings.json, emptied": lambda path: path.write_bytes(b""),
    "settings.json, a list": lambda path: path.write_text("[1]"),
    "settings.json, of other settings": lambda path: path.write_text(path.read_text().replace("0.1", "0.2")),
    "environment.json": lambda path: path.write_bytes(b"\xff\x00"),
    "metrics.jsonl": lambda path: break_line(path, 1, '{"step": 1, "lo'),
    "evaluations.jsonl": lambda path: break_line(path, 0, "words"),
    "probes.jsonl": lambda path: break_line(path, 0, '{"step": "one"}'),
    "checkpoint/optimizer.pt": lambda path: path.write_bytes(b""),
    "checkpoint/optimizer.pt, cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "checkpoint/optimizer.pt, of words": lambda path: torch.save("words", path),
    "checkpoint/optimizer.pt, gone": lambda path: path.unlink(),
    "checkpoint/optimizer.pt, of step -1": lambda path: torch.save(torch.load(path) | {"step": -1}, path),
    "checkpoint/optimizer.pt, of step 6": lambda path: torch.save(torch.load(path) | {"step": 6}, path),
    "checkpoint/weights.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "checkpoint/weights.safetensors, gone": lambda path: path.unlink(),
    "checkpoint/weights.safetensors, of another step": lambda path: shutil.copy(path.parents[1] / "other", path),
}


@pytest.fixture
def broken(tmp_path) -> Run:
    """A stopped run of five steps with a checkpoint at two, to be damaged."""
    run = Run.open(SETTINGS | {"steps": 5}, tmp_path)
    fill(run, 3)
    for kind in ("evaluations", "probes"):
        for step in (0, 1):
            run.log(kind, step=step, x=1.0)
    run.save(1, {name: -weight for name, weight in WEIGHTS.items()}, {}, 0.0)
    shutil.copy(run.folder / "checkpoint" / "weights.safetensors", run.folder / "other")
    run.save(2, WEIGHTS, {}, 0.0)
    return run


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_told_by_its_name_with_what_to_do(broken, tmp_path, case):
    path = broken.folder / case.partition(",")[0]
    whole = Run.open(SETTINGS | {"steps": 5, "seed": 9}, tmp_path)
    DAMAGE[case](path)
    with pytest.raises(ValueError) as caught:
        run = Run.open(SETTINGS | {"steps": 5}, tmp_path)
        assert run.environment and run.resume()
    told = path.parent if path.parent.name == "checkpoint" else broken.folder
    assert f"run {broken.id} is damaged: {path}: " in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"; put it back from a copy, or delete {told} to train it anew")
    table = list_runs(tmp_path).set_index("run")
    assert table.loc[whole.id, "seed"] == 9 and pd.isna(table.loc[whole.id, "error"])
    if path.parent == broken.folder and "other" not in case:
        assert str(path) in table.loc[broken.id, "error"]


@pytest.mark.parametrize("case", [name for name in DAMAGE if name.startswith("checkpoint")])
def test_without_its_damaged_checkpoint_a_run_starts_again(broken, case):
    DAMAGE[case](broken.folder / case.partition(",")[0])
    shutil.rmtree(broken.folder / "checkpoint")
    assert broken.resume() is None and broken.metrics().empty


def test_half_a_last_line_is_left_out_of_a_run_in_training_and_told_of_a_finished_one(run):
    fill(run, 2)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert list(run.metrics()["step"]) == [0, 1]
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 3: expected a JSON object with step, got"):
        run.finish().metrics()


def test_weights_that_are_not_finite_are_not_saved(run):
    run.save(1, WEIGHTS, {}, 0.0)
    with pytest.raises(FloatingPointError, match="b is not finite after 2 steps, not saved"):
        run.save(2, WEIGHTS | {"b": torch.tensor([1.0, float("inf")])}, {}, 0.0)
    assert run.resume()["step"] == 1


def test_a_checkpoint_without_a_hash_of_a_version_before_is_resumed(run):
    run.save(1, WEIGHTS, {}, 0.0)
    path = run.folder / "checkpoint" / "optimizer.pt"
    state = torch.load(path)
    assert len(state.pop("weights")) == 64
    torch.save(state, path)
    assert run.resume()["step"] == 1
