import pytest
import torch

from diva_lab.conditions import CONDITIONS, Conditioner, Projector
from diva_lab.encoders import Features

B, N, D, L, C = 3, 16, 8, 6, 5  # pictures, patches, width, tokens of the prompt, width of the cross-attention

EACH = pytest.mark.parametrize("name", CONDITIONS)


@pytest.fixture
def features():
    random = torch.Generator().manual_seed(0)
    return Features(torch.randn(B, D, generator=random), torch.randn(B, N, D, generator=random))


@pytest.fixture
def empty():
    return torch.randn(L, C, generator=torch.Generator().manual_seed(1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@EACH
def test_a_context_is_one_token_to_be_added_or_has_the_shape_of_the_prompts(name, features, empty):
    assert Conditioner(name, D, C)(features, empty, seeded(0)).shape == (B, 1 if name == "global" else L, C)


@EACH
def test_a_context_is_the_empty_prompt_where_the_projector_says_nothing(name, features, empty):
    conditioner = Conditioner(name, D, C)
    torch.nn.init.zeros_(conditioner.projector[-1].weight)
    torch.nn.init.zeros_(conditioner.projector[-1].bias)
    said = conditioner(features, empty, seeded(0))
    assert torch.equal(said if len(said[0]) == L else empty + said, empty.expand(B, -1, -1))


@EACH
def test_without_a_generator_nothing_is_drawn(name, features, empty):
    conditioner = Conditioner(name, D, C)
    torch.manual_seed(0)
    one = conditioner(features, empty)
    torch.manual_seed(1)
    assert torch.equal(one, conditioner(features, empty))


@EACH
def test_equal_generators_give_equal_contexts(name, features, empty):
    conditioner = Conditioner(name, D, C)
    torch.manual_seed(0)
    one = conditioner(features, empty, seeded(5))
    torch.manual_seed(1)
    assert torch.equal(one, conditioner(features, empty, seeded(5)))


@EACH
def test_a_pictures_context_does_not_depend_on_the_others(name, features, empty):
    conditioner = Conditioner(name, D, C)
    alone = Features(features.embedding[1:2], features.patches[1:2])
    torch.testing.assert_close(conditioner(features, empty, seeded(0))[1:2], conditioner(alone, empty, seeded(0)))


@EACH
def test_a_context_carries_the_gradient_to_embedding_and_projector(name, features, empty):
    conditioner = Conditioner(name, D, C)
    features.embedding.requires_grad_()
    conditioner(features, empty, seeded(0)).square().sum().backward()
    assert features.embedding.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in conditioner.parameters())


def test_global_adds_the_projected_embedding(features, empty):
    conditioner = Conditioner("global", D, C)
    assert torch.equal(conditioner(features, empty), conditioner.projector(features.embedding)[:, None])


def test_recap_adds_the_class_token_and_then_patches(features, empty):
    conditioner = Conditioner("recap", D, C)
    for generator in (None, seeded(0)):
        offset = conditioner(features, empty, generator) - empty
        torch.testing.assert_close(offset[:, 0], conditioner.projector(features.embedding))
        allowed = conditioner.projector(features.patches)  # [b, n, c]
        distance = (offset[:, 1:, None] - allowed[:, None]).abs().amax(-1)  # [b, l - 1, n]
        assert distance.amin(-1).max() < 1e-5
        assert torch.equal(distance.argmin(-1), distance.argmin(-1)[:1].expand(B, -1))  # one draw for the batch


def test_recap_draws_other_patches_from_another_generator(features, empty):
    conditioner = Conditioner("recap", D, C)
    assert not torch.equal(conditioner(features, empty, seeded(0)), conditioner(features, empty, seeded(1)))


def test_recap_draws_with_replacement_from_all_patches(features, empty):
    conditioner = Conditioner("recap", D, C)
    few = Features(features.embedding, features.patches[:, :2])  # fewer patches than positions
    assert conditioner(few, empty, seeded(0)).shape == (B, L, C)
    long = torch.zeros(400, C)
    drawn = conditioner(features, long, seeded(0))[0, 1:].round(decimals=4)
    assert len(drawn.unique(dim=0)) == N


@EACH
def test_a_projectors_weights_are_fixed_by_its_seed_and_nothing_else(name):
    state = torch.get_rng_state()
    one, same, other = (Conditioner(name, D, C, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["projector.1.weight"], other["projector.1.weight"])


def test_the_projector_is_norm_linear_gelu_linear():
    assert [type(layer).__name__ for layer in Projector(D, C)] == ["LayerNorm", "Linear", "GELU", "Linear"]


def test_an_unknown_condition_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"unknown condition 'local'; expected one of {', '.join(CONDITIONS)}"):
        Conditioner("local", D, C)
