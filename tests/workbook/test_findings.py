import numpy as np
import pandas as pd
import pytest
from figure_records import DOSE, MIXES, READABLE

from diva_lab.statistics import compare_rows, conflict_rate, paired_t
from diva_lab.workbook import findings
from diva_lab.workbook.findings import percent, points, verdict

RESULTS = pd.DataFrame(
    {
        "objective": ["none"] * 3 + ["dcr"] * 3 + ["diva"],
        "seed": [0, 1, 2, 2, 1, 0, 1],
        "pairs/mean": [0.2, 0.3, 0.4, 0.5, 0.4, 0.4, 0.2],
        "nmi": [0.7, 0.7, 0.7, 0.6, 0.6, 0.6, 0.8],
    }
)
CHANGES = pd.DataFrame(
    [("dcr", "pairs/text", 0.02, 0.01, 0.03), ("dcr", "pairs/state", -0.02, -0.03, -0.01),
     ("dcr", "nmi", 0.0, -0.1, 0.1), ("diva", "pairs/text", -0.02, -0.03, -0.01),
     ("perturb-norm", "pairs/text", 0.0, -0.1, 0.1)],
    columns=["objective", "measure", "difference", "low", "high"],
)  # fmt: skip


def test_an_alignment_states_its_end_its_change_and_how_many_seeds_of_both_stages():
    text = findings.state_alignment(DOSE, "anchored", ["pairs/mean", "zeroshot"])
    assert text == (
        "anchored (2 seeds, 2 of stage 1; 1,000 images): pair score (P) **30.0**, +10.0 points (95 % interval +10.0 to "
        "+10.0); zero-shot (D) **80.0**, -10.0 points (95 % interval -10.0 to -10.0)."
    )
    one = findings.state_alignment(DOSE.query("seed == 0"), "anchored", ["pairs/mean"])
    assert "1 seed, 1 of stage 1" in one and "one seed, no interval" in one
    assert findings.state_alignment(DOSE, "placebo", ["pairs/mean"]) == "placebo: not run."


def test_the_score_that_is_stated_is_the_mean_over_stage_1_as_its_change_is():
    shared = DOSE[(DOSE["alignment"] == "anchored") & (DOSE["seed"] == 0)].assign(seed=2)  # the projector of seed 0
    shared["pairs/mean"] += 0.2 * (shared["images"] == shared["images"].max())
    text = findings.state_alignment(pd.concat([DOSE, shared]), "anchored", ["pairs/mean"])
    assert "pair score (P) **35.0**, +15.0 points" in text  # the mean of (30 + 50) / 2 and 30


def test_a_mix_is_stated_as_it_was_chosen_with_the_interval_over_stage_1():
    assert findings.state_mix(MIXES, ("diva, mixed", "anchored"), ["pairs/mean", "zeroshot"]) == (
        "diva, mixed, anchored, mix 0.5 (2 seeds): pair score (P) **40.5**, +20.0 points (95 % interval +20.0 to "
        "+20.0); zero-shot (D) **85.0**, -5.0 points (95 % interval -5.0 to -5.0)."
    )
    assert "+30.0 points" in findings.state_mix(MIXES, ("caption-contrast", "none"), ["pairs/mean"])
    assert findings.state_mix(MIXES, ("dcr", "anchored"), ["pairs/mean"]) == "dcr, anchored: not run."


def test_rows_at_their_chosen_mixes_are_a_table_and_a_soup_has_no_interval():
    one = MIXES[MIXES["chosen"] & (MIXES["objective"] == "diva, mixed")].head(1)
    mixes = pd.concat([MIXES, one.assign(objective="soup of diva, mixed", align_seed=np.nan)])
    lines = findings.tabulate_mixes(mixes, ["pairs/mean", "zeroshot"]).splitlines()
    assert lines[0] == "|  | mix | seeds | pair score (P) | zero-shot (D) |"
    assert lines[2] == "| original | 0 |  | 20.5 | 90.0 |"
    assert "| DIVA, rate and mix chosen, anchored | 0.5 | 2 | 40.5 [34.1, 46.9] | 85.0 [85.0, 85.0] |" in lines
    assert lines[-1] == "| mean of the runs of DIVA, rate and mix chosen, anchored | 0.5 |  | 40.0 | 85.0 |"


