import numpy as np
import pytest
import torch

from diva_lab import evaluate
from diva_lab.evaluation import patch_probe as module
from diva_lab.evaluation.patch_probe import fit_attentive, probe_rows
from diva_lab.world import DETAILS


def marked(n: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Tokens [n, 16, 8] of noise, but for one, anywhere, that has a mark and beside it the label."""
    random = np.random.default_rng(seed)
    tokens, labels = random.normal(size=(n, 16, 8)), random.integers(3, size=n)
    place = random.integers(16, size=n)
    tokens[range(n), place, 0] = 12
    tokens[range(n), place, 1 + labels] = 4
    return torch.from_numpy(tokens).float(), labels


def test_an_attentive_probe_reads_a_token_that_can_lie_anywhere():
    (tokens, labels), (others, asked) = marked(600, 0), marked(300, 1)
    answers = fit_attentive(tokens, labels, 3)(others).argmax(1).numpy()
    assert (answers == asked).mean() > 0.97
    assert (tokens.mean(1).shape, answers.shape) == ((600, 8), asked.shape)


def test_an_attentive_probe_follows_from_its_seed_alone(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 3)
    tokens, labels = marked(50, 0)
    one, two, other = (fit_attentive(tokens, labels, 3, seed)(tokens) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_a_probes_rows_are_its_share_of_right_images_with_chance_and_interval():
    right = {"presence": np.array([True] * 9 + [False]), "text": np.array([True] * 5 + [False] * 5)}
    presence, text, whole = probe_rows("probe", right, 0)
    assert (presence["value"], presence["chance"], text["value"], text["chance"]) == (0.9, 0.5, 0.5, 1 / 6)
    assert whole["category"] == "all" and whole["value"] == pytest.approx(0.7)
    assert whole["chance"] == pytest.approx((1 / 2 + 1 / 6) / 2)
    assert all(row["low"] < row["value"] < row["high"] for row in (presence, text, whole))


def test_the_benchmark_has_every_detail_three_times_and_names_its_layer(small_world, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 3)
    table = evaluate(["tiny"], ["patch-probe"], layer=-1)
    assert set(table["set"]) == {"patch-probe, layer -1"} and set(table["features"]) == {"patches"}
    assert set(table["n"]) == {small_world} and not table[["value", "low", "high", "chance"]].isna().any(axis=None)
    names = table.groupby("metric", sort=False)["category"].apply(list).to_dict()
    assert names == {
        metric: [*DETAILS, "all"]
        for metric in ("probe of the embedding", "probe of the patches' mean", "attentive probe of the patches")
    }


def test_a_layer_that_the_tower_lacks_is_one_clear_error(small_world):
    with pytest.raises(ValueError, match="tiny, patch-probe, patch-probe: layer 9: the image tower has"):
        evaluate(["tiny"], ["patch-probe"], layer=9)
