"""Figures of scores: patterns, differences with intervals, claims, benchmarks."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diva_lab.figures.style import (
    CHANCE,
    FAINT,
    GREY,
    INK,
    MARKERS,
    PERCENT,
    WIDTH,
    base_objective,
    ceiling_scores,
    colours_of,
    finish,
    label_of,
    need_columns,
    pattern_scores,
    styled,
    true_minus,
)
from diva_lab.world import DETAILS, PATTERNS


@styled
def pair_scores(reports: pd.DataFrame, ceiling: pd.DataFrame | None = None, source: str = "") -> Figure:
    """Pair score per pattern with its 95 % interval, for each encoder of a report table; the mean at the bottom.

    `ceiling` (columns `detail`, `after`) is what supervised tuning of the same tower reaches, drawn as a bar.
    """
    values = np.column_stack([pattern_scores(reports), reports["pairs/mean"]])
    low = np.column_stack([pattern_scores(reports, "/low"), reports["pairs/mean/low"]])
    high = np.column_stack([pattern_scores(reports, "/high"), reports["pairs/mean/high"]])
    y = np.append(np.arange(len(DETAILS)), len(DETAILS) + 0.35)
    fig, ax = plt.subplots(figsize=(WIDTH, 3.1 + 0.22 * len(reports)))
    ax.axvline(CHANCE, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
    if ceiling is not None:
        top = ceiling_scores(ceiling)
        ax.vlines(np.append(top, top.mean()), y - 0.34, y + 0.34, color=INK, linewidth=2.4, label="supervised ceiling")
    spread = 0.5 * (np.arange(len(reports)) - (len(reports) - 1) / 2) / max(len(reports), 3)
    for i, (name, colour) in enumerate(colours_of(reports.index).items()):
        error = np.abs(np.stack([values[i] - low[i], high[i] - values[i]]))
        ax.errorbar(
            values[i], y + spread[i], xerr=error, fmt=MARKERS.get(name, "o"), color=colour, label=label_of(name),
            markersize=5, elinewidth=1.3, markeredgecolor="white", markeredgewidth=0.6,
        )  # fmt: skip
    ax.axhline(len(DETAILS) - 0.33, color=FAINT, linewidth=0.8)
    ax.set(xlim=(-0.01, 1.01), ylim=(y[-1] + 0.6, -0.6), xlabel="pairs with both texts right, %")
    ax.set_yticks(y, [*PATTERNS.values(), "mean of nine"])
    ax.get_yticklabels()[-1].set_fontweight("bold")
    ax.xaxis.set_major_formatter(PERCENT)
    ax.grid(False, axis="y")
    ax.annotate("chance", (CHANCE, 1), (2, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                fontsize=7, color=GREY)  # fmt: skip
    fig.legend(loc="outside upper right", ncols=4)
    return finish(fig, source)


def _by_pattern(reports: pd.DataFrame) -> pd.DataFrame:
    """The pair scores of a report table, or of rows of `summarise`: a column a pattern, by its name."""
    if "pairs/mean" in reports:
        return pd.DataFrame(pattern_scores(reports), reports.index, list(PATTERNS.values()))
    names = [name for name in reports if f"{name}/low" in reports and name != "mean"]
    need_columns(reports, names or ["<pattern>/low"])
    return reports[names].astype(float)


@styled
def radar(reports: pd.DataFrame, ceiling: pd.DataFrame | None = None, source: str = "") -> Figure:
    """The pair scores of each encoder, pattern by pattern, as a closed line; the supervised ceiling behind them.

    Args:
        reports: a report table, or one row an encoder of what `summarise` says of any folder of pairs, whose patterns
            are then the axes, in their order.
        ceiling: as in `pair_scores`; of the tiny world's nine details, so for a report table only.
    """
    scores = _by_pattern(reports)
    angles = np.arange(scores.shape[1]) * (2 * np.pi / scores.shape[1])
    closed = lambda values: np.append(values, values[0])  # noqa: E731
    fig, ax = plt.subplots(figsize=(WIDTH, 4.9), subplot_kw={"projection": "polar"})
    ax.set_theta_zero_location("N")
    ax.set_theta_direction(-1)
    ax.plot(np.linspace(0, 2 * np.pi, 200), np.full(200, CHANCE), color=GREY, linewidth=0.9, linestyle=(0, (1, 2)),
            label="chance")  # fmt: skip
    if ceiling is not None:
        top = closed(ceiling_scores(ceiling))
        ax.fill(closed(angles), top, color="#F1F2F4", zorder=0)
        ax.plot(closed(angles), top, color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label="supervised ceiling")
    for (name, colour), row in zip(colours_of(reports.index).items(), scores.to_numpy(), strict=True):
        ax.plot(closed(angles), closed(row), color=colour, label=label_of(name), marker=MARKERS.get(name, "o"),
                markersize=4, markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
        ax.fill(closed(angles), closed(row), color=colour, alpha=0.07)
    ax.set_ylim(0, 1)
    ax.set_rgrids((0.25, 0.5, 0.75, 1), ("25", "50", "75", "100 %"), angle=20, fontsize=7, color=GREY)
    ax.set_thetagrids(np.degrees(angles), [textwrap.fill(name, 16) for name in scores], fontsize=8)
    for label, angle in zip(ax.get_xticklabels(), angles, strict=True):
        label.set_horizontalalignment("center" if angle == 0 else "left" if angle < np.pi else "right")
    ax.spines["polar"].set(color=FAINT)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return finish(fig, source)


@styled
def objective_differences(differences: pd.DataFrame, source: str = "", baseline: str = "none") -> Figure:
    """A table of what each objective changed, paired with the `baseline`: dot, 95 % interval and numbers.

    `differences`: columns `objective`, `measure`, `difference`, `low`, `high` (fractions; shown as points). Intervals
    that hold zero are drawn hollow; undefined ones (a single seed) are left out.
    """
    need_columns(differences, ("objective", "measure", "difference", "low", "high"))
    measures, objectives = (list(dict.fromkeys(differences[name])) for name in ("measure", "objective"))
    columns = min(len(measures), 3)
    rows = -(-len(measures) // columns)
    shape = (WIDTH, 0.25 + rows * (0.5 + 0.26 * len(objectives)))
    fig, axes = plt.subplots(rows, columns, figsize=shape, squeeze=False, sharey=True)
    colours = colours_of(objectives)
    for ax in axes.flat[len(measures) :]:
        ax.set_axis_off()
    for ax, measure in zip(axes.flat, measures, strict=False):
        table = differences[differences["measure"] == measure].set_index("objective")
        ax.axvline(0, color=INK, linewidth=0.9)
        for y, name in enumerate(objectives):
            if name not in table.index:
                continue
            _difference(ax, y, table.loc[name], colours[name], MARKERS.get(base_objective(name), "o"))
        ax.set(ylim=(len(objectives) - 0.4, -0.6))
        ax.set_title(textwrap.shorten(label_of(measure), 36, placeholder=" …"), fontsize=8.5)
        ax.set_yticks(range(len(objectives)), [label_of(name) for name in objectives])
        ax.grid(False, axis="y")
    for ax in axes.flat[max(len(measures) - columns, 0) : len(measures)]:
        ax.set_xlabel(f"points against {baseline}", fontsize=8)
    return finish(fig, source)


def _difference(ax: Axes, y: float | int | np.integer, row: pd.Series, colour: str, marker: str) -> None:
    """A dot with its interval at height `y` and both in numbers at the right edge; hollow where undecided."""
    value, low, high = (100 * float(row[column]) for column in ("difference", "low", "high"))
    known = np.isfinite([low, high]).all()
    if known:
        ax.plot([low, high], [y, y], color=colour, linewidth=1.6)
    hollow = not known or low <= 0 <= high
    face = "white" if hollow else colour
    ax.plot(value, y, marker=marker, color=colour, markersize=5.5, markerfacecolor=face)
    text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" if known else f"{value:+.1f}"
    ax.annotate(true_minus(text), (1, y), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                fontsize=6.5, va="center", color=GREY if hollow else INK)  # fmt: skip


@styled
def claims(
    differences: pd.DataFrame, groups: Mapping[str, Sequence[str]], source: str = "", baseline: str = "none"
) -> Figure:
    """What rows of the study changed against the `baseline`, grouped by question; a column a measure.

    Args:
        differences: as in `objective_differences`, of at least one measure.
        groups: question -> its rows of the study, in order. One that `differences` lacks is named as not run.
    """
    need_columns(differences, ("objective", "measure", "difference", "low", "high"))
    measures = list(dict.fromkeys(differences["measure"]))
    rows = [name for group in groups.values() for name in group]
    tops = np.cumsum([0, *(len(group) + 1 for group in groups.values())])[:-1]  # a line for each question
    places = [top + 1 + k for top, group in zip(tops, groups.values(), strict=True) for k in range(len(group))]
    shape = (WIDTH, 0.6 + 0.21 * (len(rows) + len(groups)))
    fig, axes = plt.subplots(1, max(len(measures), 1), figsize=shape, squeeze=False, sharey=True)
    colours = colours_of(rows)
    for ax, measure in zip(axes[0], measures, strict=False):
        table = differences[differences["measure"] == measure].set_index("objective")
        ax.axvline(0, color=INK, linewidth=0.9)
        for y, name in zip(places, rows, strict=True):
            if name in table.index:
                _difference(ax, y, table.loc[name], colours[name], MARKERS.get(base_objective(name), "o"))
        ax.set_title(label_of(measure), fontsize=8.5)
        ax.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        ax.margins(x=0.15)
    fig.supxlabel(f"points against {label_of(baseline)}, 95 % intervals over seeds", fontsize=8)
    for ax in axes[0]:
        ax.set(ylim=(max(places, default=0) + 0.6, -0.5))
        ax.grid(False, axis="y")
    run = set(differences["objective"])
    labels = [label_of(name) + ("" if name in run else " (not run)") for name in rows]
    axes[0, 0].set_yticks([*places, *tops], [*labels, *groups])
    for label in axes[0, 0].get_yticklabels()[len(rows) :]:
        label.set_fontweight("bold")
    for label, name in zip(axes[0, 0].get_yticklabels(), rows, strict=False):
        label.set_color(INK if name in run else GREY)
    return finish(fig, source)


@styled
def runs_scatter(
    runs: pd.DataFrame,
    x: str,
    y: str,
    line: pd.DataFrame | None = None,
    labels: tuple[str, str] = ("", ""),
    source: str = "",
) -> Figure:
    """A mark a run at (x, y), a shape a row of the study where they are ten at most, else one an objective.

    Args:
        runs: columns `objective` and those named by `x` and `y`.
        line: a regression with its interval: columns `x`, `mean`, `low`, `high`, in the units of `runs`.
        labels: of the two axes.
    """
    need_columns(runs, ("objective", x, y))
    fig, ax = plt.subplots(figsize=(WIDTH, 3.2))
    if line is not None:
        ax.fill_between(line["x"], line["low"], line["high"], color=FAINT, alpha=0.6, linewidth=0)
        ax.plot(line["x"], line["mean"], color=INK, linewidth=1.2, label="regression, 95 %")
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.axvline(0, color=INK, linewidth=0.8)
    few = runs["objective"].nunique() <= len(MARKERS) + 1
    key = runs["objective"] if few else runs["objective"].map(base_objective)
    colours = colours_of(dict.fromkeys(key))
    spare = {name: list(MARKERS.values())[k % len(MARKERS)] for k, name in enumerate(colours)}
    for name, rows in runs.groupby(key, sort=False):
        marker = spare[name] if few else MARKERS.get(name, "o")
        ax.plot(rows[x], rows[y], marker, color=colours[name], markersize=6, markeredgecolor="white",
                markeredgewidth=0.6, alpha=0.85, label=label_of(name))  # fmt: skip
    ax.set(xlabel=labels[0] or label_of(x), ylabel=labels[1] or label_of(y))
    fig.legend(loc="outside right upper")
    return finish(fig, source)


@styled
def benchmark_scores(table: pd.DataFrame, published: pd.DataFrame | None = None, source: str = "") -> Figure:
    """One panel a benchmark, set and metric: each encoder's value with its interval, chance as a line.

    Args:
        table: rows of `evaluate`; an encoder that is not above chance is drawn hollow.
        published: rows of data/published/results.csv, which have panels of their own beneath, one more for each
            backbone, in grey: their sets, backbones and seeds are not ours. What was read second hand is drawn hollow.
    """
    need_columns(table, ("encoder", "benchmark", "set", "metric", "category", "value", "low", "high", "chance", "note"))
    groups = ["benchmark", "set", "metric"]
    ours = list(table[table["category"] == "all"].groupby(groups, sort=False))
    theirs = [] if published is None else list(published.groupby([*groups, "backbone"], sort=False))
    columns = 3
    above, below = -(-len(ours) // columns), -(-len(theirs) // columns)
    tall = max([table["encoder"].nunique()] + [len(rows) for _, rows in theirs])
    shape = (WIDTH, 0.3 + (above + below) * (0.65 + 0.2 * tall))
    fig, axes = plt.subplots(above + below, columns, figsize=shape, squeeze=False)
    for ax in [*axes.flat[len(ours) : above * columns], *axes.flat[above * columns + len(theirs) :]]:
        ax.set_axis_off()
    for ax, ((benchmark, name, metric), rows) in zip(axes.flat, ours, strict=False):
        colours = colours_of(rows["encoder"])
        for y, row in enumerate(rows.itertuples()):
            colour = colours[row.encoder]
            if np.isfinite(row.low):
                ax.plot([100 * row.low, 100 * row.high], [y, y], color=colour, linewidth=1.6)
            ax.plot(100 * row.value, y, marker=MARKERS.get(row.encoder, "o"), color=colour, markersize=5.5,
                    markerfacecolor="white" if row.note else colour)  # fmt: skip
        chance = rows["chance"].iloc[0]
        if np.isfinite(chance):
            ax.axvline(100 * chance, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
        _panel(ax, rows["encoder"], f"{benchmark}: {metric}\n{name}")
    for ax, ((_, name, metric, backbone), rows) in zip(axes.flat[above * columns :], theirs, strict=False):
        for y, row in enumerate(rows.itertuples()):
            hollow = "second hand" in row.source
            ax.plot(row.percent, y, "D", color=GREY, markersize=4, markerfacecolor="white" if hollow else GREY)
        _panel(ax, rows["method"], f"published, {backbone}: {metric}\n{name}")
    return finish(fig, source)


def _panel(ax: Axes, names: Iterable[str], title: str) -> None:
    names = [label_of(name) for name in names]
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="%")
    ax.set_yticks(range(len(names)), [textwrap.shorten(name, 22, placeholder="…") for name in names])
    ax.set_title(title, fontsize=8.5)
    ax.grid(False, axis="y")
