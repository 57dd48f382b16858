"""Rulings on published claims, from tables whose differences and p values were computed by hand."""

import numpy as np
import pandas as pd
import pytest

from diva_lab.evaluation.pairs import compare_pairs
from diva_lab.evaluation.referee import CHECKS, KNOWN, NUMBERS, OWN
from diva_lab.evaluation.table import PERCEPTION
from diva_lab.evaluation.verdicts import (
    ability_of,
    balance_table,
    claims,
    difference_table,
    differences,
    is_headline,
    rule,
    score_table,
)
from diva_lab.workbook.findings import state_claim
from diva_lab.workbook.referee_page import state_rulings


def row(method, benchmark, sets, metric, percent, low=np.nan, high=np.nan, **other):
    cell = {"benchmark": benchmark, "set": sets, "metric": metric, "category": "all", "backbone": "b", "n": 135}
    cell |= {"method": method, "percent": percent, "low": low, "high": high, "source": OWN, "finding": ""} | other
    return {name: cell.get(name, np.nan if name in NUMBERS else "") for name in CHECKS}


MMVP = ("mmvp-vlm", "MMVP_VLM", "pairs")
RESULTS = pd.DataFrame(
    [
        row("none", *MMVP, 20.0, 14.0, 27.0),
        row("none", "mmvp-vlm", "MMVP_VLM", "group", 10.0, 6.0, 16.0),
        row("none", "zero-shot", "animals", "top-1", 60.0, 49.0, 70.0),
        row("none", "zero-shot", "animals", "score", 60.0, 49.02, 70.05),
        row("none", "clustering", "6 sets", "nmi", 71.0, n=6),
        row("none", "knn", "animals", "top-1", 50.0, n=20),
        row("diva", *MMVP, 25.2, 18.0, 33.0, gained=8, lost=1, p=20 / 512),
        row("diva", "mmvp-vlm", "MMVP_VLM", "group", 12.0, 7.0, 18.0),
        row("diva", "zero-shot", "animals", "score", 80.0, 69.2, 87.7),
        row("dcr", *MMVP, 40.0, 32.0, 48.0, gained=30, lost=3, p=1e-6),
        row("dcr", "clustering", "6 sets", "nmi", 76.0, n=6),
        row("dcr", "knn", "animals", "top-1", 55.0, n=20),
        row("diva", *MMVP, 19.0, source="somebody"),
        row("diva", *MMVP, np.nan, source="a thread", finding="below the original"),
    ]
)
PUBLISHED = pd.DataFrame(
    [("mmvp-vlm", "MMVP-VLM", "pairs", "b", method, value) for method, value in
     (("none", 19.3), ("diva", 25.9), ("dcr", 33.3), ("un2clip", 32.6))]
    + [("clustering", "average of six sets", "nmi", "b", "none", 71)]
    + [("clustering", "average of six sets", "nmi", "b", "dcr", 76)]
    + [("mmvp-vlm", "MMVP-VLM", "pairs", "other", "diva", 50), ("mllm", "MMVP", "score", "b", "diva", 31)],
    columns=["benchmark", "set", "metric", "backbone", "method", "percent"],
)  # fmt: skip


def of(table, **cell):
    for name, value in cell.items():
        table = table[table[name] == value]
    (one,) = table.to_dict("records")
    return one


def test_a_difference_is_paired_where_items_were_compared_and_else_of_independent_scores():
    changes = differences(RESULTS, "b")
    one = of(changes, method="diva", metric="pairs")
    assert (one["how"], one["p"]) == ("paired", 20 / 512)
    assert one["difference"] == pytest.approx(100 * 7 / 135) and one["low"] < one["difference"] < one["high"]
    one = of(changes, method="diva", metric="score")
    assert one["how"] == "independent" and one["difference"] == pytest.approx(20) and one["p"] < 0.05
    captions = ("aro", "ARO", "macro accuracy")
    resampled = {"difference_low": -0.5, "difference_high": 4.5, "p": 0.1}
    rows = [row("none", *captions, 60.0, 55, 65), row("diva", *captions, 62.0, 57, 67, **resampled)]
    (one,) = differences(pd.DataFrame(rows), "b").to_dict("records")
    assert (one["how"], one["difference"], one["low"], one["high"]) == ("paired", pytest.approx(2), -0.5, 4.5)
    assert one["p"] == one["holm"] == 0.1 and np.isnan(one["gained"])
    one = of(changes, method="dcr", metric="nmi")
    assert one["how"] == "" and one["difference"] == pytest.approx(5) and np.isnan([one["low"], one["p"]]).all()
    assert dict(zip(changes["metric"], changes["ability"], strict=True)) == {
        "pairs": "P", "group": "P", "score": "D", "nmi": "D", "top-1": "D",
    }  # fmt: skip


