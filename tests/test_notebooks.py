"""Rules for the notebooks, checked by reading them; nbval runs them."""

import ast
import json
from pathlib import Path

import nbformat
import pytest

from diva_lab.workbook.parameters import assigned_names

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("[0-9]*.ipynb"))
OUTPUTS = {"text/plain", "text/markdown", "text/html", "image/png"}
METADATA = {  # as JupyterLab writes it, without the kernel's Python version, which `make lab` leaves out
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    },
}
FUNCTIONS = {"08_your_own_objective": 3}  # an objective, a condition, a benchmark; elsewhere one at most


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def notebook(path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_hidden(cell: nbformat.NotebookNode) -> bool:
    return cell.metadata.get("jupyter", {}).get("source_hidden", False)


def is_check(cell: nbformat.NotebookNode) -> bool:
    return cell.source.startswith("# NBVAL_CHECK_OUTPUT")


def parameters_place(notebook: nbformat.NotebookNode) -> int:
    """The place of the one cell tagged `parameters` among the code cells."""
    (place,) = (i for i, cell in enumerate(code(notebook)) if "parameters" in cell.metadata.get("tags", []))
    return place


# --- files ------------------------------------------------------------------------------------------------------


def test_the_notebooks_are_numbered_from_zero():
    assert len(NOTEBOOKS) > 1
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{k:02}_" for k in range(len(NOTEBOOKS))]


def test_opening_and_saving_a_notebook_in_jupyterlab_changes_no_byte(path, notebook):
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"


def test_the_file_is_small_and_has_no_traces_of_widgets_or_papermill(path, notebook):
    assert path.stat().st_size < 300_000
    assert {key for cell in notebook.cells for key in cell.metadata} <= {"tags", "jupyter"}
    for cell in code(notebook):
        assert "injected-parameters" not in cell.metadata.get("tags", [])
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data")
            assert set(output.get("data", {})) <= OUTPUTS


def test_no_path_of_a_machine_is_in_it(path):
    text = path.read_text()
    assert not any(f"/{name}/" in text for name in ("home", "work", "root", "Users"))


def test_it_was_run_from_top_to_bottom_and_shows_figures(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert "image/png" in json.dumps([cell.outputs for cell in code(notebook)])


# --- cells ------------------------------------------------------------------------------------------------------


def test_cells_are_short_without_classes_and_with_few_functions(path, notebook):
    shown = [cell.source for cell in code(notebook) if not is_hidden(cell)]
    lines = [len(source.splitlines()) for source in shown]
    assert max(lines) <= 15
    assert sum(count > 8 for count in lines) <= len(lines) / 10 + 1, [s for s in shown if len(s.splitlines()) > 8]
    nodes = [node for cell in code(notebook) for node in ast.walk(ast.parse(cell.source))]
    assert not [node for node in nodes if isinstance(node, ast.ClassDef)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert len(functions) <= FUNCTIONS.get(path.stem, 1)
    assert all(node.end_lineno - node.lineno < 10 for node in functions)


def test_no_cell_ends_with_a_semicolon(notebook):
    assert not [cell.source for cell in code(notebook) if cell.source.rstrip().endswith(";")]


def test_prose_begins_with_a_title_and_a_question(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    title, _, question, *_ = first.source.split("\n")
    assert title.startswith("# ")
    assert question.startswith("**") and question.endswith("?**")


def test_parameters_are_literals_and_the_folded_cells_after_them_import_and_check(notebook):
    place = parameters_place(notebook)
    parameters, imports, check = code(notebook)[place : place + 3]
    for line in ast.parse(parameters.source).body:
        ast.literal_eval(line.value)
    assert all(isinstance(line, ast.Import | ast.ImportFrom) for line in ast.parse(imports.source).body)
    call = ast.parse(check.source).body[0].value
    assert call.func.id == "check_parameters"
    defaults = assigned_names(parameters.source)
    assert {word.arg for word in call.keywords} == set(defaults)
    assert defaults["save_figures"] == "False" and defaults.get("interactive", "None") == "None"
    assert [is_hidden(cell) for cell in code(notebook)] == [cell in (imports, check) for cell in code(notebook)]


def test_checked_outputs_are_few_come_last_and_read_shipped_records_only(notebook):
    checks = [cell for cell in code(notebook) if is_check(cell)]
    assert 1 <= len(checks) <= 3
    assert code(notebook)[-len(checks) :] == checks
    for cell in checks:
        assert not any(word in cell.source for word in ("tune(", "align(", "perturb(", "world_report(", "runs["))


def test_every_figure_is_shown_by_one_call_with_its_name_and_the_last_is_followed_by_a_sentence(path, notebook):
    drawing = [i for i, cell in enumerate(code(notebook)) if "fig = " in cell.source]
    for i in drawing:
        last = ast.parse(code(notebook)[i].source).body[-1]
        last = last.body[-1] if isinstance(last, ast.If) else last
        assert last.value.func.id == "show"
        assert last.value.args[1].value.startswith(f"{path.name[:3]}")
    assert drawing
    assert any("say(" in cell.source for cell in code(notebook)[drawing[-1] + 1 :])
