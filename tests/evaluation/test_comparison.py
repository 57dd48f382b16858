import numpy as np
import pandas as pd
import pytest

from diva_lab.statistics import compare_rows, paired_differences, paired_t

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


def test_compared_leaves_out_rows_that_have_not_been_run_or_share_no_seed():
    more = pd.concat([RESULTS, pd.DataFrame([{"objective": "far", "seed": 9, "pairs/mean": 0.1, "nmi": 0.1}])])
    rows = compare_rows(more, ["far", "dcr, velocity", "dcr", "none"], ["nmi"])
    assert rows["objective"].tolist() == ["dcr"]
    assert rows.equals(paired_differences(RESULTS[RESULTS["objective"] != "diva"], ["nmi"]))
    assert compare_rows(more, ["dcr"], ["nmi"], baseline="not run").empty
