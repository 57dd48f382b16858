"""The house has an order: a file imports only what stands above it in the README's map; functions are short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "diva_lab").rglob("*.py"), *(ROOT / "tools").glob("*.py")])
LINES, LEVELS = 60, 3
NESTED = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match, ast.FunctionDef, ast.AsyncFunctionDef)
DOORS = {"diva_lab", "diva_lab.__main__"}  # they stand before all rooms, and no room imports them


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def in_package(path: Path) -> bool:
    return path.relative_to(ROOT).parts[0] == "diva_lab"


def map_order() -> list[str]:
    """The modules of `diva_lab` in the order of the README's map.

    A line of the map is `  name.py   text`, or `  room/   name · name: text` with the files of a room; a line that is
    indented further goes on with the line before. A room's `__init__` counts after its files.
    """
    text = (ROOT / "README.md").read_text()
    block = text.split("\ndiva_lab/\n", 1)[1].split("\ntools/", 1)[0]
    order = []
    for line in re.sub(r"\n {3,}", " ", block).splitlines():
        entry = re.fullmatch(r"  (?:(?P<file>\w+)\.py|(?P<room>\w+)/)\s+(?P<text>\S.*)", line)
        assert entry, f"README's map: expected '  name.py  text' or '  room/  name · name: text', got {line!r}"
        if entry["file"]:
            order.append(f"diva_lab.{entry['file']}")
            continue
        names, colon, _ = entry["text"].partition(":")
        assert colon, f"README's map: expected the files of {entry['room']}/ before a colon, got {line!r}"
        order += [f"diva_lab.{entry['room']}.{name.strip()}" for name in names.split("·")]
        order.append(f"diva_lab.{entry['room']}")
    return order


def imports_of(path: Path) -> set[str]:
    """The modules of this repository that a file imports, inside functions too.

    `from room import name` is the module `room.name` where there is one, else the package `room`.
    """
    modules, imported = {module_of(file) for file in FILES}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: expected absolute imports, line {node.lineno} is relative"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in inner]
        imported |= set(names) & modules
    return imported


def test_every_file_stands_in_the_map_once_and_the_map_names_no_other():
    order = map_order()
    assert len(order) == len(set(order))
    files = {module_of(file) for file in FILES if in_package(file)}
    assert files - DOORS == set(order)


def test_a_file_imports_only_what_stands_above_it():
    place = {name: k for k, name in enumerate(map_order())}
    wrong = []
    for file in FILES:
        name = module_of(file)
        if name in place and name != "diva_lab.cli":  # the command may import any room
            late = [other for other in imports_of(file) if other in DOORS or place.get(other, -1) >= place[name]]
            wrong += [f"{name} <- {other}" for other in late]
    assert wrong == []


def test_the_package_does_not_import_its_tools():
    users = {module_of(file): imports_of(file) for file in FILES if in_package(file)}
    assert [name for name, imported in users.items() if any(other.startswith("tools") for other in imported)] == []


def test_a_private_name_is_not_imported():
    private = {}
    for file in FILES:
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        ours = [node for node in nodes if (node.module or "").partition(".")[0] in ("diva_lab", "tools")]
        private[module_of(file)] = [a.name for node in ours for a in node.names if re.match(r"_[a-z]", a.name)]
    assert {name: names for name, names in private.items() if names} == {}


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def depth(node: ast.AST) -> int:
    """Levels of blocks below a function; an `elif` is no new level."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child) + (isinstance(child, NESTED) and not chained))
    return deepest


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_functions_are_short_and_flat(path):
    long = [f"{f.name}: {n} lines" for f in functions(path) if (n := f.end_lineno - f.lineno + 1) > LINES]
    deep = [f"{f.name}: {n} levels" for f in functions(path) if (n := depth(f)) > LEVELS]
    assert long + deep == []


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes a text file: by `read_text`, by `write_text`, or by `open` without a `b`."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    modes = [*call.args[1:2], *(word.value for word in call.keywords if word.arg == "mode")]
    binary = any("b" in str(getattr(mode, "value", "")) for mode in modes)
    return name in ("read_text", "write_text") or (isinstance(call.func, ast.Name) and name == "open" and not binary)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_text_file_is_opened_with_its_encoding_named(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and opens_text(node)]
    assert [c.lineno for c in calls if "encoding" not in [word.arg for word in c.keywords]] == []


def test_no_two_files_or_rooms_have_one_name_in_sight_of_each_other():
    names = [file.stem for file in FILES if file.parent.name in ("diva_lab", "tools") and file.stem != "__init__"]
    names += [
        file.parent.name for file in FILES if file.name == "__init__.py" and file.parent.parent.name == "diva_lab"
    ]
    assert sorted(names) == sorted(set(names))
