import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from one_step import OneStep, open_lora, predictions, record, trainable

from diva_lab.machine import generator
from diva_lab.objectives.dcr import DCR_PARTS, dcr_loss, dcr_parts
from diva_lab.objectives.negatives import draw_others

DENOMINATORS = ("shared", "own")
BOTH = pytest.mark.parametrize("denominator", DENOMINATORS)


def of_grid(grid: torch.Tensor, *rest, **options) -> torch.Tensor:
    """DCR's loss of a grid of predictions [b, b, d]: for latent i under condition j."""
    i = torch.arange(len(grid))[:, None]
    return dcr_loss(
        grid[i, torch.cat([i, draw_others(len(grid), len(grid) - 1, generator())], dim=1)], *rest, **options
    )


def chance(b: int, truth_cosine: float, tau: float) -> float:
    """DCR's loss under equal predictions: ln(b + exp(-d / tau)) + d / (2 tau), with d = 1 - s(prediction, truth)."""
    d = 1 - truth_cosine
    return math.log(b + math.exp(-d / tau)) + d / (2 * tau)


@BOTH
def test_dcr_is_unchanged_by_permuting_the_batch(denominator):
    grid, augmented, truth = predictions(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = of_grid(grid, augmented, truth, denominator=denominator)
    permuted = of_grid(grid[order][:, order], augmented[order], truth[order], denominator=denominator)
    torch.testing.assert_close(permuted, loss[order], atol=1e-12, rtol=0)


@BOTH
def test_dcr_of_two_images_agrees_with_a_sum_by_hand(denominator):
    grid, augmented, truth = predictions(2)
    tau = 0.1

    def cosine(a, b):
        a, b = a.tolist(), b.tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    loss = of_grid(grid, augmented, truth, tau, denominator)
    for i in range(2):
        anchor = grid[i, i]
        e_augmented = math.exp(cosine(anchor, augmented[i]) / tau)
        e_truth = math.exp(cosine(anchor, truth[i]) / tau)
        e_negative = math.exp(cosine(anchor, grid[i, 1 - i]) / tau)
        both = e_augmented + e_truth + e_negative
        by_hand = {
            "shared": -(math.log(e_augmented / both) + math.log(e_truth / both)) / 2,
            "own": -(
                math.log(e_augmented / (e_augmented + e_negative)) + math.log(e_truth / (e_truth + e_negative))
            ) / 2,
        }  # fmt: skip
        assert abs(loss[i].item() - by_hand[denominator]) < 1e-10


@pytest.mark.parametrize(
    ("denominator", "expected"),
    [
        ("shared", [1.3098524969556813, 1.1945414815645012, 1.7208947210246937]),
        ("own", [0.9383396575743834, 0.7462924979676675, 1.3658544483497792]),
    ],
)
def test_dcr_has_the_value_on_record(denominator, expected):
    loss = of_grid(*predictions(3), denominator=denominator)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("b", [2, 5])
def test_dcr_is_finite_at_half_precision(denominator, dtype, b):
    grid, augmented, truth = predictions(b, dtype=dtype)
    extreme = grid.clone()
    extreme[:, :1] *= -1  # opposite predictions
    for values in (grid, extreme, torch.ones_like(grid)):
        values = values.requires_grad_()
        loss = of_grid(values, augmented, truth, 0.01, denominator)
        loss.sum().backward()
        assert loss.dtype == torch.float32 and loss.isfinite().all() and values.grad.isfinite().all()


@BOTH
def test_dcr_of_half_precision_predictions_is_computed_in_float32(denominator):
    half = predictions(4, dtype=torch.bfloat16)
    loss = of_grid(*half, 0.01, denominator)
    expected = of_grid(*(x.double() for x in half), 0.01, denominator)
    torch.testing.assert_close(loss.double(), expected, atol=1e-3, rtol=1e-5)


@BOTH
def test_dcr_is_computed_in_float32_under_autocast(denominator):
    inputs = predictions(4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = of_grid(*inputs, denominator=denominator)
    torch.testing.assert_close(inside, of_grid(*inputs, denominator=denominator), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("b", [2, 3, 8])
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_dcr_is_at_chance_when_all_predictions_are_identical(b, tau):
    _, augmented, truth = predictions(b)
    same = augmented[:1].expand(b, -1)
    cosines = F.cosine_similarity(same, truth)
    loss = of_grid(same.expand(b, b, -1), same, truth, tau)
    expected = torch.tensor([chance(b, c.item(), tau) for c in cosines], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)


@BOTH
def test_dcr_is_unchanged_by_the_scale_of_every_prediction(denominator):
    grid, augmented, truth = predictions(4)
    random = torch.Generator().manual_seed(1)
    a, b, c = (torch.rand(shape, generator=random).double() * 9 + 0.1 for shape in ((4, 4, 1), (4, 1), (4, 1)))
    expected = of_grid(grid, augmented, truth, denominator=denominator)
    scaled = of_grid(a * grid, b * augmented, c * truth, denominator=denominator)
    torch.testing.assert_close(scaled, expected, atol=1e-12, rtol=0)


@BOTH
def test_dcrs_gradient_flows_through_anchor_augmented_positive_and_negatives(denominator):
    grid, augmented, truth = (x.requires_grad_() for x in predictions(3))
    of_grid(grid, augmented, truth, denominator=denominator).sum().backward()
    assert (grid.grad.norm(dim=-1) > 1e-6).all()  # the diagonal: anchors; the rest: negatives
    assert (augmented.grad.norm(dim=-1) > 1e-6).all()


@BOTH
def test_dcr_of_an_image_reads_its_own_row_only(denominator):
    grid, augmented, truth = (x.requires_grad_() for x in predictions(3))
    of_grid(grid, augmented, truth, denominator=denominator)[1].backward()
    for x in (grid, augmented, truth):
        assert (x.grad[1] != 0).any() and (x.grad[[0, 2]] == 0).all()


@BOTH
def test_dcr_falls_when_the_negatives_turn_away_and_rises_when_the_augmented_view_does(denominator):
    grid, augmented, truth = predictions(3)
    anchors = torch.eye(3, dtype=torch.bool)[..., None]
    loss = of_grid(grid, augmented, truth, denominator=denominator)
    away = of_grid(torch.where(anchors, grid, -grid), augmented, truth, denominator=denominator)
    worse = of_grid(grid, -augmented, truth, denominator=denominator)
    assert (away < loss).all() and (worse > loss).all()


def test_the_two_denominators_differ_and_the_shared_one_is_never_the_smaller():
    losses = {name: of_grid(*predictions(4), denominator=name) for name in DENOMINATORS}
    assert (losses["shared"] > losses["own"] + 1e-3).all()


@pytest.mark.parametrize("gone", ["none there", "far away"])
def test_with_the_negatives_gone_shared_only_makes_the_positives_equal_and_own_has_no_term(gone):
    tau = 0.1
    b = 1 if gone == "none there" else 3
    grid, augmented, truth = predictions(b)
    if b > 1:  # opposite to the anchor: exp(-2 / tau) of a positive
        anchors = grid.diagonal().T[:, None]
        grid = torch.where(torch.eye(b, dtype=torch.bool)[..., None], grid, -anchors)
    anchor = grid.diagonal().T
    difference = F.cosine_similarity(anchor, augmented) - F.cosine_similarity(anchor, truth)
    expected = torch.log(2 * torch.cosh(difference / (2 * tau)))
    atol = 1e-10 if b == 1 else 1e-6
    torch.testing.assert_close(of_grid(grid, augmented, truth, tau), expected, atol=atol, rtol=0)
    assert of_grid(grid, augmented, truth, tau, "own").abs().max() < atol


@BOTH
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_dcrs_parts_add_up_to_its_loss_and_their_gradients_to_its_gradient(denominator, tau):
    grid, augmented, truth = predictions(5)
    inputs = [x.requires_grad_() for x in (grid, augmented, truth)]
    parts, whole = dcr_parts(*inputs, tau, denominator), dcr_loss(*inputs, tau, denominator)
    torch.testing.assert_close(parts.sum(1), whole)
    one, other = (torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (parts, whole))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@BOTH
def test_each_part_of_dcr_pulls_through_its_own_scores_alone(denominator):
    grid, augmented, truth = predictions(4)
    inputs = [x.requires_grad_() for x in (grid, augmented, truth)]
    for k, part in enumerate(DCR_PARTS):
        of_grid, of_view, of_truth = torch.autograd.grad(
            dcr_parts(*inputs, 0.1, denominator)[:, k].sum(), inputs, allow_unused=True
        )
        reached = {"truth": of_truth, "view": of_view, "push": of_grid[:, 1:]}
        for name, gradient in reached.items():
            assert (gradient is not None and bool((gradient != 0).any())) == (name == part), (part, name)


def test_an_unknown_denominator_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown denominator 'all'; expected shared or own"):
        of_grid(*predictions(2), denominator="all")


# --- the objective ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("objective", ["dcr", "dcr-guidance"])
def test_dcr_contrasts_the_predictions_of_one_noisy_latent_under_the_conditions_of_all_images(step, objective, rows):
    with record(step) as seen:
        loss = step.terms(objective, rows=rows)["dcr"].detach()
    images, (x_t, t, noise) = step.images(), seen.draws[0]
    (view,) = (x for x, _ in seen.encoded if not torch.equal(x, images))
    own, augmented = (step.conditioner(step.encoder.features(x), step.denoiser.empty) for x in (images, view))

    def predict(i: int, context: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return step.denoiser.predict(x_t[i : i + 1], t[i : i + 1], context).flatten()

    for i in range(len(images)):
        blank = predict(i, step.denoiser.empty[None]) if objective == "dcr-guidance" else 0.0
        others = [predict(i, own[j : j + 1]) - blank for j in range(len(images)) if j != i]
        row = torch.stack([predict(i, own[i : i + 1]) - blank, *others])
        positives = predict(i, augmented[i : i + 1]) - blank, noise[i].flatten() - blank
        expected = dcr_loss(row[None], *(x[None] for x in positives))
        torch.testing.assert_close(loss[i : i + 1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{"negatives": 1}, {"negative_gradient": False}])
def test_approximations_of_dcr_are_others_and_off_by_default(small_settings, changes):
    one = OneStep.of(replace(small_settings, objective="dcr", batch=3))
    weights = list(trainable(open_lora(one.encoder)).values())
    exact, again, approximate = (
        torch.cat([g.flatten() for g in torch.autograd.grad(one.terms(**options)["dcr"].sum(), weights)])
        for options in ({}, {}, changes)
    )
    assert torch.equal(exact, again) and not torch.allclose(exact, approximate, rtol=1e-2)


def test_dcr_is_at_chance_where_the_condition_says_nothing(small_settings):
    one = OneStep.of(replace(small_settings, objective="dcr", rows=1))
    torch.nn.init.zeros_(one.conditioner.projector[-1].weight)
    with record(one) as seen:
        loss = one.terms()["dcr"].detach()
    predicted, noise = torch.stack([row[0] for row in seen.predicted]), seen.draws[0][2]
    cosines = F.cosine_similarity(predicted.flatten(1), noise.flatten(1))
    expected = torch.tensor([chance(3, c.item(), 0.1) for c in cosines])
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("objective", ["dcr", "dcr-guidance"])
def test_dcr_in_parts_is_dcr(step, objective):
    terms = step.terms(objective, parts=True)
    assert tuple(terms) == DCR_PARTS
    torch.testing.assert_close(sum(terms.values()), step.terms(objective)["dcr"])


@pytest.mark.parametrize("change", [{"target": "velocity"}, {"denominator": "own"}, {"tau": 0.2}, {"latent": "sample"}])
def test_every_variant_of_dcr_is_another_loss(step, change):
    assert not torch.allclose(step.terms("dcr")["dcr"], step.terms("dcr", **change)["dcr"])
