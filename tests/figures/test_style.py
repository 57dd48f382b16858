import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from figure_records import DRAWN, figure
from matplotlib.collections import PathCollection

from diva_lab import figures
from diva_lab.figures import style
from diva_lab.objectives import OBJECTIVES
from diva_lab.training.settings import CONTROLS


def test_each_objective_has_a_colour_and_a_marker_of_its_own():
    assert set(figures.COLOURS) == {*CONTROLS, *OBJECTIVES}
    assert len(set(figures.COLOURS.values())) == len(set(figures.MARKERS.values())) == len(figures.COLOURS)


def test_a_variant_has_the_colour_and_the_name_of_its_objective():
    assert style.colours_of(["dcr, velocity", "naive, upgrad"]) == {
        "dcr, velocity": figures.COLOURS["dcr"],
        "naive, upgrad": figures.COLOURS["naive"],
    }
    assert style.label_of("dcr, velocity") == "DCR, velocity"
    assert style.label_of("dcr-guidance, τ .3") == f"{style.LABELS['dcr-guidance']}, τ .3"
    assert style.label_of("mine") == "mine"


def test_the_running_mean_waits_for_half_of_its_window():
    mean = figures.running_mean(np.arange(1.0, 7.0), 4)
    assert mean == pytest.approx([np.nan, 1.5, 2, 2.5, 3.5, 4.5], nan_ok=True)


@pytest.mark.parametrize("value", [0.1, 0.4, 0.9])
def test_three_rows_have_the_value_as_their_median_and_an_interval_that_holds_it_as_their_range(value):
    record = pd.DataFrame({"name": ["a", "b"], "x": value, "x/low": [0.3, np.nan], "x/high": [0.5, np.nan]})
    three = style.with_intervals(record, "x").groupby("name")["x"]
    assert three.size().tolist() == [3, 3]
    assert three.median().tolist() == [value, value]
    assert three.min().tolist() == [min(value, 0.3), value] and three.max().tolist() == [max(value, 0.5), value]
    renamed = record.rename(columns={"x/low": "low", "x/high": "high"})
    again = style.with_intervals(renamed, "x", ("low", "high"))
    assert again["x"].tolist() == style.with_intervals(record, "x")["x"].tolist()


def test_the_trace_names_the_runs_the_git_sha_and_the_versions():
    environment = {"git": "0123456789ab", "versions": {"torch": "2.11.0", "numpy": "2.3"}}
    assert (
        figures.trace(environment, "tune-dcr-s0", "seed 0") == "tune-dcr-s0 · seed 0 · git 0123456789ab · torch 2.11.0"
    )


def test_powers_of_ten_are_formulas_and_a_dollar_is_a_dollar():
    table = pd.DataFrame({"step": range(4), "norm_$a$": [1.0, 10, 100, 1000]})
    fig = figures.term_norms(table)
    fig.canvas.draw()
    labels = [label for label in fig.axes[0].get_yticklabels() if label.get_text()]
    assert labels and all(label.get_parse_math() for label in labels)
    (name,) = fig.axes[0].get_legend().get_texts()
    assert name.get_text() == "$a$" and not name.get_parse_math()


@pytest.mark.parametrize(
    ("text", "short"), [("a b", "a b"), ("aa bb cc", "aa bb…"), ("abcdefgh", "abcdef…"), ("a\nb", "a b")]
)
def test_a_long_text_is_cut_between_words_where_it_has_words(text, short):
    assert style.shorten(text, 7) == short


def test_minus_signs_stand_before_numbers_and_hyphens_stay_within_words():
    assert style.minus_signs("zero-shot -0.5 [-1, -.2] 1e-05 2-3") == "zero-shot −0.5 [−1, −.2] 1e−05 2-3"


@pytest.mark.parametrize("name", DRAWN)
def test_marks_are_hollow_only_where_an_interval_shows_no_effect(name):
    for ax in figure(name).axes:
        for line in ax.lines:
            alone = line.get_marker() not in ("", "None", None) and len(line.get_xdata())
            if alone and line.get_markerfacecolor() in ("none", "white", "#ffffff"):
                assert len(line.get_xdata()) == 1 and line.get_markersize() == 5.5  # of `draw_interval`
        marks = [each.get_facecolor() for each in ax.collections if isinstance(each, PathCollection)]
        assert all(len(faces) and (faces[:, :3] < 1).any(axis=1).all() for faces in marks)


@pytest.mark.parametrize("undecided", [True, False])
def test_a_dot_is_hollow_where_it_is_undecided(undecided):
    ax = plt.figure().add_subplot()
    style.draw_interval(ax, 0, 1.0, 0.5, 1.5, style.RIGHT, undecided=undecided)
    assert ax.lines[1].get_markerfacecolor() == ("white" if undecided else style.RIGHT)
