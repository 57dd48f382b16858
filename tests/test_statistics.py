import ast
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score

from diva_lab.statistics import (
    average_precision,
    bootstrap_counts,
    bootstrap_mean,
    bootstrap_weights,
    compare_mixes,
    compare_rows,
    conflict_rate,
    holm,
    independent_difference,
    interval_p,
    mcnemar_pairs,
    nested_t,
    paired_differences,
    paired_shares,
    paired_t,
    percent,
    percentiles,
    rank_correlation,
    regression,
    where_reached,
    wilson,
)

# --- a rate of counts -------------------------------------------------------------------------------------------


def test_a_rate_of_counts_has_the_interval_of_a_mean_where_every_member_counts_once():
    hits = np.random.default_rng(0).integers(2, size=200).astype(float)
    value, low, high = bootstrap_counts(np.stack([hits, 1 - hits], 1), lambda sums: sums[:, 0] / sums.sum(1))
    assert value == hits.mean() and (low, high) == pytest.approx(bootstrap_mean([hits]), abs=0.01)


def test_an_interval_of_counts_is_wider_where_a_members_counts_agree():
    together, apart = np.array([[4, 0], [0, 4]] * 20, float), np.full((40, 2), 2.0)
    share = lambda sums: sums[:, 0] / sums.sum(1)  # noqa: E731
    assert bootstrap_counts(apart, share) == (0.5, 0.5, 0.5)
    value, low, high = bootstrap_counts(together, share)
    assert low < 0.4 < value == 0.5 < 0.6 < high
    assert bootstrap_counts(together, share) == (value, low, high)


# --- a proportion -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_gives_the_values_of_newcombes_table(successes, n, expected):  # Statistics in Medicine 17 (1998)
    assert wilson(successes, n) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("n", [1, 15, 300])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_wilson_inverts_the_score_test_holds_the_proportion_and_stays_within_0_and_1(n, level):
    z = stats.norm.ppf((1 + level) / 2)
    for successes in range(n + 1):
        low, high = wilson(successes, n, level)
        assert 0 <= low <= successes / n <= high <= 1
        assert (low == 0) == (successes == 0) and (high == 1) == (successes == n)
        for end in {low, high} - {0.0, 1.0}:  # |p - end| is z standard errors at the end
            assert (successes / n - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, rel=1e-12)


def test_wilson_by_hand():  # two of four, at the level of z = 2: 1 / 2 -+ sqrt(1 / 16 + 1 / 16)
    level = 2 * stats.norm.cdf(2) - 1
    assert wilson(2, 4, level) == pytest.approx((0.5 - 0.5**0.5 / 2, 0.5 + 0.5**0.5 / 2), rel=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson(successes, n)


# --- a mean of groups -------------------------------------------------------------------------------------------


def test_bootstrap_mean_holds_the_mean_of_the_group_means_and_not_the_mean_of_the_members():
    low, high = bootstrap_mean([np.ones(2), np.zeros(1000)])
    assert (low, high) == (0.5, 0.5)


def test_bootstrap_mean_resamples_within_the_groups():
    between = [np.full(50, value) for value in (0.0, 0.3, 1.0)]
    assert bootstrap_mean(between) == pytest.approx((1.3 / 3, 1.3 / 3))


def test_bootstrap_mean_of_one_group_nears_the_normal_interval():
    values = np.random.default_rng(0).normal(size=400)
    half = 1.96 * values.std() / 20
    assert bootstrap_mean([values], draws=8000) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_bootstrap_mean_is_fixed_by_its_seed():
    groups = [np.random.default_rng(0).random(20)]
    assert bootstrap_mean(groups, seed=1) == bootstrap_mean(groups, seed=1) != bootstrap_mean(groups, seed=2)


def test_bootstrap_mean_refuses_an_empty_group():
    with pytest.raises(ValueError, match="without members"):
        bootstrap_mean([np.ones(3), np.ones(0)])


# --- a difference over seeds ------------------------------------------------------------------------------------


def test_paired_t_by_hand():  # three seeds: two degrees of freedom, whose quantile has a closed form
    p = 0.975
    quantile = (2 * p - 1) * (2 / (4 * p * (1 - p))) ** 0.5
    half = quantile * 0.1 / 3**0.5
    assert paired_t([0.1, 0.2, 0.3]) == pytest.approx((0.2, 0.2 - half, 0.2 + half), rel=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 0.25, -1e-3])
