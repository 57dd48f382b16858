"""A run on disk: settings, metrics and checkpoints; saved, resumed, listed.

    runs/ID/settings.json      the settings, and which stage it is of
    runs/ID/environment.json   git sha, versions, machine, time, a hash of the objective's source
    runs/ID/metrics.jsonl      one line a step: loss, terms, gradients, seconds of training so far
    runs/ID/evaluations.jsonl  what `evaluate` returned, at each step at which it was called
    runs/ID/probes.jsonl       what `probe` returned, at the same steps: one line a measure
    runs/ID/skipped.jsonl      one line an image that could not be read: step, name, reason; up to the last checkpoint
    runs/ID/checkpoint/        the trained weights (safetensors), and after `step` steps the optimizer's state and each
                               process's position in its images

A run's id is made of its settings: asked for again, a finished run is returned and a stopped one goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from diva_lab.paths import RUNS
from diva_lab.provenance import environment

ADDED: dict[str, object] = {  # setting added since 0.2 -> its default, at which it is left out of a run's id
    "anchor": "none", "captions": "", "mentions": 1.0, "anchor_share": 0.5, "anchor_weight": 1.0, "anchor_noise": 0.1,
    "anchor_shift": True, "centre": False, "truth_weight": 1.0, "view_weight": 1.0, "push_weight": 1.0,
}  # fmt: skip
RECORDS = {"metrics": 1, "skipped": 1, "evaluations": 0, "probes": 0}  # kind -> its last step less the checkpoint's


def _text(settings: dict) -> str:
    return json.dumps(settings, indent=1, sort_keys=True)


@dataclass(frozen=True)
class Run:
    """One run's folder. `settings` are those of the stage, and the key `stage` names it."""

    folder: Path

    @classmethod
    def at(cls, settings: dict, root: str | Path = RUNS) -> "Run":
        """Where the run of these settings lies under `root`, made or not."""
        name = [settings[key] for key in ("stage", "objective") if settings.get(key)]
        hashed = {key: value for key, value in settings.items() if key not in ADDED or value != ADDED[key]}
        digest = hashlib.sha256(_text(hashed).encode()).hexdigest()[:8]
        return cls(Path(root) / "-".join([*name, f"s{settings['seed']}", digest]))

    @classmethod
    def open(cls, settings: dict, root: str | Path = RUNS, facts: dict | None = None) -> "Run":
        """The run of these settings under `root`, its folder made if there is none; `facts` join its environment."""
        run = cls.at(settings, root)
        if not (run.folder / "settings.json").exists():
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "environment.json").write_text(
                json.dumps(environment() | (facts or {}), indent=1) + "\n", encoding="utf-8"
            )
            (run.folder / "settings.json").write_text(_text(settings) + "\n", encoding="utf-8")
        return run

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def settings(self) -> dict:
        return json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))

    @property
    def environment(self) -> dict:
        return json.loads((self.folder / "environment.json").read_text(encoding="utf-8"))

    @property
    def source(self) -> str:
        """One line for under a figure: run, seed, git sha and torch version."""
        facts = self.environment
        return f"run {self.id} · git {facts['git']} · torch {facts['versions']['torch']}"

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    def finish(self) -> "Run":
        (self.folder / "done").touch()
        return self

    def log(self, kind: str, **values: float | int | str) -> None:
        """Append one line to `metrics`, `evaluations`, `probes` or `skipped`."""
        with open(self.folder / f"{kind}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _table(self, kind: str) -> pd.DataFrame:
        path = self.folder / f"{kind}.jsonl"
        return pd.DataFrame(
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        )

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

    def save(
        self,
        step: int,
        weights: dict[str, torch.Tensor],
        optimizer: dict,
        seconds: float,
        positions: Sequence[int] = (),
    ) -> None:
        """Write a checkpoint; the old one stays until the new one is whole."""
        new, old = self.folder / "checkpoint.new", self.folder / "checkpoint"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, new / "weights.safetensors")
        state = {"step": step, "seconds": seconds, "optimizer": optimizer, "positions": list(positions)}
        torch.save(state, new / "optimizer.pt")
        aside = self.folder / "checkpoint.old"
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists():
            old.rename(aside)
        new.rename(old)
        shutil.rmtree(aside, ignore_errors=True)

    @property
    def _checkpoint(self) -> Path | None:
        return next((p for name in ("checkpoint", "checkpoint.old") if (p := self.folder / name).exists()), None)

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights of the last checkpoint.

        Raises:
            FileNotFoundError: if the run has none.
        """
        if self._checkpoint is None:
            raise FileNotFoundError(f"run {self.id} has no checkpoint in {self.folder}; was it ever trained?")
        return load_file(self._checkpoint / "weights.safetensors")

    def resume(self) -> dict | None:
        """What `save` was last given but for the weights, records cut back to it; None if there is no checkpoint."""
        if self._checkpoint is None:
            for kind in RECORDS:
                (self.folder / f"{kind}.jsonl").unlink(missing_ok=True)
            return None
        state = torch.load(self._checkpoint / "optimizer.pt", weights_only=True)
        for kind, behind in RECORDS.items():
            path, last = self.folder / f"{kind}.jsonl", state["step"] - behind
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last]
                path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        return state


def list_runs(root: str | Path = RUNS) -> pd.DataFrame:
    """Every run under `root`: its id, whether it is done, and its settings as columns."""
    folders = sorted(path.parent for path in Path(root).glob("*/settings.json"))
    return pd.DataFrame([{"run": (run := Run(folder)).id, "done": run.done, **run.settings} for folder in folders])
