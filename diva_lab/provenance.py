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

import torch

from diva_lab.paths import ROOT

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "accelerate", "peft", "numpy")


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_hash(function: Callable | None) -> str | None:
    """A hash of a function's source and of what it reads beside it; None where there is no source.

    Followed are functions and classes of its own package or notebook and of `diva_lab.objectives`; numbers and texts of
    the module that it reads count by their values.
    """
    if not inspect.isfunction(function):
        return None
    module = function.__module__ or "__main__"
    rooms, sources, queue = (module.rpartition(".")[0] or module, "diva_lab.objectives"), {}, [function]
    while queue:
        here = inspect.unwrap(queue.pop())  # without decorators, whose code is not the function's
        place = (getattr(here, "__module__", None) or "__main__", getattr(here, "__qualname__", ""))
        if (
            not (inspect.isfunction(here) or inspect.isclass(here))
            or place in sources
            or not place[0].startswith(rooms)
        ):
            continue
        try:
            sources[place] = inspect.getsource(here)
        except (OSError, TypeError):  # typed into an interpreter
            return None
        for name, value in _read_globals(here).items():
            if callable(value):
                queue.append(value)
            elif isinstance(value, int | float | str):
                sources[place] += f"# {name} = {value!r}\n"
    return hashlib.sha256("\n".join(sources[place] for place in sorted(sources)).encode()).hexdigest()[:16]


def _read_globals(function: Callable) -> dict[str, object]:
    """The module's names that a function's code reads, with their values, sorted; none of a class."""
    if not inspect.isfunction(function):
        return {}
    names = _names(function.__code__) & function.__globals__.keys()
    return {name: function.__globals__[name] for name in sorted(names)}


def _names(code: CodeType) -> set[str]:
    """The names that a function's code may read from its module, inner functions included."""
    inner = [_names(part) for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*inner)


def environment() -> dict:
    """git sha (`+` if the code differs from it), versions, machine and time."""
    changed = _git("status", "--porcelain", "--", "diva_lab", "tools", "pyproject.toml", "constraints.txt")
    return {
        "git": (_git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else ""),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores{_gpu()}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _gpu() -> str:
    """The name of the GPU that is trained on, after a comma; "" where there is none."""
    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def _git(*words: str) -> str:
    """What git prints about this checkout; "" where there is no git, or no repository of our own."""
    if not (ROOT / ".git").exists():  # installed, perhaps into a folder of another project's repository
        return ""
    try:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
