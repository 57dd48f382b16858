import numpy as np
import pytest
from scipy import stats

from diva_lab.statistics import bootstrap_mean, paired_t, regression, wilson


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_gives_the_values_of_newcombes_table(successes, n, expected):  # Statistics in Medicine 17 (1998)
    assert wilson(successes, n) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("n", [1, 15, 300])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_wilson_agrees_with_scipy_holds_the_proportion_and_stays_within_0_and_1(n, level):
    for successes in range(n + 1):
        low, high = wilson(successes, n, level)
        expected = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert 0 <= low <= successes / n <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson(successes, n)


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


def test_paired_t_agrees_with_scipy():
    differences = np.random.default_rng(0).normal(0.02, 0.01, size=5)
    mean, low, high = paired_t(differences)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert mean == pytest.approx(differences.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_paired_t_of_equal_differences_is_a_point():
    assert paired_t([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)


def test_paired_t_refuses_a_single_seed():
    with pytest.raises(ValueError, match="at least two"):
        paired_t([0.1])


def test_regression_agrees_with_scipy_and_its_band_is_narrowest_at_the_mean():
    x = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    y = np.array([1.0, 2.5, 2.0, 4.0, 4.5])
    (slope, low, high), line = regression(x, y, points=5)
    fit = stats.linregress(x, y)
    half = stats.t.ppf(0.975, 3) * fit.stderr
    assert (slope, low, high) == pytest.approx((fit.slope, fit.slope - half, fit.slope + half))
    assert line["x"] == pytest.approx(x)
    assert line["mean"] == pytest.approx(fit.intercept + fit.slope * x)
    width = line["high"] - line["low"]
    assert width.argmin() == 2 and width[0] == pytest.approx(width[4])
    # at the mean of x the band is that of a mean: t s / sqrt(n)
    s = np.sqrt(((y - fit.intercept - fit.slope * x) ** 2).sum() / 3)
    assert width[2] == pytest.approx(2 * stats.t.ppf(0.975, 3) * s / np.sqrt(5))


def test_regression_of_points_on_a_line_has_an_interval_of_no_width_and_takes_three():
    (slope, low, high), _ = regression([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert (slope, low, high) == pytest.approx((2, 2, 2))
    with pytest.raises(ValueError, match="no regression of 2 values on 2"):
        regression([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="x that vary"):
        regression([1.0, 1.0, 1.0], [0.0, 1.0, 2.0])
