"""Every family of encoders with every family of denoisers: both stages and the evaluation, on small random models."""

import functools
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from run_checks import kill_and_resume, same_weights
from small_models import (
    UNET1,
    UNET2,
    write_clip,
    write_diffusion,
    write_diffusion3,
    write_flux_vae,
    write_transformers_clip,
)

from diva_lab.evaluation import world
from diva_lab.evaluation.world import world_report
from diva_lab.machine import generator
from diva_lab.models.diffusion import StableDiffusion
from diva_lab.models.encoders import load_encoder
from diva_lab.models.flow import Light, StableDiffusion3
from diva_lab.models.lora import visual_weights
from diva_lab.models.registry import load_denoiser
from diva_lab.provenance import sha256
from diva_lab.training.build import build_denoiser, tuned_encoder, weight_hashes
from diva_lab.training.export import export
from diva_lab.training.presets import PRESETS, RECIPES, preset, stages
from diva_lab.training.settings import Settings
from diva_lab.training.stages import align, find_run, tune
from diva_lab.world import World

ENCODERS = {
    "open_clip ViT": write_clip,  # OpenAI's layout, GELU
    "CLIP, quick GELU": partial(write_transformers_clip, kind="clip", act="quick_gelu"),  # OpenAI, MetaCLIP, DFN
    "SigLIP": partial(write_transformers_clip, kind="siglip", act="gelu_pytorch_tanh"),  # attention pooling
}
DENOISERS = {
    "SD 1, epsilon": (partial(write_diffusion, unet=UNET1), StableDiffusion),
    "SD 2, epsilon": (partial(write_diffusion, unet=UNET2), StableDiffusion),
    "SD 2, v": (partial(write_diffusion, unet=UNET2, prediction_type="v_prediction"), StableDiffusion),
    "SD 3, flow": (write_diffusion3, StableDiffusion3),
    "light": (None, Light),
    "light-flux": (None, Light),
}
FLOWS = ("SD 3, flow", "light", "light-flux")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    written = {name: str(write(root / name)) for name, write in ENCODERS.items()}
    written |= {name: str(write(root / name)) for name, (write, _) in DENOISERS.items() if write}
    return written | {"light": "light-tiny", "light-flux": f"light-flux-tiny@{write_flux_vae(root / 'flux')}"}


@pytest.fixture(scope="module")
def flows(models):
    return {name: load_denoiser(models[name]) for name in FLOWS}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """`world_report` on few scenes and few pairs."""
    cache, drawn = tmp_path_factory.mktemp("pairs"), functools.cache(world.world_scenes.__wrapped__)

    def few(encoder) -> dict[str, float]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(world, "SCENES", 200)
            patch.setattr(world, "world_scenes", drawn)
            patch.setitem(world.WORLD_SPLITS, "choose", (4, 2000, 9))
            return world_report(encoder, World(px=8), "choose", cache=cache)

    return few


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_both_stages_run_and_move_what_they_should(models, encoder, denoiser, tmp_path):
    light = denoiser.startswith("light")
    objective = "genhancer" if light else "dcr"
    settings = Settings(
        encoder=models[encoder], denoiser=models[denoiser], objective=objective, steps=2, batch=2, lr=1e-3
    )
    stage1 = align(replace(settings, projector="new"), tmp_path)
    parts = {name.partition(".")[0] for name in stage1.weights()}
    assert parts == ({"conditioner", "network"} if light else {"conditioner"})
    stage2 = tune(replace(settings, projector=str(stage1.folder)), tmp_path)
    assert all(name.startswith("encoder.") for name in stage2.weights())
    assert stage2.metrics()["grad_norm"].gt(0).all() and stage2.metrics()["loss"].notna().all()
    images = torch.rand(2, 3, 32, 32)
    before = tune(replace(settings, objective="none"), tmp_path)
    assert not torch.equal(tuned_encoder(stage2).encode_image(images), tuned_encoder(before).encode_image(images))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_tuned_encoder_of_every_family_is_evaluated(models, encoder, report, tmp_path):
    settings = Settings(encoder=models[encoder], denoiser=models["SD 1, epsilon"], projector="new", steps=1, batch=2)
    scores = report(tuned_encoder(tune(settings, tmp_path)))
    assert scores["zeroshot"] < 0.35 and scores["probe/mean"] > 0.2  # random weights know no class, but see something


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoisers_family_is_read_from_its_folder(models, name):
    assert type(load_denoiser(models[name])) is DENOISERS[name][1]