def test_paired_t_of_equal_differences_is_a_point(value):
    assert paired_t([value] * 4) == (value, value, value)


def test_nested_seeds_count_by_their_groups():
    values, groups = [0.1, 0.3, 0.2, 0.6], ["a", "a", "b", "c"]
    assert nested_t(values, groups) == pytest.approx(paired_t([0.2, 0.2, 0.6]))
    mean, low, high = nested_t([0.1, 0.3], ["a", "a"])
    assert mean == pytest.approx(0.2) and np.isnan([low, high]).all()
    copies = nested_t(values * 5, groups * 5)  # more seeds of the same groups do not narrow it
    assert copies == pytest.approx(nested_t(values, groups))


def test_a_value_is_read_where_a_path_first_comes_to_a_level():
    path, values = [0.1, 0.3, 0.2, 0.4], [9.0, 5.0, 7.0, 1.0]
    assert where_reached(path, 0.2, values) == pytest.approx(7)  # on the way to .3, not at the .2 after it
    assert where_reached(path, 0.4, values) == 1 and where_reached(path, 0.1, values) == 9
    assert where_reached(path, 0.05, values) == 9 and np.isnan(where_reached(path, 0.41, values))
    with pytest.raises(ValueError, match=r"arrays of \(4,\) and \(3,\)"):
        where_reached(path, 0.2, values[:3])


def test_a_rank_correlation_is_scipys_and_its_interval_is_wider_where_whole_groups_are_drawn():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 10)
    x = rng.normal(size=6)[groups] + 0.1 * rng.normal(size=60)
    y = rng.normal(size=6)[groups] + x
    rho, low, high = rank_correlation(x, y, groups)
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic) and low < rho < high
    _, low_alone, high_alone = rank_correlation(x, y, np.arange(60))
    assert high - low > high_alone - low_alone
    assert rank_correlation(x, x**3, groups)[0] == pytest.approx(1)
    one = rank_correlation(x, y, ["a"] * 60)
    assert one[0] == pytest.approx(rho) and np.isnan(one[1:]).all()
    assert np.isnan(rank_correlation(x, np.ones(60), groups)).all()


def test_paired_t_refuses_a_single_seed():
    with pytest.raises(ValueError, match="at least two"):
        paired_t([0.1])


RESULTS = pd.DataFrame(
    {
        "objective": ["none"] * 3 + ["dcr"] * 3 + ["diva"],
        "seed": [0, 1, 2, 2, 1, 0, 1],
        "pairs/mean": [0.2, 0.3, 0.4, 0.5, 0.4, 0.4, 0.2],
        "nmi": [0.7, 0.7, 0.7, 0.6, 0.6, 0.6, 0.8],
    }
)


def test_differences_are_paired_by_seed_whatever_the_order_of_the_rows():
    rows = paired_differences(RESULTS.sample(frac=1, random_state=1), ["pairs/mean", "nmi"])
    row = rows[(rows["objective"] == "dcr") & (rows["measure"] == "pairs/mean")].iloc[0]
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(paired_t([0.2, 0.1, 0.1]))
    assert row["seeds"] == 3


def test_a_shift_common_to_an_objective_has_an_interval_of_no_width():
    rows = paired_differences(RESULTS, ["nmi"]).set_index("objective")
    assert rows.loc["dcr", ["difference", "low", "high"]].to_numpy(float) == pytest.approx(np.full(3, -0.1))


def test_a_single_seed_has_a_difference_and_no_interval():
    row = paired_differences(RESULTS, ["nmi"]).set_index("objective").loc["diva"]
    assert row["difference"] == pytest.approx(0.1)
    assert np.isnan([row["low"], row["high"]]).all()