def test_mcnemars_p_is_that_of_a_computation_by_hand():
    """8 gained, 1 lost: 2 (1 + 9) / 2^9."""
    ids, was = [2 * k + 1 for k in range(20)], [False] * 8 + [True] * 12
    now = [True] * 8 + [False] + [True] * 11
    frames = [pd.DataFrame({"id_1": ids, "correct": correct}) for correct in (was, now)]
    found = compare_pairs(*frames)
    assert found["p"] == pytest.approx(20 / 512) and (len(found["gained"]), len(found["lost"])) == (8, 1)


def test_holms_correction_is_over_one_test_of_each_method_and_set():
    changes = differences(RESULTS, "b")
    assert set(zip(*(changes.dropna(subset="holm")[name] for name in ("method", "metric")), strict=True)) == {
        ("diva", "pairs"), ("diva", "score"), ("dcr", "pairs"),
    }  # fmt: skip
    assert of(changes, method="dcr", metric="pairs")["holm"] == pytest.approx(3e-6)
    p = of(changes, method="diva", metric="score")["p"]
    assert p < 20 / 512 and of(changes, method="diva", metric="score")["holm"] == pytest.approx(2 * p)
    assert of(changes, method="diva", metric="pairs")["holm"] == pytest.approx(20 / 512)


@pytest.mark.parametrize(
    ("published", "difference", "low", "high", "adjusted", "expected"),
    [
        (6.6, 5, 1, 9, 0.01, "confirmed"),
        (14, 5, 1, 9, 0.01, "confirmed"),  # in its direction, though smaller
        (6.6, -5, -9, -1, 0.01, "contradicted"),
        (-1, 5, 1, 9, 0.01, "contradicted"),
        (-6, -5, -9, -1, 0.01, "confirmed"),
        (6.6, 3, -1, 7, 0.2, "undecided"),
        (14, 3, -1, 7, 0.2, "contradicted"),  # too small, and perhaps nothing
        (-8, 3, -1, 7, 0.2, "contradicted"),
        (6.6, 5, 1, 9, 0.06, "undecided"),  # not after the correction
        (0, 5, 1, 9, 0.01, "contradicted"),
        (0, 0, -2, 2, 1, "undecided"),
        (6.6, 5, np.nan, np.nan, np.nan, "undecided"),
        (6.6, np.nan, np.nan, np.nan, np.nan, "undecided"),
    ],
)
def test_a_claim_is_confirmed_contradicted_or_undecided(published, difference, low, high, adjusted, expected):
    assert rule(*map(float, (published, difference, low, high, adjusted))) == expected


def test_published_claims_meet_what_was_measured_by_benchmark_set_and_metric():
    found = claims(RESULTS, "b", PUBLISHED)
    assert list(zip(found["method"], found["benchmark"], strict=True)) == [
        ("diva", "mmvp-vlm"), ("dcr", "mmvp-vlm"), ("un2clip", "mmvp-vlm"), ("dcr", "clustering"),
    ]  # fmt: skip
    assert list(found["verdict"]) == ["confirmed", "confirmed", "undecided", "undecided"]
    assert of(found, method="dcr", metric="nmi")["difference"] == pytest.approx(5), "average of six sets is 6 sets"
    assert np.isnan(of(found, method="un2clip")["difference"])
    assert of(found, method="diva")["elsewhere"] == "19 % (somebody); below the original (a thread)"


def test_the_pairs_that_would_decide_are_those_at_the_published_difference_and_the_changes_seen():
    one = of(claims(RESULTS, "b", PUBLISHED), method="diva")
    d, psi = 0.066, 9 / 135  # (1.96 sqrt(.0667) + .8416 sqrt(.0667 - .0044))^2 / .0044 = 117.8
    assert one["pairs"] == np.ceil((1.959964 * psi**0.5 + 0.841621 * (psi - d * d) ** 0.5) ** 2 / d**2) == 118
    assert np.isnan(of(claims(RESULTS, "b", PUBLISHED), method="un2clip")["pairs"])


