"""The instrument's four decisions: exact where the answer is known beforehand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diva_lab.analysis.readability import (
    Instrument,
    MinimalPairs,
    common_shift,
    decide,
    embedding_gradients,
    readability,
    towards,
    world_pairs_in_memory,
)
from diva_lab.models.encoders import load_encoder
from diva_lab.models.registry import load_denoiser
from diva_lab.objectives import OBJECTIVES
from diva_lab.training.build import build_conditioner, make_step
from diva_lab.training.settings import Settings


def vectors(n: int, d: int = 12, seed: int = 0) -> torch.Tensor:
    """n pairs of vectors, [n, 2, d]."""
    return torch.randn(n, 2, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_tie_counts_half_and_both_images_of_a_pair_count_alike():
    scores = torch.tensor([[1.0, 2.0], [1.0, -1.0], [0.0, 0.0], [0.0, 1.0], [-1.0, -2.0]])
    assert decide(scores).tolist() == [1.0, 0.5, 0.5, 0.75, 0.0]


def test_the_gradient_of_a_quadratic_around_the_right_statement_is_always_readable():
    texts = F.normalize(vectors(20, seed=1), dim=2)
    middle = F.normalize(texts + texts.flip(1), dim=2)  # an embedding that is undecided between the two
    assert decide(towards(middle - texts, texts - texts.flip(1), middle)).tolist() == [1.0] * 20


def test_a_loss_that_prefers_the_right_statement_is_read_in_every_image_and_its_negative_in_none():
    f, texts = vectors(20), F.normalize(vectors(20, seed=1), dim=2)
    direction = texts - texts.flip(1)
    assert decide(towards(-direction, direction, f)).tolist() == [1.0] * 20
    assert decide(towards(direction, direction, f)).tolist() == [0.0] * 20


def test_a_gradient_along_the_embedding_says_nothing():
    f, texts = vectors(20), F.normalize(vectors(20, seed=1), dim=2)
    assert towards(3 * f, texts - texts.flip(1), f).abs().max() < 1e-12


def test_lengths_of_gradient_and_embedding_do_not_matter():
    f, g, texts = vectors(20), vectors(20, seed=2), F.normalize(vectors(20, seed=1), dim=2)
    direction = texts - texts.flip(1)
    one, other = (decide(towards(a * g, direction, b * f)) for a, b in ((1, 1), (7, 0.01)))
    np.testing.assert_array_equal(one, other)


# --- on the tiny models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instrument() -> Instrument:
    settings = Settings(objective="diva", draws=1)
    encoder, denoiser = load_encoder("tiny"), load_denoiser("tiny")
    return Instrument(encoder, build_conditioner(settings, encoder, denoiser), denoiser, settings, bins=2, used=(0, 1))


def some_pairs(n: int = 2) -> MinimalPairs:
    return world_pairs_in_memory(n, seed=3)


def test_the_sign_agrees_with_a_finite_difference_of_the_loss(instrument):
    encoder, denoiser = instrument.encoder, instrument.denoiser
    pairs = some_pairs(1)
    images = pairs.images[:, 0].float() / 255
    texts = torch.stack([encoder.encode_text([both[side] for both in pairs.statements]) for side in (0, 1)], dim=1)

    def start(shift):
        random = torch.Generator().manual_seed(0)
        return make_step(images, encoder, instrument.conditioner, denoiser, random, instrument.settings, shift)

    shift = torch.zeros(len(images), encoder.dim, requires_grad=True)
    (gradient,) = embedding_gradients(OBJECTIVES["diva"], start(shift), shift).values()
    direction = F.normalize(texts[:, 0] - texts[:, 1], dim=1)
    with torch.no_grad():
        size = 0.02
        up, down = (OBJECTIVES["diva"](start(sign * size * direction))["rec"] for sign in (1, -1))
    difference = (up - down) / (2 * size)
    slope = (gradient * direction).sum(1)
    clear = slope.abs() > slope.abs().median() / 2
    assert torch.equal(slope[clear] > 0, difference[clear] > 0)


def test_constant_predictions_give_exactly_one_half(instrument, monkeypatch):
    def constant(x_t, t, context, kind="noise"):
        return torch.zeros(len(context), *x_t.shape[1:]) + 0 * context.sum()

    monkeypatch.setattr(instrument.denoiser, "predict", constant)
    table = readability(some_pairs(), instrument)
    decided = table[table["measure"].isin(["known", "readable: diva", "class: diva"])]
    assert len(decided) == 3 * 3 * 10 and set(decided["value"]) == {0.5}


def test_every_measure_of_every_objective_and_of_dcrs_parts_has_a_row_a_bin_and_pattern(instrument):
    settings = Settings(objective="dcr", draws=1, parts=True)
    table = readability(some_pairs(1), replace(instrument, settings=settings, objectives=("diva", "dcr")), batch=5)
    patterns = {*some_pairs(1).patterns, "mean"}
    for (measure, name), rows in table.groupby(["measure", "bin"]):
        assert set(rows["pattern"]) == patterns, (measure, name)
        assert (rows["low"] <= rows["value"] + 1e-12).all() and (rows["value"] <= rows["high"] + 1e-12).all()
    terms = {"diva", "dcr truth", "dcr view", "dcr push"}
    by_bin = {f"{kind}: {term}" for kind in ("readable", "class", "norm") for term in terms} | {"known"}
    found = set(zip(table["measure"], table["bin"], strict=True))
    assert found == {(m, b) for m in by_bin for b in ("all", "0", "1")} | {
        (m, "all") for m in ("said", "seen", "distance")
    }


def test_the_bin_of_all_is_decided_by_the_sum_of_the_bins_that_are_used(instrument):
    pairs = some_pairs(3)
    one, both = (replace(instrument, used=used).measure(pairs, 0) for used in ((1,), (0, 1)))
    for measure in ("known", "readable: diva"):
        np.testing.assert_array_equal(one[measure, "all"], one[measure, "1"])
        np.testing.assert_array_equal(one[measure, "0"], both[measure, "0"])
    assert any((one[m, "all"] != both[m, "all"]).any() for m in ("known", "readable: diva"))


def test_no_part_of_the_pairs_is_a_single_one():
    pairs = some_pairs(1)  # nine
    assert [len(part) for part in pairs.split(4)] == [4, 5] and [len(part) for part in pairs.split(3)] == [3, 3, 3]
    assert [name for part in pairs.split(4) for name in part.patterns] == list(pairs.patterns)


# --- the common shift -------------------------------------------------------------------------------------------


def test_a_shift_that_all_embeddings_share_has_share_one_and_one_that_sums_to_zero_none():
    before = vectors(30)[:, 0]
    share, moved = common_shift(before, before + vectors(1, seed=5)[:, 0])
    assert share == pytest.approx(1) and torch.allclose(moved, vectors(1, seed=5)[0, 0])
    apart = vectors(30, seed=6)[:, 0]
    assert common_shift(before, before + apart - apart.mean(0))[0] == pytest.approx(0, abs=1e-12)
    assert common_shift(before, before)[0] == 0.0
