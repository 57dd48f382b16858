import pytest
import torch
import torch.nn.functional as F
from one_step import predictions, record, trainable

from diva_lab.gradients import term_gradients
from diva_lab.objectives.contrastive import info_nce


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


def test_info_nce_is_computed_in_float32_under_autocast():
    _, a, b = predictions(4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(a, b)
    torch.testing.assert_close(inside, info_nce(a, b), atol=1e-6, rtol=1e-6)


# --- CLIP's own loss on captions --------------------------------------------------------------------------------


def test_the_contrast_with_captions_is_clips_loss_with_a_frozen_text_tower(step):
    made = step.terms("caption-contrast", tau=0.01)["cap"]
    with record(step) as seen:
        assert torch.equal(step.terms("caption-contrast", tau=0.01)["cap"], made)
    ((_, features),) = seen.encoded
    texts = step.encoder.encode_text(step.captions())
    torch.testing.assert_close(made, info_nce(features.embedding, texts, 0.01))
    assert not seen.predicted


# --- the naive sum ----------------------------------------------------------------------------------------------


def test_the_naive_terms_are_the_weighted_contrast_of_two_views_and_reconstruction(step):
    with record(step) as seen:
        terms = step.terms("naive", lambda_con=2.0, lambda_rec=0.5)
    assert list(terms) == ["con", "rec"]
    one, two = (features.embedding for x, features in seen.encoded if not torch.equal(x, step.images()))
    torch.testing.assert_close(terms["con"], 2 * info_nce(one, two))
    (predicted,), ((_, _, noise),) = seen.predicted, seen.draws
    errors = torch.stack([F.mse_loss(a, b) for a, b in zip(predicted, noise, strict=True)]).view(-1, 3).mean(0)
    torch.testing.assert_close(terms["rec"].detach(), 0.5 * errors)


def test_the_naive_gradient_is_the_sum_of_its_terms(step):
    opened = trainable(step.encoder)

    def gradient(**weights: float) -> list[torch.Tensor]:
        loss = sum(values.mean() for values in step.terms("naive", **weights).values())
        return torch.autograd.grad(loss, list(opened.values()))

    terms = term_gradients(step.terms("naive"), opened)
    whole, con, rec = gradient(), gradient(lambda_rec=0.0), gradient(lambda_con=0.0)
    for k, name in enumerate(opened):
        torch.testing.assert_close(terms["con"][name] + terms["rec"][name], whole[k], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(terms["con"][name], con[k], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(terms["rec"][name], rec[k], atol=1e-6, rtol=1e-4)
