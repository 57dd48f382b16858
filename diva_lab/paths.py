"""Where data, runs and caches lie."""

import atexit
import os
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


def named_folder(variable: str) -> Path | None:
    """The absolute folder that a variable of the environment names; None where it is not set, or empty."""
    text = os.environ.get(variable, "")
    return Path(os.path.expanduser(text)).absolute() if text else None


RUNS = named_folder("DIVA_LAB_RUNS") or ROOT / "runs"


def __getattr__(name: str) -> Path:
    """`CACHE`, found where it is first asked for: what keeps nothing shall not warn that nothing can be kept."""
    if name == "CACHE":
        return _find_cache()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _find_cache() -> Path:
    """The folder of caches; where it cannot be written, one that is deleted when this process ends, with a warning."""
    home = Path(os.path.expanduser("~"))  # "~" itself where there is neither HOME nor a known user
    folder = named_folder("DIVA_LAB_CACHE") or home / ".cache" / "diva-lab"
    if folder.is_absolute() and not _why_not_writable(folder):
        return folder
    warnings.warn(
        f"no cache: {folder} cannot be written; name a folder in the environment variable DIVA_LAB_CACHE", stacklevel=3
    )
    folder = Path(tempfile.mkdtemp(prefix="diva-lab-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def check_writable(folder: Path) -> None:
    """Refuse a folder in which nothing can be written or made; it need not be there yet.

    Raises:
        PermissionError: names what is in the way, and how to name another place.
    """
    if reason := _why_not_writable(Path(folder)):
        raise PermissionError(
            f"{folder}: cannot be written: {reason}; name another place by --out, or for runs by the environment "
            "variable DIVA_LAB_RUNS"
        )


def _why_not_writable(folder: Path) -> str:
    """What keeps a folder from being made or written in; "" if nothing does."""
    there = folder.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"{there} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} is read-only or belongs to another user"