# --- the presets ------------------------------------------------------------------------------------------------

FIRST = tuple(f"{name}-{recipe}" for name in ("openai-l14", "siglip-so400m") for recipe in RECIPES)  # of each family
SMALL = {"images": "world", "steps": 2, "warmup": 0, "batch": 2, "accumulate": 1, "vae_px": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where the presets' runs are: those that differ in size alone are here the same, and are made once."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    "name", [name if name.startswith(FIRST) else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
)
def test_every_preset_trains_a_small_model_of_its_family_which_is_then_evaluated(name, models, report, runs):
    encoder = models["SigLIP" if "siglip" in name else "CLIP, quick GELU"]
    denoiser = models[preset(name).denoiser if preset(name).denoiser.startswith("light") else "SD 2, epsilon"]
    small = SMALL | {"encoder": encoder, "denoiser": denoiser}
    if 1 in stages(name):
        stage1 = align(replace(preset(name, 1), **small), runs)
        assert stage1.metrics()["grad_norm"].gt(0).all()
        small["projector"] = str(stage1.folder)
    run = tune(replace(preset(name), **small), runs, report)
    assert {key for key, value in asdict(preset(name)).items() if run.settings[key] != value} <= small.keys()
    assert run.metrics()["grad_norm"].gt(0).all() and run.metrics()["loss"].notna().all()
    parts = {key.partition(".")[0] for key in run.weights()}
    assert parts == ({"encoder", "conditioner"} if preset(name).train_projector else {"encoder"})
    before, after = visual_weights(load_encoder(encoder)), visual_weights(tuned_encoder(run))
    assert any(not torch.equal(weight, before[key]) for key, weight in after.items())
    scores = run.evaluations()
    assert list(scores["step"]) == [0, 2] and scores[["pairs/mean", "probe/mean", "zeroshot"]].notna().all(axis=None)


# --- flow matching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_mixes_linearly_and_its_velocity_gives_back_the_noise(flows, name, monkeypatch):
    denoiser = flows[name]
    x0, noise = torch.randn(2, 3, denoiser.vae.config.latent_channels, 8, 8, generator=generator("flow")).unbind(0)
    t = torch.tensor([0, 499, 999])
    sigma = torch.tensor([0.001, 0.5, 1.0]).view(-1, 1, 1, 1)
    x_t = denoiser.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, (1 - sigma) * x0 + sigma * noise)
    velocity = denoiser.target("velocity", x0, noise, t)
    torch.testing.assert_close(velocity, noise - x0)
    monkeypatch.setattr(denoiser, "_run", lambda *_: velocity)
    context = torch.zeros(3, 1, denoiser.width)
    torch.testing.assert_close(denoiser.predict(x_t, t, context), noise, atol=1e-5, rtol=1e-5)
    assert torch.equal(denoiser.predict(x_t, t, context, "native"), velocity)


@pytest.mark.parametrize("name", FLOWS)
def test_every_condition_reaches_a_flows_prediction_with_a_gradient(flows, name):
    denoiser = flows[name]
    x_t = torch.randn(2, denoiser.vae.config.latent_channels, 7, 8, generator=generator("odd"))
    if name == "SD 3, flow":
        x_t = x_t[:, :, :6]  # it takes even sizes alone, as released
    context = torch.randn(4, 1, denoiser.width, generator=generator("context")).requires_grad_()
    out = denoiser.predict(x_t, torch.tensor([100, 900]), context)
    assert out.shape == (4, *x_t.shape[1:])
    assert not torch.allclose(out[0], out[1])
    (gradient,) = torch.autograd.grad(out[1].square().sum(), context)
    parts = gradient.split([*denoiser.widths.values()] or [denoiser.width], -1)
    assert all(part[1].abs().sum() > 0 and part[[0, 2, 3]].abs().sum() == 0 for part in parts)


def test_stable_diffusion_3_encodes_prompts_and_draws_as_its_pipeline_does(flows):
    denoiser = flows["SD 3, flow"]
    pipeline = denoiser._pipeline()
    tokens, _, pooled, _ = pipeline.encode_prompt([""], None, None, do_classifier_free_guidance=False)
    assert torch.equal(denoiser.empty, tokens[0])
    x_t, t, context = torch.randn(1, 4, 8, 8), torch.tensor([249]), tokens
    with torch.no_grad():
        velocity = denoiser.network(x_t, context, pooled, torch.tensor([250.0])).sample
        torch.testing.assert_close(denoiser.predict(x_t, t, context), x_t + 0.75 * velocity)
    assert denoiser.sample(["a red circle"], steps=2).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(("name", "shift", "scale"), [("SD 3, flow", 0.1, 0.5), ("light-flux", 0.1159, 0.3611)])
