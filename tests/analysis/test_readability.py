"""The instrument's four decisions: exact where the answer is known beforehand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diva_lab.analysis.readability import (
    MinimalPairs,
    common_shift,
    decide,
    embedding_gradients,
    readability,
    swap,
    towards,
    world_pairs_in_memory,
)
from diva_lab.models.encoders import load_encoder
from diva_lab.models.registry import load_denoiser
from diva_lab.objectives import OBJECTIVES
from diva_lab.training.build import build_conditioner, make_step
from diva_lab.training.settings import Settings


def vectors(n: int, d: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_tie_counts_half_and_both_images_of_a_pair_count_alike():
    scores = torch.tensor([[1.0, 2.0], [1.0, -1.0], [0.0, 0.0], [0.0, 1.0], [-1.0, -2.0]])
    assert decide(scores).tolist() == [1.0, 0.5, 0.5, 0.75, 0.0]


def test_the_gradient_of_a_quadratic_around_the_right_statement_is_always_readable():
    f, texts = F.normalize(vectors(40), dim=1), F.normalize(vectors(40, seed=1), dim=1)
    middle = F.normalize(texts + swap(texts), dim=1)  # of an embedding that is undecided between the two
    direction = texts - swap(texts)
    assert decide(towards(middle - texts, direction, middle).view(-1, 2)).tolist() == [1.0] * 20
    gradient = f - texts  # of |f - t|^2 / 2, from anywhere on the sphere: t . (t - t') without f's direction
    exact = ((texts - (texts * f).sum(1, keepdim=True) * f) * direction).sum(1)
    np.testing.assert_array_equal(decide(towards(gradient, direction, f).view(-1, 2)), decide(exact.view(-1, 2)))


def test_a_loss_that_prefers_the_right_statement_is_read_in_every_image_and_its_negative_in_none():
    f, texts = vectors(40), F.normalize(vectors(40, seed=1), dim=1)
    direction = texts - swap(texts)
    assert decide(towards(-direction, direction, f).view(-1, 2)).tolist() == [1.0] * 20
    assert decide(towards(direction, direction, f).view(-1, 2)).tolist() == [0.0] * 20


def test_a_gradient_along_the_embedding_says_nothing():
    f, texts = vectors(40), F.normalize(vectors(40, seed=1), dim=1)
    score = towards(3 * f, texts - swap(texts), f)
    assert score.abs().max() < 1e-12


def test_lengths_of_gradient_and_embedding_do_not_matter():
    f, g, texts = vectors(40), vectors(40, seed=2), F.normalize(vectors(40, seed=1), dim=1)
    direction = texts - swap(texts)
    one, other = (decide(towards(a * g, direction, b * f).view(-1, 2)) for a, b in ((1, 1), (7, 0.01)))
    np.testing.assert_array_equal(one, other)


# --- on the tiny models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    settings = Settings(objective="diva", draws=2, timesteps="high-noise")
    encoder, denoiser = load_encoder("tiny"), load_denoiser("tiny")
    return encoder, build_conditioner(settings, encoder, denoiser), denoiser, settings


def some_pairs(n: int = 2) -> MinimalPairs:
    return world_pairs_in_memory(n, seed=3)


def test_the_sign_agrees_with_a_finite_difference_of_the_loss(models):
    encoder, conditioner, denoiser, settings = models
    pairs = some_pairs(1)
    images = pairs.images.flatten(0, 1).float() / 255
    texts = encoder.encode_text([text for both in pairs.statements for text in both])

    def start(shift):
        random = torch.Generator().manual_seed(0)
        return make_step(images, encoder, conditioner, denoiser, random, settings, shift)

    shift = torch.zeros(len(images), encoder.dim, requires_grad=True)
    (gradient,) = embedding_gradients(OBJECTIVES["diva"], start(shift), shift).values()
    direction = F.normalize(texts - swap(texts), dim=1)
    with torch.no_grad():
        size = 0.02
        up, down = (OBJECTIVES["diva"](start(sign * size * direction))["rec"] for sign in (1, -1))
    difference = (up - down) / (2 * size)
    slope = (gradient * direction).sum(1)
    clear = slope.abs() > slope.abs().median() / 2
    assert torch.equal(slope[clear] > 0, difference[clear] > 0)


def test_constant_predictions_give_exactly_one_half(models, monkeypatch):
    encoder, conditioner, denoiser, settings = models

    def constant(x_t, t, context, kind="noise"):
        return torch.zeros(len(context), *x_t.shape[1:]) + 0 * context.sum()

    monkeypatch.setattr(denoiser, "predict", constant)
    table = readability(some_pairs(), encoder, conditioner, denoiser, settings)
    each = table.set_index(["measure", "pattern"])["value"]
    assert set(each[["known", "readable: diva"]]) == {0.5}


def test_every_measure_of_every_objective_and_of_dcrs_parts_has_a_row_a_pattern_and_a_mean(models):
    encoder, conditioner, denoiser, _ = models
    changed = Settings(objective="dcr", draws=1, parts=True)
    table = readability(some_pairs(), encoder, conditioner, denoiser, changed, ("diva", "dcr"), batch=3)
    patterns = set(some_pairs().patterns) | {"mean"}
    for measure, rows in table.groupby("measure"):
        assert set(rows["pattern"]) == patterns, measure
        assert (rows["low"] <= rows["value"] + 1e-12).all() and (rows["value"] <= rows["high"] + 1e-12).all()
    terms = {"diva", "dcr truth", "dcr view", "dcr push"}
    expected = {f"{kind}: {term}" for kind in ("readable", "class", "norm") for term in terms}
    assert set(table["measure"]) == expected | {"known", "said", "seen", "distance"}


def test_the_report_does_not_depend_on_how_many_pairs_are_taken_at_once_where_draws_do_not(models):
    encoder, conditioner, denoiser, settings = models
    whole, parts = (readability(some_pairs(), encoder, conditioner, denoiser, settings, batch=b) for b in (18, 5))
    kept = [table[table["measure"].isin(["said", "distance"])]["value"].to_numpy() for table in (whole, parts)]
    np.testing.assert_allclose(*kept, rtol=1e-5)


# --- the common shift -------------------------------------------------------------------------------------------


def test_a_shift_that_all_embeddings_share_has_share_one_and_one_that_sums_to_zero_none():
    before = vectors(30)
    share, moved = common_shift(before, before + vectors(1, seed=5))
    assert share == pytest.approx(1) and torch.allclose(moved, vectors(1, seed=5)[0])
    apart = vectors(30, seed=6)
    assert common_shift(before, before + apart - apart.mean(0))[0] == pytest.approx(0, abs=1e-12)
    assert common_shift(before, before)[0] == 0.0
