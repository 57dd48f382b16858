"""Sentences from records: a difference with its interval, a verdict, what was not run."""

from collections.abc import Sequence

import numpy as np
import pandas as pd


def state_difference(differences: pd.DataFrame, objective: str, measure: str, expected: int = 0) -> str:
    """A difference in words, with the `verdict` on an expected sign (0: none); "not run" where it is not there."""
    found = differences[(differences["objective"] == objective) & (differences["measure"] == measure)]
    if found.empty:
        return "not run"
    row = found.iloc[0]
    said = points(row["difference"], row["low"], row["high"])
    return said + (f", {verdict(row['low'], row['high'], expected)}" if expected else "")


def state_missing(missing: pd.DataFrame, rows: Sequence[str]) -> str:
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