def test_latents_are_shifted_and_scaled_as_the_autoencoder_says(flows, name, shift, scale):
    denoiser = flows[name]
    images = torch.rand(1, 3, 32, 32)
    mean = denoiser.vae.encode(images * 2 - 1).latent_dist.mean
    torch.testing.assert_close(denoiser.latents(images), (mean - shift) * scale)


@pytest.mark.parametrize("name", ["light", "light-flux"])
def test_the_light_denoiser_has_genhancers_two_joint_and_four_single_blocks(flows, name):
    network = flows[name].network
    assert (len(network.transformer_blocks), len(network.single_transformer_blocks)) == (2, 4)


def test_a_light_denoiser_learns_in_stage_1_and_stays_as_it_is_in_stage_2(tmp_path):
    settings = Settings(
        denoiser="light-tiny", objective="genhancer", projector="new", draws=1, batch=16, steps=40, lr=3e-3
    )
    stage1 = align(settings, tmp_path)
    loss = stage1.metrics()["loss"]
    assert loss.tail(10).mean() < 0.8 * loss.head(10).mean()
    learned = build_denoiser(replace(settings, projector=str(stage1.folder)))
    for name, weight in learned.network.state_dict().items():
        assert torch.equal(weight, stage1.weights()[f"network.{name}"]), name
    assert not any(p.requires_grad for p in learned.parameters())


def test_a_light_denoiser_without_stage_1_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"light-tiny.*no weights yet.*align"):
        tune(Settings(denoiser="light-tiny", projector="new"), tmp_path)
    stage1 = align(Settings(projector="new", steps=1, batch=2), tmp_path)  # of another denoiser
    with pytest.raises(ValueError, match=r"does not fit.*light-tiny"):
        tune(Settings(denoiser="light-tiny", projector=str(stage1.folder)), tmp_path)


def test_a_denoiser_with_two_projectors_resumes_exports_and_is_known_by_its_weights(tmp_path):
    denoiser = f"light-flux-tiny@{write_flux_vae(tmp_path / 'flux')}"
    settings = Settings(
        denoiser=denoiser, objective="genhancer", projector="new", draws=1, batch=2, steps=3, evaluate_every=1,
        save_every=1, precision="no",
    )  # fmt: skip
    whole, resumed = kill_and_resume(align, settings, tmp_path, stop=2)
    assert same_weights(whole, resumed)
    second = replace(settings, projector=str(whole.folder))
    hashes = weight_hashes(second)
    assert hashes["denoiser"].keys() == {"vae/diffusion_pytorch_model.safetensors"}
    assert hashes["projector"] == {"weights.safetensors": sha256(whole.folder / "checkpoint" / "weights.safetensors")}
    run, again = kill_and_resume(tune, second, tmp_path, stop=2)
    assert same_weights(run, again) and run.environment["weights"] == hashes
    export(run, tmp_path / "exported")
    images = torch.rand(2, 3, 32, 32)
    exported = load_encoder(tmp_path / "exported" / "open_clip")
    torch.testing.assert_close(exported.encode_image(images), tuned_encoder(run).encode_image(images))
    with pytest.raises(ValueError, match=r"does not fit.*light-tiny"):  # one projector, not two
        tune(replace(second, denoiser="light-tiny"), tmp_path)
    write_flux_vae(tmp_path / "flux", seed=1)
    assert weight_hashes(second)["denoiser"] != hashes["denoiser"]
    assert find_run(second, tmp_path / "whole") != run  # the same settings, another autoencoder


def test_genhancer_on_a_model_of_noise_is_its_own_loss(tmp_path):
    settings = Settings(steps=1, batch=2, draws=1, precision="no")
    losses = {
        name: tune(replace(settings, objective=name), tmp_path).metrics()["loss"][0] for name in ("diva", "genhancer")
    }
    assert losses["diva"] == losses["genhancer"]


def test_another_kind_of_pipeline_is_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match=r"FluxPipeline.*StableDiffusion3Pipeline"):
        load_denoiser(tmp_path)
