"""What each objective changed: differences paired by seed, and how to say them in a sentence."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from diva_lab.evaluation.intervals import paired_t


def paired_differences(
    results: pd.DataFrame, measures: Sequence[str], baseline: str = "none", level: float = 0.95
) -> pd.DataFrame:
    """Mean difference to `baseline` of every other objective in each of `measures`, with its interval over seeds.

    Args:
        results: one row an objective and seed: columns `objective`, `seed` and the measures.

    Returns:
        Columns objective, measure, difference, low, high, seeds: how many both have. low and high are NaN for a single
        seed. The interval is over seeds of training; the test pictures are the same for all, so it does not hold
        what other pictures would change. Raises ValueError if `baseline` is not among the objectives.
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


def compared(
    results: pd.DataFrame, rows: Sequence[str], measures: Sequence[str], baseline: str = "none"
) -> pd.DataFrame:
    """`paired_differences` of those of `rows` that have a seed in common with `baseline`; the others are left out."""
    seeds = set(results.loc[results["objective"] == baseline, "seed"])
    shared = results[results["seed"].isin(seeds)]
    kept = [name for name in rows if name != baseline and name in set(shared["objective"])]
    if not kept:
        return pd.DataFrame(columns=["objective", "measure", "difference", "low", "high", "seeds"])
    return paired_differences(shared[shared["objective"].isin([*kept, baseline])], measures, baseline)


def stated(differences: pd.DataFrame, objective: str, measure: str, expected: int = 0) -> str:
    """A difference in words, with the `verdict` on an expected sign (0: none); "not run" where it is not there."""
    found = differences[(differences["objective"] == objective) & (differences["measure"] == measure)]
    if found.empty:
        return "not run"
    row = found.iloc[0]
    said = points(row["difference"], row["low"], row["high"])
    return said + (f", {verdict(row['low'], row['high'], expected)}" if expected else "")


def absent(missing: pd.DataFrame, rows: Sequence[str]) -> str:
    """Those of `rows` that have not been run with all their seeds, named for a sentence; "" where none is missing.

    `missing`: columns `row` and `seed`, as in data/results/missing.csv.
    """
    found = missing[missing["row"].isin(list(rows))].groupby("row", sort=False)["seed"]
    parts = [f"{name} (seeds {', '.join(map(str, seeds))})" for name, seeds in found]
    return f" Not run: {'; '.join(parts)}." if parts else ""


def percent(value: float, low: float, high: float, digits: int = 1) -> str:
    """A fraction with its interval, in words: "54.2 % (95 % interval 45.1 to 63.0)"."""
    return f"{100 * value:.{digits}f} % (95 % interval {100 * low:.{digits}f} to {100 * high:.{digits}f})"


def points(value: float, low: float, high: float, digits: int = 1) -> str:
    """A difference of fractions with its interval: "+3.1 points (95 % interval +1.0 to +5.2)"; NaN: no interval."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"{100 * value:+.{digits}f} points (one seed, no interval)"
    return f"{100 * value:+.{digits}f} points (95 % interval {100 * low:+.{digits}f} to {100 * high:+.{digits}f})"


def verdict(low: float, high: float, expected: int = 1) -> str:
    """What the interval (low, high) of a difference says of an expected rise (`expected` = 1) or fall (-1)."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return "undecided: one seed has no interval"
    if low <= 0 <= high:
        return "undecided: the interval holds zero"
    return "as expected" if (low > 0) == (expected > 0) else "against expectation"
