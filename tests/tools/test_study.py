import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from diva_lab.analysis.conflict import probe_gradients
from diva_lab.figures.style import MEASURES
from diva_lab.models.encoders import load_encoder
from diva_lab.paths import DATA
from diva_lab.training.build import build_conditioner, build_denoiser
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.workbook.notebooks import SUMMARY_MEASURES as EACH
from tools import study as module
from tools.study import (
    ROWS,
    SEEDS,
    SMALL_ROWS,
    Study,
    align_projectors,
    cache_report,
    collect,
    main,
    results_table,
    run_rows,
)


def test_every_row_of_the_study_is_a_setting_of_its_own():
    study = Study()
    settings = [study.stage_two(changes) for _, _, changes in study.tiers()]
    assert len(set(settings)) == len(settings) == len(study.rows)
    assert set(ROWS) == set(SEEDS) and set(SMALL_ROWS) <= set(Study().rows)


def test_equal_evaluations_are_equal():
    steps = Settings(**ROWS["variants"]["diva, equal evaluations"]).steps
    assert steps * Settings.batch * Settings.draws == module.STEPS * (Settings.batch**2 + Settings.batch)


def test_a_report_is_made_once_for_each_encoder():
    encoder, calls = load_encoder("tiny"), []
    asked = cache_report(lambda e: calls.append(1) or {"x": float(len(calls))})
    assert asked(encoder) == asked(encoder) == {"x": 1.0}
    encoder.proj.weight.data += 0.1
    assert asked(encoder) == {"x": 2.0}


class Report:
    """In place of `world_report`: a score that is best at the first learning rate asked for."""

    def __init__(self):
        self.calls = 0

    def __call__(self, encoder, **_) -> dict[str, float]:
        self.calls += 1
        return {name: 0.5 - 1e-3 * self.calls for name in EACH}


@pytest.fixture
def small(small_settings, tmp_path, monkeypatch):
    """A study of four rows on small models, and its stand-in for the world's benchmarks."""
    models = {
        name: getattr(small_settings, name) for name in ("encoder", "denoiser", "projector", "batch", "precision")
    }
    rows = {
        "objectives": {"naive": models | {"objective": "naive"}, "dcr": models | {"objective": "dcr"}},
        "rivals": {"naive, upgrad": models | {"objective": "naive", "combine": "upgrad"}},
        "variants": {"dcr, aligned": models | {"objective": "dcr", "align": {"steps": 1}}}, "ours": {},
    }  # fmt: skip
    monkeypatch.setattr(module, "ROWS", rows)
    report = Report()
    monkeypatch.setattr(module, "world_report", report)
    names = ("naive", "dcr", "naive, upgrad", "dcr, aligned")
    monkeypatch.setattr(module, "alignment_report", None)
    few = lambda at, parameters: probe_gradients(at, parameters, batches=2, bins=1)  # noqa: E731
    return Study(tmp_path / "runs", tmp_path / "results", 2, 1, (1e-4, 1e-3), 2, names, few)


def table(study: Study, name: str) -> pd.DataFrame:
    return pd.read_csv(study.results / f"{name}.csv")


def test_a_study_is_run_collected_and_run_no_second_time(small, monkeypatch):
    run_rows(small)
    collect(small)
    objectives, ablations = table(small, "objectives"), table(small, "ablations")
    assert set(objectives["objective"]) == {"none", "naive", "dcr", "perturb-norm", "perturb-drift"}
    assert objectives.groupby("objective")["seed"].apply(list).map(tuple).unique().tolist() == [(0, 1)]
    assert ablations["objective"].tolist() == ["naive, upgrad"] * 2 + ["dcr, aligned"] * 2
    (aligned,) = small.root.glob("align-*")
    run_of = {row.objective: row.run for row in ablations.itertuples()}
    assert Run(small.root / run_of["dcr, aligned"]).settings["projector"] == str(aligned)
    for name in ("objectives", "ablations", "rates"):
        assert table(small, name)[["run", "git", "torch", "seed"]].notna().all(axis=None)
    rates = table(small, "rates")
    assert rates.groupby("objective")["chosen"].sum().eq(1).all() and set(rates["seed"]) == {100}
    assert objectives.query("objective == 'dcr'")["lr"].isin(small.rates).all()
    assert table(small, "missing").empty
    claims = table(small, "claims")
    assert set(claims["measure"]) == set(MEASURES) and "none" not in set(claims["objective"])
    assert table(small, "conflict")[["seed", "step"]].values.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert {"naive", "dcr"} == set(table(small, "probes")["objective"])
    monkeypatch.setattr(module, "world_report", lambda *_, **__: pytest.fail("evaluated again"))
    run_rows(small)


