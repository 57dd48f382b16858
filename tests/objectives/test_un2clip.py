from dataclasses import replace

import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from one_step import OneStep, open_lora
from small_models import write_clip_of, write_unclip

from diva_lab.machine import generator
from diva_lab.models.registry import denoiser_files, load_denoiser, reads_embeddings
from diva_lab.objectives.diva import reconstruction
from diva_lab.objectives.timesteps import draw_timesteps
from diva_lab.training.build import build_denoiser, weight_hashes
from diva_lab.training.stages import align, tune


@pytest.fixture(scope="module")
def one(settings_of) -> OneStep:
    made = OneStep.of(settings_of("un2clip"))
    open_lora(made.encoder)
    return made


@pytest.mark.parametrize("level", [0, 300, 999])
def test_labels_are_those_of_diffusers_own_pipeline(small_unclip, level):
    random = torch.Generator().manual_seed(0)
    embedding, noise = torch.randn(2, 3, 48, generator=random)
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(small_unclip)
    theirs = pipeline.noise_image_embeddings(embedding, level, noise)
    torch.testing.assert_close(load_denoiser(small_unclip).labels(embedding, level, noise), theirs)
    assert theirs.shape == (3, 96)


def test_a_prediction_is_that_of_the_network_alone_with_the_empty_prompt(small_unclip):
    denoiser = load_denoiser(small_unclip)
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(small_unclip)
    random = torch.Generator().manual_seed(0)
    x_t, t, labels = torch.randn(3, 4, 8, 8, generator=random), torch.tensor([10, 500, 990]), torch.randn(3, 96)
    with torch.no_grad():
        length = pipeline.tokenizer.model_max_length
        ids = pipeline.tokenizer([""], padding="max_length", max_length=length, return_tensors="pt").input_ids
        context = pipeline.text_encoder(ids)[0].expand(3, -1, -1)
        theirs = pipeline.unet(x_t, t, context, class_labels=labels).sample
        ours = denoiser.predict(x_t, t, torch.zeros(3, 1, denoiser.width), "native", labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    other = denoiser.predict(x_t, t, torch.zeros(3, 1, denoiser.width), "native", labels + 1)
    assert (other - ours).abs().max() > 1e-4


def test_the_loss_is_the_decoders_own(one):
    """A second way to the same number: v of each draw, one image at a time."""
    random, denoiser, settings = generator("a test", 0), one.denoiser, one.settings
    x0 = denoiser.latents(one.images()).repeat(2, 1, 1, 1)
    t = draw_timesteps(settings.timesteps, 6, 1000, random)
    noise, own = torch.randn(x0.shape, generator=random), torch.randn(6, 48, generator=random)
    signal, sigma = (part[t].view(-1, 1, 1, 1) for part in (denoiser.signal, denoiser.sigma))
    with torch.no_grad():
        f = one.encoder.features(one.images()).embedding.repeat(2, 1)
        labels = denoiser.labels(f, settings.embedding_noise, own)
        context = denoiser.empty[None]
        predicted = [
            denoiser.network(x, k[None], context, class_labels=label[None]).sample
            for x, k, label in zip((signal * x0 + sigma * noise).split(1), t, labels, strict=True)
        ]
    losses = reconstruction(torch.cat(predicted), signal * noise - sigma * x0).view(2, 3).mean(0)
    torch.testing.assert_close(one.terms()["rec"], losses, rtol=1e-4, atol=1e-6)


def test_noise_on_the_embedding_changes_the_loss_and_its_level_is_checked(one):
    assert not torch.allclose(one.terms()["rec"], one.terms(embedding_noise=500)["rec"])
    with pytest.raises(ValueError, match="embedding_noise=1000"):
        replace(one.settings, embedding_noise=1000)


def test_its_run_records_encoder_and_decoder_and_reads_no_projector(settings_of, tmp_path):
    settings = replace(settings_of("un2clip"), projector="no-such-projector", steps=2)
    run = tune(settings, tmp_path)
    assert set(run.environment["weights"]) == {"encoder", "denoiser"} == set(weight_hashes(settings))
    assert "image_normalizer/diffusion_pytorch_model.safetensors" in run.environment["weights"]["denoiser"]


def test_a_folder_says_whether_it_is_a_decoder(small_unclip, small_diffusion):
    assert reads_embeddings(str(small_unclip)) and not reads_embeddings(str(small_diffusion))
    assert not reads_embeddings("light-tiny")
    assert any(name.startswith("image_normalizer/") for name in denoiser_files(str(small_unclip)))


# --- what does not fit ------------------------------------------------------------------------------------------


def test_a_decoder_under_another_objective_is_refused_and_the_other_way_around(settings_of, small_unclip, tmp_path):
    with pytest.raises(ValueError, match=r"'diva': denoiser .* reads CLIP's embedding by no projector.* un2clip"):
        build_denoiser(replace(settings_of("diva"), denoiser=str(small_unclip)))
    with pytest.raises(ValueError, match=r"'un2clip': denoiser .* is no unCLIP decoder.* unclip-l14"):
        build_denoiser(replace(settings_of("un2clip"), denoiser=settings_of("diva").denoiser))
    with pytest.raises(ValueError, match="by no projector"):
        align(settings_of("un2clip"), tmp_path)


def test_an_encoder_of_another_width_is_refused(settings_of, tmp_path):
    wide = write_clip_of(
        tmp_path / "clip", {"embed_dim": 40, "vision_cfg": {"layers": 1, "width": 64},
                            "text_cfg": {"layers": 1, "width": 32, "heads": 2}}
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"embeddings 48 wide; those of encoder .* are 40"):
        tune(replace(settings_of("un2clip"), encoder=str(wide)), tmp_path)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"class_embed_type": None}, "class_embed_type = None"),
        ({"projection_class_embeddings_input_dim": 80}, "label 80 wide, found 96"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path, unet, message):
    with pytest.raises(ValueError, match=message):
        load_denoiser(write_unclip(tmp_path / "unclip", **unet))


def test_it_draws_from_no_prompt(small_unclip):
    with pytest.raises(ValueError, match="from embeddings, not from prompts"):
        load_denoiser(small_unclip).sample(["a photo"])
