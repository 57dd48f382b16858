"""Records of finished runs, small enough to commit: settings, environment, every evaluation, hashes; no weights.

A run that is on record is not run again, wherever its folder is.
"""

import json
from pathlib import Path

import pandas as pd

from diva_lab.provenance import sha256
from diva_lab.training.runs import Run

DIGITS = 5  # of a score on record


def write_record(run: Run, folder: Path, **facts: object) -> Path:
    """Put a run on record, with other facts beside; its evaluations are kept in columns."""
    metrics, evaluations = run.metrics(), run.evaluations()
    weights = run.folder / "checkpoint" / "weights.safetensors"
    record = {
        "run": run.id, **facts, "settings": run.settings, "environment": run.environment, "steps": len(metrics),
        "seconds": round(float(metrics["seconds"].iloc[-1]), 1) if len(metrics) else 0.0,
        "weights": sha256(weights) if weights.is_file() else None,
        "evaluations": {name: evaluations[name].round(DIGITS).tolist() for name in evaluations},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.id}.json"
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(record) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def read_record(run: Run, folder: Path) -> dict | None:
    """The record of a run, `evaluations` as a table; None if there is none."""
    path = folder / f"{run.id}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record | {"evaluations": pd.DataFrame(record["evaluations"])}
