"""The rules of the house for notebooks, held by reading them; that they run is nbval's business."""

import ast
import json
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("[0-9][0-9]_*.ipynb"))
OUTPUTS = {"text/plain", "text/markdown", "text/html", "image/png"}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def notebook(path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_each_notebook_has_a_number_of_its_own():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers) and {"00", "01", "02", "03", "04", "06"} <= set(numbers)


def test_the_kernel_is_python3_and_the_format_valid(notebook):
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata.kernelspec.name == "python3"


def test_cells_are_thin_without_classes_and_with_one_short_function_at_most(notebook):
    functions = []
    for cell in code(notebook):
        assert cell.source.count("\n") < 15, cell.source
        assert not cell.source.rstrip().endswith(";")
        tree = ast.parse(cell.source)
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
        functions += [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert len(functions) <= 1


def test_prose_begins_with_a_title_and_a_question(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    title, _, question, *_ = first.source.split("\n")
    assert title.startswith("# ")
    assert question.startswith("**") and question.endswith("?**")


def test_one_cell_holds_the_parameters_as_literals_and_all_of_them_are_checked(notebook):
    cells = code(notebook)
    (number,) = (i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    declared = {}
    for line in ast.parse(cells[number].source).body:
        declared[line.targets[0].id] = ast.literal_eval(line.value)
    (check,) = (cell.source for cell in cells if "check_parameters(" in cell.source)
    call = next(node for node in ast.walk(ast.parse(check)) if isinstance(node, ast.Call))
    assert {keyword.arg for keyword in call.keywords} == set(declared)
    assert declared["save_figures"] is False
    assert not declared.get("interactive", False)


def test_the_check_comes_before_anything_but_imports(notebook):
    cells = [cell.source for cell in code(notebook) if "parameters" not in cell.metadata.get("tags", [])]
    before = cells[: next(i for i, source in enumerate(cells) if "check_parameters(" in source)]
    kinds = {type(line) for source in before for line in ast.parse(source).body}
    assert kinds <= {ast.Import, ast.ImportFrom}


def test_one_to_three_cells_are_held_to_their_output_and_read_shipped_records_only(notebook):
    checked = [cell.source for cell in code(notebook) if cell.source.startswith("# NBVAL_CHECK_OUTPUT")]
    assert 1 <= len(checked) <= 3
    for source in checked:
        assert not any(word in source for word in ("tune(", "align(", "perturb(", "world_report(", "runs["))


def test_every_cell_that_draws_ends_by_showing_it_and_the_last_figure_is_followed_by_a_sentence(notebook):
    drawing = [i for i, cell in enumerate(code(notebook)) if "fig = " in cell.source]
    for i in drawing:
        assert code(notebook)[i].source.rstrip().endswith("plt.show()")
    assert drawing
    assert any("say(" in cell.source for cell in code(notebook)[drawing[-1] + 1 :])


def test_the_file_is_small_and_keeps_neither_widgets_nor_papermills_marks(path, notebook):
    assert path.stat().st_size < 300_000
    assert "widgets" not in notebook.metadata
    assert "papermill" not in json.dumps([notebook.metadata, *(cell.metadata for cell in notebook.cells)])
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data")
            assert set(output.get("data", {})) <= OUTPUTS


def test_no_path_of_a_machine_is_in_it(path):
    text = path.read_text()
    assert not any(f"/{name}/" in text for name in ("home", "work", "root", "Users"))
