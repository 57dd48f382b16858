import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from PIL import Image

from diva_lab.cli import read_seeds
from diva_lab.evaluation.world import WORLD_MEASURES
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.training.stages import tune
from diva_lab.workbook.notebooks import (
    EVALUATED_COLUMNS,
    NOTEBOOKS,
    SUMMARY_COLUMNS,
    declared_parameters,
    evaluate_runs,
    recorded_rows,
    resolve_images,
    run_notebook,
    select_notebooks,
    summarise_runs,
)
from diva_lab.world import DETAILS


def run_command(argv: list[str], notebooks: Path) -> int:
    """`diva-lab run` on other notebooks than the repository's."""
    from diva_lab.cli import main

    with mock.patch("diva_lab.workbook.notebooks.NOTEBOOKS", notebooks):
        return main(["run", *argv])


def exit_code(argv: list[str], notebooks: Path) -> int:
    """The exit code of `diva-lab run`, from argparse or from the verb."""
    try:
        return run_command(argv, notebooks)
    except SystemExit as stop:
        return stop.code


def write_run(
    root: Path,
    objective: str,
    seed: int,
    zeroshot: float = 0.9,
    cos: list[float] | None = None,
    seconds: tuple[float, ...] = (1.0, 3.0, 4.0, 9.0),
    tag: str = "",
    done: bool = True,
    **settings: object,
) -> Run:
    """The folder of a run without weights, evaluated at step 0 and after as many steps as there are `seconds`."""
    run = Run(root / f"tune-{objective}-s{seed}{tag}")
    run.folder.mkdir(parents=True)
    settings = {"stage": "tune", "objective": objective, "seed": seed} | settings
    (run.folder / "settings.json").write_text(json.dumps(settings))
    (run.folder / "environment.json").write_text(json.dumps({"git": "abc", "versions": {"torch": "2.0"}}))
    rows = [{"step": i, "loss": 1.0, "seconds": s} for i, s in enumerate(seconds)]
    for row, value in zip(rows, cos or [], strict=False):
        row["cos"] = value
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {name: 0.5 for name in WORLD_MEASURES} | {"pairs/colour/low": 0.4, "pairs/colour/high": 0.6}
    records = [{"step": 0} | values, {"step": len(rows)} | values | {"zeroshot": zeroshot}]
    (run.folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if done:
        (run.folder / "done").touch()
    return run


# --- summary ----------------------------------------------------------------------------------------------------


def test_summary_has_one_row_per_objective_and_seed_in_a_fixed_order_with_fixed_columns(tmp_path):
    for objective, seed in [("dcr", 1), ("dcr", 0), ("perturb-norm", 0), ("diva", 0), ("none", 0)]:
        write_run(tmp_path, objective, seed)
    table = summarise_runs(tmp_path)
    assert list(table.columns) == SUMMARY_COLUMNS
    assert [*zip(table["objective"], table["seed"], strict=True)] == [
        ("none", 0),
        ("diva", 0),
        ("dcr", 0),
        ("dcr", 1),
        ("perturb-norm", 0),
    ]
    assert len(DETAILS) == 9 and table[[f"pairs/{name}" for name in DETAILS]].eq(0.5).all(axis=None)


def test_summary_reports_the_last_evaluation_and_the_steps_before_it(tmp_path):
    run = write_run(tmp_path, "dcr", 0, zeroshot=0.7)
    row = summarise_runs(tmp_path).iloc[0]
    assert row["zeroshot"] == 0.7 and row["steps"] == 4 and row["run"] == run.id


def test_the_conflict_rate_is_the_share_of_negative_cosines_and_nan_for_one_gradient(tmp_path):
    write_run(tmp_path, "naive", 0, cos=[-0.1, 0.2, -0.3, -0.4])
    write_run(tmp_path, "dcr", 0)
    rates = summarise_runs(tmp_path).set_index("objective")["conflict_rate"]
    assert rates["naive"] == 0.75 and np.isnan(rates["dcr"])


def test_steps_without_a_cosine_do_not_count_in_the_conflict_rate(tmp_path):
    write_run(tmp_path, "naive", 0, cos=[-0.1, 0.2])
    assert summarise_runs(tmp_path)["conflict_rate"].item() == 0.5


def test_seconds_per_step_is_the_median_difference(tmp_path):
    write_run(tmp_path, "dcr", 0, seconds=(10.0, 12.0, 13.0, 19.0))
    assert summarise_runs(tmp_path)["seconds_per_step"].item() == 2.0


def test_a_run_of_no_steps_has_a_row(tmp_path):
    write_run(tmp_path, "none", 0, seconds=())
    row = summarise_runs(tmp_path).iloc[0]
    assert row["steps"] == 0 and row["zeroshot"] == 0.9 and np.isnan(row["seconds_per_step"])


def test_unfinished_runs_and_those_of_stage_one_have_no_row(tmp_path):
    write_run(tmp_path, "dcr", 0, done=False)
    write_run(tmp_path, "diva", 0, stage="align")
    write_run(tmp_path, "perturb-drift", 0, stage="perturb")
    assert summarise_runs(tmp_path)["objective"].tolist() == ["perturb-drift"]


def test_runs_whose_objective_or_condition_exists_only_in_a_notebook_have_no_row(tmp_path):
    write_run(tmp_path, "mine", 0)
    write_run(tmp_path, "diva", 0, condition="mine")
    write_run(tmp_path, "diva", 1, condition="recap")
    assert summarise_runs(tmp_path)["seed"].tolist() == [1]


def test_of_several_runs_with_one_objective_and_seed_the_row_shows_the_earliest_that_was_evaluated(tmp_path):
    not_evaluated = write_run(tmp_path, "dcr", 0, tag="-d")
    (not_evaluated.folder / "evaluations.jsonl").unlink()
    first = write_run(tmp_path, "dcr", 0, tag="-c")
    write_run(tmp_path, "dcr", 0, tag="-a", seconds=(1.0,) * 9)
    for age, run in enumerate((not_evaluated, first)):
        os.utime(run.folder / "settings.json", (age, age))
    assert summarise_runs(tmp_path)["run"].tolist() == [first.id]


def test_a_folder_without_runs_gives_an_empty_table_with_the_same_columns(tmp_path):
    table = summarise_runs(tmp_path)
    assert len(table) == 0 and list(table.columns) == SUMMARY_COLUMNS


# --- the evaluation ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_run(tmp_path, small_clip):
    """A run of the small CLIP with objective `none` and an invented record of the tiny world."""
    record = {name: 0.5 for name in WORLD_MEASURES} | {
        "pairs/mean": 0.2,
        "pairs/mean/low": 0.18,
        "pairs/mean/high": 0.22,
    }
    return tune(Settings(str(small_clip), objective="none"), tmp_path, lambda encoder: record)


def test_a_runs_record_gives_the_same_rows_as_evaluate(small_run, monkeypatch):
    from diva_lab.evaluation.table import evaluate

    last = small_run.evaluations().iloc[-1].drop("step").to_dict()
    monkeypatch.setattr("diva_lab.evaluation.world.world_report", lambda encoder, seed: last)
    evaluated, recorded = evaluate([small_run.folder], ["world"]), recorded_rows(small_run)
    names = ["metric", "category", "value"]
    assert sorted(recorded[names].itertuples(index=False)) == sorted(evaluated[names].itertuples(index=False))
    assert list(recorded.columns) == list(evaluated.columns) and set(recorded["encoder"]) == {small_run.id}


def test_recorded_rows_have_n_interval_chance_and_note(tmp_path):
    from diva_lab.statistics import wilson

    rows = recorded_rows(write_run(tmp_path, "dcr", 0, zeroshot=0.9)).set_index(["metric", "category"])
    colour, all_pairs, zeroshot = rows.loc["pairs", "colour"], rows.loc["pairs", "all"], rows.loc["zeroshot", "all"]
    assert (colour["n"], colour["low"], colour["high"], colour["chance"]) == (300, 0.4, 0.6, 0.25)
    assert all_pairs["n"] == 2700 and np.isnan(all_pairs["low"]) and all_pairs["note"] == ""
    assert (zeroshot["n"], zeroshot["chance"]) == (3000, 1 / 12)
    assert (zeroshot["low"], zeroshot["high"]) == wilson(2700, 3000)
    assert (rows[["git", "torch"]] == ["abc", "2.0"]).all(axis=None)


def test_the_summary_comes_from_the_evaluation_with_intervals_and_what_is_not_above_chance(small_run):
    table, errors = evaluate_runs(small_run.folder.parent)
    assert not errors and list(table.columns) == list(recorded_rows(small_run).columns)
    assert set(table["encoder"]) == {small_run.id} and set(table["benchmark"]) == {"world", "emoji"}
    assert table["weights"].nunique() == 1 and table["n"].notna().all()
    row = summarise_runs(small_run.folder.parent, table).iloc[0]
    assert list(row.index) == SUMMARY_COLUMNS + EVALUATED_COLUMNS
    assert (row["pairs/mean"], row["pairs/mean/low"], row["pairs/mean/high"]) == (0.2, 0.18, 0.22)
    emoji = table[(table["metric"] == "emoji-match") & (table["category"] == "all")].iloc[0]
    assert (row["emoji-match/mean"], row["emoji-match/mean/low"]) == (emoji["value"], emoji["low"])
    assert row["note"].startswith("not above chance: pairs") and row["zeroshot"] == 0.5


def test_a_run_that_cannot_be_evaluated_keeps_the_rows_of_its_record_and_gives_an_error(tmp_path):
    run = write_run(tmp_path, "dcr", 0)  # without weights
    table, errors = evaluate_runs(tmp_path)
    assert len(errors) == 1 and "no checkpoint" in errors[0] and run.id in errors[0]
    assert set(table["benchmark"]) == {"world"}
    row = summarise_runs(tmp_path, table).iloc[0]
    assert row["zeroshot"] == 0.9 and np.isnan(row["emoji/mean"])


# --- the notebooks that ship ------------------------------------------------------------------------------------


def test_the_grids_compare_any_encoders_on_any_folder_of_pairs(tmp_path, small_clip, monkeypatch):
    from diva_lab.evaluation.emoji import EMOJI

    for name, value in (("MPLBACKEND", ""), ("DIVA_LAB_CACHE", str(tmp_path)), ("DIVA_LAB_RUNS", str(tmp_path))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND")
    grids = NOTEBOOKS / "04_mmvp_grids.ipynb"
    parameters = {"encoders": ["tiny", str(small_clip)], "pairs_folder": str(EMOJI / "noto")}
    assert run_notebook(grids, tmp_path, parameters) == ""
    cells = nbformat.read(tmp_path / grids.name, as_version=4).cells
    shown = json.dumps([cell.outputs for cell in cells if cell.cell_type == "code"], ensure_ascii=False)
    assert "McNemar" in shown and f"- {small_clip.name}: of 9 intervals **" in shown
    assert not list(tmp_path.glob("tune-*"))  # nothing was trained


@pytest.mark.slow
def test_papermill_runs_a_notebook_from_anywhere_and_its_runs_lie_in_one_place(tmp_path):
    root, elsewhere, name = NOTEBOOKS.parent, tmp_path / "elsewhere", "notebooks/01_alignment.ipynb"
    elsewhere.mkdir()
    environment = {"DIVA_LAB_RUNS": tmp_path / "runs", "PYTHONPATH": root, "JUPYTER_PREFER_ENV_PATH": "1"}
    ways = [(root, name), (elsewhere, root / name), (root, name, "--cwd", "notebooks")]
    for k, (folder, path, *more) in enumerate(ways):
        command = [sys.executable, "-m", "papermill", path, tmp_path / "out.ipynb", *more, "-p", "steps", "1"]
        done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out.ipynb").read_text().count("done before") == (2 if k else 0)
    assert len(list((tmp_path / "runs" / "notebooks").iterdir())) == 2 and not list(elsewhere.iterdir())


# --- the command ------------------------------------------------------------------------------------------------


def write_notebook(folder: Path, name: str, *sources: str, parameters: str = "") -> None:
    cells = [nbformat.v4.new_markdown_cell(f"# The question of {name}\n\nProse with <b>stress</b>.")]
    if parameters:
        cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    folder.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / name)


WRITE_RUNS = """
for seed in seeds:
    folder = Path(runs_root) / f"tune-dcr-s{seed}"
    folder.mkdir(parents=True)
    for file in copied.iterdir():
        text = file.read_text().replace('"step": 4', f'"step": {steps}').replace('"seed": 0', f'"seed": {seed}')
        (folder / file.name).write_text(text.replace('"images": ""', f'"images": "{images}"'))
"""  # of the run `copied`, which took four steps: quicker than to import diva_lab


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Three notebooks: the first has no parameters and draws, the second writes a run, the third only prints."""
    for name in ("MPLBACKEND", "JUPYTER_PREFER_ENV_PATH"):  # the run sets them: restore them afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    row = {"metric": "emoji", "category": "all", "n": 334, "value": 0.3, "low": 0.2, "high": 0.4, "chance": 0.25}
    row = {"benchmark": "emoji", "set": "emoji", **row, "note": "not above chance", "weights": "f00"}
    monkeypatch.setattr(
        "diva_lab.evaluation.table.evaluate", lambda *_: pd.DataFrame([row])
    )  # runs of `write_run` have no weights
    folder = tmp_path / "notebooks"
    write_notebook(folder, "00_draw.ipynb", "import matplotlib.pyplot as plt", "plt.plot([0, 1])\nplt.show()")
    write_notebook(
        folder,
        "01_train.ipynb",
        "from pathlib import Path\nprint('here:', Path.cwd().name)",
        f"copied = Path({str(write_run(tmp_path / 'copied', 'dcr', 0, images='').folder)!r})",
        WRITE_RUNS,
        parameters='runs_root = ""\nimages = "world"\nseeds = [0]\nsteps = 2',
    )
    write_notebook(folder, "02_print.ipynb", "print('steps are', steps)", parameters="steps = 5")
    return folder


def test_the_notebooks_run_in_order_and_leave_notebooks_summary_and_report(notebooks, tmp_path, capsys):
    out = tmp_path / "out"
    code = run_command(["--out", str(out), "--seeds", "0,3", "--steps", "3"], notebooks)
    printed = capsys.readouterr().out
    assert code == 0, printed
    files = ("evaluation.csv", "summary.csv", "report.html")
    assert printed.splitlines()[-3:] == [str(out / name) for name in files]
    assert "here: notebooks" in printed and "steps are 3" in printed
    assert [path.name for path in select_notebooks(out, None)] == ["00_draw.ipynb", "01_train.ipynb", "02_print.ipynb"]
    table = pd.read_csv(out / "summary.csv")
    assert table["seed"].tolist() == [0, 3] and table["steps"].tolist() == [3, 3]
    assert list(table.columns) == SUMMARY_COLUMNS + EVALUATED_COLUMNS
    every = pd.read_csv(out / "evaluation.csv")
    assert set(every["benchmark"]) == {"world", "emoji"} and set(every["encoder"]) == set(table["run"])
    assert table["emoji/mean"].eq(0.3).all() and table["note"].eq("not above chance: emoji").all()

    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page and "steps are 3" in page and "The question of 01_train" in page
    assert "runs_root" not in page, "the report shows code"
    assert not re.search(r"<script|<link|@import|url\(|(src|href)=.https?:", page), "the report needs the network"


def test_a_failing_notebook_ends_the_run_and_what_was_written_stays(notebooks, tmp_path, capsys):
    write_notebook(notebooks, "01_train.ipynb", "print('before')", "raise RuntimeError('no luck')")
    out = tmp_path / "out"
    assert run_command(["--out", str(out)], notebooks) == 1
    printed = capsys.readouterr()
    assert "FAILED: 01_train.ipynb" in printed.err and "RuntimeError: no luck" in printed.err
    assert "02_print" not in printed.out
    assert printed.out.splitlines()[-1] == str(out / "report.html")
    page = (out / "report.html").read_text()
    assert "data:image/png" in page and "before" in page and "no luck" in page
    assert "failed</span>" in page and pd.read_csv(out / "summary.csv").empty


def test_a_parameter_of_a_wrong_type_fails_with_the_notebooks_own_error(notebooks, tmp_path, capsys):
    check = "from diva_lab.workbook.parameters import check_parameters\ncheck_parameters(globals(), seeds=int)"
    write_notebook(notebooks, "03_check.ipynb", check, parameters="seeds = 1")
    assert run_command(["--out", str(tmp_path / "out"), "--only", "03", "--seeds", "1,2"], notebooks) == 1
    assert "seeds=[1, 2]: expected int, got list" in capsys.readouterr().err


def test_only_selects_notebooks_by_number(notebooks, tmp_path):
    assert run_command(["--out", str(tmp_path / "out"), "--only", "02"], notebooks) == 0
    assert [path.name for path in select_notebooks(tmp_path / "out", None)] == ["02_print.ipynb"]


def test_a_failing_evaluation_ends_with_exit_code_1_and_leaves_the_summary(notebooks, tmp_path, monkeypatch, capsys):
    def refuse(encoders, benchmarks):
        raise ValueError("no emoji here")

    monkeypatch.setattr("diva_lab.evaluation.table.evaluate", refuse)
    out = tmp_path / "out"
    assert run_command(["--out", str(out), "--only", "01"], notebooks) == 1
    assert "FAILED: evaluation\nno emoji here" in capsys.readouterr().err
    assert pd.read_csv(out / "summary.csv")["zeroshot"].tolist() == [0.9]
    assert "failed</span>" not in (out / "report.html").read_text()  # no notebook failed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "nowhere"], "nowhere"),
        (["--images", "nowhere/*.tar"], "no such tar"),
        (["--images", "world:x"], "world:SEED"),
        (["--seeds", "one"], "which ones (0,1,2)"),
        (["--seeds", "0"], "which ones (0,1,2)"),
        (["--images", ""], "expected a folder of images"),
        (["--steps", "ten"], "whole number from 1 to 1000000000"),
        (["--steps", "0"], "whole number from 1 to 1000000000"),
        (["--only", ""], "expected one of 00, 01, 02"),
        (["--only", "07"], "expected one of 00, 01, 02"),
        (["--only", "00", "--steps", "3"], "none of these notebooks has the parameter 'steps'"),
    ],
)
def test_bad_arguments_give_one_error_before_any_notebook_runs(notebooks, tmp_path, capsys, argv, message):
    out = tmp_path / "out"
    assert exit_code(["--out", str(out), *argv], notebooks) == 2 and not out.exists()
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_of_images_reaches_the_notebooks_with_its_absolute_path(notebooks, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert run_command(["--out", "out", "--only", "01", "--images", "photos"], notebooks) == 0
    (settings,) = (tmp_path / "out").glob("*/settings.json")
    assert json.loads(settings.read_text())["images"] == str(tmp_path / "photos")
    assert resolve_images("world:3") == "world:3"
    for source in ("", "hf:"):  # neither is the working directory
        with pytest.raises((ValueError, FileNotFoundError), match=f"images '{source}'"):
            resolve_images(source)
    Dataset.from_dict({"image": [Image.new("RGB", (40, 40))]}).save_to_disk(tmp_path / "dataset")
    for source in ("hf:dataset", "hf:dataset:train"):
        assert resolve_images(source) == source.replace("dataset", str(tmp_path / "dataset"))


def test_a_folder_without_images_is_refused(notebooks, tmp_path, capsys):
    assert run_command(["--out", str(tmp_path / "out"), "--images", str(notebooks)], notebooks) == 2
    assert "no image" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seeds"), [("3", 3), ("0,1,2", [0, 1, 2]), ("4,", [4])])
def test_seeds_are_a_number_of_them_or_a_list(text, seeds):
    assert read_seeds(text) == seeds


def test_declared_parameters_are_those_of_the_tagged_cell(notebooks):
    names = [declared_parameters(path) for path in select_notebooks(notebooks, None)]
    assert names == [set(), {"runs_root", "images", "seeds", "steps"}, {"steps"}]
