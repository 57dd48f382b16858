"""What a score is worth: an interval for a proportion, for a mean of group means, and for a difference over seeds."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) for a proportion of `successes` out of `n`; within [0, 1] also at 0 and n.

    E. B. Wilson, JASA 22 (1927). Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"no proportion: {successes} successes out of {n}")
    z = stats.norm.ppf((1 + level) / 2)
    p = successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == n else float(centre + half)
    return low, high


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


def paired_t(differences: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired `differences` (one a seed) and its Student-t interval: (mean, low, high).

    Raises ValueError for fewer than two seeds, from which no spread can be read.
    """
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval over seeds takes at least two differences, not an array of shape {values.shape}")
    mean = float(values.mean())
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def regression(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float = 0.95, points: int = 50
) -> tuple[tuple[float, float, float], dict[str, np.ndarray]]:
    """Least squares of y on x: the slope with its interval (slope, low, high), and the line with that of its mean.

    Returns:
        The slope, in units of y over x, and the line at `points` places from the least x to the largest: `x`, `mean`,
        `low`, `high`. Student's t with n - 2 degrees of freedom; the pairs are taken as independent.

    Raises:
        ValueError: for fewer than three pairs, or x all alike.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) != len(y) or len(x) < 3 or np.ptp(x) == 0:
        raise ValueError(f"no regression of {len(y)} values on {len(x)}: it takes three pairs, and x that vary")
    centre, spread = x.mean(), ((x - x.mean()) ** 2).sum()
    slope = float(((x - centre) * y).sum() / spread)
    rest = y - y.mean() - slope * (x - centre)
    sd, t = np.sqrt((rest**2).sum() / (len(x) - 2)), stats.t.ppf((1 + level) / 2, len(x) - 2)
    half = float(t * sd / np.sqrt(spread))
    at = np.linspace(x.min(), x.max(), points)
    mean, reach = y.mean() + slope * (at - centre), t * sd * np.sqrt(1 / len(x) + (at - centre) ** 2 / spread)
    return (slope, slope - half, slope + half), {"x": at, "mean": mean, "low": mean - reach, "high": mean + reach}
