from itertools import combinations

import pytest
import torch
from small_models import write_diffusion

from diva_lab.models.denoiser import Denoiser
from diva_lab.models.frozen import LEVERS, attend
from diva_lab.models.registry import load_denoiser

SUBSETS = [*((name,) for name in LEVERS), *combinations(LEVERS, 2), tuple(LEVERS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_diffusion(tmp_path_factory.mktemp("frozen") / "diffusion")


def build(folder, levers) -> Denoiser:
    denoiser = load_denoiser(folder, levers=levers)
    denoiser.network.double()
    return denoiser


def ask(denoiser: Denoiser, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions for two latents under three contexts each, and their gradient in the contexts."""
    random = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 8, 8, generator=random, dtype=torch.float64)
    context = torch.randn(6, tokens, denoiser.width, generator=random, dtype=torch.float64).requires_grad_()
    out = denoiser.predict(x_t, torch.tensor([10, 700]), context)
    weight = torch.randn(out.shape, generator=random)
    return out, torch.autograd.grad((weight * out).sum(), context)[0]


@pytest.mark.parametrize("levers", SUBSETS, ids="+".join)
@pytest.mark.parametrize("tokens", [1, 26])
def test_no_lever_changes_a_prediction_or_its_gradient(folder, levers, tokens):
    plain, fast = (ask(build(folder, names), tokens) for names in ((), levers))
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6 * other.abs().max().item(), rtol=1e-6)


def saved(denoiser: Denoiser, tokens: int = 1) -> int:
    """Bytes that a prediction keeps for its backward pass, weights not counted, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in denoiser.network.parameters()}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    context = torch.ones(6, tokens, denoiser.width, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        denoiser.predict(torch.ones(2, 4, 8, 8, dtype=torch.float64), torch.tensor([10, 700]), context)
    return sum(storage.nbytes() for storage in kept.values())


def test_levers_for_memory_keep_less(folder):
    plain = saved(build(folder, ()))
    assert saved(build(folder, ("forget",))) < 0.9 * plain
    assert saved(build(folder, ("forget", "recompute"))) < 0.75 * plain


def test_the_prefix_runs_once_per_latent(folder):
    sizes = []
    for levers in ((), ("share",)):
        denoiser = build(folder, levers)
        original = denoiser.network.conv_in.forward
        denoiser.network.conv_in.forward = lambda x, f=original: (sizes.append(len(x)), f(x))[1]
        ask(denoiser, 1)
    assert sizes == [6, 2]


def test_the_empty_prompt_is_projected_once(folder):
    denoiser = build(folder, LEVERS)
    ask(denoiser, 1)
    counts = []
    for name, module in denoiser.network.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(lambda _, args, out: counts.append(args[0].shape[1]))
    ask(denoiser, 1)
    assert not any(length > 1 for length in counts)


@pytest.mark.parametrize("sizes", [(7, 3, 20, 12), (2, 2, 90, 90)])
@pytest.mark.parametrize("constant", [False, True])
def test_attention_in_parts_is_attention(sizes, constant, monkeypatch):
    b, heads, n, m = sizes
    monkeypatch.setattr("diva_lab.models.frozen.CACHED", 2 * heads * n * m)  # two rows at a time
    random = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(b, heads, length, 8, generator=random).double() for length in (n, m, m, n))
    wanted = [q.requires_grad_(), *([] if constant else [k.requires_grad_(), v.requires_grad_()])]
    ours, plain = attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(*(torch.autograd.grad(out, wanted, g) for out in (ours, plain)), strict=True):
        torch.testing.assert_close(one, other)
