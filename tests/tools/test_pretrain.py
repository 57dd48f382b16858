"""What `tools.pretrain` makes, and what of it reads what."""

import shutil
from functools import partial

import pytest

from diva_lab.models.registry import load_denoiser
from diva_lab.paths import DATA
from diva_lab.world import World
from tools import pretrain


@pytest.fixture
def calls(monkeypatch):
    """The calls of `pretrain.main`, in order; nothing is trained."""
    calls = []
    for name in ("clip", "vae", "diffusion"):
        monkeypatch.setattr(
            pretrain, f"pretrain_{name}", lambda *args, _name=name, **more: calls.append((_name, *args, more))
        )
    monkeypatch.setattr(pretrain, "write_pairs", lambda *_: calls.append(("pairs",)))
    monkeypatch.setattr(pretrain, "write_record", lambda *_, **__: None)
    return calls


def test_models_of_another_world_are_made_in_their_folder_and_leave_the_shipped_pairs(calls, tmp_path):
    pretrain.main(["models", "--world", "2", "--sight", "0.01", "--out", str(tmp_path)])
    assert [call[0] for call in calls] == ["clip", "vae", "diffusion"]
    assert calls[0] == ("clip", tmp_path / "clip", World(2), 0, {"p": 0.01})
    assert all(call[1:] == (tmp_path / "diffusion", World(2), 0, {}) for call in calls[1:])


def test_one_part_is_made_alone(calls, tmp_path):
    pretrain.main(["clip", "--out", str(tmp_path)])
    assert calls == [("clip", tmp_path / "clip", World(0), 0, {"p": pretrain.SIGHT})]


def test_all_makes_the_shipped_pairs_too(calls, tmp_path):
    pretrain.main(["all", "--out", str(tmp_path)])
    assert [call[0] for call in calls] == ["clip", "vae", "diffusion", "pairs"]


def test_a_denoiser_with_a_text_tower_of_its_own_stands_beside_the_shipped_clip(calls, tmp_path):
    pretrain.main(["own-text", "--out", str(tmp_path)])
    text = ("clip", tmp_path / "text", World(0), 1, {"steps": (800, 0), "width": 96})
    assert calls == [text, ("diffusion", tmp_path / "diffusion", World(0), 1, {"text": "text"})]
    for part in ("clip/record.json", "diffusion/vae/config.json"):
        assert (tmp_path / part).read_bytes() == (DATA / "tiny" / part).read_bytes()


def test_a_denoiser_reads_prompts_by_the_tower_that_it_is_given(tmp_path, monkeypatch):
    world = World()
    monkeypatch.setattr(pretrain, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(pretrain, "SCENES", 64)
    monkeypatch.setattr(pretrain, "MinimalPairs", partial(pretrain.MinimalPairs, each=20))
    pretrain.pretrain_clip(tmp_path / "text", world, 1, steps=(1, 0), width=96)
    shutil.copytree(DATA / "tiny" / "diffusion" / "vae", tmp_path / "diffusion" / "vae")
    pretrain.pretrain_diffusion(tmp_path / "diffusion", world, 0, steps=1, batch=2, text="text")
    denoiser = load_denoiser(str(tmp_path / "diffusion"))
    assert denoiser.encode_text(["a photo of a red star"]).shape[2] == 96
