import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from figure_records import DRAWN, MIXES, REPORTS, RUNS, figure
from matplotlib.legend import Legend
from PIL import Image

from diva_lab import figures
from diva_lab.figures import style


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_says_what_it_is_names_its_series_and_has_a_number_of_its_data(name):
    fig = figure(name)
    text = figures.describe(fig)
    lead = " ".join(getattr(figures, name).__doc__.split("\n\n")[0].replace("`", "").split())
    assert text.startswith(lead) and 50 < len(text) < 1000 and "nan" not in text.split()
    values = text.removeprefix(lead)
    assert re.search(r"\d", values)
    series = {entry.get_text() for legend in fig.findobj(Legend) for entry in legend.get_texts()}
    assert not [each for each in series if each not in values]
    if not series and not any(ax.images for ax in fig.axes):
        rows = [label.get_text() for label in fig.axes[0].get_yticklabels()]
        assert [row for row in rows if " ".join(row.split()) in values]


def test_a_line_has_its_first_and_last_value_in_percent_where_its_axis_has_them():
    text = figures.describe(figure("trade_off"))
    assert "pair score (P), % by zero-shot (D), %: DIVA from 30.0 % to 32.0 %; DCR from 30.0 % to 34.0 %" in text
    text = figures.describe(figures.front(MIXES))
    assert "DIVA, rate and mix chosen, anchored from 20.5 % to 60.5 %" in text  # the mean, not a seed


def test_a_row_chart_has_the_range_of_each_series_with_the_rows_of_its_ends():
    reports = REPORTS.copy()
    reports.loc["dcr", "pairs/colour"] = 0.7
    text = figures.describe(figures.pair_scores(reports))
    assert re.search(r"none \(original\) 30.0 %; DCR from 50.0 % \(.+\) to 70.0 % \(Color and Appearance\)", text)


def test_rows_of_one_series_have_their_numbers_as_drawn():
    text = figures.describe(figure("claims"))
    assert "DIVA +2.0 [−1.0, +5.0]" in text


def test_variants_of_one_colour_are_named_together():
    assert "naive sum and naive sum, upgrad from 1 to 2" in figures.describe(figures.runs_scatter(RUNS, "cos", "p"))


def test_many_panels_have_values_as_far_as_they_fit_and_then_their_titles():
    tables = {f"run {k}": pd.DataFrame({"step": [0, 1], "loss": [3.0, k], "rec": 1.0, "con": 2.0}) for k in range(12)}
    text = figures.describe(figures.loss_curves(tables))
    assert "run 1, loss" in text or "run 1, step: loss from 3 to 1" in text
    assert "Also run" in text and len(text) < 1000


def test_a_figure_drawn_by_hand_is_described_too():
    fig, ax = plt.subplots()
    ax.plot([0, 1, 2], [5, np.nan, 7], label="mine")
    ax.set(title="A title", xlabel="step", ylabel="loss")
    ax.legend()
    assert figures.describe(fig) == "A title, loss by step: mine from 5 to 7."
    assert figures.describe(plt.figure()) == ""


def test_what_matplotlib_draws_otherwise_is_described_and_saved_too():
    fig, axes = plt.subplots(2, 3)
    axes[0, 0].plot(["a", "b", "a"], label="names")
    axes[0, 1].scatter([0, 1], [2, 3], facecolors="none", edgecolors="k", label="rings")
    sns.heatmap(pd.DataFrame([[1.0, 2.0], [np.nan, 4.0]]), ax=axes[0, 2])
    axes[1, 0].bar(["u", "v"], [1, 2], label="bars")
    axes[1, 1].pcolormesh(np.full((2, 2), np.nan))
    for k, colour in enumerate(plt.cm.viridis(np.linspace(0, 1, 400))):  # more than a palette holds
        axes[1, 2].plot([0, 1], [k, k], color=colour)
    for ax in (axes[0, 0], axes[0, 1], axes[1, 0]):
        ax.legend()
    text = figures.describe(fig)
    assert "marks from 2 to 3" in text and "from 1 to 4." in text and "Also rings; bars" in text
    assert Image.open(io.BytesIO(figures.to_png(fig, small=True))).convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_patterns_have_their_display_names():
    assert {style.label_of(name) for name in style.PATTERNS} == set(style.PATTERNS.values())
    assert style.label_of("pairs/colour") == style.label_of("colour") == "Color and Appearance"