def test_scores_at_the_same_level_are_a_table_with_a_dash_where_a_row_does_not_come():
    rows = [("diva", "anchored", "pairs/mean", 0.2, "zeroshot", 0.965, 0.96, 0.97),
            ("diva", "anchored", "pairs/mean", 0.25, "zeroshot", 0.95, 0.94, 0.96),
            ("diva", "anchored", "pairs/mean", 0.25, "nmi", 0.8, 0.7, 0.9),
            ("soup of diva", "anchored", "pairs/mean", 0.25, "zeroshot", 0.96, np.nan, np.nan),
            ("new", "placebo", "pairs/mean", 0.2, "zeroshot", 0.5, np.nan, np.nan)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["objective", "alignment", "at", "level", "measure", "value", "low", "high"])
    assert findings.tabulate_matched(table, "pairs/mean", "zeroshot").splitlines() == [
        "|  | 20 | 25 |",
        "| --- | --- | --- |",
        "| DIVA, anchored | 96.5 [96.0, 97.0] | 95.0 [94.0, 96.0] |",
        "| mean of the runs of DIVA, anchored | – | 96.0 |",
        "| new, placebo | 50.0 | – |",
    ]


def test_readability_states_all_four_decisions_of_the_bin_of_all():
    text = findings.state_readability(READABLE, "anchored")
    assert text.count("70 % (95 % interval 60 to 75)") == 4 and text.endswith("Chance is 50 %.")


def test_a_prediction_is_stated_over_all_between_projectors_and_within_anchored_ones():
    rows = [("image-only", "i", 0.5, 0), ("image-only", "i", 0.4, 1)]
    rows += [("anchored", name, 0.8 + k / 10, 5 + k * sign) for name, sign in (("a", 1), ("b", -1)) for k in range(2)]
    table = pd.DataFrame(rows, columns=["alignment", "projector", "readable", "gain"])
    text = findings.state_prediction(table)
    assert "over 6 pairs of a projector and a pattern: **+0." in text and "of the 3 projectors: **" in text
    assert text.endswith("mean of 2: **+0.00**, from -1.00 to +1.00.")
    alone = findings.state_prediction(table[table["projector"] != "b"])
    assert alone.endswith("mean of 1: **+1.00**, from +1.00 to +1.00.")


def test_a_line_fitted_on_one_world_is_tested_on_another_against_the_mean_gain():
    columns = ["projector", "readable", "gain"]
    fitted = pd.DataFrame([("a", 0.5, 0.0), ("a", 0.7, 10.0), ("b", 0.9, 20.0)], columns=columns)  # mean 10, slope 50
    tested = pd.DataFrame([("c", 0.5, 1.0), ("d", 0.6, 5.0), ("d", 0.9, 14.0)], columns=columns)
    text = findings.state_transfer(fitted, tested)
    assert "(3 pairs of a projector and a pattern): +5.0 points of gain for 10 points of readability" in text
    assert "misses the gain by **2.3** points" in text  # 1, 0 and 6
    assert "mean gain by 6.0; rank correlation there **+1.00" in text  # 9, 5 and 4


@pytest.mark.parametrize(
    "low, high, place", [(0.26, 0.3, "above chance"), (0.2, 0.3, "not different from"), (0.1, 0.2, "below")]
)
def test_a_pair_score_is_above_below_or_not_different_from_chance(low, high, place):
    report = {"pairs/mean": (low + high) / 2, "pairs/mean/low": low, "pairs/mean/high": high}
    assert place in findings.state_against_chance("diva", report)


# --- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected", "text"),
    [(0.1, 0.2, 1, "as expected"), (0.1, 0.2, -1, "against expectation"), (-0.2, -0.1, 1, "against expectation"),
     (-0.2, -0.1, -1, "as expected"), (-0.1, 0.2, 1, "undecided"), (np.nan, np.nan, 1, "one seed")],
)  # fmt: skip
def test_a_verdict_needs_an_interval_on_one_side_of_zero(low, high, expected, text):
    assert text in verdict(low, high, expected)


