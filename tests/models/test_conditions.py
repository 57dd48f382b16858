import pytest
import torch

from diva_lab.models.conditions import CONDITIONS, Conditioner, Projector
from diva_lab.models.encoders import Features

B, N, D, L, C = 3, 16, 8, 6, 5  # images, patches, width, tokens of the prompt, width of the cross-attention

LENGTHS = {
    "global": 1, "recap": L, "recap-all": 1 + N, "recap-half": 1 + N // 2, "recap-pool6": 1 + N // 6,
    "recap-pool10": 1 + N // 10,
}  # fmt: skip
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
def test_a_context_has_its_conditions_tokens_drawn_or_not(name, features, empty):
    for generator in (None, seeded(0)):
        assert Conditioner(name, D, C)(features, empty, generator).shape == (B, LENGTHS[name], C)


@EACH
def test_a_context_is_the_empty_prompt_where_the_projector_is_zero(name, features, empty):
    conditioner = Conditioner(name, D, C)
    torch.nn.init.zeros_(conditioner.projector[-1].weight)
    torch.nn.init.zeros_(conditioner.projector[-1].bias)
    context = conditioner(features, empty, seeded(0))
    wanted = {"global": torch.zeros(1, C), "recap": empty}.get(name, empty.mean(0).expand(LENGTHS[name], -1))
    assert torch.equal(context, wanted.expand(B, -1, -1))


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
def test_an_images_context_does_not_depend_on_the_others(name, features, empty):
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


def patches_of(name, features, empty, generator=None):
    """A condition's context without its first token, with the identity as projector and an empty prompt of zeros."""
    conditioner = Conditioner(name, D, D)
    conditioner.projector = torch.nn.Identity()
    context = conditioner(features, torch.zeros(L, D), generator)
    assert torch.equal(context[:, 0], features.embedding)
    return context[:, 1:]


def test_recap_all_has_every_patch(features, empty):
    assert torch.equal(patches_of("recap-all", features, empty), features.patches)


def test_recap_half_draws_half_of_the_patches_and_none_twice(features, empty):
    assert torch.equal(patches_of("recap-half", features, empty), features.patches[:, ::2])
    drawn = patches_of("recap-half", features, empty, seeded(0))
    same = (drawn[:, :, None] == features.patches[:, None]).all(-1)  # [b, n / 2, n]
    assert same.sum(2).eq(1).all() and same.sum(1).le(1).all()
    assert not torch.equal(drawn, patches_of("recap-half", features, empty, seeded(1)))


@pytest.mark.parametrize("window", [6, 10])
def test_recap_pool_averages_neighbours(features, empty, window):
    context = patches_of(f"recap-pool{window}", features, empty)
    for i in range(N // window):
        torch.testing.assert_close(context[:, i], features.patches[:, i * window : (i + 1) * window].mean(1))


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
    with pytest.raises(ValueError, match=f"unknown condition 'xyz'; expected one of {', '.join(CONDITIONS)}"):
        Conditioner("xyz", D, C)


@EACH
def test_several_projectors_read_the_same_tokens_and_stand_side_by_side(name, features):
    conditioner = Conditioner(name, D, {"vec": 3, "text": C}, seed=2)
    assert {key.split(".")[1] for key in conditioner.state_dict()} == {"vec", "text"}
    context = conditioner(features, torch.zeros(L, 3 + C), seeded(0))
    assert context.shape == (B, LENGTHS[name], 3 + C)
    for part, width in (("vec", slice(0, 3)), ("text", slice(3, None))):
        alone = Conditioner(name, D, C)
        alone.projector = conditioner.projector[part]
        torch.testing.assert_close(
            context[..., width], alone(features, torch.zeros(L, context[..., width].shape[2]), seeded(0))
        )
