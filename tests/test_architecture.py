"""The house has an order: a file imports only what stands above it in the README's map; functions are short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "diva_lab").rglob("*.py"), *(ROOT / "tools").glob("*.py")])
LINES, LEVELS = 60, 3
NESTED = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def map_order() -> list[str]:
    """The modules of `diva_lab` in the order of the README's map: a line a file, or a folder and its files by ` · `."""
    text = (ROOT / "README.md").read_text()
    block = text.split("\ndiva_lab/", 1)[1].split("\ntools/", 1)[0]
    order = []
    for line in block.splitlines()[1:]:
        if found := re.match(r"  (\w+)\.py\b", line):
            order.append(f"diva_lab.{found[1]}")
        elif found := re.match(r"  (\w+)/\s+(.*)", line):
            room = f"diva_lab.{found[1]}"
            order += [*(f"{room}.{name}" for name in re.findall(r"[\w]+", found[2].partition(":")[0])), room]
    return order


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports, inside functions too; a package where a name is its own."""
    known, found = {module_of(file) for file in FILES}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names = list(inner & known) or [node.module]
        found |= set(names) & known
    return found


def test_every_file_stands_in_the_map():
    listed = set(map_order())
    doors = {"diva_lab", "diva_lab.__main__"}
    rooms = {module_of(file) for file in FILES if file.name == "__init__.py"}
    assert {
        module_of(file) for file in FILES if "tools" not in file.relative_to(ROOT).parts
    } - doors - rooms == listed - rooms


def test_a_file_imports_only_what_stands_above_it():
    order = map_order()
    place = {name: k for k, name in enumerate(order)}
    wrong = []
    for file in FILES:
        own = module_of(file)
        if own in place and own != "diva_lab.cli":  # the door may import any room
            wrong += [f"{own} <- {name}" for name in imports_of(file) if place.get(name, -1) >= place[own]]
    assert wrong == []


def test_the_package_does_not_know_its_tools():
    users = [
        module_of(f) for f in FILES if "tools" not in f.parts and any(n.startswith("tools") for n in imports_of(f))
    ]
    assert users == []


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


def test_no_two_files_have_one_name_in_sight_of_each_other():
    names = [file.name for file in FILES if file.parent.name in ("diva_lab", "tools") and file.name != "__init__.py"]
    assert len(names) == len(set(names))
