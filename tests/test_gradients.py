import math

import pytest
import torch

from diva_lab.gradients import conflict, measure, term_gradients

NAMES = ("model.visual.conv1.weight", "model.visual.transformer.resblocks.0.mlp.weight", "proj.weight")


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
        for found, expected in zip(gradient.values(), alone, strict=True):
            torch.testing.assert_close(found, torch.zeros_like(found) if expected is None else expected)


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
    found = conflict(a, b)
    assert found == pytest.approx(conflict(b, a))
    assert found["cos"] == pytest.approx(torch.cosine_similarity(flat_a, flat_b, dim=0).item())
    norms = flat_a.norm().item(), flat_b.norm().item()
    assert found["magnitude"] == pytest.approx(2 * norms[0] * norms[1] / (norms[0] ** 2 + norms[1] ** 2))


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
    found = conflict(a, b)
    assert set(found) == {"cos", "magnitude", "cos/stem", "cos/block0", "cos/head"}
    assert found["cos/head"] == pytest.approx(-1)
    alone = conflict({NAMES[0]: a[NAMES[0]]}, {NAMES[0]: b[NAMES[0]]})
    assert found["cos/stem"] == pytest.approx(alone["cos"])


def test_a_trained_projector_is_no_part_of_the_tower():
    a, b = random_gradient(0), random_gradient(1)
    alone = conflict(a, b)
    name = "conditioner.projector.1.weight"
    found = conflict(a | {name: torch.ones(2, 2)}, b | {name: -torch.ones(2, 2)})
    assert all(found[key] == pytest.approx(alone[key]) for key in alone if key.startswith("cos/"))


def test_a_zero_gradient_has_no_cosine():
    found = conflict(random_gradient(0), scaled(random_gradient(1), 0.0))
    assert all(math.isnan(value) for key, value in found.items() if key.startswith("cos"))
    assert found["magnitude"] == 0
    zero = scaled(random_gradient(0), 0.0)
    assert math.isnan(conflict(zero, zero)["magnitude"])


def test_small_gradients_keep_their_cosine():
    a, b = random_gradient(0), random_gradient(1)
    assert conflict(scaled(a, 1e-30), scaled(b, 1e-30))["cos"] == pytest.approx(conflict(a, b)["cos"], rel=1e-4)


def test_every_term_is_measured_by_its_norm_and_the_first_two_by_their_conflict():
    a, b, c = (random_gradient(seed) for seed in range(3))
    norm = torch.cat([g.flatten() for g in a.values()]).norm().item()
    assert measure({"dcr": a}) == {"norm_dcr": pytest.approx(norm)}
    found = measure({"con": a, "rec": b, "dcr": c})
    assert {key for key in found if key.startswith("norm_")} == {"norm_con", "norm_rec", "norm_dcr"}
    assert {key: found[key] for key in conflict(a, b)} == conflict(a, b)
