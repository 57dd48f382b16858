import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from one_step import OneStep, open_lora, trainable

from diva_lab.gradients import term_gradients
from diva_lab.machine import generator
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.contrastive import info_nce
from diva_lab.objectives.dcr import DCR_PARTS, dcr_chance, dcr_loss, dcr_parts
from diva_lab.objectives.diva import reconstruction
from diva_lab.objectives.negatives import draw_others
from diva_lab.objectives.rows import by_rows
from diva_lab.objectives.timesteps import TIMESTEPS, draw_timesteps

DENOMINATORS = ("shared", "own")
EACH = pytest.mark.parametrize("objective", OBJECTIVES)
BOTH = pytest.mark.parametrize("denominator", DENOMINATORS)


def predictions(b: int, d: int = 24, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Random (grid, augmented, truth), all similar to one another as a denoiser's predictions are."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.randn(b, d, generator=random, dtype=torch.float64)
    grid = truth[:, None] + 0.5 * torch.randn(b, b, d, generator=random, dtype=torch.float64)
    augmented = truth + 0.5 * torch.randn(b, d, generator=random, dtype=torch.float64)
    return grid.to(dtype), augmented.to(dtype), truth.to(dtype)


def of_grid(grid: torch.Tensor, *rest, **options) -> torch.Tensor:
    """DCR's loss of a grid of predictions [b, b, d]: for latent i under condition j."""
    i = torch.arange(len(grid))[:, None]
    return dcr_loss(
        grid[i, torch.cat([i, draw_others(len(grid), len(grid) - 1, generator())], dim=1)], *rest, **options
    )


# --- DCR --------------------------------------------------------------------------------------------------------


@BOTH
def test_dcr_is_unchanged_by_permuting_the_batch(denominator):
    grid, augmented, truth = predictions(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = of_grid(grid, augmented, truth, denominator=denominator)
    permuted = of_grid(grid[order][:, order], augmented[order], truth[order], denominator=denominator)
    torch.testing.assert_close(permuted, loss[order], atol=1e-12, rtol=0)


@BOTH
def test_dcr_of_two_pictures_agrees_with_a_sum_by_hand(denominator):
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


@pytest.mark.parametrize("loss", [*DENOMINATORS, "info_nce", "reconstruction"])
def test_losses_are_computed_in_float32_under_autocast(loss):
    grid, augmented, truth = predictions(4, dtype=torch.float32)

    def value():
        if loss in DENOMINATORS:
            return of_grid(grid, augmented, truth, 0.1, loss)
        return {"info_nce": info_nce, "reconstruction": reconstruction}[loss](augmented, truth)

    with torch.autocast("cpu", torch.bfloat16):
        inside = value()
    torch.testing.assert_close(inside, value(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("b", [2, 3, 8])
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_dcr_is_at_chance_when_all_predictions_are_identical(b, tau):
    _, augmented, truth = predictions(b)
    same = augmented[:1].expand(b, -1)
    cosines = F.cosine_similarity(same, truth)
    loss = of_grid(same.expand(b, b, -1), same, truth, tau)
    expected = torch.tensor([dcr_chance(b, c.item(), tau) for c in cosines], dtype=torch.float64)
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
def test_dcr_of_a_picture_reads_its_own_row_only(denominator):
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


def test_others_are_other_pictures_each_at_most_once():
    for k in (1, 2, 4, 9):
        others = draw_others(5, k, generator(k))
        assert others.shape == (5, min(k, 4))
        for i, row in enumerate(others.tolist()):
            assert len({i, *row}) == 1 + len(row) and set(row) <= set(range(5))


@pytest.mark.parametrize("changes", [{"negatives": 1}, {"negative_gradient": False}])
def test_approximations_of_dcr_are_others_and_off_by_default(small_settings, changes):
    one = OneStep.of(replace(small_settings, objective="dcr", batch=3))
    weights = list(trainable(open_lora(one.encoder)).values())
    exact, again, approximate = (
        torch.cat([g.flatten() for g in torch.autograd.grad(one.terms(**options)["dcr"].sum(), weights)])
        for options in ({}, {}, changes)
    )
    assert torch.equal(exact, again) and not torch.allclose(exact, approximate, rtol=1e-2)


# --- by rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_by_rows_is_the_loss_and_the_gradient_of_all_at_once(size):
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 3, dtype=torch.float64, generator=random).requires_grad_() for _ in range(2))
    place, weight = torch.arange(5.0), torch.rand(5, generator=random, dtype=torch.float64)

    def loss(rows, x, y):
        return (x * y.exp()).sum(1).sin() * place[rows]

    expected = torch.autograd.grad((weight * loss(slice(0, 5), a, b)).sum(), (a, b))
    values = by_rows(loss, size, a, b)
    torch.testing.assert_close(values, loss(slice(0, 5), a, b))
    torch.testing.assert_close(torch.autograd.grad((weight * values).sum(), (a, b)), expected)
    (only,) = torch.autograd.grad((weight * by_rows(loss, size, a, b.detach())).sum(), a)
    torch.testing.assert_close(only, expected[0])
    with torch.no_grad():
        torch.testing.assert_close(by_rows(loss, size, a, b), values)


# --- the other losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_info_nce_is_torchs_cross_entropy_both_ways(tau):
    a, b = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / tau
    own = torch.arange(6)
    expected = (F.cross_entropy(scores, own, reduction="none") + F.cross_entropy(scores.T, own, reduction="none")) / 2
    torch.testing.assert_close(info_nce(a, b, tau), expected)
    torch.testing.assert_close(info_nce(b, a, tau), expected)


def test_info_nce_is_unchanged_by_scale_and_permutes_with_the_batch():
    a, b = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([5, 0, 3, 1, 2, 4])
    torch.testing.assert_close(info_nce(3 * a, b / 7), info_nce(a, b))
    torch.testing.assert_close(info_nce(a[order], b[order]), info_nce(a, b)[order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_info_nce_is_finite_at_half_precision(dtype):
    a = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert info_nce(a, -a, 0.01).isfinite().all() and info_nce(a, a, 0.01).dtype == torch.float32


def test_the_reconstruction_of_each_example_is_its_own_mean_square():
    a, b = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = reconstruction(a, b)
    assert loss.shape == (3,)
    for k in range(3):
        torch.testing.assert_close(loss[k], F.mse_loss(a[k], b[k]))


# --- timesteps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TIMESTEPS)
def test_timesteps_are_in_range_spread_out_and_fixed_by_the_generator(kind):
    one, same, other = (draw_timesteps(kind, 4000, 1000, generator(seed)) for seed in (1, 1, 2))
    assert one.dtype == torch.int64 and one.min() >= 0 and one.max() < 1000 and one.float().std() > 100
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_timesteps_have_the_distribution_they_are_named_after():
    t = {kind: draw_timesteps(kind, 20_000, 1000, generator(0)).double() / 1000 for kind in TIMESTEPS}
    assert abs(t["uniform"].mean() - 0.5) < 0.01 and abs((t["uniform"] < 0.1).double().mean() - 0.1) < 0.01
    assert t["high-noise"].min() >= 0.5 and abs(t["high-noise"].mean() - 0.75) < 0.01
    z = t["logit-normal"].clamp(1e-3, 1 - 1e-3).logit()
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03


def test_timesteps_follow_the_weights_of_equal_parts():
    t = draw_timesteps("0,3,0,1", 20_000, 1000, generator(0))
    shares = [((t >= low) & (t < low + 250)).double().mean().item() for low in range(0, 1000, 250)]
    assert shares == pytest.approx([0, 0.75, 0, 0.25], abs=0.01)
    inside = t[(t >= 250) & (t < 500)].double()
    assert inside.mean().item() == pytest.approx(375, abs=3) and inside.std().item() == pytest.approx(72, abs=2)
    even, uniform = (draw_timesteps(kind, 1000, 1000, generator(0)) for kind in ("1,1,1,1", "uniform"))
    assert (even - uniform).abs().max() <= 1


@pytest.mark.parametrize("weights", ["0,0", "1,-1", "1,two", "", "nan,1", "inf,1"])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="or weights of equal parts"):
        draw_timesteps(weights, 2, 1000, generator(0))


def test_unknown_timesteps_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"unknown timesteps 'cosine'; expected one of {', '.join(TIMESTEPS)}"):
        draw_timesteps("cosine", 2, 1000, generator(0))


# --- objectives as functions of a step --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step(small_settings) -> OneStep:
    one = OneStep.of(small_settings)
    open_lora(one.encoder)
    return one


@contextmanager
def predicted(one: OneStep) -> Iterator[list[torch.Tensor]]:
    """What the denoiser's network returns meanwhile, one tensor an evaluation of a batch."""
    seen = []
    handle = one.denoiser.network.register_forward_hook(lambda *args: seen.append(args[2].sample.detach()))
    yield seen
    handle.remove()


@EACH
def test_an_objective_gives_named_terms_with_one_value_an_example(step, objective):
    terms = step.terms(objective)
    assert terms and set(terms) <= {"rec", "con", "dcr"}
    for values in terms.values():
        assert values.shape == (3,) and values.dtype == torch.float32 and values.isfinite().all()
        assert values.requires_grad


@EACH
def test_an_objective_draws_from_its_generator_only(step, objective):
    torch.manual_seed(0)
    one = step.terms(objective)
    torch.manual_seed(1)
    same, other = step.terms(objective), step.terms(objective, random=generator("another"))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one)


@EACH
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_frozen_parts_get_no_gradient_and_every_opened_weight_does(small_settings, objective, lora_rank):
    one = OneStep.of(replace(small_settings, objective=objective, lora_rank=lora_rank))
    open_lora(one.encoder)
    opened = trainable(one.encoder)
    one.loss().backward()
    for module in (one.denoiser, one.conditioner):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    for name, p in one.encoder.named_parameters():
        if name not in opened:
            assert p.grad is None, name
        elif not re.search(
            r"k_proj\.(base_layer\.)?bias", name
        ):  # shifts all scores of a query alike: no gradient but rounding
            assert p.grad is not None and p.grad.norm() > 0, name
    assert any("lora_" in name for name in opened) == (lora_rank > 0) and opened


@pytest.mark.parametrize("objective", ["diva", "dcr"])
@pytest.mark.parametrize("condition", ["global", "recap"])
def test_the_projector_gets_a_gradient_where_it_is_trained_too(small_settings, objective, condition):
    one = OneStep.of(replace(small_settings, objective=objective, condition=condition))
    one.conditioner.requires_grad_(True)
    one.loss().backward()
    assert all(p.grad.norm() > 0 for p in one.conditioner.parameters())


def test_the_naive_terms_are_those_of_contrastive_and_diva_drawn_one_after_the_other(step):
    random, changes = generator("naive"), {"lambda_con": 2.0, "lambda_rec": 0.5}
    terms = step.terms("naive", random=generator("naive"), **changes)
    assert list(terms) == ["con", "rec"]
    torch.testing.assert_close(terms["con"], 2 * step.terms("contrastive", random=random)["con"])
    torch.testing.assert_close(terms["rec"], 0.5 * step.terms("diva", random=random)["rec"])


def test_the_naive_gradient_is_the_sum_of_its_terms(step):
    opened = trainable(step.encoder)
    parts = term_gradients(step.terms("naive"), opened)
    loss = sum(values.mean() for values in step.terms("naive").values())
    whole = dict(zip(opened, torch.autograd.grad(loss, list(opened.values())), strict=True))
    random = generator("a test", 0)
    alone = [term_gradients(step.terms(name, random=random), opened) for name in ("contrastive", "diva")]
    for name, gradient in whole.items():
        torch.testing.assert_close(parts["con"][name] + parts["rec"][name], gradient, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(alone[0]["con"][name] + alone[1]["rec"][name], gradient, atol=1e-6, rtol=1e-4)


def test_diva_is_the_mean_over_its_draws(step):
    with predicted(step) as seen:
        loss = step.terms("diva", draws=4)["rec"]
    random = generator("a test", 0)
    draw_timesteps("uniform", 4 * 3, 1000, random)
    noise = torch.randn(4 * 3, 4, 8, 8, generator=random)
    each = [F.mse_loss(a, b) for a, b in zip(seen[0], noise, strict=True)]
    torch.testing.assert_close(loss, torch.stack(each).view(4, 3).mean(0))


@pytest.mark.parametrize(
    ("objective", "evaluations"),
    [("diva", 2 * 3), ("contrastive", 0), ("naive", 2 * 3), ("dcr", 3 * 3 + 3), ("dcr-guidance", 3 * 3 + 6)],
)
def test_an_objective_evaluates_the_denoiser_as_often_as_its_paper_says(step, objective, evaluations):
    with predicted(step) as seen:
        step.terms(objective)
    assert sum(len(batch) for batch in seen) == evaluations


def test_dcr_is_at_chance_where_the_condition_says_nothing(small_settings):
    one = OneStep.of(replace(small_settings, objective="dcr", rows=1))
    torch.nn.init.zeros_(one.conditioner.projector[-1].weight)
    with predicted(one) as seen:
        loss = one.terms()["dcr"].detach()
    random = generator("a test", 0)
    draw_timesteps("uniform", 3, 1000, random)
    noise = torch.randn(3, 4, 8, 8, generator=random)
    cosines = F.cosine_similarity(torch.stack([row[1] for row in seen]).flatten(1), noise.flatten(1))
    expected = torch.tensor([dcr_chance(3, c.item(), 0.1) for c in cosines])
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("objective", ["dcr", "dcr-guidance"])
def test_dcr_in_parts_is_dcr(step, objective):
    terms = step.terms(objective, parts=True)
    assert tuple(terms) == DCR_PARTS
    torch.testing.assert_close(sum(terms.values()), step.terms(objective)["dcr"])


def test_guidance_contrasts_what_the_condition_adds(step):
    with predicted(step) as seen:
        loss = step.terms("dcr-guidance", rows=1)["dcr"].detach()
    blank, rows = seen[0].flatten(1), torch.stack(seen[1:]).flatten(2)  # [b, d], [b, b + 1, d]
    random = generator("a test", 0)
    draw_timesteps("uniform", 3, 1000, random)
    truth = torch.randn(3, 4, 8, 8, generator=random).flatten(1) - blank
    rows = rows - blank[:, None]
    expected = dcr_loss(rows[:, [0, 2, 3]], rows[:, 1], truth)
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=0)


def test_guidance_sends_no_gradient_through_the_empty_prompt(step):
    step.denoiser.empty.requires_grad_(True)
    try:
        (gradient,) = torch.autograd.grad(
            step.terms("dcr-guidance")["dcr"].sum(), [step.denoiser.empty], allow_unused=True
        )
        assert gradient is None
    finally:
        step.denoiser.empty.requires_grad_(False)


@pytest.mark.parametrize("change", [{"target": "velocity"}, {"denominator": "own"}, {"tau": 0.2}, {"latent": "sample"}])
def test_every_variant_of_dcr_is_another_loss(step, change):
    assert not torch.allclose(step.terms("dcr")["dcr"], step.terms("dcr", **change)["dcr"])


@EACH
@pytest.mark.parametrize("seed", range(5))
def test_the_loss_falls_on_a_fixed_batch_with_fixed_timesteps_and_noise(small_settings, objective, seed):
    one = OneStep.of(replace(small_settings, objective=objective, seed=seed, batch=2))
    optimizer = torch.optim.AdamW(trainable(one.encoder).values(), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = one.loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