def test_the_baseline_must_be_there():
    with pytest.raises(ValueError, match="no baseline 'zero' among none, dcr, diva"):
        paired_differences(RESULTS, ["nmi"], baseline="zero")


def test_mixes_are_compared_with_their_start_the_seeds_of_stage_2_within_stage_1():
    place = {"objective": "diva, mixed", "alignment": "unpaired", "mix": 0.0, "chosen": False, "nmi": 0.8}
    starts = pd.DataFrame([place | {"seed": seed, "align_seed": 10_000.0 + seed % 2} for seed in (0, 1, 2)])
    ends = starts.assign(mix=0.5, chosen=True, nmi=[0.7, 0.6, 0.9])  # seeds 0 and 2 share a projector
    alone = starts[:1].assign(objective="caption-contrast", alignment="none", align_seed=np.nan)
    other = alone.assign(mix=1.0, chosen=True, nmi=0.75)
    table = compare_mixes(pd.concat([starts, ends, alone, other]), ["nmi"]).set_index("objective")
    assert table.index.tolist() == ["diva, mixed, unpaired", "caption-contrast"] and table["seeds"].tolist() == [3, 1]
    assert table["difference"].tolist() == pytest.approx([-0.1, -0.05])
    ours = table.loc["diva, mixed, unpaired", ["low", "high"]].tolist()
    assert ours == pytest.approx(stats.t.interval(0.95, 1, -0.1, 0.1))
    assert table.loc["caption-contrast", ["low", "high"]].isna().all()


def test_compare_rows_leaves_out_rows_that_have_not_been_run_or_share_no_seed():
    more = pd.concat([RESULTS, pd.DataFrame([{"objective": "far", "seed": 9, "pairs/mean": 0.1, "nmi": 0.1}])])
    rows = compare_rows(more, ["far", "dcr, velocity", "dcr", "none"], ["nmi"])
    assert rows["objective"].tolist() == ["dcr"]
    assert rows.equals(paired_differences(RESULTS[RESULTS["objective"] != "diva"], ["nmi"]))
    assert compare_rows(more, ["dcr"], ["nmi"], baseline="not run").empty


# --- a slope ----------------------------------------------------------------------------------------------------


def test_regression_by_hand_and_its_band_is_narrowest_at_the_mean():
    x = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    y = np.array([1.0, 2.5, 2.0, 4.0, 4.5])
    (slope, low, high), line = regression(x, y, points=5)
    # sums of squares about the means 2 and 2.8: x 10, xy 8.5, residuals 1.075
    t, s = stats.t.ppf(0.975, 3), (1.075 / 3) ** 0.5
    half = t * s / 10**0.5
    assert (slope, low, high) == pytest.approx((0.85, 0.85 - half, 0.85 + half), rel=1e-12)
    assert line["x"].tolist() == x.tolist()
    assert line["mean"] == pytest.approx(2.8 + 0.85 * (x - 2), rel=1e-12)
    width = line["high"] - line["low"]
    assert width.argmin() == 2 and width[0] == pytest.approx(width[4])
    assert width[2] == pytest.approx(2 * t * s / 5**0.5, rel=1e-12)  # at the mean of x the band is that of a mean