def test_what_has_not_been_run_is_named_as_missing_and_not_filled_in(small):
    run_rows(replace(small, rows=("naive",)))
    collect(small)
    missing = table(small, "missing")
    assert set(missing["row"]) == {"dcr", "naive, upgrad", "dcr, aligned"} and set(missing["seed"]) == {0, 1}
    assert set(table(small, "objectives")["objective"]) == {"none", "naive"}
    assert not (small.results / "ablations.csv").exists()


def test_a_table_of_rows_that_are_gone_is_removed(small):
    small.results.mkdir(parents=True)
    (small.results / "ablations.csv").write_text("objective\nold\n")
    run_rows(replace(small, rows=("naive",)))
    collect(small)
    assert not (small.results / "ablations.csv").exists()


def test_an_unknown_row_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["run", "dcr, faster"])
    assert "unknown row 'dcr, faster'; expected objectives, rivals" in capsys.readouterr().err


def test_the_readmes_table_is_that_of_the_records(small):
    run_rows(small)
    collect(small)
    text = results_table(table(small, "objectives"))
    naive = table(small, "objectives").query("objective == 'naive'")["pairs/mean"].mean()
    assert f"| naive sum | {100 * naive:.1f}<br>" in text


# --- on other models --------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path):
    """The shipped models in a folder of their own, said to be of world 3."""
    folder = tmp_path / "world-3"
    for part in ("clip", "diffusion"):
        shutil.copytree(DATA / "tiny" / part, folder / part)
    record = json.loads((folder / "clip" / "record.json").read_text())
    (folder / "clip" / "record.json").write_text(json.dumps(record | {"world": 3}))
    return folder


def test_a_study_on_other_models_takes_them_their_world_and_their_projector(models, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "alignment_report", lambda *_, world: asked.append(world.seed) or {"recovered": 0.1})
    study = replace(Study.of(models), root=tmp_path / "runs")
    path = align_projectors(study, "global", rounds=2, steps=1)
    record = json.loads(path.with_suffix(".json").read_text())
    assert path == models / "projectors" / "global.safetensors" and len(record["rounds"]) == 2
    assert set(asked) == {3} and record["settings"]["images"] == "world:3"
    settings = study.stage_two(ROWS["objectives"]["dcr"])
    assert (settings.encoder, settings.denoiser) == (str(models / "clip"), str(models / "diffusion"))
    assert settings.images == "world:3" and study.rows == tuple(ROWS["objectives"])
    encoder, denoiser = load_encoder(settings.encoder), build_denoiser(settings)
    loaded = build_conditioner(settings, encoder, denoiser).state_dict()
    (kept,) = study.root.glob(f"{record['rounds'][-1]['run']}/checkpoint/weights.safetensors")
    assert all(torch.equal(loaded[name.removeprefix("conditioner.")], w) for name, w in load_file(kept).items())


def test_other_models_have_runs_and_tables_of_their_own(models):
    study = Study.of(models)
    assert study.root != Study.root and study.results == Study.results / "world-3" and study.world.seed == 3


def test_a_folder_without_models_is_refused_with_what_makes_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--models", str(tmp_path)])
    assert f"models {tmp_path}: no clip/record.json; expected a folder that" in capsys.readouterr().err
