import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
REQUIRED = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"] + PROJECT["optional-dependencies"]["site"]


def pins() -> dict[str, str]:
    """Distribution -> version, of constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines), "only released versions, nothing local"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_environment_yml_asks_for_what_pyproject_asks_for():
    (pip,) = [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)]
    assert [line for line in pip if line != "-e ."] == REQUIRED
    assert pip[-1] == "-e .", "the package itself comes last"


def test_environment_yml_asks_for_the_python_that_pyproject_asks_for():
    assert f"python{PROJECT['requires-python']}" in CONDA["dependencies"]
    assert CONDA["name"] == PROJECT["name"]


def test_every_requirement_has_a_lower_bound_and_a_pin_that_meets_it():
    pinned = pins()
    for requirement in map(Requirement, REQUIRED):
        assert any(bound.operator == ">=" for bound in requirement.specifier), requirement
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_no_requirement_is_named_twice():
    names = [canonicalize_name(Requirement(line).name) for line in REQUIRED]
    assert len(names) == len(set(names))
    assert canonicalize_name(PROJECT["name"]) not in pins()


def test_every_package_that_the_code_imports_is_required():
    required = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    owners = packages_distributions()
    for file in [*(ROOT / "diva_lab").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"diva_lab", "tools"}:
                owned = {canonicalize_name(owner) for owner in owners.get(name, ())}
                assert owned & required, f"{file.name} imports {name}, which pyproject.toml does not require"
