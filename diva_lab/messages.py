"""What an error says of a name that is not known: the nearest one that is, and where a path was read from."""

import difflib
from collections.abc import Iterable
from pathlib import Path

MOST = 24  # names that are listed


def expected(name: object, known: Iterable[str]) -> str:
    """As `expected one of a, b, c`, of many the first; before it the name that was meant, if one is near.

    >>> expected("stps", ["seeds", "steps"])
    "did you mean 'steps'? expected one of seeds, steps"
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, 1) if isinstance(name, str) else []
    rest = f" ... ({len(names)} in all)" if len(names) > MOST else ""
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}expected one of {', '.join(names[:MOST])}{rest}"


def read_from(source: str) -> str:
    """` in FOLDER` for a relative path, the folder that it was read from; else nothing."""
    return "" if Path(source).is_absolute() else f" in {Path.cwd()}"