def test_numbers_are_in_percent_and_points_with_their_interval():
    assert percent(0.5417, 0.451, 0.63) == "54.2 % (95 % interval 45.1 to 63.0)"
    assert points(0.031, 0.01, 0.052, digits=0) == "+3 points (95 % interval +1 to +5)"
    assert points(-0.031, np.nan, np.nan) == "-3.1 points (one seed, no interval)"
    assert findings.number(0.01234, -0.1, 0.2, 2) == "+0.01 (95 % interval -0.10 to +0.20)"


# --- rows of the study ------------------------------------------------------------------------------------------


def test_a_row_that_was_not_run_is_named_and_not_filled_in():
    rows = compare_rows(RESULTS, ["dcr"], ["nmi"])
    interval = "-10.0 points (95 % interval -10.0 to -10.0)"
    assert findings.state_difference(rows, "dcr", "nmi", 1) == f"{interval}, against expectation"
    assert findings.state_difference(rows, "dcr", "nmi") == interval
    assert findings.state_difference(rows, "diva", "nmi", 1) == "not run"
    missing = pd.DataFrame({"row": ["dcr", "dcr", "naive"], "seed": [3, 4, 0]})
    assert findings.state_missing(missing, ["dcr", "diva"]) == " Not run: dcr (seeds 3, 4)."
    assert findings.state_missing(missing, ["diva"]) == ""


def test_a_row_states_each_measure_with_its_own_expectation():
    text = findings.state_row(compare_rows(RESULTS, ["dcr"], ["pairs/mean", "nmi"]), "dcr", {"pairs/mean": 1, "nmi": 0})
    assert text.startswith("DCR: pair score (P) **+13.3 points (95 % interval -1.0 to +27.7), undecided")
    assert text.endswith("; clustering NMI (D) **-10.0 points (95 % interval -10.0 to -10.0)**.")


def test_signs_are_counted_with_the_names_of_what_changed():
    text = findings.count_signs(CHANGES[CHANGES["measure"] == "pairs/text"])
    assert text == "of 3 intervals **1** above zero (DCR), **1** below zero (DIVA), 1 undecided"


def test_a_slope_is_judged_by_its_interval():
    assert "**+1.00 (95 % interval +0.50 to +1.50)** points of P" in findings.state_slope((1.0, 0.5, 1.5), 9, "x", "P")
    assert findings.state_slope((-1.0, -1.5, -0.5), 9, "x", "P").endswith("against expectation.")


# --- the tiny world ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "place"), [(0.1, 0.2, "below"), (0.2, 0.3, "not different from"), (0.3, 0.4, "above")]
)
def test_pair_scores_are_compared_with_chance(low, high, place):
    report = {"pairs/mean": 0.2, "pairs/mean/low": low, "pairs/mean/high": high, "zeroshot": 0.9, "probe/mean": 0.5}
    text = findings.state_pair_scores(report, pd.DataFrame({"after": [0.9, 1.0]}))
    assert f"{place} chance (25 %)" in text and "ceiling is 95.0 %" in text
    assert f"20.0 % (95 % interval {100 * low:.1f} to {100 * high:.1f})" in text


def test_attributes_below_their_target_are_named():
    quality = pd.DataFrame({"attribute": ["class", "text"], "share": [0.9, 0.5], "low": 0.4, "high": 0.95, "n": 256})
    text = findings.state_drawn_attributes(quality, {"class": 0.8, "text": 0.6})
    assert "**Texts** worst: it is right in 50 % (95 % interval 40 to 95) of 256" in text and text.endswith(
        "**Texts**."
    )
    assert findings.state_drawn_attributes(quality, {"class": 0.8, "text": 0.5}).endswith("**none**.")


@pytest.mark.parametrize(("recap", "result"), [(0.5, "as expected"), (0.2, "undecided"), (0.05, "against expectation")])
def test_recovered_fractions_are_compared_by_their_intervals(recap, result):
    reports = {
        name: {"recovered": value, "recovered/low": value - 0.02, "recovered/high": value + 0.02}
        for name, value in (("global", 0.19), ("recap", recap))
    }
    text = findings.state_recovered(reports)
    assert "global **+0.19 (95 % interval +0.17 to +0.21)**" in text and f"**{result}" in text


