"""A run that is killed, cut off or out of disk at any moment goes on to the same bits; its records can be read."""

import errno
import fcntl
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from run_checks import same_records, same_weights

from diva_lab.training import runs, stages
from diva_lab.training.runs import Run, list_runs
from diva_lab.training.settings import Settings
from diva_lab.training.stages import align

TOY = {"stage": "tune", "objective": "toy", "seed": 0, "steps": 2}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}  # of Python's audit events; `open` for writing is another
FORK = multiprocessing.get_context("fork")
cut: "Cut | None" = None  # the one that listens


class Killed(BaseException):
    """What no code of the package handles."""


class Cut:
    """A context that counts the file operations below a folder, and cuts off number `at`, half done, by an error."""

    def __init__(self, folder: Path, at: int = 0, error: BaseException | None = None):
        self.folder, self.at, self.error, self.count = str(folder), at, error or Killed(), 0

    def __enter__(self) -> "Cut":
        global cut
        cut = self
        return self

    def __exit__(self, *_) -> None:
        global cut
        cut = None

    def operation(self, path: str, half: bytes = b"", mode: str = "wb") -> None:
        self.count += 1
        if self.count != self.at:
            return
        if half:
            with open(path, mode) as file:
                file.write(half)
        raise self.error


def listen(event: str, args: tuple) -> None:
    """Tell the listening cut of an operation that Python itself makes."""
    if cut is None or not (event == "open" or event in CHANGES) or isinstance(args[0], int):
        return
    path = os.fspath(args[0])
    inside = path.startswith(cut.folder) or not os.path.isabs(path)  # `rmtree` names files within an open folder
    if event in CHANGES and inside:
        cut.operation(path)
    elif event == "open" and inside and args[2] & (os.O_WRONLY | os.O_RDWR):
        cut.operation(path, b'{"step": 1, "lo', "wb" if args[2] & os.O_TRUNC else "ab")


sys.addaudithook(listen)


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """The operations of which Python tells nothing; waiting for the disk takes long and is left out."""

    def tell(function: Callable) -> Callable:
        def told(value: object, path: Path | None = None) -> None:
            if cut is not None:
                cut.operation(str(path), b"half" if path else b"")
            if path:
                function(value, path)

        return told

    monkeypatch.setattr(runs, "save_file", tell(runs.save_file))
    monkeypatch.setattr(torch, "save", tell(torch.save))
    monkeypatch.setattr(os, "fsync", tell(os.fsync))
    monkeypatch.setattr(runs, "environment", cache(runs.environment))


# --- every operation, once --------------------------------------------------------------------------------------


def train_toy(root: Path) -> Run:
    """Two steps of no model: what `stages` and `loop` do with a run's folder."""
    run = Run.at(TOY, root)
    if run.done:
        return run
    with run.lock():
        run.make(TOY)
        state = run.resume()
        weight, first = (run.weights()["w"], state["step"]) if state else (torch.zeros(3), 0)
        for step in range(first, TOY["steps"]):
            weight = weight * 0.5 + step
            run.log("metrics", step=step, loss=weight.sum().item())
            run.log("evaluations", step=step + 1, sum=weight.sum().item())
            run.save(step + 1, {"w": weight}, {"sum": weight}, 0.0)
        return run.finish()


FILES = {"settings.json", "environment.json", "metrics.jsonl", "evaluations.jsonl", "checkpoint", "lock", "done"}


def left_over(root: Path) -> set[str]:
    """What there is in the folder, beside its files, of a run that goes on to its end."""
    run = train_toy(root)
    assert run.done and torch.equal(run.weights()["w"], torch.ones(3)) and run.state()["step"] == 2
    assert [list(table["step"]) for table in (run.metrics(), run.evaluations())] == [[0, 1], [1, 2]]
    return {path.name for path in run.folder.iterdir()} - FILES


def steps_saved(root: Path) -> int:
    state = Run.at(TOY, root).state()
    return state["step"] if state else 0


def number_of(function: Callable, root: Path) -> int:
    with Cut(root) as whole:
        function(root)
    return whole.count


def cut_off(function: Callable, root: Path, at: int, error: BaseException | None = None) -> BaseException | None:
    """What a function raises whose operation number `at` is cut off; None where it ends all the same."""
    try:
        with Cut(root, at, error):
            function(root)
    except BaseException as caught:
        assert isinstance(caught, (Killed, OSError)), caught
        list_runs(root)
        return caught
    return None


def test_a_run_that_is_cut_off_twice_at_any_operation_goes_on_to_the_same_bits(tmp_path):
    count = number_of(train_toy, tmp_path / "whole")
    assert count > 40 and not left_over(tmp_path / "whole")
    for first in range(1, count + 1):
        for second in range(1, 12 if first > 2 * count // 3 else 2):  # all of `resume`, where there is a checkpoint
            root = tmp_path / f"{first}-{second}"
            assert cut_off(train_toy, root, first)
            saved = steps_saved(root)
            cut_off(train_toy, root, second)
            assert steps_saved(root) >= saved, (first, second)
            assert not left_over(root), (first, second)
            shutil.rmtree(root)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["disk full", "read-only"])
def test_what_cannot_be_written_is_one_error_that_names_the_folder_and_the_run_goes_on_later(tmp_path, number):
    told = 0
    for at in range(1, number_of(train_toy, tmp_path / "whole") + 1):
        root = tmp_path / str(at)
        if error := cut_off(train_toy, root, at, OSError(number, os.strerror(number))):
            said = str(error)
            assert isinstance(error, OSError) and "\n" not in said and os.strerror(number) in said
            assert str(root) in said and "--out" in said and "DIVA_LAB_RUNS" in said
            told += 1
        assert left_over(root) <= {"checkpoint.old"}, at
    assert told > 30  # the rest is only tidied up


