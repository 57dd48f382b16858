"""One image: the tiny denoiser tells statements apart, and draws from the embeddings of every family."""

import numpy as np
import pytest
import torch

from diva_lab.analysis.one_image import (
    CAPTION,
    EMPTY,
    ImageModels,
    draw_images,
    patch_cosines,
    predict_clean,
    statement_losses,
    statement_similarities,
)
from diva_lab.analysis.readability import world_pairs_in_memory
from diva_lab.models.encoders import load_encoder
from diva_lab.training.build import build_conditioner, build_denoiser
from diva_lab.training.settings import Settings

PAIRS = world_pairs_in_memory(1, seed=3)  # nine
IMAGE = PAIRS.images[0, 0].permute(1, 2, 0).numpy()


def open_models(settings: Settings) -> ImageModels:
    encoder, denoiser = load_encoder(settings.encoder), build_denoiser(settings)
    conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(False)
    return ImageModels({"none": encoder, "diva": encoder}, denoiser, conditioner)


@pytest.fixture(scope="module")
def models() -> ImageModels:
    return open_models(Settings(objective="diva", projector="anchored"))


def test_the_denoiser_prefers_the_right_statement_of_most_images_in_whatever_order_they_stand(models):
    right = []
    for images, (one, other) in zip(PAIRS.images[::2], PAIRS.statements[::2], strict=True):
        losses = statement_losses(models, images[0].permute(1, 2, 0).numpy(), (one, other))
        right.append(losses.mean(0).argmin() == 0)
    assert np.mean(right) > 0.7
    again = statement_losses(models, images[0].permute(1, 2, 0).numpy(), (other, one))
    np.testing.assert_allclose(losses[:, ::-1], again, rtol=1e-5)


def test_similarities_are_the_cosines_of_statements_and_image(models):
    encoder = models.encoders["none"]
    each = (
        torch.cat([encoder.encode_text([text]) for text in PAIRS.statements[0]])
        @ encoder.encode_image(models.pixels(IMAGE))[0].detach()
    )
    assert statement_similarities(models, IMAGE, PAIRS.statements[0])["diva"] == pytest.approx(each.tolist(), abs=1e-5)


def test_with_little_noise_every_condition_gives_the_image_back_and_with_much_the_caption_helps(models):
    conditions = models.conditions(IMAGE, PAIRS.statements[0][0])
    assert list(conditions) == [EMPTY, CAPTION, "none", "diva"]
    noisy, predicted = predict_clean(models.denoiser, models.pixels(IMAGE), conditions, 5)
    for image in (noisy, *(clean for clean, _ in predicted.values())):
        assert np.abs(image.astype(int) - IMAGE).mean() < 12
    losses = np.mean(
        [[loss for _, loss in predict_clean(models.denoiser, models.pixels(IMAGE), conditions, 700, k)[1].values()]
         for k in range(6)], axis=0,
    )  # fmt: skip
    assert losses[1] < losses[0] and losses[2] == losses[3]


def test_a_denoiser_of_any_family_draws_from_embeddings_the_same_from_the_same_seed(small_settings, settings_of):
    kinds = {"text": small_settings, "unclip": settings_of("un2clip")}
    kinds["light"] = Settings(small_settings.encoder, "light-tiny", projector="new")
    for kind, settings in kinds.items():
        small = open_models(settings)
        conditions = small.conditions(IMAGE, "a photo of a disc")
        assert (CAPTION in conditions) == (kind == "text") == small.reads_text
        one, same = (
            draw_images(small.denoiser, {n: conditions[n] for n in small.encoders}, seed=1, steps=2) for _ in range(2)
        )
        assert one["none"].shape == (small.denoiser.px, small.denoiser.px, 3)
        assert np.array_equal(one["diva"], same["none"])


def test_cosines_of_patches_are_those_of_their_tokens(models):
    encoder, pixels = models.encoders["none"], models.pixels(IMAGE)
    cosines = patch_cosines(encoder, pixels, -1)
    tokens = encoder.tokens(pixels, -1)[0]
    assert cosines[3, 5] == pytest.approx(torch.cosine_similarity(tokens[3], tokens[5], dim=0).item(), abs=1e-5)
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-5)
