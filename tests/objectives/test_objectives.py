import re
from dataclasses import replace

import pytest
import torch
from one_step import OneStep, open_lora, record, trainable

from diva_lab.machine import generator
from diva_lab.objectives import OBJECTIVES

EACH = pytest.mark.parametrize("objective", OBJECTIVES)


UNDRAWN = ("caption-contrast", "kuea")  # need no view, no timestep and no noise


@pytest.fixture
def one(settings_of, objective) -> OneStep:
    """A step of an objective, with LoRA that is open."""
    made = OneStep.of(settings_of(objective))
    open_lora(made.encoder)
    return made


@EACH
def test_an_objective_gives_named_terms_with_one_value_an_image(one, objective):
    terms = one.terms()
    assert terms and set(terms) <= {"rec", "con", "dcr", "cap", "kernel", "keep"}
    for values in terms.values():
        assert values.shape == (3,) and values.dtype == torch.float32 and values.isfinite().all()
        assert values.requires_grad


@EACH
def test_an_objective_draws_from_its_generator_only(one, objective):
    torch.manual_seed(0)
    first = one.terms()
    torch.manual_seed(1)
    same, other = one.terms(), one.terms(random=generator("another"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) != (objective not in UNDRAWN) for name in first)


@EACH
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_frozen_parts_get_no_gradient_and_every_opened_weight_does(settings_of, objective, lora_rank):
    one = OneStep.of(replace(settings_of(objective), lora_rank=lora_rank))
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


@pytest.mark.parametrize(
    ("objective", "evaluations"),
    [
        ("diva", 2 * 3),
        ("contrastive", 0),
        ("naive", 2 * 3),
        ("dcr", 3 * 3 + 3),
        ("dcr-guidance", 3 * 3 + 6),
        ("caption-contrast", 0),
        ("un2clip", 2 * 3),
        ("kuea", 0),
    ],
)
def test_an_objective_evaluates_the_denoiser_as_often_as_its_paper_says(one, objective, evaluations):
    with record(one) as seen:
        one.terms()
    assert sum(len(batch) for batch in seen.predicted) == evaluations


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "kuea"])  # between alike random models
@pytest.mark.parametrize("seed", range(5))
def test_the_loss_falls_on_a_fixed_batch_with_fixed_timesteps_and_noise(settings_of, objective, seed):
    one = OneStep.of(replace(settings_of(objective), seed=seed, batch=2))
    losses = one.descend(list(trainable(one.encoder).values()))
    assert losses[-1] < losses[0] - 1e-3
