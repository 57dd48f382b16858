import subprocess
import sys

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from diva_lab.training.presets import TINY_DIVA
from diva_lab.workbook.parameters import check_parameters, live_settings, live_steps


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, int),
        (3, float),
        (0.5, float),
        ("a", str),
        (True, bool),
        ("a", ("a", "b")),
        ([0, 1], list[int]),
        ((0, 1), list[int]),
        ([0, 1], tuple[int, ...]),
        ([], list[int]),
        ([1, "a"], list),
        (None, int | None),
        (4, int | None),
        (None, None),
    ],
)
def test_a_value_of_the_right_type_passes(value, kind):
    check_parameters({"x": value}, x=kind)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("ten", int),
        (3.0, int),
        (True, int),
        (True, float),
        ("half", float),
        (10, range(10)),
        ("7", (range(10), list[int])),
        (1, str),
        (1, bool),
        ("c", ("a", "b")),
        (True, (1, 2)),
        (["0"], list[int]),
        ([True], list[int]),
        (3, list[int]),
        ("3", list),
        ("x", int | None),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(value, kind):
    with pytest.raises(ValueError, match="expected"):
        check_parameters({"x": value}, x=kind)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(-1, int), (2**32, int), ([0, -1], list[int]), (float("nan"), float), (float("inf"), float), ("nan", float)],
)
def test_a_number_that_nothing_can_use_is_refused(value, kind):
    with pytest.raises(ValueError, match=r"x=.*: expected a whole number from 0 to 4294967295, or a finite float"):
        check_parameters({"x": value}, x=kind)


def test_a_number_in_a_text_becomes_a_float_where_a_float_is_expected():
    scope = {"lr": "2e-5"}  # as YAML reads it
    check_parameters(scope, lr=float)
    assert scope["lr"] == 2e-5


def test_the_error_names_the_parameter_its_value_and_the_expected_type():
    with pytest.raises(ValueError, match="steps='ten': expected int, got str"):
        check_parameters({"steps": "ten"}, steps=int)


def test_an_unknown_name_is_refused_and_modules_functions_and_private_names_are_not():
    scope = {"steps": 3, "_private": 1, "pytest": pytest, "check_parameters": check_parameters, "Path": type}
    check_parameters(scope, steps=int)
    with pytest.raises(ValueError, match="unknown parameter 'stpes'"):
        check_parameters(scope | {"stpes": 4}, steps=int)


def test_a_missing_name_is_refused():
    with pytest.raises(ValueError, match="missing parameter 'steps'"):
        check_parameters({}, steps=int)


def test_one_error_lists_everything_that_is_wrong_with_the_right_names_types_and_defaults():
    scope = {"In": ["", 'steps = 40  # of each run\nsize: str = "s"', '# Parameters\nsteps = "ten"\nlr = 1']}
    scope |= {"steps": "ten", "size": "s", "lr": 1}
    with pytest.raises(ValueError) as error:
        check_parameters(scope, steps=int, size=("s", "m"))
    assert str(error.value) == (
        "unknown parameter 'lr'; steps='ten': expected int, got str\n"
        "the parameters of this notebook:\n"
        "  steps: int = 40\n"
        "  size: one of 's', 'm' = \"s\""
    )


def test_the_parameter_that_was_meant_is_named():
    with pytest.raises(ValueError, match=r"unknown parameter 'stpes' did you mean 'steps'\?"):
        check_parameters({"stpes": 3, "steps": 4}, steps=int)


def test_in_a_script_the_parameters_are_what_it_assigns_before_the_check(tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text(
        "from diva_lab.paths import DATA\nsteps = 1e2\n"
        "from diva_lab.workbook.parameters import check_parameters\ncheck_parameters(\n    globals(), steps=int)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert "steps=100.0: expected int, got float" in done.stderr and "  steps: int = 1e2" in done.stderr
    assert "DATA" not in done.stderr.partition("the parameters")[2]


def test_images_that_are_not_there_are_told_with_the_folder_they_were_looked_for_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"images='mine': no such folder in {tmp_path}"):
        check_parameters({"images": "mine"}, images=str)


def test_a_check_repeated_at_the_end_of_a_session_ignores_names_that_later_cells_set():
    scope = {"In": ["", "steps = 4", "check_parameters(globals(), steps=int)", "loss = 1"], "steps": 4, "loss": 1}
    check_parameters(scope, steps=int)


def test_a_misspelt_name_in_the_cell_of_parameters_is_an_error_until_it_is_corrected():
    scope = {"In": ["", "steps = 4\nstpes = 5"], "steps": 4, "stpes": 5}
    with pytest.raises(ValueError, match="stpes"):
        check_parameters(scope, steps=int)
    scope["In"] += ["check_parameters(globals(), steps=int)", "steps = 5"]
    check_parameters(scope, steps=int)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """A function that runs a notebook with two parameters by papermill."""
    cells = [
        nbformat.v4.new_code_cell("import sys\nfrom diva_lab.world import DETAILS"),
        nbformat.v4.new_code_cell("steps = 4\nlr = 0.1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "from diva_lab.workbook.parameters import check_parameters\n"
            "check_parameters(globals(), steps=int, lr=float)"
        ),
    ]
    path = tmp_path_factory.mktemp("notebook") / "n.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)

    def run(**parameters: object) -> None:
        papermill.execute_notebook(path, None, parameters, kernel_name="python3", language="python", progress_bar=False)

    return run


def test_a_notebook_runs_with_good_parameters(notebook):
    notebook(steps=2, lr=1)


def test_papermill_fails_on_parameters_that_are_unknown_or_of_a_wrong_type(notebook):
    with pytest.raises(PapermillExecutionError) as error:
        notebook(steps="ten", stpes=3)
    assert error.value.ename == "ValueError" and "steps='ten': expected int, got str" in error.value.evalue
    assert "unknown parameter 'stpes'" in error.value.evalue and "steps: int = 4" in error.value.evalue


# --- the live run -----------------------------------------------------------------------------------------------


def test_the_live_run_is_the_same_for_every_notebook_and_short_where_only_the_way_counts(monkeypatch):
    monkeypatch.delenv("DIVA_LAB_FAST", raising=False)
    whole = live_settings()
    assert whole == live_settings(0, images="world", encoder="tiny", denoiser="tiny", projector="anchored")
    assert whole.steps == TINY_DIVA["steps"] and -(-whole.steps // whole.evaluate_every) == 3
    assert live_settings(7).steps == 7 and live_settings(1).evaluate_every == 1
    assert live_steps(0, 60) == 60
    monkeypatch.setenv("DIVA_LAB_FAST", "1")
    fast = live_settings()
    assert fast.steps == fast.evaluate_every == TINY_DIVA["steps"] // 20 and live_settings(7).steps == 7
    assert (live_steps(0, 60), live_steps(0, 20), live_steps(50, 60)) == (3, 2, 50)
