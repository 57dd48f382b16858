"""Figures of scores: patterns, differences with intervals, claims, benchmarks."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diva_lab.figures import style
from diva_lab.statistics import percent
from diva_lab.world import DETAILS, PATTERNS


def _ceiling_scores(ceiling: pd.DataFrame) -> np.ndarray:
    style.require_columns(ceiling, ("detail", "after"))
    return ceiling.set_index("detail")["after"].reindex(list(DETAILS)).to_numpy(float)  # [9]


@style.apply
def pair_scores(reports: pd.DataFrame, ceiling: pd.DataFrame | None = None, source: str = "") -> Figure:
    """Pair score per pattern with its 95 % interval, for each encoder of a report table; the mean at the bottom.

    A dot is hollow where it is not above chance. `ceiling` (columns `detail`, `after`) is what supervised tuning of the
    same image tower reaches, drawn as a bar.
    """
    rows = [f"pairs/{name}" for name in (*DETAILS, "mean")]
    style.require_columns(reports, [f"{row}{end}" for row in rows for end in ("", "/low", "/high")])
    fig, ax = plt.subplots(figsize=(style.WIDTH, 3.1 + 0.22 * len(reports)))
    ax.axvline(style.CHANCE, color=style.GREY, linewidth=0.9, linestyle=(0, (1, 2)), label="chance")
    for k, (name, colour) in enumerate(style.colours_of(reports.index).items()):
        look = colour, style.marker_of(name)
        for y, row in enumerate(rows):
            value, low, high = reports.loc[name, [row, f"{row}/low", f"{row}/high"]]
            beside = y + (k - (len(reports) - 1) / 2) * 0.5 / max(len(reports), 3)
            style.draw_interval(ax, beside, value, low, high, *look, undecided=low <= style.CHANCE)
        ax.plot([], [], look[1], color=colour, label=name)
    if ceiling is not None:
        top, y = _ceiling_scores(ceiling), np.arange(len(rows))
        ax.vlines([*top, top.mean()], y - 0.34, y + 0.34, color=style.INK, linewidth=2.4, label="supervised ceiling")
    ax.invert_yaxis()
    ax.axhline(len(DETAILS) - 0.5, color=style.FAINT, linewidth=0.8)
    ax.set(xlim=(-0.01, 1.01), xlabel="pairs with both texts right, %", ylabel="")
    ax.set_yticks(range(len(rows)), [*PATTERNS.values(), "mean of nine"])
    ax.get_yticklabels()[-1].set_fontweight("bold")
    ax.xaxis.set_major_formatter(style.PERCENT)
    ax.grid(False, axis="y")
    style.move_legend(fig, columns=5)
    return style.finish(fig, source)


def _by_pattern(reports: pd.DataFrame) -> pd.DataFrame:
    """The pair scores of a report table, or of rows of `summarise`: a column for each pattern, by its name."""
    if "pairs/mean" in reports:
        columns = {f"pairs/{detail}": pattern for detail, pattern in PATTERNS.items()}
        style.require_columns(reports, columns)
        return reports[list(columns)].rename(columns=columns).astype(float)
    names = [name for name in reports if f"{name}/low" in reports and name != "mean"]
    style.require_columns(reports, names or ["<pattern>/low"])
    return reports[names].astype(float)


@style.apply
def radar(reports: pd.DataFrame, ceiling: pd.DataFrame | None = None, source: str = "") -> Figure:
    """The pair scores of each encoder, pattern by pattern, as a closed line; the supervised ceiling behind them.

    Args:
        reports: a report table, or one row of `summarise` for each encoder, of any folder of pairs; the axes are the
            patterns of that folder, in its order.
        ceiling: as in `pair_scores`; of the tiny world's nine details, so for a report table only.
    """
    scores = _by_pattern(reports)
    angles = np.arange(scores.shape[1] + 1) * (2 * np.pi / scores.shape[1])  # the last one closes the line
    fig, ax = plt.subplots(figsize=(style.WIDTH, 4.9), subplot_kw={"projection": "polar"})
    ax.set_theta_zero_location("N")
    ax.set_theta_direction(-1)
    ax.plot(np.linspace(0, 2 * np.pi, 200), np.full(200, style.CHANCE), color=style.GREY, linewidth=0.9,
            linestyle=(0, (1, 2)), label="chance")  # fmt: skip
    if ceiling is not None:
        top = np.resize(_ceiling_scores(ceiling), len(angles))
        ax.fill(angles, top, color="#F1F2F4", zorder=0)
        ax.plot(angles, top, color=style.INK, linewidth=1.1, linestyle=(0, (4, 2)), label="supervised ceiling")
    for (name, colour), row in zip(style.colours_of(reports.index).items(), scores.to_numpy(), strict=True):
        values = np.resize(row, len(angles))
        ax.plot(angles, values, color=colour, label=style.label_of(name), marker=style.marker_of(name), markersize=4,
                markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
        ax.fill(angles, values, color=colour, alpha=0.07)
    ax.set_ylim(0, 1)
    rings = {share: percent(share, digits=0) for share in (0.25, 0.5, 0.75, 1)}
    ax.set_rgrids(list(rings), list(rings.values()), angle=20, fontsize=7, color=style.GREY)
    ax.set_thetagrids(
        np.degrees(angles[:-1]), [textwrap.fill(style.shorten(name, 48), 16) for name in scores], fontsize=8
    )
    for label, angle in zip(ax.get_xticklabels(), angles, strict=False):
        label.set_horizontalalignment("center" if angle == 0 else "left" if angle < np.pi else "right")
    ax.spines["polar"].set(color=style.FAINT)
    style.move_legend(fig, "outside right upper", 1)
    return style.finish(fig, source)


@style.apply
def objective_differences(differences: pd.DataFrame, source: str = "", baseline: str = "none") -> Figure:
    """What each objective of a table changed against the `baseline`: `claims` without questions."""
    style.require_columns(differences, ("objective",))
    return claims(differences, {"": list(dict.fromkeys(differences["objective"]))}, source, baseline)


@style.apply
def claims(
    differences: pd.DataFrame, groups: Mapping[str, Sequence[str]], source: str = "", baseline: str = "none"
) -> Figure:
    """What rows of the study changed against the `baseline`, grouped by question: dot, 95 % interval and numbers.

    A dot is hollow where its interval holds zero, or where it has none (a single seed).

    Args:
        differences: columns `objective`, `measure` (a panel for each), `difference`, `low`, `high` (fractions, drawn
            as points), and `seeds` where the intervals are over seeds.
        groups: question -> its rows of the study, in order. A row that `differences` lacks is labelled as not run.
    """
    style.require_columns(differences, ("objective", "measure", "difference", "low", "high"))
    rows, questions = {}, {}  # by their heights
    for question, names in groups.items():
        top = len(rows) + len(questions)
        questions[top] = question
        rows |= dict(enumerate(names, top + 1))
    measures, run = list(dict.fromkeys(differences["measure"])), set(differences["objective"])
    panels, lines = max(len(measures), 1), len(rows) + len(questions)
    columns = panels if panels < 5 else 3
    height = 0.3 + -(-panels // columns) * (0.4 + 0.21 * lines)
    fig, axes = style.make_panels(panels, columns, height, sharey=True)
    colours = style.colours_of(rows.values())
    for ax, measure in zip(axes, measures, strict=False):
        table = differences[differences["measure"] == measure].set_index("objective")
        ax.axvline(0, color=style.INK, linewidth=0.9)
        for y, name in rows.items():
            if name in table.index:
                _draw_difference(ax, y, table.loc[name], colours[name])
        ax.set_title(textwrap.shorten(style.label_of(measure), 30, placeholder=" …"), fontsize=8.5)
        ax.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.tick_params(axis="x", labelsize=7)
        ax.margins(x=0.15)
        ax.grid(False, axis="y")
    labels = [style.label_of(name) + ("" if name in run else " (not run)") for name in rows.values()]
    axes[0].set_yticks([*rows, *questions], [*labels, *map(style.shorten, questions.values())])
    axes[0].set_ylim(lines - 0.4, ("" in groups) - 0.6)
    for label in axes[0].get_yticklabels():
        label.set_color(style.GREY if label.get_text().endswith("(not run)") else style.INK)
        label.set_fontweight("bold" if label.get_text() in groups else "normal")
    seeds = " over seeds" if "seeds" in differences else ""
    fig.supxlabel(f"points against {style.label_of(baseline)}, 95 % intervals{seeds}", fontsize=8)
    return style.finish(fig, source)


def _draw_difference(ax: Axes, y: int, row: pd.Series, colour: str) -> None:
    """A dot with its interval at height `y` and both in numbers at the right edge; hollow where `undecided`."""
    value, low, high = (100 * float(row[column]) for column in ("difference", "low", "high"))
    has_interval = bool(np.isfinite([low, high]).all())
    undecided = not has_interval or low <= 0 <= high
    style.draw_interval(ax, y, value, low, high, colour, style.marker_of(row.name), undecided)
    text = f"  {value:+.1f} [{low:+.1f}, {high:+.1f}]" if has_interval else f"  {value:+.1f}"
    ax.text(1, y, style.minus_signs(text), transform=ax.get_yaxis_transform(), fontsize=6.5, va="center",
            color=style.GREY if undecided else style.INK)  # fmt: skip


@style.apply
def runs_scatter(
    runs: pd.DataFrame,
    x: str,
    y: str,
    line: pd.DataFrame | None = None,
    labels: tuple[str, str] = ("", ""),
    source: str = "",
) -> Figure:
    """A mark for each run at (x, y): a shape for each row of the study where there are ten at most, else an objective.

    Args:
        runs: columns `objective` and those named by `x` and `y`.
        line: a regression with its interval: columns `x`, `mean`, `low`, `high`, in the units of `runs`.
        labels: of the two axes.
    """
    style.require_columns(runs, ("objective", x, y))
    fig, ax = plt.subplots(figsize=(style.WIDTH, 3.2))
    if line is not None:
        ax.fill_between(line["x"], line["low"], line["high"], color=style.FAINT, alpha=0.6, linewidth=0)
        ax.plot(line["x"], line["mean"], color=style.INK, linewidth=1.2, label="regression, 95 %")
    ax.axhline(0, color=style.INK, linewidth=0.8)
    ax.axvline(0, color=style.INK, linewidth=0.8)
    markers = dict(zip(dict.fromkeys(runs["objective"]), [*style.MARKERS.values(), "<"], strict=False))
    if runs["objective"].nunique() > len(markers):
        runs = runs.assign(objective=runs["objective"].map(style.base_objective))
        markers = {name: style.marker_of(name) for name in runs["objective"]}
    sns.scatterplot(runs, x=x, y=y, hue="objective", style="objective", palette=style.colours_of(markers),
                    markers=markers, s=40, alpha=0.85, linewidth=0.6, zorder=3, ax=ax)  # fmt: skip
    ax.set(xlabel=labels[0] or style.label_of(x), ylabel=labels[1] or style.label_of(y))
    style.move_legend(fig, "outside right upper", 1)
    return style.finish(fig, source)


@style.apply
def benchmark_scores(
    table: pd.DataFrame,
    published: pd.DataFrame | None = None,
    source: str = "",
    replications: pd.DataFrame | None = None,
) -> Figure:
    """A panel for each benchmark, set and metric: each encoder's value with its interval, chance as a line.

    Args:
        table: rows of `evaluate`; a dot is hollow where the encoder is not above chance.
        published: rows of data/published/results.csv. They have panels of their own beneath, one for each backbone,
            in grey: their sets, backbones and seeds are not ours. A number read second hand is a thin diamond.
        replications: rows of data/published/replications.csv; those of a published panel stand in it, a cross each, or
            what was found in words where no number is known.
    """
    needed = ("encoder", "benchmark", "set", "metric", "category", "value", "low", "high", "chance", "note")
    style.require_columns(table, needed)
    groups, columns = ["benchmark", "set", "metric"], 3
    ours = list(table[table["category"] == "all"].groupby(groups, sort=False))
    theirs = [] if published is None else _published_panels(published, replications, [*groups, "backbone"])
    above, below = -(-len(ours) // columns), -(-len(theirs) // columns)
    lines = max([table["encoder"].nunique()] + [len(rows) for _, rows in theirs])
    size = (style.WIDTH, 0.3 + (above + below) * (0.65 + 0.2 * lines))
    fig, axes = plt.subplots(above + below, columns, figsize=size, squeeze=False)
    for ax in [*axes[:above].flat[len(ours) :], *axes[above:].flat[len(theirs) :]]:
        ax.set_axis_off()
    for ax, ((benchmark, name, metric), rows) in zip(axes[:above].flat, ours, strict=False):
        colours = style.colours_of(rows["encoder"])
        for y, row in enumerate(rows.itertuples()):
            value, low, high = 100 * row.value, 100 * row.low, 100 * row.high
            marker = style.marker_of(row.encoder)
            style.draw_interval(ax, y, value, low, high, colours[row.encoder], marker, bool(row.note))
        if np.isfinite(chance := rows["chance"].iloc[0]):
            ax.axvline(100 * chance, color=style.GREY, linewidth=0.9, linestyle=(0, (1, 2)))
        _label_panel(ax, rows["encoder"], f"{benchmark}: {metric}\n{style.shorten(name, 40)}")
    for ax, ((_, name, metric, backbone), rows) in zip(axes[above:].flat, theirs, strict=False):
        for y, row in enumerate(rows.itertuples()):
            marker = "X" if row.replication else "d" if "second hand" in row.source else "D"
            style.draw_interval(ax, y, row.percent, np.nan, np.nan, style.GREY, marker)
            if np.isfinite(row.percent):
                ax.text(row.percent, y, f"  {row.replication}", fontsize=6, va="center")
            else:
                words = textwrap.fill(row.replication, 30)
                ax.text(0.03, y, words, transform=ax.get_yaxis_transform(), fontsize=6, va="center")
        _label_panel(ax, rows["method"], f"published, {backbone}: {metric}\n{name}")
    return style.finish(fig, source)


@style.apply
def selection(table: pd.DataFrame, source: str = "") -> Figure:
    """What the best of several adds: as it would be reported, with the range of 95 % of the test sets, and as it holds.

    `table`: as `analysis.selection.selection_table` returns it, in fractions. Checkpoints and seeds have a panel each.
    """
    style.require_columns(table, ("of", "choices", "size", "reported", "reported/low", "reported/high", "held"))
    groups = list(table.groupby("of", sort=False))
    fig, axes = style.make_panels(len(groups), len(groups), 3.0, sharey=True)
    colours = style.colours_of(map(str, sorted(table["size"].unique())))
    for ax, (of, rows) in zip(axes, groups, strict=True):
        ax.axhline(0, color=style.INK, linewidth=0.9)
        for size, part in rows.groupby("size"):
            colour = colours[str(size)]
            ax.fill_between(part["choices"], part["reported/low"], part["reported/high"], color=colour, alpha=0.15)
            ax.plot(
                part["choices"], part["reported"], "o-", color=colour, markersize=4, label=f"reported, {size} pairs"
            )
            ax.plot(part["choices"], part["held"], "--", color=colour, label=f"held, {size} pairs")
        ax.set(title=f"best of so many {of}", xlabel=of)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_formatter(style.PERCENT)
    axes[0].set_ylabel("gain in the pair score, points")
    style.move_legend(fig, "outside upper center", 4)
    return style.finish(fig, source)


def _published_panels(
    published: pd.DataFrame, replications: pd.DataFrame | None, keys: list[str]
) -> list[tuple[tuple, pd.DataFrame]]:
    """Published rows by `keys`, then their replications, whose `replication` says where, and what if not how much."""
    rows = published.assign(replication="")
    if replications is not None:
        whole = replications[replications["category"] == "all"]
        again = whole.merge(published[keys].drop_duplicates(), on=keys)
        where = again["source"].str.rpartition("/")[2]
        said = where.where(again["percent"].notna(), where + ": " + again["finding"])
        rows = pd.concat([rows, again.assign(replication=said)])
    return list(rows.groupby(keys, sort=False))


def _label_panel(ax: Axes, names: pd.Series, title: str) -> None:
    labels = [style.shorten(style.label_of(name), 22) for name in names]
    ax.set(ylim=(len(labels) - 0.4, -0.6), xlabel="%")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_title(title, fontsize=8.5)
    ax.grid(False, axis="y")
