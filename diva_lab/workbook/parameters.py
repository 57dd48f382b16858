"""Check a notebook's parameters, in a cell after the one tagged `parameters`.

papermill only warns of an unknown parameter and checks no type. It injects one more cell, which the kernel keeps in its
history `In` with the first line `# Parameters`. So the notebook itself can check them, whether it was started by
`diva-lab run`, by `papermill -p` or `-f`, or by hand.
"""

import ast
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import FunctionType, GenericAlias, ModuleType, UnionType
from typing import Union, get_args, get_origin

from diva_lab import messages
from diva_lab.images import open_images
from diva_lab.training.presets import TINY_DIVA
from diva_lab.training.settings import Settings

INJECTED = "# Parameters"  # the first line of papermill's cell
MOST = 2**32 - 1  # of a whole number: no seed is larger
KINDS = (range, type, GenericAlias)  # in a tuple of choices these are not values
CHECK = "check_parameters"  # the call before which a script assigns its parameters


def check_parameters(scope: dict, **expected: object) -> None:
    """Stop a notebook that has unknown or missing parameters, or one of a wrong type.

    >>> check_parameters({"steps": 40, "lr": 1, "size": "s"}, steps=int, lr=float, size=("s", "m", "l"))

    Args:
        scope: the notebook's `globals()`.
        **expected: for each parameter its type (`int`, `list[int]`, `str | None`), a range, or a tuple of the allowed
            values, types and ranges. An int is a valid float, a bool is no valid int; a list is a valid tuple, and the
            reverse. An int lies in 0..`MOST`, a float is finite. A number in a text becomes a float: YAML reads `2e-5`
            as a text.

    A parameter `images` that is not empty has to name images that can be read: the first one is.

    Raises:
        ValueError: one error with everything that is wrong, and the right names, types and defaults.
        FileNotFoundError: where there are no such images; says where a relative path was read from.
    """
    defaults, assigned = _assignments(scope, expected)
    unknown = [name for name in assigned if name not in expected]
    wrong = [f"unknown parameter {name!r} {messages.nearest(name, expected)}".rstrip() for name in unknown]
    for name, kind in expected.items():
        if kind is float and isinstance(scope.get(name), str):
            with suppress(ValueError):  # told below
                scope[name] = float(scope[name])
        if name not in scope:
            wrong.append(f"missing parameter {name!r}")
        elif not _fits(scope[name], kind):
            wrong.append(f"{name}={scope[name]!r}: expected {_name(kind)}, got {type(scope[name]).__name__}")
        elif numbers := [value for value in _items(scope[name]) if not _in_range(value)]:
            wrong.append(f"{name}={numbers[0]!r}: expected a whole number from 0 to {MOST}, or a finite float")
    if wrong:
        allowed = [
            f"  {name}: {_name(kind)}" + (f" = {defaults[name]}" if name in defaults else "")
            for name, kind in expected.items()
        ]
        raise ValueError("\n".join(["; ".join(wrong), "the parameters of this notebook:", *allowed]))
    if "images" in expected and scope["images"]:
        next(open_images(scope["images"], px=32, n=1, seed=0))


def live_steps(steps: int, default: int) -> int:
    """`steps`, or where it is 0 `default`, of which a twentieth where DIVA_LAB_FAST is set, as in `make test`."""
    return steps or (max(2, default // 20) if _fast() else default)


def live_settings(steps: int = 0, **changes: object) -> Settings:
    """`TINY_DIVA` with `changes`, evaluated three times on the way: the run that notebooks 02, 04 and 07 share.

    `steps` is as for `live_steps`; where DIVA_LAB_FAST is set, the run is evaluated at its end alone.
    """
    steps = live_steps(steps, TINY_DIVA["steps"])
    return Settings(**TINY_DIVA | changes | {"steps": steps}, evaluate_every=steps if _fast() else -(-steps // 3))


def _fast() -> bool:
    return bool(os.environ.get("DIVA_LAB_FAST"))


def _items(value: object) -> list | tuple:
    return value if isinstance(value, list | tuple) else [value]


def _in_range(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or 0 <= value <= MOST


def _fits(value: object, kind: object) -> bool:
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if isinstance(kind, tuple):
        return any(
            _fits(value, choice) if isinstance(choice, KINDS) else type(value) is type(choice) and value == choice
            for choice in kind
        )
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if kind is None or kind is type(None):
        return value is None
    if get_origin(kind) in (list, tuple):
        items = [item for item in get_args(kind) if item is not ...]
        return isinstance(value, list | tuple) and all(_fits(item, items[0]) for item in value)
    if kind in (list, tuple):
        return isinstance(value, list | tuple)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _name(kind: object) -> str:
    if isinstance(kind, range):
        return f"int from {kind[0]} to {kind[-1]}"
    if isinstance(kind, tuple):
        names = [_name(choice) if isinstance(choice, KINDS) else repr(choice) for choice in kind]
        return f"one of {messages.listed(names)}"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def assigned_names(source: str) -> dict[str, str]:
    """The names that a cell assigns at its top level, each with the source of its value; {} if it is not Python."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return {}
    names = {}
    for line in body:
        if isinstance(line, ast.Assign | ast.AnnAssign) and line.value is not None:
            targets = line.targets if isinstance(line, ast.Assign) else [line.target]
            value = ast.get_source_segment(source, line.value)
            names |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return names


def _assignments(scope: dict, expected: dict) -> tuple[dict[str, str], list[str]]:
    """The defaults, and every name that is assigned where parameters are assigned.

    In a kernel that is the `parameters` cell (the last cell that assigns all the expected names) and papermill's. Other
    cells do not count, so that the check can be repeated at the end of a session. In a script, as nbconvert writes it,
    it is every line before the check that assigns. In a plain dict it is every name but modules, functions, classes and
    names with a leading underscore.
    """
    if "In" not in scope:
        script = getattr(sys.modules.get(scope.get("__name__")), "__file__", None)
        if script is not None:
            declared = assigned_names(Path(script).read_text(encoding="utf-8").partition(f"\n{CHECK}(")[0])
            return declared, list(declared)
        code = (ModuleType, FunctionType, type)
        return {}, [name for name, value in scope.items() if not (name.startswith("_") or isinstance(value, code))]
    declared, injected = {}, {}
    for cell in map(str, scope["In"]):
        names = assigned_names(cell)
        if cell.lstrip().startswith(INJECTED):
            injected = names
        elif names.keys() >= expected.keys():
            declared = names
    return declared, list(declared | injected)
