"""Figures of training: losses, recovered fraction, P against D over the steps, learning rates."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from diva_lab.figures.style import (
    COLOURS,
    GREY,
    INK,
    MARKERS,
    PERCENT,
    SPAN,
    TERMS,
    WIDTH,
    WRONG,
    colours_of,
    finish,
    label_of,
    need_columns,
    running_mean,
    styled,
    true_minus,
)


@styled
def recovered_fraction(by_timestep: pd.DataFrame, over_steps: pd.DataFrame | None = None, source: str = "") -> Figure:
    """How much of what a full caption tells the denoiser the projected image tells it: 0 nothing, 1 as much.

    Args:
        by_timestep: columns `condition`, `t`, `recovered` and, where there are intervals, `low`, `high`.
        over_steps: columns `condition`, `step`, `recovered` (and `low`, `high`): the right panel.
    """
    panels = [(by_timestep, "t", "timestep t (0 clean, 1000 noise)", "by timestep")]
    if over_steps is not None:
        panels.append((over_steps, "step", "step of stage 1", "over the steps"))
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3), squeeze=False, sharey=True)
    for ax, (record, x, label, title) in zip(axes[0], panels, strict=True):
        need_columns(record, ("condition", x, "recovered"))
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.axhline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        colours = {"global": COLOURS["dcr"], "recap": COLOURS["diva"]}
        colours |= colours_of(name for name in dict.fromkeys(record["condition"]) if name not in colours)
        for name, rows in record.groupby("condition", sort=False):
            rows = rows.sort_values(x)
            ax.plot(rows[x], rows["recovered"], color=colours[name], marker="o", markersize=4, label=label_of(name))
            if {"low", "high"} <= set(rows):
                ax.fill_between(rows[x], rows["low"], rows["high"], color=colours[name], alpha=0.15, linewidth=0)
        ax.set(xlabel=label, title=title)
    for level, text in ((1, "as good as the full caption"), (0, "as good as no caption")):
        axes[0, 0].annotate(text, (0, level), (2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                            fontsize=7, color=GREY)  # fmt: skip
    axes[0, 0].set_ylabel("recovered fraction")
    axes[0, 0].set_ylim(top=1.13)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return finish(fig, source)


@styled
def loss_curves(metrics: Mapping[str, pd.DataFrame], window: int = 10, source: str = "") -> Figure:
    """A panel a run: every term of its loss, each step faint and the mean of the last `window` steps strong."""
    columns = min(len(metrics), 4)
    rows = -(-len(metrics) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH, 0.5 + 2 * rows), squeeze=False)
    for ax in axes.flat[len(metrics) :]:
        ax.set_axis_off()
    for ax, (name, table) in zip(axes.flat, metrics.items(), strict=False):
        need_columns(table, ("step", "loss"))
        terms = [term for term in TERMS if term != "loss" and term in table and table[term].notna().any()]
        for term in terms if len(terms) == 1 else ["loss", *terms]:
            colour = COLOURS[TERMS[term]]
            ax.plot(table["step"], table[term], color=colour, linewidth=0.7, alpha=0.35)
            ax.plot(table["step"], running_mean(table[term], window), color=colour, label=label_of(term))
        if len(terms) > 1 and (table[["loss", *terms]] > 0).all(axis=None):
            ax.set_yscale("log")
        ax.set(title=label_of(name), xlabel="step")
        ax.legend(loc="best", fontsize=7)
    axes[0, 0].set_ylabel("loss")
    return finish(fig, source)


@styled
def trade_off(
    evaluations: pd.DataFrame,
    panels: Sequence[tuple[str, str]] = (("zeroshot", "pairs/mean"), ("zeroshot", "probe/mean")),
    source: str = "",
) -> Figure:
    """P against D over the steps: a path per objective from the original encoder (ring) to the last step (marker).

    Args:
        evaluations: columns `objective`, `seed`, `step` and those named in `panels`. Seeds are drawn thin and, where
            there are several, their mean strong.
        panels: one (x, y) of measures each.
    """
    need_columns(evaluations, ("objective", "seed", "step", *{name for panel in panels for name in panel}))
    colours = colours_of(dict.fromkeys(evaluations["objective"]))
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.4), squeeze=False)
    for ax, (x, y) in zip(axes[0], panels, strict=True):
        for name, rows in evaluations.groupby("objective", sort=False):
            seeds = [table.sort_values("step") for _, table in rows.groupby("seed")]
            mean = rows.groupby("step")[list(dict.fromkeys((x, y)))].mean()
            for table in seeds if len(seeds) > 1 else []:
                ax.plot(table[x], table[y], color=colours[name], linewidth=0.7, alpha=0.45)
            ax.plot(mean[x], mean[y], color=colours[name], marker=".", markersize=3)
            ax.plot(mean[x].iloc[-1:], mean[y].iloc[-1:], ls="none", color=colours[name],
                    marker=MARKERS.get(str(name), "o"), markersize=7,
                    markeredgecolor="white", label=label_of(name), zorder=4)  # fmt: skip
        start = evaluations[evaluations["step"] == evaluations["step"].min()]
        ax.plot(start[x].mean(), start[y].mean(), marker="o", markersize=9, markerfacecolor="none",
                markeredgecolor=INK, markeredgewidth=1.2, linestyle="none", label="before", zorder=5)  # fmt: skip
        ax.set(xlabel=f"{label_of(x)}, %", ylabel=f"{label_of(y)}, %")
        for axis in (ax.xaxis, ax.yaxis):
            low, high = axis.get_view_interval()
            if high - low < SPAN:  # else a few live steps would look like a result
                axis.set_view_interval(*((low + high) / 2 + SPAN * np.array([-0.5, 0.5])), ignore=True)
            axis.set_major_formatter(PERCENT)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper left", ncols=5)
    return finish(fig, source)


@styled
def learning_rates(rates: pd.DataFrame, source: str = "") -> Figure:
    """Every learning rate tried for each row of the study: the mean of P and D by which one was chosen (ring).

    `rates`: columns `objective`, `lr`, `chosen`, `pairs/mean`, `zeroshot`. In points below the row's best.
    """
    need_columns(rates, ("objective", "lr", "chosen", "pairs/mean", "zeroshot"))
    score = 50 * (rates["pairs/mean"] + rates["zeroshot"])
    names = list(dict.fromkeys(rates["objective"]))
    table = rates.assign(score=score).pivot_table("score", "objective", "lr").loc[names]
    below = table.sub(table.max(axis=1), axis=0).to_numpy()  # [rows, rates]
    fig, ax = plt.subplots(figsize=(WIDTH, 0.7 + 0.2 * len(names)))
    ax.imshow(below, aspect="auto", cmap=LinearSegmentedColormap.from_list("rates", [WRONG, "#FAFAF8"]),
              vmin=min(float(np.nanmin(below)), -1e-3), vmax=0, interpolation="nearest")  # fmt: skip
    chosen = rates[rates["chosen"].astype(bool)]
    for name, rate in zip(chosen["objective"], chosen["lr"], strict=True):
        place = (list(table.columns).index(rate), names.index(name))
        ax.plot(*place, "o", markersize=15, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=0.9)
    for (i, j), value in np.ndenumerate(below):
        if np.isfinite(value):
            ax.annotate(true_minus(f"{value:.1f}"), (j, i), ha="center", va="center", fontsize=6.5)
    ax.set_yticks(range(len(names)), [label_of(name) for name in names])
    ax.set_xticks(range(table.shape[1]), [f"{rate:g}" for rate in table.columns])
    ax.set(xlabel="learning rate")
    ax.grid(False)
    return finish(fig, source)
