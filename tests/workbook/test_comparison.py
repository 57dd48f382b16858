import numpy as np
import pandas as pd
import pytest

from diva_lab.statistics import compare_rows
from diva_lab.workbook.findings import percent, points, state_difference, state_missing, verdict

RESULTS = pd.DataFrame(
    {
        "objective": ["none"] * 3 + ["dcr"] * 3 + ["diva"],
        "seed": [0, 1, 2, 2, 1, 0, 1],
        "pairs/mean": [0.2, 0.3, 0.4, 0.5, 0.4, 0.4, 0.2],
        "nmi": [0.7, 0.7, 0.7, 0.6, 0.6, 0.6, 0.8],
    }
)


@pytest.mark.parametrize(
    ("low", "high", "expected", "words"),
    [(0.1, 0.2, 1, "as expected"), (0.1, 0.2, -1, "against expectation"), (-0.2, -0.1, 1, "against expectation"),
     (-0.2, -0.1, -1, "as expected"), (-0.1, 0.2, 1, "undecided"), (np.nan, np.nan, 1, "one seed")],
)  # fmt: skip
def test_a_verdict_needs_an_interval_on_one_side_of_zero(low, high, expected, words):
    assert words in verdict(low, high, expected)


def test_numbers_are_written_in_percent_and_points_with_their_interval():
    assert percent(0.5417, 0.451, 0.63) == "54.2 % (95 % interval 45.1 to 63.0)"
    assert points(0.031, 0.01, 0.052, digits=0) == "+3 points (95 % interval +1 to +5)"
    assert points(-0.031, np.nan, np.nan) == "-3.1 points (one seed, no interval)"


def test_rows_that_have_not_been_run_are_named_and_not_filled_in():
    rows = compare_rows(RESULTS, ["dcr"], ["nmi"])
    assert state_difference(rows, "dcr", "nmi", 1) == "-10.0 points (95 % interval -10.0 to -10.0), against expectation"
    assert state_difference(rows, "dcr", "nmi") == "-10.0 points (95 % interval -10.0 to -10.0)"
    assert state_difference(rows, "diva", "nmi", 1) == "not run"
    missing = pd.DataFrame({"row": ["dcr", "dcr", "naive"], "seed": [3, 4, 0]})
    assert state_missing(missing, ["dcr", "diva"]) == " Not run: dcr (seeds 3, 4)."
    assert state_missing(missing, ["diva"]) == ""
