"""The anchored loss of stage 1: which condition and which target each image has."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from one_step import OneStep

from diva_lab.machine import generator
from diva_lab.models.encoders import Features
from diva_lab.objectives.anchored import anchored
from diva_lab.objectives.diva import diva, reconstruction
from diva_lab.objectives.step import Step
from diva_lab.training.build import make_step
from diva_lab.training.settings import Settings

WORDS = ["a photo of a red star", "a photo of a leaf", "a photo of a striped disc two dots", "a photo of a gear"]
B = len(WORDS)


@pytest.fixture(scope="module")
def tiny() -> OneStep:
    return OneStep.of(Settings(objective="diva", batch=B, draws=2, anchor="captions", precision="no"))


@pytest.fixture
def step(tiny):
    """A function that makes the same step again and again, with other settings."""
    tiny.conditioner.gap = 0.1 * torch.randn(tiny.encoder.dim, generator=generator("gap"))

    def make(**changes) -> Step:
        settings = replace(tiny.settings, **changes)
        random = generator("anchored", 0)
        models = (tiny.encoder, tiny.conditioner, tiny.denoiser)
        return make_step(tiny.images(), *models, random, settings, captions=WORDS)

    yield make
    tiny.conditioner.gap = None


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(term.mean() for term in terms.values())


def test_without_captioned_images_it_is_diva_to_the_bit(step):
    ours, published = anchored(step(anchor_share=0.0)), diva(step())
    assert ours.keys() == published.keys() and torch.equal(ours["rec"], published["rec"])


@pytest.mark.parametrize("share, k", [(0.25, 1), (0.5, 2), (0.6, 2), (1.0, 4)])
def test_a_term_counts_by_its_part_of_the_batch(step, share, k):
    terms = anchored(step(anchor_share=share))
    assert len(terms["text"]) == k and len(terms.get("rec", ())) == B - k
    if k < B:  # the image half is L_rec of these images, as DIVA has it for the same draws
        torch.testing.assert_close(terms["rec"], (B - k) / B * diva(step())["rec"][k:], rtol=1e-5, atol=1e-7)


def test_the_caption_half_is_l_rec_under_the_moved_text_embedding(step, tiny):
    terms = anchored(step(anchor_noise=0.0))
    again = step()
    drawn = again.draw_noisy(again.latents().repeat(2, 1, 1, 1))
    x_t, t, noise = (x.unflatten(0, (2, B))[:, :2].flatten(0, 1) for x in drawn)
    moved = F.normalize(tiny.encoder.encode_text(WORDS[:2]) + tiny.conditioner.gap, dim=1)
    context = tiny.conditioner.projector(moved)[:, None].repeat(2, 1, 1)
    expected = reconstruction(tiny.denoiser.predict(x_t, t, context), noise).view(2, -1).mean(0) / 2
    torch.testing.assert_close(terms["text"], expected, rtol=1e-5, atol=1e-7)


def test_a_weight_scales_the_caption_half_alone(step):
    one, three = anchored(step()), anchored(step(anchor_weight=3.0))
    torch.testing.assert_close(three["text"], 3 * one["text"])
    assert torch.equal(three["rec"], one["rec"])


def test_the_placebo_takes_the_caption_of_the_next_image(step, monkeypatch, tiny):
    asked = []
    encode_text = tiny.encoder.encode_text
    monkeypatch.setattr(tiny.encoder, "encode_text", lambda texts: asked.append(list(texts)) or encode_text(texts))
    anchored(step(anchor="captions"))
    anchored(step(anchor="shuffled"))
    anchored(step(anchor="shuffled", anchor_share=1.0))
    assert asked == [WORDS[:2], WORDS[1:3], [*WORDS[1:], WORDS[0]]]


def test_noise_has_the_length_that_is_set(step, tiny):
    moved, lengths, blank = step().embed_text(WORDS) + tiny.conditioner.gap, [], torch.zeros(B, 1, tiny.denoiser.width)
    for k in range(10):

        def condition(features: Features) -> torch.Tensor:
            lengths.append((features.embedding - moved).square().sum(1).mean())
            return blank

        made = step(anchor_share=1.0, anchor_noise=0.5)
        anchored(replace(made, generator=generator("noise", k), condition=condition))
    assert torch.stack(lengths).mean().sqrt() == pytest.approx(0.5, rel=0.05)


def test_unpaired_captions_ask_for_the_denoisers_own_prediction_under_them(step, tiny):
    contexts = tiny.denoiser.encode_text(WORDS[:2])  # a projector that says what the prompt says
    terms = anchored(replace(step(anchor="text"), condition=lambda features: contexts))
    assert terms["text"].abs().max() < 1e-9 and terms["rec"].min() > 1e-4
    assert anchored(step(anchor="text"))["text"].min() > 0


def test_only_the_projector_gets_a_gradient(step, tiny):
    tiny.conditioner.requires_grad_(True)
    total(anchored(step())).backward()
    try:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tiny.conditioner.parameters())
        assert tiny.conditioner.gap.grad is None
        assert all(p.grad is None for p in tiny.denoiser.parameters())
    finally:
        tiny.conditioner.requires_grad_(False).zero_grad()
