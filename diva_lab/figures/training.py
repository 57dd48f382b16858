"""Figures of training: losses, recovered fraction, P against D over the steps."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from diva_lab.figures import style

LEAST_RANGE = 0.02  # of an axis of scores


@style.apply
def recovered_fraction(by_timestep: pd.DataFrame, over_steps: pd.DataFrame | None = None, source: str = "") -> Figure:
    """How much a projected image helps the denoiser, as a fraction of a full caption's help: 0 none, 1 as much.

    Args:
        by_timestep: columns `condition`, `t`, `recovered` and, where there are intervals, `low`, `high`.
        over_steps: columns `condition`, `step`, `recovered` (and `low`, `high`): the right panel.
    """
    panels = [(by_timestep, "t", "timestep t (0 clean, 1000 noise)", "by timestep")]
    if over_steps is not None:
        panels.append((over_steps, "step", "step of stage 1", "over the steps"))
    fig, axes = style.make_panels(len(panels), len(panels), 3.0, sharey=True)
    fixed = {"global": style.COLOURS["dcr"], "recap": style.COLOURS["diva"]}
    for ax, (record, x, label, title) in zip(axes, panels, strict=True):
        style.require_columns(record, ("condition", x, "recovered"))
        ax.axhline(0, color=style.GREY, linewidth=0.8)
        ax.axhline(1, color=style.INK, linewidth=0.9, linestyle=(0, (4, 2)))
        colours = style.colours_of(name for name in dict.fromkeys(record["condition"]) if name not in fixed)
        if {"low", "high"} <= set(record):
            record = style.with_intervals(record, "recovered", ("low", "high"))
        sns.lineplot(record, x=x, y="recovered", hue="condition", palette=fixed | colours, marker="o", markersize=5,
                     ax=ax, **style.BANDS)  # fmt: skip
        ax.set(xlabel=label, ylabel="recovered fraction", title=title)
    for y, text in ((1, " as good as the full caption"), (0, " as good as no caption")):
        axes[0].text(0, y + 0.015, text, transform=axes[0].get_yaxis_transform(), fontsize=7, color=style.GREY)
    axes[0].set_ylim(top=1.13)
    style.move_legend(fig)
    return style.finish(fig, source)


@style.apply
def loss_curves(metrics: Mapping[str, pd.DataFrame], window: int = 10, source: str = "") -> Figure:
    """A panel for each run: every term of its loss, each step faint and the mean of the last `window` steps strong."""
    columns = min(len(metrics), 4)
    fig, axes = style.make_panels(len(metrics), columns, 0.5 + 2 * -(-len(metrics) // columns))
    for ax, (name, table) in zip(axes, metrics.items(), strict=True):
        style.require_columns(table, ("step", "loss"))
        terms = [term for term in style.TERMS if term != "loss" and term in table and table[term].notna().any()]
        for term in terms if len(terms) == 1 else ["loss", *terms]:
            style.draw_steps(ax, table["step"], table[term], window, style.TERMS[term], style.label_of(term))
        if len(terms) > 1 and (table[["loss", *terms]] > 0).all(axis=None):
            ax.set_yscale("log")
        ax.set(title=style.label_of(name), xlabel="step")
        ax.legend(loc="best", fontsize=7)
    axes[0].set_ylabel("loss")
    return style.finish(fig, source)


@style.apply
def trade_off(
    evaluations: pd.DataFrame,
    panels: Sequence[tuple[str, str]] = (("zeroshot", "pairs/mean"), ("zeroshot", "probe/mean")),
    source: str = "",
) -> Figure:
    """P against D over the steps: a path for each objective from the original (dark dot) to the last step (marker).

    Args:
        evaluations: columns `objective`, `seed`, `step` and those named in `panels`. A thin path for each seed, a
            strong one for their mean.
        panels: one (x, y) of measures for each.
    """
    measures = list(dict.fromkeys(name for panel in panels for name in panel))
    style.require_columns(evaluations, ("objective", "seed", "step", *measures))
    steps = evaluations.sort_values("step", kind="stable")
    means = steps.groupby(["step", "objective"], sort=False)[measures].mean().reset_index()
    first, last = means[means["step"] == means["step"].min()], means.groupby("objective").tail(1)
    names = list(dict.fromkeys(evaluations["objective"]))
    look = {"hue": "objective", "hue_order": names, "palette": style.colours_of(names)}
    path = look | {"estimator": None, "sort": False, "legend": False}
    fig, axes = style.make_panels(len(panels), len(panels), 3.4)
    for ax, (x, y) in zip(axes, panels, strict=True):
        sns.lineplot(steps, x=x, y=y, units="seed", linewidth=0.7, alpha=0.45, ax=ax, **path)
        sns.lineplot(means, x=x, y=y, marker=".", markersize=3, markeredgewidth=0, ax=ax, **path)
        sns.scatterplot(last, x=x, y=y, style="objective", markers={name: style.marker_of(name) for name in names},
                        s=50, zorder=4, ax=ax, **look)  # fmt: skip
        ax.plot(first[x].mean(), first[y].mean(), "o", color=style.INK, label="before", zorder=3, **style.ORIGINAL)
        ax.set(xlabel=f"{style.label_of(x)}, %", ylabel=f"{style.label_of(y)}, %")
        for axis in (ax.xaxis, ax.yaxis):
            low, high = axis.get_view_interval()
            if high - low < LEAST_RANGE:  # else the noise of a few steps would look like a result
                axis.set_view_interval(*((low + high) / 2 + LEAST_RANGE * np.array([-0.5, 0.5])), ignore=True)
            axis.set_major_formatter(style.PERCENT)
    style.move_legend(fig, "outside upper left", 5)
    return style.finish(fig, source)
