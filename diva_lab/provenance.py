"""What a result depends on beside its settings: git sha, versions, machine, and hashes of files and of code."""

import hashlib
import inspect
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import CodeType

from diva_lab.paths import ROOT

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "accelerate", "peft", "numpy")


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def source_hash(function: Callable | None) -> str | None:
    """A hash of a function's source and of the functions beside it that it calls; None where there is no source.

    Beside it are those of its own package (`diva_lab.objectives` for an objective) and of the same notebook or script.
    """
    if not inspect.isfunction(function):
        return None
    module = function.__module__ or "__main__"
    room, sources, queue = module.rpartition(".")[0] or module, {}, [function]
    while queue:
        here = inspect.unwrap(queue.pop())  # without decorators, whose code is not the function's
        name = getattr(here, "__qualname__", "")
        if not inspect.isfunction(here) or name in sources or not (here.__module__ or "__main__").startswith(room):
            continue
        try:
            sources[name] = inspect.getsource(here)
        except (OSError, TypeError):  # typed into an interpreter
            return None
        queue += [here.__globals__[called] for called in _names(here.__code__) if called in here.__globals__]
    return hashlib.sha256("\n".join(sources[name] for name in sorted(sources)).encode()).hexdigest()[:16]


def _names(code: CodeType) -> set[str]:
    """The global names that a function's code reads, inner functions included."""
    inner = [_names(part) for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*inner)


def environment() -> dict:
    """git sha (`+` if the code differs from it), versions, machine and time."""
    changed = _git("status", "--porcelain", "--", "diva_lab", "tools", "pyproject.toml", "constraints.txt")
    return {
        "git": (_git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else ""),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
