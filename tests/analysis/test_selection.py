"""What choosing on the test set adds: nothing to choose adds nothing, luck is reported and does not hold."""

import numpy as np
import pandas as pd
import pytest

from diva_lab.analysis.selection import draw_sets, published_power, selection_gain, selection_table

PATTERNS = ["a"] * 100 + ["b"] * 50
RNG = np.random.default_rng(0)


def test_a_set_has_as_many_pairs_of_each_pattern():
    counts = draw_sets(PATTERNS, 20, 5, 0)
    assert (counts[:, :100].sum(1) == 10).all() and (counts[:, 100:].sum(1) == 10).all()
    for size in (0, 21):
        with pytest.raises(ValueError, match=f"{size} pairs of 2 patterns"):
            draw_sets(PATTERNS, size, 5, 0)


def test_one_model_against_itself_gains_nothing():
    correct = RNG.random((1, 150)) < 0.3
    gain = selection_gain(correct, correct[0].astype(float), draw_sets(PATTERNS, 20, 100, 0))
    assert set(gain.values()) == {0}


def test_models_of_one_ability_gain_by_luck_which_a_larger_set_shrinks_and_the_population_does_not_hold():
    correct = np.zeros((8, 150), bool)
    for k, row in enumerate(correct):  # 5 of 100 and 3 of 50 right in each model, other ones
        row[5 * k : 5 * k + 5] = row[100 + 3 * k : 103 + 3 * k] = True
    fixed = correct[-1].astype(float)
    few, many = (selection_gain(correct, fixed, draw_sets(PATTERNS, size, 2000, 0)) for size in (20, 2000))
    assert few["held"] == pytest.approx(0, abs=1e-12) == many["held"]
    assert few["reported"] > 0.05 and 0 < many["reported"] < few["reported"] / 4
    assert few["reported/low"] <= few["reported"] <= few["reported/high"]


def test_the_best_of_two_is_the_expected_maximum():
    """One pair a pattern in two models, each right in another one: drawn sets of size 1 leave no doubt."""
    correct = np.array([[True, False], [False, True]])
    gain = selection_gain(correct, correct[1].astype(float), draw_sets(["a", "a"], 1, 4000, 0))
    # pair 0 is drawn: the first model gains 1; pair 1: both choices gain at most 0, the second is the fixed one
    assert gain["reported"] == pytest.approx(0.5, abs=0.03) and gain["held"] == 0


def test_a_model_that_is_better_everywhere_is_found_and_its_gain_holds():
    correct = np.zeros((3, 150), bool)
    correct[1] = True
    gain = selection_gain(correct, correct[2].astype(float), draw_sets(PATTERNS, 20, 100, 0))
    assert gain["reported"] == gain["held"] == 1


def test_the_table_has_every_number_of_choices_and_the_first_is_no_choice():
    correct = RNG.random((3, 4, 150)) < 0.2
    table = selection_table(correct, PATTERNS, (20, 200))
    assert table.groupby(["of", "size"])["choices"].apply(list).to_dict() == {
        **{("checkpoints", n): [1, 2, 3, 4] for n in (20, 200)}, **{("seeds", n): [1, 2, 3] for n in (20, 200)}
    }  # fmt: skip
    one = table[(table["of"] == "checkpoints") & (table["choices"] == 1)]
    assert (one["reported"] == 0).all()
    alone = table[(table["of"] == "seeds") & (table["choices"] == 1)]
    assert alone["reported"].to_numpy() == pytest.approx(0, abs=1e-12) == alone["held"].to_numpy()
    more = table[(table["of"] == "checkpoints") & (table["size"] == 20)]["reported"].to_numpy()
    assert more[-1] > more[0]


def test_a_published_gain_is_bounded_by_two_tests():
    """9 of 135 pairs: 9 gained and none lost, 2 / 2^9; 18 gained and 9 lost of 27, by hand from the binomial."""
    columns = ["benchmark", "metric", "backbone", "method", "percent"]
    rows = [("mmvp-vlm", "pairs", "a", name, value) for name, value in (("none", 20.0), ("dcr", 26.67), ("diva", 20.0))]
    table = published_power(pd.DataFrame(rows, columns=columns), 0.2).set_index("method")
    assert table["pairs"].to_dict() == {"dcr": 9, "diva": 0}
    assert table.loc["dcr", "p, none lost"] == pytest.approx(2 / 2**9)
    assert table.loc["dcr", "p, some lost"] == pytest.approx(0.1221, abs=1e-4)
    assert table.loc["diva", "p, some lost"] == 1 and np.isnan(table.loc["diva", "pairs needed"])
    assert 300 < table.loc["dcr", "pairs needed"] < 400