def test_regression_of_points_on_a_line_has_an_interval_of_no_width_and_takes_three():
    (slope, low, high), _ = regression([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert (slope, low, high) == pytest.approx((2, 2, 2))
    with pytest.raises(ValueError, match="no regression of 2 values on 2"):
        regression([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="x that vary"):
        regression([1.0, 1.0, 1.0], [0.0, 1.0, 2.0])


# --- a rate of conflict -----------------------------------------------------------------------------------------


def series(rate: float, n: int, seed: int, stay: float = 0.0) -> np.ndarray:
    """Cosines whose sign is negative at `rate`; each keeps the one before with probability `stay`."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        out.append(out[-1] if out and rng.random() < stay else np.where(rng.random() < rate, -0.2, 0.2))
    return np.array(out, float)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.863])
def test_conflict_rate_recovers_the_rate_of_a_series(rate):
    measured, low, high = conflict_rate(series(rate, 2000, seed=1))
    assert low < rate < high and high - low < 0.08
    assert measured == pytest.approx(rate, abs=0.03)


def test_blocks_of_one_step_give_about_wilsons_interval():
    cosines = series(0.3, 500, seed=2)
    measured, low, high = conflict_rate(cosines, block=1)
    assert (low, high) == pytest.approx(wilson(round(measured * 500), 500), abs=0.01)


def test_steps_that_depend_on_each_other_have_a_wider_interval():
    cosines = series(0.5, 1000, seed=3, stay=0.9)
    widths = [np.ptp(conflict_rate(cosines, block)[1:]) for block in (1, 30)]
    assert widths[1] > 2 * widths[0]


def test_several_runs_are_counted_together_and_nan_is_left_out():
    rate, low, high = conflict_rate([np.array([-0.1, np.nan, 0.2]), np.array([0.3, 0.4])])
    assert rate == 0.25 and low <= rate <= high
    with pytest.raises(ValueError, match="no cosine"):
        conflict_rate(np.array([np.nan]))


# --- average precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_that_of_scikit_learn_under_every_weight(ties):
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(40, 6)), random.random((40, 6)) < 0.3
    scores = scores.round() if ties else scores
    weights = np.vstack([np.ones(40, int), bootstrap_weights(40, seed=1, draws=9)])
    expected = [average_precision_score(labels.ravel(), scores.ravel(), sample_weight=np.repeat(w, 6)) for w in weights]
    np.testing.assert_allclose(average_precision(scores, labels, weights), expected, atol=1e-12)


def test_average_precision_by_hand_and_without_a_true_label():
    scores, labels = np.array([[0.9, 0.8], [0.7, 0.6]]), np.array([[True, False], [True, False]])
    values = average_precision(scores, labels, np.array([[1, 1], [0, 2], [0, 0]]))
    assert values[:2].tolist() == [pytest.approx((1 + 2 / 3) / 2), 1.0] and np.isnan(values[2])


def test_bootstrap_weights_draw_as_many_items_as_there_are_and_their_percentiles_leave_out_nan():
    weights = bootstrap_weights(50, seed=0, draws=400)
    assert (weights.sum(1) == 50).all() and np.array_equal(weights, bootstrap_weights(50, seed=0, draws=400))
    values = np.arange(50.0)
    low, high = percentiles(weights @ values / 50)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * values.std() / 50**0.5, rel=0.15)
    assert percentiles(np.array([np.nan, 1.0, 3.0]), 0.5) == (1.5, 2.5)


# --- two shares, and many tests ---------------------------------------------------------------------------------


def test_holm_gives_the_values_of_a_computation_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, the last raised to .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert len(holm([])) == 0


def test_holm_counts_no_test_that_was_not_made():
    adjusted = holm([np.nan, 0.02, np.nan, 0.03])
    assert adjusted[[1, 3]] == pytest.approx([0.04, 0.04]) and np.isnan(adjusted[[0, 2]]).all()


def test_an_interval_of_paired_shares_is_that_of_a_computation_by_hand():
    # (8 + 1) / 22 and (3 + 1) / 22: .2273 -+ 1.96 sqrt((.5909 - .0517) / 22)
    assert paired_shares(8, 3, 20) == pytest.approx((0.25, -0.07958, 0.53413), abs=1e-5)
    difference, low, high = paired_shares(0, 0, 135)
    assert difference == 0 and low == -high and 0.01 < high < 0.03
    assert paired_shares(3, 3, 3 + 3)[0] == 0
    with pytest.raises(ValueError, match=r"5 gained and 2 lost of 6; expected gained \+ lost <= n"):
        paired_shares(5, 2, 6)


def test_an_interval_of_paired_shares_holds_the_difference_as_often_as_it_says():
    cells, rng = np.array([0.15, 0.05, 0.8]), np.random.default_rng(0)
    held = []
    for gained, lost, _ in rng.multinomial(135, cells, size=2000):
        _, low, high = paired_shares(int(gained), int(lost), 135)
        held.append(low <= 0.1 <= high)
    assert 0.93 < np.mean(held) < 0.97


def test_an_interval_of_independent_shares_is_newcombes():
    one, two = ((x / n, *wilson(x, n)) for x, n in ((48, 80), (56, 70)))  # method 10 of Newcombe's table II
    difference, low, high, p = independent_difference(one, two)
    assert (difference, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5) and 0.001 < p < 0.05
    assert independent_difference(two, one)[:3] == pytest.approx((-0.2, -0.3339, -0.0524), abs=5e-5)
    assert independent_difference(two, one)[3] == pytest.approx(p)
    assert independent_difference(one, one)[3] == 1 and independent_difference((0.5,) * 3, (0.6,) * 3)[3] == 0


def test_p_of_an_interval_is_a_twentieth_where_the_interval_ends_at_zero():
    assert interval_p(0.2, 0.0, 0.3) == interval_p(-0.2, -0.5, 0.0) == pytest.approx(0.05)
    assert interval_p(0.2, 0.1, 0.3) == pytest.approx(2 * stats.norm.sf(2 * stats.norm.ppf(0.975)))
    assert interval_p(0.0, 0.0, 0.0) == 1 and interval_p(0.2, 0.2, 0.2) == 0


def test_p_of_independent_scores_is_below_a_twentieth_where_the_interval_excludes_zero():
    for x in range(40, 80, 3):
        _, low, high, p = independent_difference((0.6, *wilson(60, 100)), (x / 100, *wilson(x, 100)))
        assert (p < 0.05) == (low > 0 or high < 0)


def test_the_pairs_that_mcnemars_test_takes_are_those_of_a_computation_by_hand():
    # (1.96 sqrt(.3) + .8416 sqrt(.3 - .0196))^2 / .0196 = 117.7
    assert mcnemar_pairs(0.14, 0.3) == mcnemar_pairs(-0.14, 0.3) == 118
    # all changes one way: (1.96 sqrt(.1) + .8416 sqrt(.1 - .01))^2 / .01 = 76.1
    assert mcnemar_pairs(0.1, 0.02) == mcnemar_pairs(0.1, 0.1) == 77
    with pytest.raises(ValueError, match=r"difference 0\.0 of discordance"):
        mcnemar_pairs(0.0, 0.3)


def test_with_so_many_pairs_the_test_finds_the_difference_in_four_of_five_samples():
    n, rng = mcnemar_pairs(0.1, 0.24), np.random.default_rng(0)
    gained, lost, _ = rng.multinomial(n, [0.17, 0.07, 0.76], size=4000).T
    found = (gained - lost) ** 2 / (gained + lost) > stats.chi2.ppf(0.95, 1)
    assert found.mean() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [
        ((0.178,), 1, "17.8 %"),
        ((0.4,), 0, "40 %"),
        ((0.4146,), None, "41.46 %"),
        ((np.float32(0.5), 0.4, 0.6), 1, "50.0 % (95 % interval 40.0 to 60.0)"),
        ((0.5, np.nan, np.nan), 0, "50 %"),
    ],
)
def test_a_percentage_has_one_form(values, digits, text):
    assert percent(*values, digits=digits) == text


ROOT = Path(__file__).parent.parent
SOURCES = [*(ROOT / "diva_lab").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]


def written_by_hand(source: str) -> list[str]:
    """The f-strings in which a number that is formatted stands before a percent sign, or whose format is one."""
    strings = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.JoinedStr)]
    return [text for node in strings if re.search(r":[^{}]*[fgd%]\} ?%|:[^{}]*%\}", text := ast.unparse(node))]


def test_percentages_are_written_by_one_function():
    assert written_by_hand('print(f"{x:.1f} %")') and written_by_hand('f"{x:.0%}"') and written_by_hand('f"{x:d}%"')
    assert not written_by_hand('f"{percent(x)} of {n:.1f} points, 95 % interval"')
    for path in SOURCES:
        cells = [path.read_text()]
        if path.suffix == ".ipynb":
            cells = ["".join(cell["source"]) for cell in json.loads(cells[0])["cells"] if cell["cell_type"] == "code"]
        assert not [text for cell in cells for text in written_by_hand(cell)], path.name
