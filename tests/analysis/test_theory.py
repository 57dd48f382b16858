"""Both theorems on toy data with constants by hand, and the additive bias on a UNet of diffusers."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import write_diffusion

from diva_lab.analysis.theory import (
    affine_fit,
    at_cosine,
    dcr_predictions,
    first_messages,
    lipschitz,
    predict_under,
    scatter,
    scatter_bounds,
    split_in_halves,
    theorem_1,
    theorem_2,
    theory_report,
)
from diva_lab.models.conditions import Conditioner
from diva_lab.models.encoders import load_encoder
from diva_lab.models.registry import load_denoiser
from diva_lab.objectives.dcr import dcr_loss

RANDOM = torch.Generator()
TAU = 0.1


@pytest.fixture(autouse=True)
def same_draws():
    """Every test draws the same numbers, whatever ran before it."""
    RANDOM.manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64)


# --- theorem 1 --------------------------------------------------------------------------------------------------


def test_scatter_by_hand():
    x, labels = torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([4, 4, 7])  # means 1 and 9, of all 11 / 3
    assert scatter(x, labels) == pytest.approx((2 / 3, (2 * (1 - 11 / 3) ** 2 + (9 - 11 / 3) ** 2) / 3))


def test_inner_and_inter_sum_to_the_total_which_is_half_the_mean_square_over_pairs():
    x, labels = normal(30, 5), torch.arange(30) % 4
    total = (x - x.mean(0)).square().sum(1).mean().item()
    assert sum(scatter(x, labels)) == pytest.approx(total)
    assert torch.cdist(x, x).square().mean().item() / 2 == pytest.approx(total)


def test_the_constants_of_a_stretched_square_are_its_stretches():
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    stretched = square * torch.tensor([2.0, 5.0])
    assert lipschitz(square, stretched) == pytest.approx((2, 5))
    low, high = lipschitz(square, stretched, 0.2)  # sorted: 2, 2, sqrt(14.5) twice, 5, 5
    assert (low, high) == pytest.approx((2, 5))
    assert lipschitz(square, stretched, 0.5) == pytest.approx([math.sqrt(14.5)] * 2)


def test_images_with_the_same_features_are_refused():
    with pytest.raises(ValueError, match="same features; expected all of them distinct"):
        lipschitz(torch.zeros(3, 2), normal(3, 2))


def test_the_bounds_by_hand():
    assert scatter_bounds(8.0, 100.0, 2.0, 5.0) == pytest.approx((8 / 4, 100 / 25 - 8 * (1 / 4 - 1 / 25)))


@pytest.mark.parametrize("trial", range(5))
def test_both_bounds_hold_for_any_map_whose_constants_come_from_all_of_its_pairs(trial):
    features, labels = normal(24, 6), torch.arange(24) % 3
    eps = (features @ normal(6, 9)).tanh() + trial * normal(24, 9)
    (inner, inter), (inner_eps, inter_eps) = scatter(features, labels), scatter(eps, labels)
    most, least = scatter_bounds(inner_eps, inter_eps, *lipschitz(features, eps))
    assert inner <= most
    assert inter >= least


def test_a_similarity_makes_both_bounds_equalities_on_images_it_was_not_fitted_to():
    features, labels = normal(24, 6), torch.arange(24) % 3
    values = theorem_1(features, 3 * features, labels, halvings=3)
    assert (values["m"], values["M"]) == pytest.approx((3, 3))
    for side in ("inner", "inter"):
        assert [values[f"{side}_slack{end}"] for end in ("", "/low", "/high")] == pytest.approx([1, 1, 1])
    assert values["inter_says"] == 1
    assert values["needed"] == pytest.approx(0, abs=1e-9)


def test_the_second_bound_is_above_zero_only_where_the_ratio_is_above_the_needed_one():
    m, M, inner_eps = 2.0, 3.0, 7.0
    needed = (M / m) ** 2 - 1
    assert scatter_bounds(inner_eps, 1.01 * needed * inner_eps, m, M)[1] > 0
    assert scatter_bounds(inner_eps, 0.99 * needed * inner_eps, m, M)[1] < 0


def test_halves_share_no_picture_leave_none_out_and_halve_every_class():
    labels = torch.arange(24) % 3
    one, two = split_in_halves(labels, torch.Generator().manual_seed(1))
    assert sorted([*one.tolist(), *two.tolist()]) == list(range(24))
    assert labels[one].bincount().tolist() == labels[two].bincount().tolist() == [4, 4, 4]
    assert one.tolist() != split_in_halves(labels, torch.Generator().manual_seed(2))[0].tolist()


# --- theorem 2 --------------------------------------------------------------------------------------------------


def test_turned_negatives_have_the_cosine_unit_length_and_the_side_they_were_on():
    anchor, others = normal(3, 20), normal(3, 5, 20)
    turned = at_cosine(anchor, others, 0.3)
    assert torch.allclose(F.cosine_similarity(anchor[:, None], turned, dim=2), torch.tensor(0.3).double())
    assert torch.allclose(turned.norm(dim=2), torch.ones(3, 5).double())
    cosines = F.cosine_similarity(anchor[:, None], others, dim=2)
    again = at_cosine(anchor[0], others[0, :1], cosines[0, 0].item())
    assert torch.allclose(again, F.normalize(others[0, :1], dim=-1))


def test_a_line_has_its_slope_and_r2_of_one_and_a_parabola_about_its_middle_has_none():
    x = torch.linspace(-1, 1, 11, dtype=torch.float64).expand(2, -1)
    slope, r2 = affine_fit(x, torch.stack([3 * x[0] + 2, x[0] ** 2]))
    assert slope.tolist() == pytest.approx([3, 0], abs=1e-12)
    assert r2.tolist() == pytest.approx([1, 0], abs=1e-12)


def three(b: int = 4, d: int = 50) -> tuple[torch.Tensor, ...]:
    return F.normalize(normal(b, 1, d), dim=2), normal(b, d), normal(b, d)  # anchors without negatives, view, truth


def test_without_negatives_the_shared_form_is_ln_2cosh_of_the_positives_difference_and_the_own_form_is_zero():
    rows, view, truth = three()
    gap = F.cosine_similarity(rows[:, 0], view) - F.cosine_similarity(rows[:, 0], truth)
    assert torch.allclose(dcr_loss(rows, view, truth, TAU, "shared"), (2 * (gap / (2 * TAU)).cosh()).log())
    assert torch.allclose(dcr_loss(rows, view, truth, TAU, "own"), torch.zeros(4).double(), atol=1e-14)


def test_without_negatives_the_shared_form_is_least_where_the_positives_are_equally_near_however_far():
    near, far = (torch.tensor([[s, math.sqrt(1 - s**2)]]).double() for s in (0.95, 0.1))
    anchor = torch.tensor([[[1.0, 0.0]]]).double()
    equal = [dcr_loss(anchor, p, p, TAU).item() for p in (near, far)]
    assert equal == pytest.approx([math.log(2)] * 2)
    assert dcr_loss(anchor, near, far, TAU).item() > math.log(2)


@pytest.mark.parametrize("denominator", ["shared", "own"])
def test_where_negatives_make_up_the_denominator_the_loss_is_the_squared_distances_over_4_tau(denominator):
    anchor, view, truth = three(b=2)
    offsets = []
    for b in range(2):
        rows = torch.cat([anchor[b : b + 1], anchor[b : b + 1].expand(-1, 10**5, -1)], dim=1)  # very many negatives
        unit = sum(2 - 2 * F.cosine_similarity(anchor[b, :1], p[b : b + 1]) for p in (view, truth))
        loss = dcr_loss(rows, view[b : b + 1], truth[b : b + 1], TAU, denominator)
        offsets.append((loss - unit / (4 * TAU)).item())
    assert offsets[0] == pytest.approx(offsets[1], abs=1e-4)


def test_separated_negatives_remove_the_slope_and_from_the_shared_form_the_line_too():
    common = normal(3, 1, 200)  # predictions for one latent are much alike
    rows, view = common + 0.1 * normal(3, 8, 200), common[:, 0] + 0.1 * normal(3, 200)
    records = {
        (row["denominator"], row["cosine"]): row
        for row in theorem_2(rows, view, common[:, 0] + 0.3 * normal(3, 200), cosines=(1.0, -1.0))
        if row["view"] == "moves" and row["negatives"] == "turned" and row["distance"] == "unit"
    }
    for denominator in ("shared", "own"):
        assert records[denominator, 1]["r2"] > 0.99
        assert records[denominator, 1]["slope"] == pytest.approx(1 / (4 * TAU), rel=0.2)
        assert records[denominator, -1]["slope"] < records[denominator, 1]["slope"] / 5
    assert records["own", -1]["slope"] < 1e-6
    assert records["shared", -1]["r2"] < 0.95


# --- on models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_diffusion(tmp_path_factory.mktemp("theory") / "diffusion")


def test_predictions_are_of_the_same_latents_and_their_squared_distances_means_over_them(folder):
    denoiser, x_t, contexts = load_denoiser(folder), normal(2, 4, 8, 8).float(), normal(3, 1, 24).float()
    eps = predict_under(denoiser, x_t, 300, contexts, batch=2)
    one = [denoiser.predict(x[None], torch.tensor([300]), contexts).flatten(1) for x in x_t]
    for i, j in ((0, 1), (0, 2)):
        mean = sum((part[i] - part[j]).square().sum() for part in one) / 2
        assert (eps[i] - eps[j]).square().sum().item() == pytest.approx(mean.item(), rel=1e-4)


def test_reports_and_predictions_have_the_promised_keys_and_shapes(small_clip, folder):
    encoder, denoiser = load_encoder(str(small_clip)), load_denoiser(folder)
    conditioner = Conditioner("global", encoder.dim, denoiser.width)
    report = theory_report(encoder, conditioner, denoiser, timesteps=(500,), n=48, halvings=2)
    assert {key.rsplit("/", 1)[0] for key in report if "slack" not in key} == {
        f"{features}/500/{kind}" for features in ("condition", "embedding") for kind in ("extremes", "quantiles")
    }
    assert report["embedding/500/extremes/m"] <= report["embedding/500/quantiles/m"]
    rows, view, truth = dcr_predictions(encoder, conditioner, denoiser, torch.rand(3, 3, 32, 32), 500)
    assert (rows.shape, view.shape, truth.shape) == ((3, 3, 256), (3, 256), (3, 256))


# --- the additive bias ------------------------------------------------------------------------------------------


def test_a_vector_added_to_every_token_is_one_bias_a_layer_to_1e_12(folder):
    plain, biased = (load_denoiser(folder, levers=levers) for levers in ((), ("bias",)))
    x_t, v = normal(2, 4, 8, 8), normal(2, 1, 24)
    outs = []
    for denoiser, context in ((plain, plain.empty.double() + v), (biased, v)):
        denoiser.network.double()
        with torch.no_grad():
            outs.append(denoiser.network(x_t, 500, context).sample)
    assert (outs[0] - outs[1]).abs().max() < 1e-12


def test_first_messages_of_two_global_conditions_differ_by_one_vector_and_those_of_two_recaps_do_not(folder):
    denoiser = load_denoiser(folder, levers=())
    denoiser.network.double()
    v, each = normal(2, 1, 24), normal(2, len(denoiser.empty), 24)
    for added, uniform in ((v, True), (each, False)):
        one, two = first_messages(denoiser, normal(1, 4, 8, 8), 500, denoiser.empty.double() + added)
        spread = (one - two).std(0) / (one - two).abs().mean()  # [c], over positions
        assert (spread.max() < 1e-12) == uniform
