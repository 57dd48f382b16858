import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diva_lab.models.encoders import load_encoder
from diva_lab.paths import DATA
from diva_lab.training.build import build_conditioner, build_denoiser
from diva_lab.training.settings import Settings
from tools import study as module
from tools.study import ROWS, SEEDS, SMALL_ROWS, Study, align_projectors, cache_report, main, run_rows


def test_every_row_of_the_study_is_a_setting_of_its_own():
    study = Study()
    settings = [study.stage_two(changes) for _, _, changes in study.each_row()]
    assert len(set(settings)) == len(settings) == len(study.rows)
    assert set(ROWS) == set(SEEDS) and set(SMALL_ROWS) <= set(Study().rows)


def test_equal_evaluations_are_equal():
    steps = Settings(**ROWS["variants"]["diva, equal evaluations"]).steps
    assert steps * Settings.batch * Settings.draws == module.STEPS * (Settings.batch**2 + Settings.batch)


def test_a_report_is_made_once_for_each_encoder():
    encoder, calls = load_encoder("tiny"), []
    report = cache_report(lambda e: calls.append(1) or {"x": float(len(calls))})
    assert report(encoder) == report(encoder) == {"x": 1.0}
    encoder.proj.weight.data += 0.1
    assert report(encoder) == {"x": 2.0}


def test_a_study_is_run_once(finished_study, monkeypatch):
    folders = sorted(path.name for path in finished_study.root.iterdir())
    monkeypatch.setattr(module, "world_report", lambda *_, **__: pytest.fail("evaluated again"))
    run_rows(finished_study)
    assert sorted(path.name for path in finished_study.root.iterdir()) == folders


def test_the_learning_rate_is_the_best_of_all_trials_and_unknown_before(small_study, finished_study):
    rows = {name: changes for _, name, changes in small_study.each_row()}
    assert small_study.choose_rate(rows["naive"]) is None
    assert finished_study.choose_rate(rows["naive"]) == finished_study.rates[0]  # later reports are worse
    reported = {seed for tier in SEEDS for seed in SEEDS[tier]}
    assert not reported & {settings.seed for settings in finished_study.rate_trials(rows["naive"])}


def test_an_unknown_row_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["run", "dcr, faster"])
    assert "unknown row 'dcr, faster'; expected objectives, rivals" in capsys.readouterr().err


# --- on other models --------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path):
    """The shipped models in a folder of their own, whose record names world 3."""
    folder = tmp_path / "world-3"
    for part in ("clip", "diffusion"):
        shutil.copytree(DATA / "tiny" / part, folder / part)
    record = json.loads((folder / "clip" / "record.json").read_text())
    (folder / "clip" / "record.json").write_text(json.dumps(record | {"world": 3}))
    return folder


def test_a_study_on_other_models_takes_them_their_world_and_their_projector(models, tmp_path, monkeypatch):
    worlds = []
    monkeypatch.setattr(module, "alignment_report", lambda *_, world: worlds.append(world.seed) or {"recovered": 0.1})
    study = replace(Study.of(models), root=tmp_path / "runs")
    path = align_projectors(study, "global", rounds=2, steps=1)
    record = json.loads(path.with_suffix(".json").read_text())
    assert path == models / "projectors" / "global.safetensors" and len(record["rounds"]) == 2
    assert set(worlds) == {3} and record["settings"]["images"] == "world:3"
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
