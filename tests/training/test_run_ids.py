"""A finished run keeps its id, whatever settings are added later; it knows by which code and weights it was made."""

import inspect
import json
import shutil
from dataclasses import asdict, fields, make_dataclass, replace

import pandas as pd
import pytest
from one_step import pictures
from run_checks import Watch, same_weights
from small_models import write_clip

from diva_lab import provenance
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.dcr import dcr
from diva_lab.objectives.diva import diva
from diva_lab.objectives.guidance import dcr_guidance
from diva_lab.paths import DATA
from diva_lab.provenance import source_hash
from diva_lab.training import build, runs
from diva_lab.training.controls import perturb
from diva_lab.training.settings import Settings
from diva_lab.training.stages import align, find_run, portable, tune
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


# --- from which weights -----------------------------------------------------------------------------------------


@pytest.fixture
def settings(small_settings, tmp_path) -> Settings:
    """Of an encoder whose weights may be replaced."""
    folder = shutil.copytree(small_settings.encoder, tmp_path / "clip")
    return replace(small_settings, encoder=str(folder), objective="diva", steps=2, save_every=1, evaluate_every=1)


def replace_weights(settings: Settings, tmp_path) -> bytes:
    """Other weights for the encoder of `settings`; returns what was there."""
    file = f"{settings.encoder}/open_clip_model.safetensors"
    with open(file, "rb") as old:
        before = old.read()
    shutil.copy(write_clip(tmp_path / "other", seed=1) / "open_clip_model.safetensors", file)
    return before


def test_a_run_has_the_hashes_of_the_weights_that_it_starts_from(settings, tmp_path):
    aligned = align(settings, tmp_path)
    run = tune(replace(settings, projector=str(aligned.folder)), tmp_path)
    weights = run.environment["weights"]
    assert aligned.environment["weights"] == {name: weights[name] for name in ("encoder", "denoiser")}
    assert list(weights["encoder"]) == ["open_clip_model.safetensors"]
    assert {name.partition("/")[0] for name in weights["denoiser"]} == {"vae", "unet", "text_encoder"}
    assert weights["projector"] == {
        "weights.safetensors": provenance.sha256(aligned.folder / "checkpoint" / "weights.safetensors")
    }


def test_a_file_of_weights_is_read_once_until_it_changes(settings, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(build, "sha256", lambda path: read.append(path) or "0")
    for _ in range(2):
        build.weight_hashes(settings)
    encoder = [path for path in read if str(path).startswith(settings.encoder)]
    replace_weights(settings, tmp_path)
    build.weight_hashes(settings)
    assert len(encoder) == 1 and read.count(encoder[0]) == 2


def test_the_same_settings_with_other_weights_are_another_run_and_both_are_found(settings, tmp_path, capsys):
    run = tune(settings, tmp_path)
    assert run.id == find_run(settings).id  # an id is of the settings alone
    before = replace_weights(settings, tmp_path)
    other = find_run(settings, tmp_path)
    assert other.id.startswith(f"{run.id}-w") and not other.done
    assert tune(settings, tmp_path) == other and other.done
    assert tune(settings, tmp_path) == other == find_run(settings, tmp_path)
    assert capsys.readouterr().out.count("done before") == 1
    assert other.environment["weights"]["encoder"] != run.environment["weights"]["encoder"]
    assert other.settings == run.settings
    with open(f"{settings.encoder}/open_clip_model.safetensors", "wb") as file:
        file.write(before)
    assert tune(settings, tmp_path) == run == find_run(settings, tmp_path)


def test_a_model_that_is_replaced_between_stop_and_resume_is_noticed(settings, tmp_path):
    whole = tune(settings, tmp_path / "whole", Watch())
    with pytest.raises(KeyboardInterrupt):
        tune(settings, tmp_path, Watch(stop=3))
    before = replace_weights(settings, tmp_path)
    told = rf"{whole.id} was stopped, and its encoder has other .* put the old files back"
    with pytest.raises(ValueError, match=told):
        tune(settings, tmp_path)
    with open(f"{settings.encoder}/open_clip_model.safetensors", "wb") as file:
        file.write(before)
    assert same_weights(tune(settings, tmp_path, Watch()), whole)


def test_a_run_without_hashes_and_one_whose_models_are_gone_are_found(settings, tmp_path):
    run = tune(settings, tmp_path)
    facts = json.loads((run.folder / "environment.json").read_text())
    before = replace_weights(settings, tmp_path)
    (run.folder / "environment.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "weights"}))
    assert tune(settings, tmp_path) == run == find_run(settings, tmp_path)
    (run.folder / "environment.json").write_text(json.dumps(facts))
    assert find_run(settings, tmp_path) != run and before
    shutil.rmtree(settings.encoder)
    assert tune(settings, tmp_path) == run == find_run(settings, tmp_path)


def test_a_random_push_has_the_hash_of_its_encoder_alone(settings, tmp_path):
    run = perturb(tune(settings, tmp_path), pictures(4), "norm", tmp_path)
    assert set(run.environment["weights"]) == {"encoder"}
    (run.folder / "done").unlink()  # killed at the last moment
    assert perturb(tune(settings, tmp_path), pictures(4), "norm", tmp_path).done and len(run.metrics()) == 1


def test_released_weights_are_hashed_beside_those_of_their_model(small_clip):
    file = small_clip / "open_clip_model.safetensors"
    hashes = build.weight_hashes(Settings(encoder=f"tiny@{file}"))["encoder"]
    assert hashes == build.weight_hashes(Settings())["encoder"] | {f"@{file.name}": provenance.sha256(file)}
