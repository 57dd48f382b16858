"""Intervals for a proportion, a mean, a rate, differences, a correlation, a slope, a conflict; tests of many."""

import warnings
from collections.abc import Callable, Sequence
from numbers import Real

import numpy as np
import pandas as pd
from scipy import stats


def percent(value: Real, low: Real = np.nan, high: Real = np.nan, digits: int | None = 1) -> str:
    """The one form of a fraction: "17.8 %"; with an interval "54.2 % (95 % interval 45.1 to 63.0)".

    `digits` after the point; None: as many as the value has.
    """
    value, low, high = (f"{100 * each:g}" if digits is None else f"{100 * each:.{digits}f}"
                        for each in (value, low, high))  # fmt: skip
    return f"{value} %" + (f" (95 % interval {low} to {high})" if "nan" not in (low, high) else "")


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) for a proportion of `successes` out of `n`; within [0, 1] also at 0 and n.

    E. B. Wilson, JASA 22 (1927). Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"no proportion: {successes} successes out of {n}; expected 0 <= successes <= n and n >= 1")
    low, high = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(low), float(high)


def bootstrap_mean(
    groups: Sequence[np.ndarray], level: float = 0.95, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean of the group means, each of `groups` [n_g] resampled within itself.

    The groups are fixed (the nine patterns), only their members are a sample. A group of one member does not vary.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for group in map(np.asarray, groups):
        if len(group) == 0:
            raise ValueError("a group without members has no mean")
        means += group[rng.integers(len(group), size=(draws, len(group)))].mean(axis=1) / len(groups)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_weights(n: int, seed: int = 0, draws: int = 200) -> np.ndarray:
    """How often each of `n` items is drawn, in `draws` samples of n with replacement: [draws, n]."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)


def percentiles(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval (low, high) of a statistic's values over bootstrap samples; NaN is left out."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_counts(
    counts: np.ndarray, rate: Callable[[np.ndarray], np.ndarray], level: float = 0.95, seed: int = 0, draws: int = 2000
) -> tuple[float, float, float]:
    """A rate of summed counts with its percentile interval (rate, low, high), whole members resampled.

    Args:
        counts: [n, ...] of n independent members, such as images, each with any number of questions.
        rate: sums over members [draws, ...] -> [draws], such as an F1 score.
    """
    with np.errstate(invalid="ignore"):  # a draw may hold nothing to divide by
        rates = rate(np.tensordot(bootstrap_weights(len(counts), seed, draws).astype(float), counts, 1))
    return float(rate(counts.sum(0)[None])[0]), *percentiles(rates, level)


def average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision of `scores` [n, p] for `labels` [n, p] under each row of `weights` [draws, n], one an item.

    It is scikit-learn's with `sample_weight`, where the p parts of an item share its weight. NaN where no weight lies
    on a true label.
    """
    flat, parts = scores.ravel(), scores.shape[1]
    order = np.argsort(-flat, kind="stable")
    items, true = order // parts, labels.ravel()[order]
    last = np.append(np.flatnonzero(np.diff(flat[order])), len(flat) - 1)  # of each group of equal scores
    values = []
    for row in weights:
        every = row[items].astype(float)
        hits, total = np.cumsum(every * true)[last], np.cumsum(every)[last]
        gains = np.diff(hits, prepend=0)
        there = gains > 0
        values.append((gains[there] * hits[there] / total[there]).sum() / hits[-1] if hits[-1] else np.nan)
    return np.array(values)


def paired_t(differences: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired `differences` (one a seed) and its Student-t interval: (mean, low, high).

    Equal differences give an interval of no width. Raises ValueError for fewer than two seeds, which have no spread.
    """
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval over seeds takes at least two differences, not an array of shape {values.shape}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns of equal differences
        low, high = stats.ttest_1samp(values, 0).confidence_interval(level)
    return float(values.mean()), float(low), float(high)


def nested_t(
    values: Sequence[float] | np.ndarray, groups: Sequence[object], level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of the group means and its Student-t interval over the groups: (mean, low, high).

    For runs of stage 2 (`values`) that share a run of stage 1 (`groups`): seeds within a group are no new groups. With
    one group there is no interval, and its ends are NaN.
    """
    means = pd.Series(np.asarray(values, dtype=float)).groupby(np.asarray(groups)).mean()
    if len(means) < 2:
        return float(means.mean()), np.nan, np.nan
    return paired_t(means.to_numpy(), level)


def where_reached(path: Sequence[float] | pd.Series, level: float, values: Sequence[float] | pd.Series) -> float:
    """What `values` [n] are where `path` [n] first is at `level` or above it, linear between its points; NaN if never.

    Two runs can so be compared at the same score of one kind: `where_reached(pair_scores, .4, zero_shot)`.
    """
    path, values = np.asarray(path, dtype=float), np.asarray(values, dtype=float)
    if path.shape != values.shape or path.ndim != 1:
        raise ValueError(
            f"a path and its values are lists of one length, not arrays of {path.shape} and {values.shape}"
        )
    reached = np.flatnonzero(path >= level)
    if not len(reached):
        return np.nan
    end = reached[0]
    first = max(end - 1, 0)
    return float(np.interp(level, path[first : end + 1], values[first : end + 1]))


def paired_shares(gained: int, lost: int, n: int, level: float = 0.95) -> tuple[float, float, float]:
    """Difference of two paired shares with its interval: (difference, low, high), the difference (gained - lost) / n.

    Wald's interval with one half of a pair added to each of the four cells (Bonett and Price, J. Educ. Behav. Stat. 37,
    2012), so that it has a width too where nothing changed.

    Args:
        gained, lost: items that the second is right of and the first is not, and the reverse.
        n: of all items.
    """
    if min(gained, lost) < 0 or n < max(gained + lost, 1):
        raise ValueError(f"no shares: {gained} gained and {lost} lost of {n}; expected gained + lost <= n and n >= 1")
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = stats.norm.ppf((1 + level) / 2) * np.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return (gained - lost) / n, float(max(up - down - half, -1)), float(min(up - down + half, 1))


def mcnemar_p(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p: are gains and losses a fair coin's? 1 where nothing changed."""
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained or lost else 1.0


def interval_p(difference: float, low: float, high: float, level: float = 0.95) -> float:
    """Two-sided p of no difference, by the normal test that agrees with the difference's interval at `level`."""
    to_zero = difference - low if difference > 0 else high - difference
    z = abs(difference) / to_zero * stats.norm.ppf((1 + level) / 2) if to_zero > 0 else np.inf if difference else 0.0
    return float(2 * stats.norm.sf(z))


def independent_difference(
    before: tuple[float, float, float], after: tuple[float, float, float], level: float = 0.95
) -> tuple[float, float, float, float]:
    """after - before with its interval and two-sided p: (difference, low, high, p), from values with their intervals.

    Each is (value, low, high) at `level`. The squared distances of the ends are added (Newcombe, Stat. Med. 17, 1998;
    Zou and Donner, Stat. Med. 27, 2008), as for independent samples: two encoders on the same items mostly agree, so
    that a paired interval would be narrower. p is `interval_p`.
    """
    (a, a_low, a_high), (b, b_low, b_high) = before, after
    difference = b - a
    low = float(difference - np.hypot(b - b_low, a_high - a))
    high = float(difference + np.hypot(b_high - b, a - a_low))
    return difference, low, high, interval_p(difference, low, high, level)


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's adjusted p values (Scand. J. Stat. 6, 1979): the chance of one false finding among all stays below each.

    The k-th smallest of m is multiplied by m - k + 1, none is smaller than the one before it, none exceeds 1. NaN is no
    test, and stays NaN.
    """
    p = np.asarray(p, float)
    adjusted, order = np.full(p.shape, np.nan), np.argsort(p, kind="stable")  # NaN comes last
    m = int(np.isfinite(p).sum())
    adjusted[order[:m]] = np.maximum.accumulate(np.minimum(p[order[:m]] * np.arange(m, 0, -1), 1.0))
    return adjusted


def mcnemar_pairs(difference: float, discordance: float, power: float = 0.8, level: float = 0.05) -> int:
    """How many pairs McNemar's two-sided test takes to find a difference of shares with a probability of `power`.

    n = (z_(1 - level / 2) sqrt(psi) + z_power sqrt(psi - d^2))^2 / d^2 for the difference d and the share psi of pairs
    that change either way (Connor, Biometrics 43, 1987). psi is at least |d|, as where all changes go one way.

    Raises:
        ValueError: for no difference, which no number of pairs can find.
    """
    if not 0 < abs(difference) <= 1 or not 0 <= discordance <= 1:
        raise ValueError(f"difference {difference} of discordance {discordance}; expected shares, the first not 0")
    d, psi = abs(difference), max(discordance, abs(difference))
    z_level, z_power = stats.norm.ppf(1 - level / 2), stats.norm.ppf(power)
    return int(np.ceil((z_level * np.sqrt(psi) + z_power * np.sqrt(psi - d * d)) ** 2 / (d * d)))


def rank_correlation(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, groups: Sequence[object] | np.ndarray,
    level: float = 0.95, seed: int = 0, draws: int = 2000,
) -> tuple[float, float, float]:  # fmt: skip
    """Spearman's rank correlation of x and y with its percentile interval (rho, low, high), whole groups resampled.

    Pairs of one group, such as the patterns of one projector, are no independent ones. With one group there is no
    interval, and its ends are NaN; so is rho where x or y does not vary.
    """
    x, y, (_, group) = np.asarray(x, float), np.asarray(y, float), np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(group == k) for k in range(group.max() + 1)]

    def rho(rows: np.ndarray) -> float:
        varies = np.ptp(x[rows]) > 0 and np.ptp(y[rows]) > 0
        return float(stats.spearmanr(x[rows], y[rows]).statistic) if varies else np.nan

    whole = rho(np.arange(len(x)))
    if len(members) < 2 or np.isnan(whole):
        return whole, np.nan, np.nan
    drawn = np.random.default_rng(seed).integers(len(members), size=(draws, len(members)))
    values = np.array([rho(np.concatenate([members[k] for k in draw])) for draw in drawn])
    return whole, *percentiles(values, level)


def regression(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float = 0.95, points: int = 50
) -> tuple[tuple[float, float, float], dict[str, np.ndarray]]:
    """Least squares of y on x: the slope with its interval (slope, low, high), and the line with that of its mean.

    Returns:
        The slope, in units of y over x, and the line at `points` places from the smallest x to the largest: `x`,
        `mean`, `low`, `high`. Student's t with n - 2 degrees of freedom; the pairs are taken as independent.

    Raises:
        ValueError: for fewer than three pairs, or if all x are equal.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) != len(y) or len(x) < 3 or np.ptp(x) == 0:
        raise ValueError(
            f"no regression of {len(y)} values on {len(x)}: expected at least three pairs, and x that vary"
        )
    fit = stats.linregress(x, y)
    half = stats.t.ppf((1 + level) / 2, len(x) - 2) * fit.stderr
    at = np.linspace(x.min(), x.max(), points)
    mean, reach = fit.intercept + fit.slope * at, half * np.sqrt(x.var() + (at - x.mean()) ** 2)
    slope = (float(fit.slope), float(fit.slope - half), float(fit.slope + half))
    return slope, {"x": at, "mean": mean, "low": mean - reach, "high": mean + reach}


def paired_differences(
    results: pd.DataFrame, measures: Sequence[str], baseline: str = "none", level: float = 0.95
) -> pd.DataFrame:
    """Mean difference to `baseline` of every other objective in each of `measures`, with its interval over seeds.

    Args:
        results: one row for each objective and seed: columns `objective`, `seed` and the measures.

    Returns:
        Columns objective, measure, difference, low, high, seeds (how many both have). low and high are NaN for a single
        seed. The interval is over seeds of training: all runs are tested on the same images, so it does not contain
        the variation between test images.

    Raises:
        ValueError: if `baseline` is not among the objectives.
    """
    if baseline not in set(results["objective"]):
        raise ValueError(f"no baseline {baseline!r} among {', '.join(dict.fromkeys(results['objective']))}")
    table = results.set_index(["objective", "seed"])[list(measures)]
    rows = []
    for name in dict.fromkeys(results["objective"]):
        if name == baseline:
            continue
        differences = (table.loc[name] - table.loc[baseline]).dropna(how="all")  # [seeds, measures]
        for measure in measures:
            values = differences[measure].to_numpy(float)
            mean, low, high = paired_t(values, level) if len(values) > 1 else (float(values.mean()), np.nan, np.nan)
            rows.append((name, measure, mean, low, high, len(values)))
    return pd.DataFrame(rows, columns=["objective", "measure", "difference", "low", "high", "seeds"])


def compare_rows(
    results: pd.DataFrame, rows: Sequence[str], measures: Sequence[str], baseline: str = "none"
) -> pd.DataFrame:
    """`paired_differences` of those of `rows` that share a seed with `baseline`; the others are left out."""
    seeds = set(results.loc[results["objective"] == baseline, "seed"])
    shared = results[results["seed"].isin(seeds)]
    kept = [name for name in rows if name != baseline and name in set(shared["objective"])]
    if not kept:
        return pd.DataFrame(columns=["objective", "measure", "difference", "low", "high", "seeds"])
    return paired_differences(shared[shared["objective"].isin([*kept, baseline])], measures, baseline)


def nested_changes(
    first: pd.DataFrame, last: pd.DataFrame, measures: Sequence[str]
) -> dict[str, tuple[float, float, float]]:
    """`nested_t` of what each measure changed, from tables with a row a seed; `last` names the seeds of stage 1.

    Its column `align_seed` is NaN for a run without stage 1, which is a group of its own.
    """
    groups = last["align_seed"].fillna(last.index.to_series()).tolist()
    return {name: nested_t((last[name] - first[name]).to_numpy(), groups) for name in measures}


def compare_mixes(mixes: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """What each row of the study of alignments changed at the mix that was chosen beforehand, by `nested_changes`.

    Args:
        mixes: columns `objective`, `alignment`, `seed`, `align_seed`, `mix`, `chosen` and the measures, as
            data/results/feedback_mixes.csv.

    Returns:
        As `paired_differences`; a row is named "objective, alignment", or by its objective alone without stage 1.
    """
    rows = []
    for (objective, alignment), runs in mixes.groupby(["objective", "alignment"], sort=False):
        name = objective if runs["align_seed"].isna().all() else f"{objective}, {alignment}"
        first, last = (runs[of].set_index("seed") for of in (runs["mix"] == 0, runs["chosen"]))
        changes = nested_changes(first, last, measures)
        rows += [(name, measure, *change, len(last)) for measure, change in changes.items()]
    return pd.DataFrame(rows, columns=["objective", "measure", "difference", "low", "high", "seeds"])


def conflict_rate(
    cosines: np.ndarray | pd.Series | Sequence[np.ndarray],
    block: int = 10,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Share of negative cosines with its interval (rate, low, high); NaN is left out.

    Neighbouring steps share weights and momentum, so they are not independent: the interval is a circular block
    bootstrap's (Politis and Romano, 1992), blocks of `block` steps drawn within each run.

    Args:
        cosines: of one run in the order of its steps, or of several runs, one array each.

    Raises:
        ValueError: if no cosine is a finite number.
    """
    runs = [cosines] if np.ndim(cosines[0] if len(cosines) else 0.0) == 0 else cosines
    negative = [(part := np.asarray(run, float))[np.isfinite(part)] < 0 for run in runs]
    negative = [part for part in negative if len(part)]
    if not negative:
        raise ValueError("no cosine is a finite number; a rate takes at least one")
    rng, total, n = np.random.default_rng(seed), np.zeros(draws), sum(map(len, negative))
    for part in negative:
        blocks = -(-len(part) // block)
        starts = rng.integers(len(part), size=(draws, blocks))
        steps = (starts[:, :, None] + np.arange(block)).reshape(draws, -1)[:, : len(part)] % len(part)
        total += part[steps].sum(1)
    low, high = np.quantile(total / n, [(1 - level) / 2, (1 + level) / 2])
    return float(sum(part.sum() for part in negative) / n), float(low), float(high)
