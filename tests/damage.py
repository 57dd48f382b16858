"""Damage to files of settings and weights, as tests do it to copies of good folders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(path: Path, change) -> None:
    """Replace the weights in a file by change(weights)."""
    save_file({name: w.clone() for name, w in change(load_file(path)).items()}, path)


def with_nan(state):
    return {name: torch.full_like(w, torch.nan) if name == max(state) else w for name, w in state.items()}


def reshaped(state):
    return {name: w[..., None] if name == max(state) else w for name, w in state.items()}


DAMAGE = {  # how weights are damaged -> a part of the message
    "NaN": (with_nan, "NaN or infinite"),
    "infinite": (lambda state: {n: w / 0 if n == max(state) else w for n, w in state.items()}, "NaN or infinite"),
    "another shape": (reshaped, "shape|expected"),
    "one missing": (lambda state: {n: w for n, w in state.items() if n != max(state)}, "1 weights missing, as"),
    "one too many": (lambda state: state | {"zz": torch.zeros(1)}, "1 weights unexpected, as zz"),
    "other names": (lambda state: {f"x{i}": w for i, w in enumerate(state.values())}, "weights missing, as"),
    "no weights": (lambda state: {}, "weights missing, as"),
}
