"""The models of the rivals: a decoder of CLIP's embeddings and an image encoder without text."""

import pytest
import torch

from diva_lab.models.registry import load_denoiser
from diva_lab.models.vision import load_vision
from diva_lab.training.settings import Settings
from diva_lab.training.stages import tune
from diva_lab.world import World
from tools import pretrain, rivals


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few scenes, and checkpoints elsewhere."""
    monkeypatch.setattr(rivals, "SCENES", 64)
    monkeypatch.setattr(pretrain, "RUNS", tmp_path / "runs")
    return tmp_path


def test_a_decoder_is_made_in_stable_unclips_layout_and_tunes_the_tiny_clip(small):
    rivals.pretrain_unclip(small / "unclip", World(), 0, steps=2, batch=8)
    denoiser = load_denoiser(small / "unclip")
    assert denoiser.labelled and denoiser.embedding_width == 128 and denoiser.native == "velocity"
    mean, std = denoiser.normalizer.mean[0], denoiser.normalizer.std[0]
    embeddings = rivals.embed_pool(pretrain.Pool(World(), pretrain.draw_scenes(64, (0, 1))))
    torch.testing.assert_close(mean, embeddings.mean(0), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(std, embeddings.std(0), atol=2e-3, rtol=2e-3)
    run = tune(Settings(objective="un2clip", denoiser=str(small / "unclip"), steps=1, batch=2), small / "runs")
    assert run.done and run.metrics()["norm_rec"].gt(0).all()


def test_an_image_encoder_is_made_in_dinov2s_layout_and_teaches_the_tiny_clip(small):
    rivals.pretrain_vision(small / "vision", World(), 0, steps=2, batch=8)
    model = load_vision(small / "vision")
    assert model.px == 32 and model.encode_image(torch.rand(2, 3, 32, 32)).shape == (2, 96)
    run = tune(Settings(objective="kuea", teacher=str(small / "vision"), steps=1, batch=2), small / "runs")
    assert run.done and run.metrics()["kernel"].gt(0).all()


def test_a_stopped_training_goes_on_to_the_same_weights(small):
    rivals.pretrain_vision(small / "one", World(), 0, steps=2, batch=8)
    before = (small / "one" / "model.safetensors").read_bytes()
    rivals.pretrain_vision(small / "two", World(), 0, steps=2, batch=8)  # from its last checkpoint
    assert (small / "two" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("argv, made", [([], ["unclip", "vision"]), (["vision"], ["vision"])])
def test_the_command_makes_all_or_one(monkeypatch, tmp_path, argv, made):
    calls = []
    for name in ("unclip", "vision"):
        monkeypatch.setattr(rivals, f"pretrain_{name}", lambda *args, _name=name: calls.append((_name, *args)))
    rivals.main([*argv, "--out", str(tmp_path), "--threads", "1"])
    assert calls == [(name, tmp_path / name, World(), 0) for name in made]
