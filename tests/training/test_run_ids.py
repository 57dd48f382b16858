"""A finished run keeps its id, whatever settings are added later; it knows by which code it was made."""

import inspect
from dataclasses import asdict, fields, make_dataclass, replace

import pandas as pd
import pytest

from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.dcr import dcr
from diva_lab.objectives.diva import diva
from diva_lab.objectives.guidance import dcr_guidance
from diva_lab.paths import DATA
from diva_lab.provenance import source_hash
from diva_lab.training import runs
from diva_lab.training.settings import Settings
from diva_lab.training.stages import find_run, portable, tune
from tools.study import ROWS, Study

FIRST = {  # the settings of 0.2, which are always part of an id
    "accumulate", "align_by", "batch", "clip", "combine", "compile", "condition", "denoiser", "denominator", "draws",
    "encoder", "evaluate_every", "flips", "images", "keep_latents", "lambda_con", "lambda_rec", "latent", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_rank", "lr", "negative_gradient", "negatives", "objective", "optimizer", "parts",
    "precision", "projection", "projector", "prompt", "rows", "save_every", "schedule", "seed", "steps", "target",
    "tau", "timesteps", "train_projector", "vae_px", "warmup", "weight_decay",
}  # fmt: skip
RECORDS = pd.concat([pd.read_csv(DATA / "results" / f"{name}.csv") for name in ("objectives", "ablations")])
CHANGES = {name: changes for rows in ROWS.values() for name, changes in rows.items()}
SHIPPED = [row for row in RECORDS.itertuples() if row.objective in CHANGES and "align" not in CHANGES[row.objective]]

WEIGHT = 0.1  # of an objective of a test's own


@pytest.mark.parametrize("row", SHIPPED, ids=lambda row: row.run)
def test_the_runs_of_the_shipped_results_keep_their_ids(row):
    study, changes = Study(), CHANGES[row.objective]
    settings = study.stage_two({"steps": study.steps} | changes, lr=row.lr, seed=row.seed)
    assert find_run(replace(settings, evaluate_every=settings.steps // 2)).id == row.run


def test_a_setting_that_was_added_later_is_declared_with_its_default():
    later = {field.name: field.default for field in fields(Settings) if field.name not in FIRST}
    assert later == runs.ADDED and {field.name for field in fields(Settings)} >= FIRST


def test_a_later_setting_changes_an_id_only_where_it_is_not_at_its_default(monkeypatch):
    Grown = make_dataclass("Grown", [("later", float, 0.5)], bases=(Settings,), frozen=True)
    before = find_run(Settings()).id
    monkeypatch.setitem(runs.ADDED, "later", 0.5)
    assert find_run(Grown()).id == before
    assert find_run(Grown(later=0.7)).id != before
    assert portable(Grown())["later"] == 0.5 == asdict(Grown())["later"]


# --- by which code ----------------------------------------------------------------------------------------------


def test_the_hash_of_an_objective_is_of_its_own_code_and_of_the_functions_that_it_calls(monkeypatch):
    hashes = {name: source_hash(function) for name, function in OBJECTIVES.items()}
    assert None not in hashes.values() and len(set(hashes.values())) == len(hashes)
    sources = inspect.getsource
    edited = lambda f: sources(f) + ("  # edited" if f.__name__ == "dcr_loss" else "")  # noqa: E731
    monkeypatch.setattr(inspect, "getsource", edited)
    assert source_hash(dcr) != hashes["dcr"] and source_hash(dcr_guidance) != hashes["dcr-guidance"]
    assert source_hash(diva) == hashes["diva"]


def test_an_objective_of_ones_own_has_the_hash_of_what_it_builds_on_and_of_its_constants(monkeypatch):
    def mine(step):
        return {name: WEIGHT * value for name, value in dcr(step).items()}

    monkeypatch.setitem(globals(), "WEIGHT", 0.1)
    before = source_hash(mine)
    monkeypatch.setitem(globals(), "WEIGHT", 0.2)
    assert source_hash(mine) != before
    monkeypatch.setitem(globals(), "WEIGHT", 0.1)
    assert source_hash(mine) == before
    sources = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda f: sources(f) + " # edited" * (f.__name__ == "dcr_loss"))
    assert source_hash(mine) != before


def test_a_run_made_by_other_code_is_returned_and_named(small_settings, tmp_path, capsys, monkeypatch):
    def mine(step):
        return diva(step)

    monkeypatch.setitem(OBJECTIVES, "mine", mine)
    settings = replace(small_settings, objective="mine", steps=1)
    run = tune(settings, tmp_path)
    assert run.environment["objective"] == source_hash(mine)
    assert tune(settings, tmp_path) == run
    assert "another version" not in capsys.readouterr().out

    def mine(step):  # edited
        return {"rec": 2 * diva(step)["rec"]}

    monkeypatch.setitem(OBJECTIVES, "mine", mine)
    assert tune(settings, tmp_path) == run
    printed = capsys.readouterr().out
    assert f"run {run.id} was made by another version of objective 'mine': delete {run.folder}" in printed


def test_what_has_no_source_has_no_hash_and_an_older_run_without_one_is_silent(small_settings, tmp_path, capsys):
    assert source_hash(None) is None and source_hash(len) is None
    assert source_hash(eval("lambda step: {}")) is None
    settings = replace(small_settings, objective="diva", steps=1)
    run = tune(settings, tmp_path)
    path = run.folder / "environment.json"
    path.write_text(path.read_text().replace('"objective"', '"before"'))
    assert tune(settings, tmp_path) == run and "another version" not in capsys.readouterr().out
