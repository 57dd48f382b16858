import numpy as np
import torch

from diva_lab import evaluate
from diva_lab.analysis.readability import world_pairs_in_memory
from diva_lab.evaluation import correspondence as module
from diva_lab.evaluation.correspondence import changed_patches, difference_maps
from diva_lab.models.encoders import load_encoder
from diva_lab.world import DETAILS


def test_a_patch_is_changed_where_one_byte_of_it_differs():
    pairs = torch.zeros(2, 2, 3, 32, 32, dtype=torch.uint8)
    pairs[0, 1, 2, 7, 8] = 1
    pairs[1, 0, 0, 31, 0] = 255
    changed = changed_patches(pairs, 4)
    assert changed.nonzero().tolist() == [[0, 0, 1], [1, 3, 0]]
    assert changed_patches(pairs, 27).sum(dim=(1, 2)).min() >= 1, "a grid that does not divide the image"


def test_equal_images_have_an_empty_map_and_the_map_has_one_number_a_patch():
    pairs = world_pairs_in_memory(2, 0).images[:5].clone()
    pairs[0, 1] = pairs[0, 0]
    encoder = load_encoder("tiny")
    maps = difference_maps(encoder, pairs)
    assert maps.shape == (5, 4, 4) and maps[0].abs().max() < 1e-6 and (maps[1:].amax((1, 2)) > 1e-4).all()
    one, two = (encoder.tokens(pairs[:, side].float() / 255) for side in (0, 1))
    torch.testing.assert_close(maps.flatten(1), 1 - torch.cosine_similarity(one, two, dim=2), atol=1e-5, rtol=0)


def test_the_overlap_is_complete_for_the_exact_mask_and_at_chance_for_noise(monkeypatch):
    monkeypatch.setattr(module, "PAIRS", 20)

    def exact(encoder, pairs, layer):
        return changed_patches(pairs, 4).float()

    def noise(encoder, pairs, layer):
        return torch.rand(len(pairs), 4, 4, generator=torch.Generator().manual_seed(0))

    for maps, expected in (
        (exact, lambda row: row["value"] == 1),
        (noise, lambda row: row["low"] < row["chance"] + 0.05),
    ):
        monkeypatch.setattr(module, "difference_maps", maps)
        table = evaluate(["tiny"], ["correspondence"])
        assert list(table["category"]) == [*DETAILS, "all"] and all(expected(row) for row in table.to_dict("records"))
        assert np.isclose(table["chance"].iloc[-1], table["chance"].iloc[:-1].mean())


def test_the_benchmark_compares_the_layer_that_it_names(monkeypatch):
    monkeypatch.setattr(module, "PAIRS", 5)
    first, last = (evaluate(["tiny"], ["correspondence"], layer=layer) for layer in (1, -1))
    assert set(first["set"]) == {"correspondence, layer 1"} and set(last["set"]) == {"correspondence, layer -1"}
    assert not np.array_equal(first["value"], last["value"])
