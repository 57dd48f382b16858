import shutil

import pytest
import torch
from small_models import write_diffusion, write_flux_vae

from diva_lab.models.denoiser import TARGETS, Denoiser
from diva_lab.models.diffusion import StableDiffusion
from diva_lab.models.registry import DENOISERS, denoiser_files, load_denoiser
from diva_lab.world import World, draw_scenes

PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")


@pytest.fixture(scope="module")
def denoiser(small_diffusion) -> Denoiser:
    return load_denoiser(small_diffusion)


@pytest.fixture(scope="module")
def velocity(tmp_path_factory) -> Denoiser:
    """The same weights under a scheduler that declares the output to be a velocity."""
    folder = tmp_path_factory.mktemp("models") / "velocity"
    return load_denoiser(write_diffusion(folder, prediction_type="v_prediction"))


@pytest.fixture(scope="module")
def noised(denoiser):
    random = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 4, 8, 8, generator=random) for _ in range(2))
    t = torch.tensor([0, 10, 500, 999])
    return x0, noise, t, denoiser.add_noise(x0, noise, t)


def context(denoiser: Denoiser) -> torch.Tensor:
    return denoiser.encode_text(["a photo of a disc", "", "two dots", "a photo of a red star"])


def test_noise_is_added_as_diffusers_scheduler_does(denoiser, noised):
    x0, noise, t, x_t = noised
    torch.testing.assert_close(x_t, denoiser.scheduler.add_noise(x0, noise, t))
    assert denoiser.timesteps == denoiser.scheduler.config.num_train_timesteps == 1000


def test_the_velocity_target_is_that_of_diffusers_scheduler(denoiser, noised):
    x0, noise, t, _ = noised
    torch.testing.assert_close(denoiser.target("velocity", x0, noise, t), denoiser.scheduler.get_velocity(x0, noise, t))
    assert torch.equal(denoiser.target("noise", x0, noise, t), noise)


def test_an_unknown_target_is_refused_with_the_known_ones(denoiser, noised):
    with pytest.raises(ValueError, match=f"unknown target 'x0'; expected one of {', '.join(TARGETS)}"):
        denoiser.target("x0", *noised[:3])


def test_predictions_are_noise_whatever_the_network_predicts(denoiser, velocity, noised):
    _, _, t, x_t = noised
    c = context(denoiser)
    output = denoiser.network(x_t, t, c).sample  # both folders hold the same network
    torch.testing.assert_close(denoiser.predict(x_t, t, c), output)
    level = denoiser.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(velocity.predict(x_t, t, c), level.sqrt() * output + (1 - level).sqrt() * x_t)


def test_a_perfect_velocity_is_turned_into_the_noise_itself(velocity, noised, monkeypatch):
    x0, noise, t, x_t = noised
    v = velocity.scheduler.get_velocity(x0, noise, t)
    monkeypatch.setattr(velocity.network, "forward", lambda *_, **__: type("Output", (), {"sample": v}))
    torch.testing.assert_close(velocity.predict(x_t, t, context(velocity)), noise, atol=1e-5, rtol=1e-5)


def test_an_unknown_prediction_type_is_refused(small_diffusion):
    parts = load_denoiser(small_diffusion)
    parts.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match=r"prediction_type 'sample'; expected epsilon or v_prediction"):
        StableDiffusion(parts.vae, parts.network, parts.text_encoder, parts.tokenizer, parts.scheduler)


def test_a_prediction_depends_on_its_own_row_only(denoiser, noised):
    _, _, t, x_t = noised
    c = context(denoiser)
    torch.testing.assert_close(denoiser.predict(x_t, t, c)[2:3], denoiser.predict(x_t[2:3], t[2:3], c[2:3]))


def test_a_prediction_carries_the_gradient_to_its_context_and_not_to_the_weights(denoiser, noised):
    _, _, t, x_t = noised
    c = context(denoiser).requires_grad_()
    denoiser.predict(x_t, t, c).square().mean().backward()
    assert (c.grad.abs().sum((1, 2)) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in denoiser.parameters())


def test_the_global_condition_enters_each_cross_attention_as_one_additive_bias(small_diffusion, noised):
    unet = load_denoiser(small_diffusion).network.double()
    layer = next(m for name, m in unet.named_modules() if name.endswith("attn2"))
    random = torch.Generator().manual_seed(0)
    u, v = torch.randn(26, 24, generator=random).double(), torch.randn(24, generator=random).double()
    x = torch.randn(1, 64, layer.to_q.in_features, generator=random).double()
    bias = layer.to_out[0](layer.to_v(v)) - layer.to_out[0].bias
    torch.testing.assert_close(layer(x, (u + v)[None]), layer(x, u[None]) + bias, atol=1e-12, rtol=0)


def test_a_denoiser_stays_frozen_in_evaluation_mode(denoiser):
    denoiser.train()
    torch.nn.ModuleList([denoiser]).train()
    assert not any(module.training for module in denoiser.modules())
    assert not any(p.requires_grad for p in denoiser.parameters())


def test_latents_are_the_posteriors_mean_or_with_a_generator_a_seeded_sample(denoiser):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, (one, same, other) = (
        denoiser.latents(images),
        (denoiser.latents(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)),
    )
    with torch.no_grad():
        posterior = denoiser.vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(mean, posterior.mean * denoiser.vae.config.scaling_factor)
    assert mean.shape == (3, 4, 8, 8) and torch.equal(one, same) and not torch.equal(one, other)
    deviation = (one - mean) / (posterior.std * denoiser.vae.config.scaling_factor)
    assert 0.8 < deviation.std() < 1.2


