"""A run on disk: settings, metrics and checkpoints; saved, resumed, listed.

    runs/ID/settings.json      the settings, and which stage it is of
    runs/ID/environment.json   git sha, versions, machine, time, number of processes, hashes of the objective's source
                               and of the weights, all at the start
    runs/ID/metrics.jsonl      one line a step: loss, terms, gradients, seconds of training so far
    runs/ID/evaluations.jsonl  what `evaluate` returned, at each step at which it was called
    runs/ID/probes.jsonl       what `probe` returned, at the same steps: one line a measure
    runs/ID/processes.jsonl    one line each time that it went on in another number of processes than before
    runs/ID/skipped.jsonl      one line an image that could not be read: step, name, reason; up to the last checkpoint
    runs/ID/checkpoint/        the trained weights (safetensors), and after `step` steps the optimizer's state and each
                               process's position in its images
    runs/ID/lock               held by the process that trains the run; says which one it is
    runs/ID/done               there once the run is finished

A run's id is made of its settings: asked for again, a finished run is returned and a stopped one goes on. A file is
written aside, synced to disk and then put in place, so that a kill at any moment leaves the old one or the new one.
What is damaged is told by its file, with what to do.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pandas as pd
import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diva_lab.image_files import open_regular
from diva_lab.machine import count_processes
from diva_lab.paths import RUNS
from diva_lab.provenance import environment, sha256

ADDED: dict[str, object] = {  # setting added since 0.2 -> its default, at which it is left out of a run's id
    "anchor": "none", "captions": "", "mentions": 1.0, "anchor_share": 0.5, "anchor_weight": 1.0, "anchor_noise": 0.1,
    "anchor_shift": True, "centre": False, "truth_weight": 1.0, "view_weight": 1.0, "push_weight": 1.0,
    "prompt_mask": False, "vae_input": "image", "noise_precision": "float32", "encoder_resize": "own",
    "normalise": "own", "loader_crop": False, "shared_samples": False, "token_draws": "batch", "draw_weights": "",
    "augment_normalised": False, "warmup_zero": False, "lora_targets": "all",
    "embedding_noise": 0, "teacher": "tiny-vision", "resampled": False, "workers": 0,
    "latents_on_disk": False,
}  # fmt: skip
HOLDER = "process {} on {}"  # what a lock says of the process that holds it: its id, its machine
PATIENCE = 10  # seconds, for a lock whose holder was killed
RECORDS = {  # kind -> its last step less the checkpoint's
    "metrics": 1, "skipped": 1, "evaluations": 0, "probes": 0, "processes": 0,
}  # fmt: skip


def _text(settings: dict) -> str:
    return json.dumps(settings, indent=1, sort_keys=True)


def _hashed(settings: dict) -> dict:
    """The settings that a run's id is made of."""
    return {key: value for key, value in settings.items() if key not in ADDED or value != ADDED[key]}


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    """Write a file aside, and put it in place in one step."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    _sync(new)
    new.replace(path)
    _sync(path.parent)


def _holder(file: TextIO) -> str:
    """Lock an open file; returns "", or which process holds it.

    A process that was killed leaves its lock to what it had started (a data loader's workers, a call of git), which
    ends soon after it: such a lock is waited for, up to PATIENCE seconds.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
        if not _has_ended(holder):
            return holder
        if time.monotonic() > end:
            return f"what {holder} had started before it ended"
        time.sleep(0.05)


def _has_ended(holder: str) -> bool:
    """Whether a lock's holder is a process of this machine, and has ended."""
    written = re.fullmatch(HOLDER.format(r"(\d+)", re.escape(platform.node())), holder)
    try:
        return bool(written) and psutil.Process(int(written[1])).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _parse(line: str) -> dict | None:
    """A JSON object; None where the text is anything else."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class Run:
    """One run's folder. `settings` are those of the stage, and the key `stage` names it."""

    folder: Path

    @classmethod
    def at(cls, settings: dict, root: str | Path = RUNS) -> "Run":
        """Where the run of these settings lies under `root`, made or not."""
        name = [settings[key] for key in ("stage", "objective") if settings.get(key)]
        digest = hashlib.sha256(_text(_hashed(settings)).encode()).hexdigest()[:8]
        return cls(Path(root) / "-".join([*name, f"s{settings['seed']}", digest]))

    @classmethod
    def open(cls, settings: dict, root: str | Path = RUNS, facts: dict | None = None) -> "Run":
        """The run of these settings under `root`, its folder made if there is none; `facts` join its environment."""
        return cls.at(settings, root).make(settings, facts)

    def make(self, settings: dict, facts: dict | None = None) -> "Run":
        """Write settings and environment, joined by `facts`, where there are none yet.

        Raises:
            ValueError: where there are other settings.
        """
        path = self.folder / "settings.json"
        if not path.exists():
            with self._writing():
                self.folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(environment() | {"processes": count_processes()} | (facts or {}), indent=1)
                _write(self.folder / "environment.json", text + "\n")
                _write(path, _text(settings) + "\n")
        here, given = _hashed(self.settings), _hashed(settings)
        if changed := sorted(key for key in here.keys() | given.keys() if here.get(key) != given.get(key)):
            ours, theirs = (values.get(changed[0]) for values in (here, given))
            raise self._damage(path, f"it was edited: {changed[0]} is {ours!r}, the run's id is of {theirs!r}")
        return self

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training this run; ends with this process, however it ends.

        Raises:
            RuntimeError: where another process trains the run; says which one.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115, closed below
        with file:
            try:
                if holder := _holder(file):
                    raise RuntimeError(
                        f"run {self.id} is being trained by {holder}; let it end, or stop it and run the same again "
                        f"(held: {file.name})"
                    )
            except OSError as error:
                print(f"{file.name}: no locks here ({error.strerror}); train it by one process at a time", flush=True)
            with self._writing():
                file.truncate(0)
                file.write(HOLDER.format(os.getpid(), platform.node()))
                file.flush()
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what to do where a file cannot be written."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"run {self.id} cannot be written to {self.folder}: {error}. What was saved before is kept: free some "
                "space or mend the folder and run the same again, or name another folder by --out or DIVA_LAB_RUNS"
            ) from error

    def _damage(self, path: Path, what: str) -> ValueError:
        """The error for a file that is not as it was written."""
        whole = self.folder if self.done else path.parent
        return ValueError(
            f"run {self.id} is damaged: {path}: {what}; put it back from a copy, or delete {whole} to train it anew"
        )

    def _facts(self, name: str, keys: tuple[str, ...]) -> dict:
        """A JSON file's object, which must have these keys."""
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; put it back from a copy, or name the folder of a run")
        facts = _parse(path.read_text(encoding="utf-8", errors="replace"))
        if facts is None or any(key not in facts for key in keys):
            raise self._damage(path, f"expected a JSON object with {', '.join(keys)}")
        return facts

    def remove_empty(self) -> None:
        """Take the folder away where nothing was trained, evaluated or saved in it."""
        kept = ("done", "checkpoint", *(f"{kind}.jsonl" for kind in RECORDS))
        if not any((self.folder / name).exists() for name in kept):
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def settings(self) -> dict:
        return self._facts("settings.json", ("stage", "seed"))

    @property
    def environment(self) -> dict:
        facts = self._facts("environment.json", ("git", "versions"))
        if not all(isinstance(facts.get(key) or {}, dict) for key in ("versions", "weights")) or not facts["versions"]:
            raise self._damage(self.folder / "environment.json", "expected objects as versions and weights")
        return facts

    @property
    def began_in(self) -> int:
        """The number of processes in which it began; of a run of a version before, that of its checkpoint."""
        began = self.environment.get("processes") or len((self.state() or {}).get("positions", [])) or 1
        if type(began) is not int or began < 1:
            raise self._damage(self.folder / "environment.json", f"processes is {began!r}; expected a whole number")
        return began

    @property
    def source(self) -> str:
        """One line for under a figure: run, seed, git sha and torch version."""
        facts = self.environment
        return f"run {self.id} · git {facts['git']} · torch {facts['versions']['torch']}"

    @property
    def error(self) -> str | None:
        """What is damaged in its settings, environment and records; None where all can be read."""
        try:
            _ = self.settings, self.environment, [self._records(kind) for kind in RECORDS]
        except (ValueError, OSError) as error:
            return str(error)
        return None

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    def finish(self) -> "Run":
        with self._writing():
            _write(self.folder / "done", "")
        return self

    def log(self, kind: str, **values: float | int | str) -> None:
        """Append one line to a kind of `RECORDS`."""
        with self._writing(), open(self.folder / f"{kind}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _records(self, kind: str) -> list[dict]:
        """The lines of a kind; without its last ones where they are cut off, unless the run is done.

        Raises:
            ValueError: for a line that is no record; names file and line.
        """
        path = self.folder / f"{kind}.jsonl"
        if path.exists() and not path.is_file():
            raise self._damage(path, "not a regular file")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        records = [r if (r := _parse(line)) and isinstance(r.get("step"), int) else None for line in lines]
        while records and records[-1] is None and not self.done:  # is being written, or a kill came in between
            records.pop()
        if None in records:
            number = records.index(None)
            raise self._damage(path, f"line {number + 1}: expected a JSON object with step, got {lines[number][:40]!r}")
        return records

    def _table(self, kind: str) -> pd.DataFrame:
        return pd.DataFrame(self._records(kind))

    def metrics(self) -> pd.DataFrame:
        """One row a step: step, loss, each term, gradients, seconds."""
        return self._table("metrics")

    def evaluations(self) -> pd.DataFrame:
        """One row for each call of `evaluate`: step and what it returned."""
        return self._table("evaluations")

    def probes(self) -> pd.DataFrame:
        """One row for each measure and call of `probe`: step and what it returned."""
        return self._table("probes")

    def skipped(self) -> pd.DataFrame:
        """One row for each image that could not be read: step, name, reason."""
        return self._table("skipped")

    def processes(self) -> pd.DataFrame:
        """One row for each time that it went on in another number of processes: step, processes, accumulate."""
        return self._table("processes")

    def save(
        self,
        step: int,
        weights: dict[str, torch.Tensor],
        optimizer: dict,
        seconds: float,
        positions: Sequence[int] = (),
    ) -> None:
        """Write a checkpoint; the old one stays until the new one is whole and on disk.

        Raises:
            FloatingPointError: for weights that are not finite; the old checkpoint stays.
            OSError: where it cannot be written; the old checkpoint stays.
        """
        weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise FloatingPointError(f"run {self.id}: {name} is not finite after {step} steps, not saved")
        current, new, old = (self.folder / name for name in ("checkpoint", "checkpoint.new", "checkpoint.old"))
        state = {"step": step, "seconds": seconds, "optimizer": optimizer, "positions": list(positions)}
        with self._writing():
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            save_file(weights, new / "weights.safetensors")
            _save_state(state | {"weights": sha256(new / "weights.safetensors")}, new / "optimizer.pt")
            for path in (*new.iterdir(), new, *self.folder.glob("*.jsonl")):
                _sync(path)
            if current.exists():  # else the old one is the only one
                shutil.rmtree(old, ignore_errors=True)
                current.rename(old)
            new.rename(current)
            _sync(self.folder)
            shutil.rmtree(old, ignore_errors=True)

    @property
    def _checkpoint(self) -> Path | None:
        return next((p for name in ("checkpoint", "checkpoint.old") if (p := self.folder / name).exists()), None)

    @property
    def saved(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self._checkpoint is not None

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights of the last checkpoint.

        Raises:
            FileNotFoundError: if the run has none.
            ValueError: where they are damaged; names the file.
        """
        if self._checkpoint is None:
            raise FileNotFoundError(f"run {self.id} has no checkpoint in {self.folder}; was it ever trained?")
        path = self._checkpoint / "weights.safetensors"
        if not path.is_file():
            raise self._damage(path, "gone, or not a regular file")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise self._damage(path, str(error)) from error

    def state(self) -> dict | None:
        """What `save` was last given, with a hash instead of the weights; None if there is no checkpoint.

        Raises:
            ValueError: where it is damaged, or its step is none of the run's; names the file.
        """
        if self._checkpoint is None:
            return None
        path = self._checkpoint / "optimizer.pt"
        try:
            with open_regular(path) as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
            step, _, _ = int(state["step"]), float(state["seconds"]), state["optimizer"]
            if not all(isinstance(position, int) for position in state.get("positions", [])):
                raise TypeError("positions are whole numbers")
        except Exception as error:  # torch has many
            raise self._damage(path, f"cannot be read ({type(error).__name__})") from error
        steps = self.settings.get("steps", step)
        if not 0 <= step <= steps:
            raise self._damage(path, f"it is of step {step}, the run has {steps}")
        return state

    def resume(self) -> dict | None:
        """Finish what a kill left half done, cut the records back to the last checkpoint, and return its `state`.

        Raises:
            ValueError: where a file is damaged, or the weights are not those that were saved with the state.
        """
        with self._writing():
            current, new, old = (self.folder / name for name in ("checkpoint", "checkpoint.new", "checkpoint.old"))
            if old.exists() and not current.exists():
                old.rename(current)
            for rest in (new, old):
                shutil.rmtree(rest, ignore_errors=True)
        state = self.state()
        if state is None:
            with self._writing():
                for kind in RECORDS:
                    (self.folder / f"{kind}.jsonl").unlink(missing_ok=True)
            return None
        path = current / "weights.safetensors"
        if "weights" in state and not (path.is_file() and sha256(path) == state["weights"]):
            raise self._damage(path, "these are not the weights that were saved with optimizer.pt")
        for kind, behind in RECORDS.items():
            records = self._records(kind)
            kept = "".join(f"{json.dumps(r)}\n" for r in records if r["step"] <= state["step"] - behind)
            path = self.folder / f"{kind}.jsonl"
            if path.exists() and path.read_text(encoding="utf-8", errors="replace") != kept:
                with self._writing():
                    _write(path, kept)
        return state


def _save_state(state: dict, path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's own, where the disk is full
        raise OSError(f"{path}: {error}") from error


def begun_settings(settings: dict, processes: int, root: str | Path = RUNS) -> dict:
    """The settings under which a run lies: these, or the same that began in another number of processes.

    They have another `accumulate`, with which a step is of as many images. Asked for in more or fewer processes, such a
    run goes on, or is done.
    """
    parts = settings.get("accumulate", 1) * processes
    if not Run.at(settings, root).folder.exists():
        for began in (n for n in range(1, parts + 1) if parts % n == 0 and n != processes):
            other = {**settings, "accumulate": parts // began}
            if (Run.at(other, root).folder / "settings.json").is_file() and Run.at(other, root).began_in == began:
                return other
    return settings


def list_runs(root: str | Path = RUNS) -> pd.DataFrame:
    """Every run under `root`: its id, whether it is done, its settings as columns; `error` of one that is damaged."""
    runs = [Run(path.parent) for path in sorted(Path(root).glob("*/settings.json"))]
    rows = [{"run": run.id, "done": run.done, "error": run.error} for run in runs]
    rows = [row | ({} if row["error"] else run.settings) for row, run in zip(rows, runs, strict=True)]
    return pd.DataFrame(rows)
