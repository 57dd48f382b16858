import numpy as np
import pytest
import torch
from small_models import write_clip, write_diffusion

from diva_lab.analysis.conflict import probe_gradients
from diva_lab.images import open_images
from diva_lab.training.settings import Settings
from diva_lab.training.stages import tune


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conflict")
    clip, diffusion = write_clip(folder / "clip"), write_diffusion(folder / "diffusion")
    models = {"encoder": str(clip), "denoiser": str(diffusion), "projector": "new"}
    settings = Settings(objective="naive", steps=2, batch=3, lora_rank=0, lr=0.0, precision="no", **models)
    return tune(settings, folder, probe=lambda at, parameters: probe_gradients(at, parameters, batches=3, bins=2))


def table(run, step: int):
    rows = run.probes()
    return rows[rows["step"] == step].set_index(["bin", "of", "measure"])["value"]


def test_a_probe_measures_every_objective_and_pair_in_every_bin(probed):
    values = table(probed, 2)
    for part in ("all", "0", "1"):
        for name in ("contrastive", "diva", "dcr"):
            assert {"loss", "norm", "snr", "noise_scale"} <= set(values[part][name].index)
        for pair in ("contrastive~diva", "contrastive~dcr", "diva~dcr"):
            record = values[part][pair]
            assert record["cos/low"] <= record["cos"] <= record["cos/high"]
            assert -1 <= record["other"] <= 1 and 0 <= record["magnitude"] <= 1
            assert {"cos/block0", "cos/kind/q", "cos/kind/fc2"} <= set(record.index)
    assert np.isfinite([values["all"][name]["curvature"] for name in ("contrastive", "diva", "dcr")]).all()


def test_a_probe_changes_nothing_and_repeats_its_values(probed):
    first, last = table(probed, 0), table(probed, 2)  # at a learning rate of zero nothing has moved
    assert first.drop("curvature", level=2).equals(last.drop("curvature", level=2))
    bends = [part.xs("curvature", level=2) for part in (first, last)]
    np.testing.assert_allclose(*bends, rtol=1e-4)


def test_a_bins_timesteps_are_its_own(small_settings, tmp_path):
    drawn = []

    def spy(at, parameters):
        for weights in ("1,0", "0,1"):
            step = at(0, timesteps=weights)
            drawn.append(step.draw_noisy(step.latents())[1])
        return []

    tune(small_settings, tmp_path, probe=spy)
    total = 1000
    assert all((low < total // 2).all() and (high >= total // 2).all() for low, high in (drawn[:2], drawn[2:]))


def test_a_probes_images_are_not_those_of_the_training(small_settings, tmp_path):
    batches = []
    tune(small_settings, tmp_path, probe=lambda at, parameters: batches.append(at(0).images) or [])
    source = open_images(small_settings.images, batches[0].shape[-1], small_settings.batch, small_settings.seed)
    trained = torch.cat([next(source) for _ in range(small_settings.steps)]).float() / 255
    assert len(batches[0]) == small_settings.batch
    assert not any(torch.equal(one, other) for one in batches[0] for other in trained)
