import numpy as np
import pytest
import torch

from diva_lab.analysis.alignment import ALIGNMENT_TIMESTEPS, recovered_fraction

CAPTIONS = ["a photo of a red disc" + " two dots" * i for i in range(6)]


@pytest.fixture
def latents():
    return torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def half_way(denoiser):
    return 0.5 * denoiser.encode_text(CAPTIONS)


def test_the_empty_context_recovers_nothing(denoiser, latents):
    table = recovered_fraction(denoiser, denoiser.empty.expand(6, -1, -1), CAPTIONS, latents)
    assert list(table.index) == [*ALIGNMENT_TIMESTEPS, "total"] and len(ALIGNMENT_TIMESTEPS) == 10
    assert (table[["recovered", "low", "high"]] == 0).all(axis=None)


def test_the_captions_own_context_recovers_all(denoiser, latents):
    table = recovered_fraction(denoiser, denoiser.encode_text(CAPTIONS), CAPTIONS, latents)
    assert (table["visual"] == table["caption"]).all()
    assert (table[["recovered", "low", "high"]] == 1).all(axis=None)


def test_losses_and_fraction_by_hand(denoiser, latents):
    table = recovered_fraction(denoiser, half_way(denoiser), CAPTIONS, latents, timesteps=(300,), seed=4)
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4300))
    x_t = eps + 0.07 * latents
    strength = torch.tensor([len(caption) / 100 for caption in CAPTIONS]).view(-1, 1, 1, 1)
    empty, visual, caption = ((s * x_t - eps).square().mean().item() for s in (0, strength / 2, strength))
    row = table.loc[300]
    assert row[["t", "empty", "visual", "caption"]].tolist() == pytest.approx([300, empty, visual, caption])
    assert row["recovered"] == pytest.approx((empty - visual) / (empty - caption), rel=1e-4)


def test_the_total_is_a_ratio_of_sums_over_the_timesteps(denoiser, latents):
    table = recovered_fraction(denoiser, half_way(denoiser), CAPTIONS, latents, timesteps=(150, 350))
    rows, total = table.iloc[:2].sum(), table.loc["total"]
    expected = (rows["empty"] - rows["visual"]) / (rows["empty"] - rows["caption"])
    assert total["recovered"] == pytest.approx(expected) and np.isnan(total["t"])
    assert total["low"] <= total["recovered"] <= total["high"] and total["low"] < total["high"]


def test_neither_the_batch_nor_the_other_timesteps_change_a_row(denoiser, latents):
    whole = recovered_fraction(denoiser, half_way(denoiser), CAPTIONS, latents)
    parts = recovered_fraction(denoiser, half_way(denoiser), CAPTIONS, latents, timesteps=(250, 350), batch=4)
    columns = ["empty", "visual", "caption", "recovered"]
    np.testing.assert_allclose(whole.loc[[250, 350], columns], parts.loc[[250, 350], columns], rtol=1e-5)


def test_without_captions_the_fraction_is_undefined_and_the_losses_are_not(denoiser, latents):
    table = recovered_fraction(denoiser, half_way(denoiser), None, latents)
    assert table[["caption", "recovered", "low", "high"]].isna().all(axis=None)
    assert table[["empty", "visual"]].notna().all(axis=None)


def test_a_caption_that_tells_nothing_leaves_the_fraction_undefined(denoiser, latents):
    table = recovered_fraction(denoiser, half_way(denoiser), [""] * 6, latents)
    assert table["recovered"].isna().all() and table["caption"].equals(table["empty"])


def test_images_that_differ_in_number_are_refused(denoiser, latents):
    with pytest.raises(ValueError, match="6 contexts, 5 captions, 6 latents"):
        recovered_fraction(denoiser, half_way(denoiser), CAPTIONS[:5], latents)