def test_changed_pairs_are_listed_with_mcnemars_test():
    before = pd.DataFrame({"id_1": [1, 3, 5], "correct": [True, False, False]})
    after = before.assign(correct=[False, True, True])
    text = findings.state_changed_pairs(before, after, "dcr")
    assert text == "DCR: pairs gained 3, 5; lost 1. McNemar's exact test of gains against losses: p = 1."


def test_scores_have_an_interval_where_there_is_one_and_the_note():
    rows = pd.DataFrame(
        {"encoder": ["none", "dcr"], "benchmark": "emoji", "metric": "emoji", "n": 334, "value": [0.2, 0.3],
         "low": [0.1, np.nan], "high": [0.3, np.nan], "note": ["not above chance", ""]}
    )  # fmt: skip
    text = findings.state_scores(rows)
    assert text.startswith(
        "emoji, emoji (n = 334): none (original) 20.0 % (95 % interval 10.0 to 30.0), not above chance"
    )
    assert text.endswith("; DCR 30.0 %.")


def test_no_pattern_that_rose_is_against_the_expectation_of_training_and_not_of_a_random_push():
    assert "The largest rise: Texts +2.0 points" in findings.state_patterns(CHANGES, "dcr")
    assert "against expectation" not in findings.state_patterns(CHANGES, "dcr")
    assert "against expectation" in findings.state_patterns(CHANGES, "diva")
    assert "against expectation" not in findings.state_patterns(CHANGES, "perturb-norm")


# --- gradients --------------------------------------------------------------------------------------------------


def test_the_null_is_inside_or_outside_the_interval_of_the_cosine():
    probe = {"cos": 0.1, "cos/low": 0.0, "cos/high": 0.2, "other": 0.05, "other/sd": 0.02, "random/sd": 0.001}
    assert "+0.0500, inside that interval" in findings.state_null(probe)
    assert "+0.3000, **outside** that interval" in findings.state_null(probe | {"other": 0.3})


def test_conflict_is_stated_with_the_intervals_of_rate_mean_and_growth():
    rng = np.random.default_rng(0)
    metrics = pd.DataFrame({"seed": np.repeat([0, 1, 2], 40), "step": np.tile(np.arange(40), 3)})
    metrics["cos"] = rng.normal(size=120)
    text = findings.state_conflict(metrics, published=0.99)
    each = [rows["cos"].to_numpy() for _, rows in metrics.groupby("seed")]
    assert percent(*conflict_rate(each), 0) in text and "99.0 % is **outside**" in text
    assert findings.number(*paired_t([cosines.mean() for cosines in each])) in text
    halves = [(part[20:] < 0).mean() - (part[:20] < 0).mean() for part in each]
    assert f"{points(*paired_t(halves), 0)}**; the paper reports a rise" in text


def test_the_lowest_and_the_highest_part_and_the_embedding_are_stated():
    metrics = pd.DataFrame({"seed": [0, 1], "cos/block0": [-0.2, -0.4], "cos/features": 0.1, "cos/head": [0.2, 0.4]})
    text = findings.state_parts(metrics)
    assert "of 3 parts" in text and text.index("block0 **-0.3") < text.index("head **+0.3") < text.index(
        "features **+0.1"
    )


def test_the_parts_of_the_timesteps_are_counted_below_zero_and_apart_from_the_null():
    rows = [
        (part, measure, value)
        for part, values in {"0": (-0.5, -0.6, -0.4, -0.5), "1": (0.3, 0.2, 0.4, 0.0)}.items()
        for measure, value in zip(("cos", "cos/low", "cos/high", "other"), values, strict=True)
    ]
    probes = pd.DataFrame(rows, columns=["bin", "measure", "value"]).assign(step=9, of="contrastive~diva")
    text = findings.state_timesteps(probes, "contrastive~diva")
    assert text.startswith("contrastive and DIVA: the mean cosine ranges from -0.500 (part 0) to +0.300 (part 1).")
    assert "below zero in **1** and excludes the mean of the null in **1**" in text
    assert findings.state_timesteps(probes[:0], "contrastive~diva") == "contrastive~diva: **not run**."


