import ast
import json
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from diva_lab.workbook.parameters import assigned_names

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def committed() -> list[Path]:
    """The files that git tracks or would track."""
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


# --- commands and texts -----------------------------------------------------------------------------------------


def test_the_makefile_has_the_promised_targets_and_help_names_each():
    promised = {"help", "run", "test", "lab", "figures", "pretrain", "study", "clean"}
    assert promised <= TARGETS
    printed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make (\w+)", printed, re.MULTILINE)) == promised


def test_every_target_that_the_readme_names_exists():
    named = set(re.findall(r"`make ([a-z]+)|^\s*make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    named = {first or second for first, second in named}
    assert {"run", "test"} <= named <= TARGETS


def test_every_local_link_of_the_readme_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", (ROOT / "README.md").read_text())
    links = [link for pair in links for link in pair if link and not re.match(r"\w+:", link)]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_ci_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert re.search(r"^make test$", script.read_text(), re.MULTILINE)
    assert script.stat().st_mode & 0o111, "not executable"


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_no_committed_file_names_a_path_of_one_machine():
    machine = re.compile(rb"(?<![\w./:~-])/(?:root|work|home/\w+|Users/\w+|mnt|opt|scratch)/\w|\b[A-Z]:\\Users\\")
    found = {}
    for path in committed():
        if path.suffix not in (".png", ".jpg", ".safetensors"):
            found[str(path.relative_to(ROOT))] = [match.decode() for match in machine.findall(path.read_bytes())]
    assert {name: paths for name, paths in found.items() if paths} == {}


# --- notebooks --------------------------------------------------------------------------------------------------


def test_the_notebooks_are_numbered_from_zero():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{k:02}_" for k in range(8)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_and_small(path):
    nbformat.validate(json.loads(path.read_text()))
    assert path.stat().st_size < 300_000


def test_a_notebook_names_the_kernel_that_a_venv_brings(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info.name == "python"


def test_a_notebook_holds_no_traces_of_papermill_or_widgets(notebook):
    assert not {"papermill", "widgets"} & notebook.metadata.keys()
    for cell in notebook.cells:
        assert "papermill" not in cell.metadata
        assert "injected-parameters" not in cell.metadata.get("tags", [])
    for output in outputs(notebook):
        assert not [kind for kind in output.get("data", {}) if "widget" in kind]


def test_a_notebook_was_run_from_top_to_bottom_without_errors_and_shows_figures(notebook):
    cells = [cell for cell in code_cells(notebook) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_a_notebook_declares_its_parameters_in_one_cell_and_checks_them_after_the_imports(notebook):
    cells = code_cells(notebook)
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    names, (imports, check) = assigned_names(cells[tagged[0]].source), cells[tagged[0] + 1 : tagged[0] + 3]
    assert all(isinstance(line, ast.Import | ast.ImportFrom) for line in ast.parse(imports.source).body)
    call = ast.parse(check.source).body[0].value
    assert call.func.id == "check_parameters"
    assert {word.arg for word in call.keywords} == set(names)


def test_a_notebook_is_thin(notebook):
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= 15, cell.source
        tree = ast.parse(TransformerManager().transform_cell(cell.source))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)], cell.source
