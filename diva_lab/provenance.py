"""What a result depends on beside its settings: git sha, versions, machine, and hashes of files."""

import hashlib
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

from diva_lab.paths import ROOT

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "accelerate", "peft", "numpy")


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def environment() -> dict:
    """What a result depends on beside its settings: git sha (`+` if the code differs), versions, machine, time."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--", "diva_lab", "tools", "pyproject.toml", "constraints.txt")
    return {
        "git": (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else ""),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
