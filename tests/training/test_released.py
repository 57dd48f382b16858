"""Each setting by which the released code differs changes what it says; libraries' own functions are the reference."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from image_writers import pixels
from one_step import OneStep, pictures
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from run_checks import kill_and_resume, same_records, same_weights
from small_models import write_transformers_clip
from torchvision.transforms import v2
from transformers import get_cosine_schedule_with_warmup

from diva_lab.image_files import crop_square, draw_box
from diva_lab.images import augment_pixels, open_images
from diva_lab.machine import generator
from diva_lab.models.conditions import Conditioner
from diva_lab.models.encoders import Encoder, Features, load_encoder
from diva_lab.models.lora import make_trainable
from diva_lab.models.registry import load_denoiser
from diva_lab.training.batches import Batches, Pixels
from diva_lab.training.build import build_denoiser
from diva_lab.training.presets import compare_presets, origin, preset, replace_settings
from diva_lab.training.settings import Settings, learning_rate
from diva_lab.training.stages import align, tune


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Encoder:
    folder = tmp_path_factory.mktemp("released") / "siglip"
    return load_encoder(write_transformers_clip(folder, kind="siglip", act="gelu_pytorch_tanh"))


@pytest.fixture
def denoiser():
    return load_denoiser("tiny")


# --- the objective and the rate ---------------------------------------------------------------------------------


def test_draws_are_added_with_their_weights():
    one = OneStep.of(Settings(objective="diva", batch=2, seed=3))
    first, second, both = (one.terms(draw_weights=weights)["rec"] for weights in ("1,0", "0,1", "5,1"))
    torch.testing.assert_close(both, 5 * first + second)
    torch.testing.assert_close(one.terms()["rec"], (first + second) / 2)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("weights", ["5", "5,1,1", "a,b", "-1,2", "0,0", "nan,1", "inf,1", ","])
def test_weights_that_do_not_fit_the_draws_are_refused(weights):
    with pytest.raises(ValueError, match=r"draw_weights=.*expected 2 numbers"):
        Settings(draw_weights=weights)


def test_the_rate_rises_from_zero_as_the_trainers_schedule_does():
    settings = Settings(steps=460, lr=1e-4, warmup=23, warmup_zero=True, schedule="cosine")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 23, 460)
    for step in range(460):
        assert learning_rate(settings, step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()
    assert learning_rate(settings, 0) == 0 < learning_rate(replace(settings, warmup_zero=False), 0)


# --- what the models read ---------------------------------------------------------------------------------------


def test_the_vae_sees_less_contrast(denoiser):
    seen, encode = [], denoiser.vae.encode
    denoiser.vae.encode = lambda x: seen.append((x + 1) / 2) or encode(x)
    denoiser.vae_input = "imagenet"
    black_and_white = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    denoiser.latents(black_and_white)
    assert (round(seen[-1].min().item(), 3), round(seen[-1].max().item(), 3)) == (0.064, 0.927)
    reference = v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)(black_and_white)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(seen[-1], reference * std + mean)


def test_noise_is_added_in_bfloat16_as_diffusers_adds_it(denoiser):
    scheduler = DDPMScheduler.from_config(denoiser.scheduler.config)
    x0, noise = torch.randn(2, 40, 4, 8, 8, generator=generator("noise")).unbind()
    t = torch.cat([torch.arange(4), torch.linspace(4, 999, 36).long()])
    denoiser.noise_precision = "bf16"
    halves = x0.bfloat16(), noise.bfloat16(), t
    found = denoiser.add_noise(x0, noise, t)
    assert torch.equal(found, scheduler.add_noise(*halves).float())
    assert torch.equal(denoiser.target("velocity", x0, noise, t), scheduler.get_velocity(*halves).float())
    assert torch.equal(found[:2], x0[:2].bfloat16().float()), "sigma of the first two timesteps is 0"
    denoiser.noise_precision = "float32"
    assert (denoiser.add_noise(x0, noise, t) - found).abs().max() > 1e-3


def test_the_prompts_padding_is_hidden_from_the_text_encoder():
    plain, masked = (build_denoiser(Settings(prompt_mask=mask)) for mask in (False, True))
    tokens = masked.tokenizer(
        [""], padding="max_length", max_length=masked.tokenizer.model_max_length, return_tensors="pt"
    )
    end = int(tokens.attention_mask.sum())
    with torch.no_grad():
        reference = masked.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0]
    assert torch.equal(masked.empty, reference)
    torch.testing.assert_close(masked.empty[:end], plain.empty[:end], atol=1e-5, rtol=1e-5)
    assert (masked.empty[end:] - plain.empty[end:]).norm() > 0.1 * plain.empty[end:].norm()


def test_a_denoiser_without_such_a_mask_refuses_it():
    with pytest.raises(ValueError, match=r"prompt_mask=True: denoiser 'light-tiny'"):
        build_denoiser(Settings(denoiser="light-tiny", prompt_mask=True, projector="new"))


def test_the_encoders_input_is_resized_without_antialiasing(siglip):
    images = torch.rand(2, 3, 80, 80, generator=generator("resize"))
    found = Pixels(Settings(encoder_resize="bilinear"), siglip)(images)
    small = v2.Resize((siglip.px, siglip.px), antialias=False)(images)
    torch.testing.assert_close(found, (small - siglip.mean) / siglip.std)
    torch.testing.assert_close(Pixels(Settings(), siglip)(images), siglip.preprocess(images))
    assert (found - siglip.preprocess(images)).abs().mean() > 0.05


def test_siglip_is_fed_with_openais_mean_and_deviation_in_training_alone(siglip):
    images = pictures(2).float() / 255
    found = Pixels(Settings(normalise="openai"), siglip)(images)
    torch.testing.assert_close(found, v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)(images))
    torch.testing.assert_close(siglip.preprocess(images), images * 2 - 1)


def test_the_augmentation_takes_the_normalised_input(siglip, monkeypatch):
    images = pictures(3).float() / 255
    settings = Settings(augment_normalised=True, normalise="openai")
    feed = Pixels(settings, siglip)
    view = feed.augment(images, generator("augment"))
    inner = augment_pixels(feed(images), generator("augment"))
    torch.testing.assert_close(feed(view), inner, atol=1e-5, rtol=1e-5)
    assert inner.min() >= 0 and inner.max() <= 1, "the jitter clamps what was normalised"
    assert feed(images).min() < -1.5 and feed(images).max() > 1.5
    monkeypatch.setattr("diva_lab.images.draw_box", lambda width, height, *_: (0, 0, width, height))
    turned, still = (augment_pixels(feed(images), generator("augment"), flips) for flips in (True, False))
    for a, b in zip(turned, still, strict=True):
        assert any(torch.equal(a, b.flip(axes)) for axes in ((), (2,), (1,), (1, 2)))
    assert not torch.equal(turned, still)


def test_the_jitter_is_in_the_ranges_of_the_recipe(monkeypatch):
    drawn = {name: [] for name in ("brightness", "contrast", "saturation", "hue")}
    for name, values in drawn.items():
        adjust = f"diva_lab.images.transforms.adjust_{name}"
        monkeypatch.setattr(adjust, lambda x, factor, values=values: values.append(factor) or x)
    augment_pixels(torch.rand(400, 3, 4, 4, generator=generator("x")), generator("jitter"))
    for name, (low, high) in {"hue": (-0.05, 0.05)}.items() | dict.fromkeys(list(drawn)[:3], (0.9, 1.1)).items():
        width = high - low
        assert low <= min(drawn[name]) < low + 0.02 * width and high - 0.02 * width < max(drawn[name]) <= high, name


# --- images -----------------------------------------------------------------------------------------------------


def test_the_loaders_crop_is_torchvisions_where_nothing_is_drawn():
    photo = pixels(1, (60, 90))  # 3 : 2, for which no draw fits
    crop = v2.RandomResizedCrop(32, scale=(0.9, 1), interpolation=v2.InterpolationMode.BICUBIC)
    assert np.array_equal(np.asarray(crop_square(photo, 32, np.random.default_rng(0))), np.asarray(crop(photo)))
    assert draw_box(90, 60, np.random.default_rng(0)) == (5, 0, 80, 60)
    assert draw_box(60, 90, np.random.default_rng(0)) == (0, 5, 60, 80)
    assert draw_box(90, 60, np.random.default_rng(0), (0.9, 1.1)) == (12, 0, 66, 60)


def test_the_loaders_crop_takes_torchvisions_part_of_a_square():
    boxes = np.array([draw_box(200, 200, np.random.default_rng(i)) for i in range(2000)])
    crop = v2.RandomResizedCrop(32, scale=(0.9, 1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [crop.make_params([Image.new("RGB", (200, 200))]) for _ in range(2000)]
    theirs = np.array([[d["left"], d["top"], d["width"], d["height"]] for d in drawn])
    for k in range(4):
        assert abs(boxes[:, k].mean() - theirs[:, k].mean()) < 4 * theirs[:, k].std() / math.sqrt(1000)
        assert np.std(boxes[:, k]) == pytest.approx(np.std(theirs[:, k]), rel=0.1)
    left, top, w, h = boxes[7]
    photo = pixels(3, (200, 200))
    part = photo.crop((left, top, left + w, top + h)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(crop_square(photo, 32, np.random.default_rng(7))), np.asarray(part))


@pytest.mark.parametrize("kind", ["world", "folder"])
def test_a_crop_belongs_to_its_sample_so_that_a_stopped_run_sees_it_again(kind, tmp_path):
    for i in range(7):
        pixels(i, (40, 50)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    source = "world" if kind == "world" else str(tmp_path)
    stream = open_images(source, 32, 2, 0, crop=(0, 0))
    first = [next(stream) for _ in range(3)]
    place = stream.position
    later = [next(stream) for _ in range(4)]
    again = open_images(source, 32, 2, 0, place, crop=(0, 0))
    assert all(torch.equal(a, next(again)) for a in later)
    whole = open_images(source, 32, 2, 0)
    other = open_images(source, 32, 2, 0, crop=(1, 0))
    assert not torch.equal(first[0], next(whole)) and not torch.equal(first[0], next(other))


def test_processes_share_their_samples_but_not_their_crops():
    settings = Settings(batch=3, shared_samples=True)
    one, two = (next(Batches(settings, 32, rank=rank, processes=2))[0] for rank in (0, 1))
    assert torch.equal(one, two)
    one, two = (next(Batches(replace(settings, loader_crop=True), 32, rank=r, processes=2))[0] for r in (0, 1))
    assert not torch.equal(one, two)
    apart = replace(settings, shared_samples=False)
    one, two = (next(Batches(apart, 32, rank=rank, processes=2))[0] for rank in (0, 1))
    assert not torch.equal(one, two)


# --- conditions and LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("recap", 76), ("recap-half", 8)])
def test_tokens_are_drawn_for_each_image_and_with_replacement(name, count):
    patches = torch.arange(16.0).view(1, 16, 1).expand(3, 16, 2)  # token i of every image is i
    features, empty = Features(torch.zeros(3, 2), patches), torch.zeros(77, 2)
    drawn = {}
    for each in (False, True):
        conditioner = Conditioner(name, 2, 2, projection="linear", each=each)
        with torch.no_grad():
            conditioner.projector.weight.copy_(torch.eye(2))
            conditioner.projector.bias.zero_()
            drawn[each] = conditioner(features, empty, generator(name))[:, 1:, 0]  # [3, count]
    assert drawn[True].shape == (3, count)
    assert torch.equal(drawn[False][0], drawn[False][1]) and not torch.equal(drawn[True][0], drawn[True][1])
    if name == "recap-half":
        assert all(len(set(row.tolist())) == count for row in drawn[False]), "none twice"
        assert any(len(set(row.tolist())) < count for row in drawn[True])


def test_each_draw_of_noise_has_a_condition_of_its_own():
    one = OneStep.of(Settings(objective="diva", condition="recap", batch=2, projector="shipped"))
    seen, predict = [], one.denoiser.predict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            one.denoiser,
            "predict",
            lambda x, t, context, **more: seen.append(context.detach()) or predict(x, t, context, **more),
        )
        for draws in ("batch", "each"):
            one.terms(token_draws=draws)
    (same, other), (first, second) = (context.unflatten(0, (2, 2)) for context in seen)
    assert torch.equal(same, other) and not torch.equal(first, second)


def test_released_lora_leaves_out_siglips_pooling_attention(siglip):
    opened = {}
    for targets in ("all", "released"):
        encoder = copy.deepcopy(siglip)
        make_trainable(encoder, targets=targets)
        opened[targets] = {name for name, p in encoder.named_parameters() if p.requires_grad}
        encoder.features(torch.rand(2, 3, 32, 32)).embedding.square().sum().backward()
        assert all(p.grad is not None for name, p in encoder.named_parameters() if name in opened[targets])
    missing = opened["all"] - opened["released"]
    assert missing and all(".attn_pool." in name for name in missing)
    pooling = {name.split("attn_pool.")[1] for name in opened["released"] if ".attn_pool." in name}
    assert {name.split(".")[0] for name in pooling} == {"mlp", "proj"}
    assert [name for name in pooling if name.startswith("proj")] == ["proj.bias"]
    clip = [load_encoder("tiny") for _ in range(2)]
    for encoder, targets in zip(clip, ("all", "released"), strict=True):
        make_trainable(encoder, targets=targets)
    one, two = ({n for n, p in encoder.named_parameters() if p.requires_grad} for encoder in clip)
    assert one == two, "every matrix of a CLIP"


# --- whole recipes ----------------------------------------------------------------------------------------------

TINY = {"encoder": "tiny", "denoiser": "tiny", "images": "world", "batch": 2, "accumulate": 1, "vae_px": 0, "steps": 2,
        "evaluate_every": 1, "save_every": 1, "precision": "no"}  # fmt: skip


@pytest.mark.parametrize("recipe", ["diva", "dcr"])
def test_a_released_recipe_goes_on_to_the_bit(recipe, tmp_path):
    settings = replace_settings(preset(f"openai-l14-{recipe}-released"), TINY)
    if recipe == "dcr":
        stage1 = replace_settings(preset("openai-l14-dcr-released", 1), TINY)
        one, two = kill_and_resume(align, stage1, tmp_path / "stage1", stop=2)
        assert same_weights(one, two)
        settings = replace(settings, projector=str(one.folder))
    one, two = kill_and_resume(tune, settings, tmp_path, stop=2)
    assert same_weights(one, two)
    same_records(one, two)


def test_the_differences_of_two_presets_are_told_with_their_reasons(capsys):
    text = compare_presets("openai-l14-diva", "openai-l14-diva-released")
    lines = dict(line.split(": ", 2)[1:] for line in text.splitlines())
    assert lines.keys() == {
        "vae_input", "encoder_resize", "normalise", "loader_crop", "token_draws", "draw_weights", "warmup_zero", "clip",
    }  # fmt: skip
    assert all("  # " in line for line in lines.values()) and lines["clip"].startswith("0.0 -> 1.0")
    assert "stage 1: only openai-l14-dcr has it" in compare_presets("openai-l14-diva", "openai-l14-dcr")
    assert compare_presets("openai-l14-dcr", "openai-l14-dcr").endswith("have the same settings")
    assert "steps: 4600 -> 100000" in compare_presets("metaclip-h14-dcr", "metaclip-h14-dcr-released")


def test_a_preset_without_a_release_is_told_apart_and_has_no_released_recipe():
    assert origin("dfn-h14-dcr") == origin("metaclip-l14-genhancer") == "paper, no release for this backbone"
    assert origin("openai-l14-dcr") == "paper" and origin("openai-l14-dcr-released") == "released code"
    for name, known in (("dfn-h14-dcr-released", "openai-l14"), ("openai-l14-naive-released", "none")):
        with pytest.raises(ValueError, match=f"no preset '{name}'.*released code for {known}"):
            preset(name)