def test_a_set_that_lacks_classes_is_not_the_published_one():
    part = RESULTS.assign(set=RESULTS["set"].replace("MMVP_VLM", "MMVP_VLM (4 of 9 classes)"))
    assert claims(part, "b", PUBLISHED).query("benchmark == 'mmvp-vlm'")["difference"].isna().all()


def test_a_claim_is_stated_with_its_ruling_numbers_and_the_pairs_that_would_decide():
    weak, mine = RESULTS.copy(), RESULTS["p"] == 20 / 512
    weak.loc[mine, ["gained", "lost", "p"]] = [9, 6, 0.607]
    sentence = state_claim(of(claims(weak, "b", PUBLISHED), method="diva"))
    assert sentence.startswith(
        "**undecided**: DIVA on mmvp-vlm, MMVP-VLM (pairs). Published: +6.6 points, from 19.3 to 25.9 %. "
        "Measured: +2.2 points, from 20.0 to 25.2 %, 95 % interval "
    )
    assert "; of 135 pairs 9 gained and 6 lost; p = 0.61, 0.61 after Holm's correction." in sentence
    assert " pairs would decide it, if as many change; these are 135. Elsewhere: 19 % (somebody); " in sentence
    assert state_claim(of(claims(RESULTS, "b", PUBLISHED), method="un2clip")).endswith("Measured: not yet.")
    strong = state_claim(of(claims(RESULTS, "b", PUBLISHED), method="dcr", metric="pairs"))
    assert strong.startswith("**confirmed**: DCR") and "would decide" not in strong
    assert "lies outside" not in strong
    small = RESULTS.copy()
    small.loc[mine, ["gained", "lost", "p"]] = [3, 3, 1]
    assert state_claim(of(claims(small, "b", PUBLISHED), method="diva")).startswith("**contradicted**")
    assert "The published difference lies outside the interval." in state_claim(
        of(claims(small, "b", PUBLISHED), method="diva")
    )


def test_a_claim_whose_items_were_resampled_is_ruled_on_without_a_number_of_pairs():
    captions = ("aro", "ARO", "macro accuracy")
    resampled = {"difference_low": -0.5, "difference_high": 4.5, "p": 0.1}
    rows = [row("none", *captions, 60.0, 55, 65), row("diva", *captions, 62.0, 57, 67, **resampled)]
    said = [(*captions, "b", method, value) for method, value in (("none", 59.0), ("diva", 62.0))]
    (claim,) = claims(pd.DataFrame(rows), "b", pd.DataFrame(said, columns=PUBLISHED.columns)).to_dict("records")
    assert claim["verdict"] == "undecided" and np.isnan(claim["pairs"])
    assert state_claim(claim).endswith("95 % interval -0.5 to +4.5; p = 0.1, 0.1 after Holm's correction.")


def test_claims_of_real_backbones_are_stated_before_anything_is_measured():
    empty = RESULTS[:0]
    rulings = state_rulings(empty, "openai-l14")
    assert len(rulings) > 10 and all(text.startswith("**undecided**") for text in rulings)
    assert state_rulings(empty, "tiny") == []


def test_tables_for_figures_hold_headline_scores_as_fractions():
    scores = score_table(RESULTS, "b")
    assert set(scores["metric"]) == {"pairs", "score", "nmi", "top-1"} and scores["value"].between(0, 1).all()
    changes = difference_table(differences(RESULTS, "b"))
    assert set(changes["measure"]) == {
        "mmvp-vlm, MMVP_VLM: pairs", "zero-shot, animals: score", "clustering, 6 sets: nmi",
        "knn, animals: top-1",
    }  # fmt: skip
    balance = balance_table(RESULTS, "b")
    assert balance[["objective", "step", "P", "D"]].values.tolist() == [
        ["diva", 0, 0.2, pytest.approx(0.6)], ["diva", 1, pytest.approx(0.252), pytest.approx(0.8)],
        ["dcr", 0, 0.2, pytest.approx(0.5)], ["dcr", 1, pytest.approx(0.4), pytest.approx(0.55)],
    ]  # fmt: skip


def test_every_score_of_perception_is_a_headline_and_their_average_may_stand_in_the_table():
    rows = pd.DataFrame([row("none", benchmark, "s", metric, 1.0) for benchmark, metric in PERCEPTION.items()])
    assert is_headline(rows).all() and "p average" in KNOWN
    assert all(ability_of(benchmark, metric) == "P" for benchmark, metric in PERCEPTION.items())
