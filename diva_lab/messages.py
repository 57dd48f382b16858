"""What an error says of a name that is not known: the nearest one that is, and where a path was read from."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

MOST = 24  # names that are listed


def expected(name: object, known: Iterable[str]) -> str:
    """As `expected one of a, b, c`, of many the first; before it the name that was meant, if one is near.

    >>> expected("stps", ["seeds", "steps"])
    "did you mean 'steps'? expected one of seeds, steps"
    """
    names = list(known)
    return f"{nearest(name, names)}expected one of {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """`a, b, c`; of more than `MOST` names the first, and how many there are."""
    rest = f" ... ({len(names)} in all)" if len(names) > MOST else ""
    return f"{', '.join(names[:MOST])}{rest}"


def nearest(name: object, known: Iterable[str]) -> str:
    """`did you mean 'NAME'? ` for the one of `known` that is near, if one is; else nothing."""
    near = difflib.get_close_matches(name, list(known), 1) if isinstance(name, str) else []
    return f"did you mean {near[0]!r}? " if near else ""


def read_from(source: str) -> str:
    """` in FOLDER` for a relative path, the folder that it was read from; else nothing."""
    return "" if Path(source).is_absolute() else f" in {Path.cwd()}"
