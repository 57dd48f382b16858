import shutil
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest

from diva_lab.analysis.theory import COSINES, theory_report
from diva_lab.figures.style import MEASURES
from diva_lab.training.runs import Run
from tools import study, tables
from tools.study import Study
from tools.tables import collect, results_table, theory_tables, write_results_table


def table(of: Study, name: str) -> pd.DataFrame:
    return pd.read_csv(of.results / f"{name}.csv")


def test_every_finished_run_is_in_the_tables(finished_study):
    collect(finished_study)
    objectives, ablations = table(finished_study, "objectives"), table(finished_study, "ablations")
    assert set(objectives["objective"]) == {"none", "naive", "dcr", "perturb-norm", "perturb-drift"}
    assert objectives.groupby("objective")["seed"].apply(list).map(tuple).unique().tolist() == [(0, 1)]
    assert ablations["objective"].tolist() == ["naive, upgrad"] * 2 + ["dcr, aligned"] * 2
    (aligned,) = finished_study.root.glob("align-*")
    run_of = {row.objective: row.run for row in ablations.itertuples()}
    assert Run(finished_study.root / run_of["dcr, aligned"]).settings["projector"] == str(aligned)
    for name in ("objectives", "ablations", "rates"):
        assert table(finished_study, name)[["run", "git", "torch", "seed"]].notna().all(axis=None)
    rates = table(finished_study, "rates")
    assert rates.groupby("objective")["chosen"].sum().eq(1).all() and set(rates["seed"]) == {100}
    assert objectives.query("objective == 'dcr'")["lr"].isin(finished_study.rates).all()
    assert table(finished_study, "missing").empty
    claims = table(finished_study, "claims")
    assert set(claims["measure"]) == set(MEASURES) and "none" not in set(claims["objective"])
    assert table(finished_study, "conflict")[["seed", "step"]].values.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert {"naive", "dcr"} == set(table(finished_study, "probes")["objective"])


def test_what_has_not_been_run_is_named_as_missing_and_its_old_table_removed(finished_study, tmp_path):
    part = replace(finished_study, root=tmp_path / "part")
    shutil.copytree(finished_study.root, part.root)
    for folder in part.root.iterdir():
        if "naive" not in folder.name or Run(folder).settings["combine"] != "sum":
            (folder / "done").unlink()
    part.results.mkdir()
    (part.results / "ablations.csv").write_text("objective\nold\n")
    collect(part)
    missing = table(part, "missing")
    assert set(missing["row"]) == {"dcr", "naive, upgrad", "dcr, aligned"} and set(missing["seed"]) == {0, 1}
    assert set(table(part, "objectives")["objective"]) == {"none", "naive"}
    assert not (part.results / "ablations.csv").exists()


def test_without_runs_no_table_is_touched(small_study, monkeypatch, capsys):
    monkeypatch.setattr(tables, "read_study", lambda *_: small_study)
    small_study.results.mkdir()
    (small_study.results / "rates.csv").write_text("objective\nold\n")
    with pytest.raises(SystemExit):
        tables.main([])
    assert f"no runs in {small_study.root}; expected those of `python -m tools.study`" in capsys.readouterr().err
    assert (small_study.results / "rates.csv").exists()


# --- the theorems -----------------------------------------------------------------------------------------------


def test_the_theorems_tables_hold_every_step_and_name_the_run_and_the_code(tmp_path, monkeypatch):
    for module in (study, tables):
        monkeypatch.setattr(module, "THEORY", ("diva",))
    report = partial(theory_report, timesteps=(400,), n=48, latents=1, halvings=2)
    part = study.Study(tmp_path, tmp_path / "results", theory_steps=1, theory=report, theory_batches=1)
    assert theory_tables(part) == []  # nothing has been run
    study.run_theory(part)
    scatter_of, affine = (pd.read_csv(path) for path in theory_tables(part))
    assert scatter_of.groupby("step").size().to_dict() == {0: 4, 1: 4}  # two kinds of features, two of constants
    assert set(scatter_of["run"]) == {path.name for path in (tmp_path / "theory").iterdir()}
    sizes = affine.groupby(["objective", "step", "t", "denominator", "view", "distance"]).size()
    assert sizes["none", 0].eq(len(COSINES) + 1).all() and sizes["diva", 1].eq(1).all()
    cosines = affine[affine["negatives"] == "as they are"].groupby("objective")["cosine"].first()
    assert cosines["none"] != cosines["diva"]  # the tuned encoder was measured
    for rows in (scatter_of, affine):
        assert {"objective", "seed", "git", "torch"} <= set(rows)
        assert not rows.isna().any(axis=None)


# --- the table in docs/results.md -------------------------------------------------------------------------------


def test_the_results_table_by_hand():
    scores = {"none": (0.2, 0.3), "naive": (0.22, 0.32)}  # two points better with each seed
    facts = {"steps": 200, "git": "1a2b", "torch": "2"}
    rows = [
        {"objective": name, "seed": seed, **dict.fromkeys(MEASURES, value), **facts}
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]
    head, _, none, naive, *_, below = results_table(pd.DataFrame(rows)).splitlines()
    assert head.count("|") == len(MEASURES) + 2
    assert none == "| none (original) | " + " | ".join(["25.0"] * len(MEASURES)) + " |"
    assert naive == "| naive sum | " + " | ".join(["27.0<br>+2.0 [+2.0, +2.0]"] * len(MEASURES)) + " |"
    assert "2 seeds after 200 steps" in below and "git 1a2b, torch 2" in below


def test_the_results_table_is_written_between_its_marks_and_nothing_else_changes(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("before\n<!-- results: a note -->\nold\n<!-- /results -->\nafter\n")
    lines = write_results_table(path).read_text().splitlines()
    assert lines[:2] == ["before", "<!-- results: a note -->"] and lines[-2:] == ["<!-- /results -->", "after"]
    assert "\n".join(lines[2:-2]) == results_table(pd.read_csv(tables.RESULTS / "objectives.csv"))
    text = path.read_text()
    assert write_results_table(path).read_text() == text


def test_a_file_without_marks_is_refused(tmp_path):
    (tmp_path / "results.md").write_text("no table here\n")
    with pytest.raises(ValueError, match=r"results.md: expected the marks <!-- results: ... -->"):
        write_results_table(tmp_path / "results.md")
