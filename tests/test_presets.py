import csv
from dataclasses import asdict

import pytest

from diva_lab.presets import BACKBONES, PRESETS, preset
from diva_lab.runs import DATA
from diva_lab.train import changed, main
from diva_lab.training import Settings

TABLE = list(csv.DictReader((DATA / "published" / "recipes.csv").read_text().splitlines()))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['recipe']}-stage{row['stage']}")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_preset_has_the_numbers_of_the_published_recipe(row, backbone):
    found = asdict(preset(f"{backbone}-{row['recipe']}", int(row["stage"]), int(row["processes"] or 8)))
    numbers = ("steps", "lr", "weight_decay", "warmup", "batch", "accumulate", "lora_rank", "clip", "draws")
    numbers += ("lora_alpha", "lora_dropout", "vae_px") if row["lora_alpha"] else ()
    for name in numbers:
        if row[name]:
            assert found[name] == float(row[name]), name
    for name in ("optimizer", "schedule", "precision", "latent"):
        assert found[name] == row[name] or not row[name], name
    assert found["batch"] * found["accumulate"] * 8 == (640 if row["recipe"] == "diva" else 256)
    assert found["train_projector"] == ("projector" in row["trained"] and row["stage"] == "2")


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_sees_as_many_pictures_however_many_processes_share_it(name):
    sizes = {s.batch * s.accumulate * n for n in (1, 2, 4, 8) for s in [preset(name, processes=n)]}
    assert sizes == {640 if name.endswith("diva") else 256}


def test_dcrs_denoiser_sees_the_pictures_that_clip_sees():
    assert {name: preset(f"{name}-dcr").vae_px for name in BACKBONES} == {
        "openai-l14": 224, "openai-l14-336": 336, "metaclip-l14": 224, "metaclip-h14": 224, "siglip-so400m": 224,
        "siglip-so400m-384": 384, "dfn-h14": 224, "dfn-h14-378": 378,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("resnet-dcr",), "unknown preset"), (("openai-l14-diva", 1), "no stage 1"), (("openai-l14-dcr", 2, 3), "3 proc")],
)
def test_a_preset_that_is_not_there_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(*arguments)


def test_settings_are_changed_by_name():
    found = changed(Settings(), ["steps=3", "lr=1e-3", "objective=diva", "flips=False"])
    assert (found.steps, found.lr, found.objective, found.flips) == (3, 1e-3, "diva", False)
    for bad in ("step=3", "steps", "steps=many"):
        with pytest.raises(ValueError, match="step"):
            changed(Settings(), [bad])


def test_one_command_runs_both_stages_and_then_only_says_where(tmp_path, capsys):
    tiny = ["encoder=tiny", "denoiser=tiny", "steps=1", "batch=2", "accumulate=1", "vae_px=0"]
    command = ["--preset", "openai-l14-dcr", "--shards", "world", "--out", str(tmp_path), "--set", *tiny]
    assert main(command) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["align", "tune"]
    assert main(command) == 0 and capsys.readouterr().out.splitlines() == [first]


def test_an_error_is_one_line(tmp_path, capsys):
    assert main(["--preset", "nothing", "--shards", "world", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: unknown preset 'nothing'") and not list(tmp_path.iterdir())