def test_latents_of_images_of_any_size_have_the_models_own(denoiser, small_diffusion):
    assert denoiser.px == 32 and denoiser.latents(torch.rand(1, 3, 50, 50)).shape == (1, 4, 8, 8)
    assert load_denoiser(small_diffusion, px=16).latents(torch.rand(1, 3, 50, 50)).shape == (1, 4, 4, 4)


def test_the_empty_prompt_is_that_of_the_text_encoder(denoiser):
    assert denoiser.empty.shape == (26, denoiser.width)
    torch.testing.assert_close(denoiser.empty, denoiser.encode_text(["a photo of a disc", ""])[1])
    assert not torch.allclose(denoiser.empty, denoiser.encode_text(["a photo of a disc"])[0])


def test_the_empty_prompt_is_the_same_whenever_it_is_first_used(small_diffusion):
    outside, inside = load_denoiser(small_diffusion).empty, load_denoiser(small_diffusion)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside.empty, outside)


def test_prompts_longer_than_the_context_are_cut(denoiser):
    assert denoiser.encode_text(["a photo of a disc " * 20]).shape == (1, 26, denoiser.width)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_are_images_and_depend_on_the_seed_alone(denoiser, guidance):
    prompts = ["a photo of a disc", "a photo of a star"]
    state = torch.get_rng_state()
    one, same, other = (denoiser.sample(prompts, guidance, steps=2, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (2, 3, 32, 32) and one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(state, torch.get_rng_state())


# --- bad input --------------------------------------------------------------------------------------------------


def test_an_unknown_denoiser_is_refused_with_the_known_ones(tmp_path):
    for name in ("sd99", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="unknown denoiser") as caught:
            load_denoiser(name)
        assert all(known in str(caught.value) for known in DENOISERS)


@pytest.mark.parametrize("part", PARTS)
def test_an_incomplete_folder_is_refused_saying_what_belongs_there(small_diffusion, tmp_path, part):
    folder = tmp_path / "diffusion"
    shutil.copytree(small_diffusion, folder, ignore=shutil.ignore_patterns(part))
    with pytest.raises(FileNotFoundError, match="fetch") as caught:
        load_denoiser(folder)
    assert str(folder) in str(caught.value) and all(name in str(caught.value) for name in PARTS)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("light-flux@", ValueError, "unknown denoiser 'light-flux@'.*light-flux@FOLDER"),
        ("light-flux@nowhere", FileNotFoundError, 'nowhere.*to hold vae: .*OWNER/NAME --include "vae/\\*"'),
        ("light@{}", ValueError, "takes a latent 4 wide, found 16"),
        ("light-flux-tiny@{}/vae", FileNotFoundError, "config.json.*to hold vae"),
    ],
)
def test_a_light_denoiser_refuses_a_folder_without_its_vae(tmp_path, name, error, message):
    with pytest.raises(error, match=message) as caught:
        load_denoiser(name.format(write_flux_vae(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_light_denoiser_needs_nothing_but_the_folder_vae(tmp_path):
    denoiser = load_denoiser(f"light-flux-tiny@{write_flux_vae(tmp_path)}", px=16)
    assert denoiser.latents(torch.rand(1, 3, 16, 16)).shape == (1, 16, 4, 4) and denoiser.width == 32 + 48
    assert [file.parent.name for file in denoiser_files(f"light-flux-tiny@{tmp_path}").values()] == ["vae"]


def test_a_known_denoiser_whose_folder_is_missing_is_refused_naming_the_folder(monkeypatch, tmp_path):
    monkeypatch.setitem(DENOISERS, "tiny", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="tiny") as caught:
        load_denoiser("tiny")
    assert str(tmp_path / "nowhere") in str(caught.value) and "unknown" not in str(caught.value)


# --- what is drawn ----------------------------------------------------------------------------------------------


def test_clean_latents_follow_from_the_noise_that_was_added(denoiser, noised):
    x0, noise, t, x_t = noised
    torch.testing.assert_close(denoiser.clean(x_t, noise, t), x0, rtol=1e-3, atol=1e-4)


def test_images_of_the_tiny_world_survive_the_autoencoder():
    images = torch.from_numpy(World().render(draw_scenes(8, 0))).permute(0, 3, 1, 2).float() / 255
    tiny = load_denoiser("tiny")
    decoded = tiny.decode(tiny.latents(images))
    assert (decoded - images).abs().mean() < 0.2 * (images.roll(1, 0) - images).abs().mean()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawing_ends_where_the_predictions_point_and_guidance_goes_further_from_the_empty_prompt(
    denoiser, monkeypatch, guidance
):
    random = torch.Generator().manual_seed(0)
    noise, told, plain = (torch.randn(2, 4, 8, 8, generator=random) for _ in range(3))

    def exact(x_t, t, context):
        signal, sigma = denoiser.signal[t].view(-1, 1, 1, 1), denoiser.sigma[t].view(-1, 1, 1, 1)
        return (x_t - signal * (told if context.any() else plain)) / sigma

    monkeypatch.setattr(denoiser, "predict", exact)
    drawn = denoiser.draw(noise, {"context": torch.ones(2, 1, denoiser.width)}, guidance, steps=5)
    torch.testing.assert_close(drawn, plain + guidance * (told - plain), rtol=1e-3, atol=1e-3)
