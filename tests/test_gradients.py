import math

import pytest
import torch

from diva_lab.gradients import (
    COMBINE,
    EMBEDDINGS,
    combine,
    curvature,
    measure,
    signal,
    term_gradients,
    total_gram,
)

NAMES = ("model.visual.conv1.weight", "model.visual.transformer.resblocks.0.mlp.c_fc.weight", "proj.weight")


@pytest.fixture
def parameters():
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(4, 3, generator=random).requires_grad_() for name in NAMES}


def terms(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two terms of five examples each; the second does not touch the last parameter."""
    stem, block, head = parameters.values()
    x = torch.linspace(-1, 1, 15).view(5, 3)
    return {
        "con": ((x @ stem.T) * (x @ block.T) * (x @ head.T)).sum(1),
        "rec": (x @ stem.T - x @ block.T).square().sum(1),
    }


def conflict(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """What `measure` finds of two gradients together."""
    return {name: value for name, value in measure({"a": a, "b": b}).items() if not name.startswith("norm_")}


def random_gradient(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 3, generator=random) for name in NAMES}


def scaled(gradient: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    return {name: factor * g for name, g in gradient.items()}


def test_the_terms_gradients_add_up_to_that_of_the_loss(parameters):
    gradients = term_gradients(terms(parameters), parameters)
    loss = sum(values.mean() for values in terms(parameters).values())
    whole = torch.autograd.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, whole, strict=True):
        torch.testing.assert_close(gradients["con"][name] + gradients["rec"][name], gradient)


def test_each_terms_gradient_is_that_of_its_mean(parameters):
    for name, gradient in term_gradients(terms(parameters), parameters).items():
        alone = torch.autograd.grad(terms(parameters)[name].mean(), list(parameters.values()), allow_unused=True)
        for value, expected in zip(gradient.values(), alone, strict=True):
            torch.testing.assert_close(value, torch.zeros_like(value) if expected is None else expected)


def test_a_parameter_that_a_term_does_not_touch_gets_zeros(parameters):
    gradients = term_gradients(terms(parameters), parameters)
    assert (gradients["rec"]["proj.weight"] == 0).all() and (gradients["con"]["proj.weight"] != 0).any()


def test_taking_gradients_leaves_none_behind(parameters):
    term_gradients(terms(parameters), parameters)
    assert all(p.grad is None for p in parameters.values())


def test_a_gradient_agrees_with_itself_and_conflicts_with_its_opposite():
    g = random_gradient(0)
    same, opposite = conflict(g, g), conflict(g, scaled(g, -1.0))
    for key in same:
        assert same[key] == pytest.approx(1)
        assert opposite[key] == pytest.approx(1 if key == "magnitude" else -1)


def test_the_conflict_is_symmetric_and_agrees_with_the_flat_vectors():
    a, b = random_gradient(0), random_gradient(1)
    flat_a, flat_b = (torch.cat([g.flatten() for g in gradient.values()]).double() for gradient in (a, b))
    measured = conflict(a, b)
    assert measured == pytest.approx(conflict(b, a))
    assert measured["cos"] == pytest.approx(torch.cosine_similarity(flat_a, flat_b, dim=0).item())
    norms = flat_a.norm().item(), flat_b.norm().item()
    assert measured["magnitude"] == pytest.approx(2 * norms[0] * norms[1] / (norms[0] ** 2 + norms[1] ** 2))


@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_cosines_do_not_depend_on_scale_and_the_magnitude_similarity_falls(factor):
    a, b = random_gradient(0), random_gradient(1)
    one, two = conflict(a, a) | {"cos": conflict(a, b)["cos"]}, conflict(a, scaled(a, factor))
    assert conflict(a, scaled(b, factor))["cos"] == pytest.approx(one["cos"])
    assert two["magnitude"] == pytest.approx(2 * factor / (1 + factor**2))


def test_orthogonal_gradients_have_cosine_zero():
    a, b = random_gradient(0), random_gradient(1)
    for name in NAMES:
        b[name] = b[name] - a[name] * (a[name] * b[name]).sum() / a[name].square().sum()
    assert all(abs(value) < 1e-6 for key, value in conflict(a, b).items() if key.startswith("cos"))


def test_there_is_a_cosine_for_each_part_of_the_tower():
    a, b = random_gradient(0), random_gradient(1)
    b["proj.weight"] = -a["proj.weight"]
    measured = conflict(a, b)
    parts = {"stem", "block0", "head", "kind/embedding", "kind/fc1", "kind/projection"}
    assert set(measured) == {"cos", "magnitude", *(f"cos/{part}" for part in parts)}
    assert measured["cos/kind/projection"] == measured["cos/head"]
    assert measured["cos/head"] == pytest.approx(-1)
    alone = conflict({NAMES[0]: a[NAMES[0]]}, {NAMES[0]: b[NAMES[0]]})
    assert measured["cos/stem"] == pytest.approx(alone["cos"])


def test_a_trained_projector_is_no_part_of_the_tower():
    a, b = random_gradient(0), random_gradient(1)
    alone = conflict(a, b)
    name = "conditioner.projector.1.weight"
    measured = conflict(a | {name: torch.ones(2, 2)}, b | {name: -torch.ones(2, 2)})
    alone.pop("cos/kind/projection")
    assert all(measured[key] == pytest.approx(alone[key]) for key in alone if key.startswith("cos/"))


def test_a_zero_gradient_has_no_cosine():
    measured = conflict(random_gradient(0), scaled(random_gradient(1), 0.0))
    assert all(math.isnan(value) for key, value in measured.items() if key.startswith("cos"))
    assert measured["magnitude"] == 0
    zero = scaled(random_gradient(0), 0.0)
    assert math.isnan(conflict(zero, zero)["magnitude"])


def test_small_gradients_keep_their_cosine():
    a, b = random_gradient(0), random_gradient(1)
    assert conflict(scaled(a, 1e-30), scaled(b, 1e-30))["cos"] == pytest.approx(conflict(a, b)["cos"], rel=1e-4)


def test_every_term_is_measured_by_its_norm_and_every_pair_by_its_conflict():
    a, b, c = (random_gradient(seed) for seed in range(3))
    norm = torch.cat([g.flatten() for g in a.values()]).norm().item()
    assert measure({"dcr": a}) == {"norm_dcr": pytest.approx(norm)}
    assert conflict(a, b).items() <= measure({"con": a, "rec": b}).items()
    measured = measure({"con": a, "rec": b, "dcr": c})
    for one, other, gradients in (("con", "rec", (a, b)), ("con", "dcr", (a, c)), ("rec", "dcr", (b, c))):
        for key, value in conflict(*gradients).items():
            assert measured[f"{one}~{other}:{key}"] == pytest.approx(value)


def test_embeddings_are_measured_but_are_no_weights():
    a, b = random_gradient(0), random_gradient(1)
    plain, measured = conflict(a, b), conflict(a | {EMBEDDINGS: torch.ones(2, 3)}, b | {EMBEDDINGS: -torch.ones(2, 3)})
    assert measured.pop(f"cos/{EMBEDDINGS}") == pytest.approx(-1)
    assert measured == plain
    assert EMBEDDINGS not in combine(
        {"con": a | {EMBEDDINGS: torch.ones(2)}, "rec": b | {EMBEDDINGS: torch.ones(2)}}, "sum"
    )


# --- curvature and signal ---------------------------------------------------------------------------------------


def test_the_curvature_of_a_quadratic_is_its_hessians_whatever_the_step():
    hessian = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    u = hessian @ w / (hessian @ w).norm()
    for size in (1e-3, 1.0):
        before = w.clone()
        measured = curvature({"proj.w": hessian @ w}, lambda: {"proj.w": hessian @ w}, {"proj.w": w}, size)
        assert measured == pytest.approx((u @ hessian @ u).item())
        assert (w == before).all()


def test_a_zero_gradient_has_no_curvature():
    w = torch.ones(2)
    assert math.isnan(curvature({"proj.w": torch.zeros(2)}, lambda: {}, {"proj.w": w}, 0.1))


def gram_of(mean: float, spread: float, k: int, n: int = 400) -> torch.Tensor:
    """The Gram matrix of k gradients in n dimensions: a common part of length `mean`, noise of variance spread^2."""
    random = torch.Generator().manual_seed(0)
    g = spread * torch.randn(k, n, generator=random, dtype=torch.float64) / n**0.5
    g[:, 0] += mean
    return g @ g.T


def test_signal_and_noise_of_gradients_are_recovered():
    measured = signal(gram_of(2.0, 3.0, k=200), batch=8)
    assert measured["signal"] == pytest.approx(4, rel=0.1) and measured["noise"] == pytest.approx(9, rel=0.1)
    assert measured["snr"] == pytest.approx(measured["signal"] / measured["noise"])
    assert measured["noise_scale"] == pytest.approx(8 / measured["snr"])


def test_noise_alone_has_no_signal_and_equal_gradients_no_noise():
    pure = signal(gram_of(0.0, 1.0, k=100), batch=8)
    assert abs(pure["snr"]) < 0.02
    same = signal(torch.ones(5, 5), batch=8)
    assert same["noise"] == pytest.approx(0) and same["signal"] == pytest.approx(1)


# --- surgery ----------------------------------------------------------------------------------------------------


def opposed() -> dict[str, dict[str, torch.Tensor]]:
    """Two terms in conflict, the first much longer."""
    a = random_gradient(0)
    b = {name: 0.3 * random_gradient(1)[name] - 0.2 * g for name, g in a.items()}
    assert conflict(a, b)["cos"] < -0.1
    return {"con": scaled(a, 5.0), "rec": b}


@pytest.mark.parametrize("how", ["pcgrad", "mgda", "upgrad"])
def test_surgery_on_two_gradients_opposes_neither(how):
    terms = opposed()
    merged = combine(terms, how)
    for gradient in terms.values():
        assert total_gram([merged, gradient])[0, 1] >= -1e-6 * total_gram([gradient])[0, 0]
    plain = combine(terms, "sum")
    assert min(total_gram([plain, gradient])[0, 1] for gradient in terms.values()) < 0


@pytest.mark.parametrize("how", ["sum", "pcgrad", "upgrad"])
def test_without_conflict_surgery_leaves_the_sum(how):
    a = random_gradient(0)
    terms = {"con": a, "rec": {name: 2 * g + 0.1 for name, g in a.items()}}
    for name, g in combine(terms, how).items():
        torch.testing.assert_close(g, terms["con"][name] + terms["rec"][name])


def test_mgda_is_the_shortest_vector_between_two():
    terms = opposed()
    merged = total_gram([scaled(combine(terms, "mgda"), 0.5)])[0, 0]
    for share in torch.linspace(0, 1, 21):
        between = {n: share * g + (1 - share) * terms["rec"][n] for n, g in terms["con"].items()}
        assert merged <= total_gram([between])[0, 0] * (1 + 1e-4)


def test_cagrad_improves_the_worst_term_and_stays_near_the_mean():
    terms = opposed()
    mean, merged = (scaled(combine(terms, how), 0.5) for how in ("sum", "cagrad"))
    worst = [min(total_gram([x, g])[0, 1] for g in terms.values()) for x in (mean, merged)]
    assert worst[1] > worst[0]
    away = {n: merged[n] - mean[n] for n in mean}
    assert total_gram([away])[0, 0] <= 1.01 * (0.5 + 1e-3) ** 2 * total_gram([mean])[0, 0] * 4


def test_equal_norms_make_both_terms_as_long():
    terms = opposed()
    weights = COMBINE["equal-norms"](total_gram(list(terms.values())))
    lengths = weights * total_gram(list(terms.values())).diagonal().sqrt()
    torch.testing.assert_close(lengths[0], lengths[1])


@pytest.mark.parametrize("how", sorted(COMBINE))
def test_one_term_is_left_as_it_is(how):
    g = random_gradient(0)
    assert all((combine({"dcr": g}, how)[name] == g[name]).all() for name in g)


@pytest.mark.parametrize("how", sorted(set(COMBINE) - {"cagrad"}))
def test_surgery_grows_with_its_gradients(how):
    terms = opposed()
    one, three = combine(terms, how), combine({name: scaled(g, 3.0) for name, g in terms.items()}, how)
    for name, g in one.items():
        torch.testing.assert_close(three[name], 3 * g, rtol=1e-4, atol=1e-5)
