"""Readability and doses as drawn."""

import numpy as np
import pandas as pd
import pytest
from figure_records import DOSE, GAINS, MIXES, PUSHES, READABLE, legend, lines

from diva_lab import figures
from diva_lab.figures.feedback import ALIGNMENTS, DECISIONS, ROWS


def test_readability_draws_every_decision_of_the_bin_of_all_with_its_interval():
    fig = figures.readability({"before": READABLE, "after": READABLE.assign(value=0.5, low=0.4, high=0.6)})
    for ax, value in zip(fig.axes, (0.7, 0.5), strict=True):
        for _, colour in DECISIONS.values():
            drawn = [line for line in lines(ax, colour) if len(line)]
            dots = [line for line in drawn if len(line) == 1]
            assert len(dots) == 3 and all(x == pytest.approx(value) for ((x, _),) in dots)
            assert sum(len(line) == 2 for line in drawn) == 3  # intervals
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["Texts", "Quantity and Count", "mean"]
    assert set(legend(fig)) == {name for name, _ in DECISIONS.values()}


def test_dose_curves_have_a_line_a_seed_and_a_mean_for_each_alignment_in_its_own_colour():
    fig = figures.dose_curves(DOSE.sample(frac=1, random_state=0))
    for name, gain in (("image-only", 0.0), ("anchored", 0.1)):
        *seeds, mean = lines(fig.axes[0], ALIGNMENTS[name][0])
        assert len(seeds) == 2
        assert mean == pytest.approx(np.array([[i, 0.2 + gain * i / 1000] for i in (0, 500, 1000)]))
    assert set(legend(fig)) == {"chance", "anchored", "image-only"}


def test_a_front_runs_from_the_original_to_the_tuned_weights_with_a_large_mark_at_the_chosen_mix():
    fig = figures.front(MIXES.sample(frac=1, random_state=0), PUSHES)
    for ax, measure, start in zip(fig.axes, ("zeroshot", "nmi"), (0.9, 0.8), strict=True):
        drawn = {len(line): line for line in lines(ax, ROWS["diva, mixed", "anchored"][1])}
        path = [[start - m / 10, 0.205 + 0.4 * m] for m in (0, 0.5, 1)]
        assert drawn[3] == pytest.approx(np.array(path)), measure
        assert drawn[1] == pytest.approx(np.array(path[1:2]))
    assert {"original", "random push", "DIVA, anchored", "CLIP's loss on captions"} <= set(legend(fig))
    assert len(legend(fig)) == 5


def test_pushes_that_lost_more_than_any_row_are_counted_at_the_left():
    far = PUSHES.assign(zeroshot=0.3)
    zeroshot, nmi = figures.front(MIXES, pd.concat([PUSHES, far])).axes
    assert [text.get_text() for text in zeroshot.texts] == [f"← {len(far)} more"] and not nmi.texts
    assert zeroshot.get_xlim()[0] == pytest.approx(figures.front(MIXES).axes[0].get_xlim()[0])


def test_every_row_of_a_front_has_a_look_of_its_own():
    mixed = [objective for objective, _ in ROWS if objective.endswith("mixed")]  # as the row without: dashed
    assert len({look[1:] for look in ROWS.values()}) == len(ROWS) - len(mixed)


def test_gains_are_marked_by_alignment():
    ax = figures.gain_by_readability(GAINS).axes[0]
    places = np.concatenate([np.asarray(dots.get_offsets()) for dots in ax.collections])
    assert places == pytest.approx(GAINS[["readable", "gain"]].to_numpy())