# --- in training ------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(small_settings, monkeypatch) -> Iterator[Settings]:
    """A stage 1 that saves after each of its steps; its frozen models are loaded once.

    Everything runs in one thread: a forked process has the parent's pool of threads without the threads, and would wait
    for them without end.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = replace(small_settings, objective="diva", draws=1, batch=1, steps=6, save_every=1, evaluate_every=2)
    denoiser = stages.build_denoiser(settings)
    monkeypatch.setattr(stages, "load_encoder", cache(stages.load_encoder))
    monkeypatch.setattr(stages, "build_denoiser", lambda *_: denoiser)
    yield settings
    torch.set_num_threads(threads)


def evaluate(conditioner, encoder, denoiser) -> dict[str, float]:
    return {"sum": sum(p.double().sum().item() for p in conditioner.parameters())}


def equals(whole: Run, run: Run) -> None:
    assert run.done and same_weights(whole, run)
    same_records(whole, run)
    assert list_runs(run.folder.parent)["error"].isna().all()


def test_training_that_is_cut_off_at_any_operation_goes_on_to_the_same_bits(settings, tmp_path):
    settings = replace(settings, steps=2, evaluate_every=1)

    def train(root: Path) -> Run:
        return align(settings, root, evaluate)

    count = number_of(train, tmp_path / "whole")
    whole = train(tmp_path / "whole")
    for at in range(1, count + 1):
        assert cut_off(train, tmp_path / str(at), at)
        equals(whole, train(tmp_path / str(at)))


def in_a_child(settings: Settings, root: Path, watch: Callable = evaluate) -> multiprocessing.Process:
    """A process of its own that trains; forked, so that it starts at once."""

    def train() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        align(settings, root, watch)

    child = FORK.Process(target=train)
    child.start()
    return child


@pytest.mark.parametrize("kills", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_training_that_is_killed_at_random_moments_goes_on_to_the_same_bits(settings, tmp_path, kills):
    whole = align(settings, tmp_path / "whole", evaluate)
    start = time.perf_counter()
    in_a_child(settings, tmp_path / "timed").join()
    seconds = time.perf_counter() - start
    draw, root, killed, finished = random.Random(0), tmp_path / "0", 0, 0
    while killed < kills:
        child = in_a_child(settings, root)
        child.join(draw.uniform(0, seconds))
        child.kill()
        child.join()
        killed += child.exitcode == -9
        assert child.exitcode in (-9, 0)
        list_runs(root)
        if child.exitcode == 0:
            equals(whole, align(settings, root, evaluate))
            finished += 1
            root = tmp_path / str(finished)
    equals(whole, align(settings, root, evaluate))


def test_a_second_process_on_a_run_is_told_which_one_holds_it(settings, tmp_path):
    child = in_a_child(settings, tmp_path, lambda *_: time.sleep(60) or {})
    run = stages.find_run(settings, tmp_path, "align")
    while not ((run.folder / "lock").exists() and (run.folder / "lock").read_text()):
        assert child.is_alive()
        time.sleep(0.01)
    told = rf"{run.id} is being trained by process {child.pid} on {os.uname().nodename};"
    with pytest.raises(RuntimeError, match=told):
        align(settings, tmp_path)
    child.kill()
    child.join()
    assert align(settings, tmp_path).done


def test_a_killed_run_goes_on_as_soon_as_what_it_had_started_has_ended(tmp_path, monkeypatch):
    run, held, end = Run.at(TOY, tmp_path), FORK.Event(), FORK.Event()

    def hold() -> None:
        with run.lock():
            FORK.Process(target=end.wait, args=(60,)).start()
            held.set()
            time.sleep(60)

    child = FORK.Process(target=hold)
    child.start()
    assert held.wait(60)
    child.kill()
    child.join()
    with open(run.folder / "lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "PATIENCE", 0)
        with pytest.raises(RuntimeError, match=f"by what process {child.pid} on .* had started before it ended; let"):
            train_toy(tmp_path)
    threading.Timer(0.5, end.set).start()
    assert not left_over(tmp_path)


def test_a_finished_run_is_returned_without_writing_a_file(settings, tmp_path, capsys):
    run = align(replace(settings, steps=1), tmp_path)
    capsys.readouterr()
    with Cut(tmp_path) as none:
        assert align(replace(settings, steps=1), tmp_path) == run
    assert none.count == 0
    assert capsys.readouterr().out == f"{run.id}: done before, see {run.folder}\n"


def test_a_clock_that_was_set_back_changes_nothing(settings, tmp_path, monkeypatch):
    whole = align(settings, tmp_path / "whole", evaluate)
    assert cut_off(lambda root: align(settings, root, evaluate), tmp_path / "cut", 60)
    for path in (tmp_path / "cut").rglob("*"):
        os.utime(path, (4e9, 4e9))
    for name in ("time", "time_ns", "gmtime"):
        now = getattr(time, name)
        monkeypatch.setattr(time, name, (lambda *_: 0) if name != "gmtime" else lambda *_, now=now: now(0))
    resumed = align(settings, tmp_path / "cut", evaluate)
    equals(whole, resumed)
    assert resumed.metrics()["seconds"].is_monotonic_increasing