def test_two_terms_agree_or_not_with_an_interval():
    text = findings.state_agreement(pd.DataFrame({"truth~push:cos": [-0.5] * 20}), "truth~push")
    assert text.startswith(
        "pull to the truth and push of the negatives: mean cosine **-0.50**, negative in 100 % (95 %"
    )


# --- theory -----------------------------------------------------------------------------------------------------


def test_bounds_are_stated_with_what_the_second_needs():
    row = {"features": "condition", "constants": "extremes", "inner_holds": 1.0, "inter_holds": 1.0, "inter_says": 0.3}
    text = findings.state_bounds(pd.DataFrame([row | {"needed": 5, "ratio": 1}, row | {"needed": 9, "ratio": 2}]))
    assert "above zero in **30 %**" in text and "must exceed 5.0 to 9.0; it is 1.0 to 2.0" in text


def affine_rows(straight_from: float, slope_at_zero: float) -> pd.DataFrame:
    rows = pd.DataFrame({"t": 100, "cosine": [1.0, 0.8, 0.5, 0.0]})
    rows["slope"] = rows["slope/low"] = rows["slope/high"] = np.where(rows["cosine"] == 0, slope_at_zero, 2.5)
    return rows.assign(
        **dict.fromkeys(("r2", "r2/low", "r2/high"), np.where(rows["cosine"] >= straight_from, 1.0, 0.5))
    )


def test_the_range_where_the_loss_is_affine_is_stated_by_timestep():
    assert findings.state_affine_ranges(affine_rows(0.8, 0.1)).endswith("cosines t = 100: 0.8 to 1")
    assert findings.state_affine_ranges(affine_rows(2, 0.1)).endswith("cosines nowhere")
    assert findings.state_line(affine_rows(0, 2.5)) == (
        "slope +2.50 (95 % interval +2.50 to +2.50), R² +1.00 (95 % interval +1.00 to +1.00)"
    )


def test_theorem_2_is_against_expectation_where_only_near_negatives_give_a_line():
    text = findings.state_theorem_2(affine_rows(0.8, 0.25))
    assert "from 0.8 to 1" in text and "at most 10 % of the slope" in text and "**against expectation**" in text
    assert "**as expected**" in findings.state_theorem_2(affine_rows(0, 2.5))


# --- the result of a run ----------------------------------------------------------------------------------------


def changes_of(objective: str, after: float, low: float, high: float) -> pd.DataFrame:
    """Differences of P, from 20 %, and of D, which does not change."""
    rows = [("pairs/mean", 0.2, after, low, high), ("zeroshot", 0.9, 0.9, -0.01, 0.01)]
    table = pd.DataFrame(rows, columns=["measure", "before", "after", "low", "high"])
    return table.assign(objective=objective, difference=table["after"] - table["before"])


def test_the_result_is_two_sentences_on_p_and_d_of_the_objective_with_the_highest_pair_score():
    table = [changes_of("dcr", 0.21, -0.01, 0.03), changes_of("diva", 0.3, 0.08, 0.12)]
    text = findings.state_result(pd.concat([*table, changes_of("perturb-norm", 0.9, 0.6, 0.8)]))
    assert text == (
        "By DIVA, the best of 2 objectives, the pair score (P) is **30.0 %** against 20.0 % of the original: "
        "**+10.0 points (95 % interval +8.0 to +12.0)**, as expected. The zero-shot accuracy (D) is **90.0 %** against "
        "90.0 % of the original: **+0.0 points (95 % interval -1.0 to +1.0)**."
    )
    assert "By DCR the pair score" in findings.state_result(table[0])
    assert "undecided: the interval contains zero." in findings.state_result(table[0])


def test_without_a_tuned_encoder_the_result_says_so():
    for table in (changes_of("perturb-norm", 0.9, 0.6, 0.8), changes_of("dcr", np.nan, np.nan, np.nan)):
        expected = "No tuned encoder can be compared with the original."
        assert findings.state_result(table[table["measure"] == "pairs/mean"]) == expected
