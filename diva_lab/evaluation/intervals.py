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
