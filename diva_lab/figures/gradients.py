"""Figures of gradients: conflict, norms, and probes by timestep."""

from collections.abc import Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from scipy.stats import norm

from diva_lab.figures import style
from diva_lab.statistics import percent


@style.apply
def conflict_histogram(
    cosines: Float[np.ndarray, " n"],
    rate: tuple[float, float, float],
    null: tuple[float, float] | None = None,
    bins: int = 30,
    source: str = "",
) -> Figure:
    """Histogram of cos(g_con, g_rec) over the steps, with the rate of negative ones and the size of the effect.

    Args:
        cosines: one for each step, in -1..1.
        rate: share of negative cosines and its 95 % interval (value, low, high).
        null: mean and standard deviation of the cosines between gradients of unrelated batches: the dashed line, a
            normal curve of the same area.
    """
    mean_null, spread_null = null or (0.0, 0.0)
    reach = 1.05 * max(np.abs(cosines).max(initial=0.01), abs(mean_null) + 3 * spread_null)
    edges = np.linspace(-reach, reach, 2 * (bins // 2) + 1)  # zero is an edge, so no bin has both signs
    fig, ax = plt.subplots(figsize=(style.WIDTH, 3))
    sns.histplot(x=cosines, bins=edges, hue=cosines < 0, palette={True: style.WRONG, False: style.RIGHT}, alpha=1,
                 shrink=0.92, linewidth=0, legend=False, ax=ax)  # fmt: skip
    if null is not None:
        x = np.linspace(-reach, reach, 200)
        heights = len(cosines) * (edges[1] - edges[0]) * norm.pdf(x, mean_null, spread_null)
        ax.plot(x, heights, color=style.INK, linewidth=1, linestyle=(0, (3, 2)), label="null: unrelated batches")
        ax.legend(loc="best")
    mean, spread = float(np.mean(cosines)), float(np.std(cosines, ddof=1)) if len(cosines) > 1 else float("nan")
    ax.axvline(0, color=style.INK, linewidth=0.9)
    ax.axvline(mean, color=style.INK, linewidth=1.3, linestyle=(0, (1, 1.5)))
    ax.set(xlabel="cos(g_con, g_rec)", ylabel="steps", xlim=(-reach, reach))
    share, high = (percent(number, digits=0) for number in (rate[0], rate[2]))
    facts = f"negative in {share} of {len(cosines)} steps\n95 % interval {100 * rate[1]:.0f} to {high}"
    effect = f"mean cosine {mean:+.4f}\neffect size, mean / sd: {mean / spread if spread else np.nan:+.2f}"
    ax.set_title(facts, fontsize=8.5, color=style.WRONG)
    ax.set_title(style.minus_signs(effect), fontsize=8.5, loc="right", fontweight="normal")
    return style.finish(fig, source)


@style.apply
def conflict_over_steps(metrics: pd.DataFrame, window: int = 10, source: str = "") -> Figure:
    """cos(g_con, g_rec) at each `step` (column `cos`), its running mean and, below, the running rate of negatives."""
    style.require_columns(metrics, ("step", "cos"))
    metrics = metrics.sort_values("step")
    fig, axes = plt.subplots(2, 1, figsize=(style.WIDTH, 3.4), sharex=True, height_ratios=(2, 1))
    steps, cosines = metrics["step"], metrics["cos"].to_numpy(float)
    colours = np.where(cosines < 0, style.WRONG, style.RIGHT)
    axes[0].scatter(steps, cosines, s=11, c=colours, alpha=0.6, linewidth=0)
    axes[0].plot(steps, style.running_mean(cosines, window), color=style.INK, label=f"mean of the last {window}")
    axes[0].axhline(0, color=style.INK, linewidth=0.9)
    axes[0].set(ylabel="cos(g_con, g_rec)")
    axes[0].legend(loc="best")
    axes[1].plot(steps, style.running_mean(cosines < 0, window), color=style.WRONG)
    axes[1].axhline(0.5, color=style.GREY, linewidth=0.9, linestyle=(0, (1, 2)))
    axes[1].set(ylabel="negative, %", xlabel="step", ylim=(-0.03, 1.03))
    axes[1].yaxis.set_major_formatter(style.PERCENT)
    return style.finish(fig, source)


@style.apply
def conflict_by_block(metrics: pd.DataFrame, bins: int = 40, source: str = "", of: str = "blocks") -> Figure:
    """Heat map of the cosine, part of the encoder by step (means over at most `bins` stretches of steps).

    On the right, each part's mean over the steps with its 95 % interval (normal, steps taken as independent).

    Args:
        metrics: with columns `cos/<block>` and `cos/kind/<kind>`, drawn in their order, first at the top.
        of: `blocks`, and the gradient in the global embedding (`cos/features`) if there is one, or `kinds` of layer.
    """
    if of not in ("blocks", "kinds"):
        raise ValueError(f"unknown parts {of!r}; expected blocks or kinds")
    parts = [str(name) for name in metrics if str(name).startswith("cos/")]
    parts = [name for name in parts if name.startswith("cos/kind/") == (of == "kinds")]
    style.require_columns(metrics, ("step", *(parts or ["cos/<block>" if of == "blocks" else "cos/kind/<kind>"])))
    cosines = metrics[parts].rename(columns=lambda name: name.split("/")[-1])
    steps = np.unique(metrics["step"])
    firsts = steps[:: -(-len(steps) // bins)]  # the first step of each stretch
    stretches = firsts[np.searchsorted(firsts, metrics["step"], side="right") - 1]
    cells = cosines.groupby(stretches).mean().T  # [parts, stretches]
    reach = max(float(cells.abs().max(axis=None)), 1e-3)
    size = (style.WIDTH, 1.2 + 0.27 * len(parts))
    fig, axes = plt.subplots(1, 2, figsize=size, width_ratios=(3, 1), sharey=True)
    legend = {"location": "top", "shrink": 0.5, "aspect": 30, "pad": 0.02, "label": "cos(g_con, g_rec)"}
    sns.heatmap(cells, cmap=style.DIVERGING, vmin=-reach, vmax=reach, cbar_kws=legend, ax=axes[0])
    mean, half = cosines.mean(), 1.96 * cosines.sem()
    for y, (value, low, high) in enumerate(zip(mean, mean - half, mean + half, strict=True)):
        colour = style.WRONG if high < 0 else style.RIGHT if low > 0 else style.GREY
        style.draw_interval(axes[1], y + 0.5, value, low, high, colour, undecided=colour == style.GREY)
    axes[1].axvline(0, color=style.INK, linewidth=0.9)
    axes[0].set(xlabel="step", ylabel="")
    axes[1].set(xlabel="mean over the steps")
    axes[1].tick_params(labelleft=False)
    return style.finish(fig, source)


def _norm_columns(metrics: pd.DataFrame) -> list[str]:
    return [str(name) for name in metrics if str(name).startswith("norm_")] or ["norm_<term>"]


def _draw_norms(ax: Axes, metrics: pd.DataFrame, window: int) -> None:
    for name in _norm_columns(metrics):
        term = name.removeprefix("norm_")
        colour = style.TERMS.get(term, style.INK)
        style.draw_steps(ax, metrics["step"], metrics[name], window, colour, style.label_of(term))
    ax.set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


@style.apply
def term_norms(metrics: pd.DataFrame, window: int = 10, source: str = "") -> Figure:
    """Norms of the terms' gradients over the steps, from the columns `norm_<term>`, on a logarithmic axis."""
    style.require_columns(metrics, ("step", *_norm_columns(metrics)))
    fig, ax = plt.subplots(figsize=(style.WIDTH, 2.6))
    _draw_norms(ax, metrics.sort_values("step"), window)
    return style.finish(fig, source)


@style.apply
def parts_conflict(metrics: pd.DataFrame, window: int = 5, source: str = "") -> Figure:
    """Cosines among the gradients of more than two terms over the steps, and the norm of each.

    `metrics`: `step`, `norm_<term>` and `<one>~<other>:cos`, as of DCR with `parts`. Each step is a faint line, the
    running mean a strong one. The legend has each pair's mean over all steps.
    """
    pairs = [str(name) for name in metrics if str(name).endswith(":cos")]
    style.require_columns(metrics, ("step", *(pairs or ["<one>~<other>:cos"]), *_norm_columns(metrics)))
    metrics = metrics.sort_values("step")
    fig, axes = plt.subplots(2, 1, figsize=(style.WIDTH, 4.2), sharex=True)
    colours = cycle(style.COLOURS[name] for name in ("dcr", "dcr-guidance", "genhancer", "none"))
    for name, colour in zip(pairs, colours, strict=False):
        label = f"{name.removesuffix(':cos').replace('~', ' ~ ')}, mean {metrics[name].mean():+.2f}"
        style.draw_steps(axes[0], metrics["step"], metrics[name], window, colour, style.minus_signs(label))
    axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes[0].axhline(0, color=style.INK, linewidth=0.9)
    axes[0].set(ylabel="cosine", ylim=(-1.05, 1.05))
    _draw_norms(axes[1], metrics, window)
    return style.finish(fig, source)


def _by_bin(probes: pd.DataFrame, of: str, step: int) -> pd.DataFrame:
    """The measures of one gradient or pair at one step: a row for each bin of timesteps, low noise first."""
    rows = probes[(probes["of"] == of) & (probes["step"] == step) & (probes["bin"].astype(str) != "all")]
    return rows.assign(bin=rows["bin"].astype(int)).pivot(index="bin", columns="measure", values="value")


def _label_bins(axis: Axis, probes: pd.DataFrame) -> None:
    names = [str(k) for k in range(len(set(probes["bin"].astype(str)) - {"all"}))]
    names[0], names[-1] = f"{names[0]}\nlow noise", f"{names[-1]}\nhigh noise"
    axis.set_ticks(range(len(names)), names)
    axis.set_label_text("part of the timesteps")


@style.apply
def cosine_by_timestep(probes: pd.DataFrame, pairs: Sequence[str] = (), source: str = "") -> Figure:
    """Ridgelines: the cosine of a batch's own two gradients for each part of the timesteps, above its null.

    A ridge is the null, a normal curve with the mean and spread of gradients of *different* batches. On its line the
    dot is the mean over batches of the cosine of a batch's *own* two gradients with its 95 % interval, at the last
    probed step (hollow where the interval holds zero); the tick is that mean at the first. The thick bar at zero holds
    95 % of random directions.

    Args:
        probes: one run's records of `analysis.conflict.probe_gradients`: `step`, `bin`, `of`, `measure`, `value`.
        pairs: of objectives, as `a~b`, a panel for each; by default all in `probes`.
    """
    style.require_columns(probes, ("step", "bin", "of", "measure", "value"))
    pairs = list(pairs or dict.fromkeys(name for name in probes["of"] if "~" in str(name)))
    first, last = int(probes["step"].min()), int(probes["step"].max())
    fig, axes = style.make_panels(len(pairs), len(pairs), 3.6, sharey=True)
    for ax, pair in zip(axes, pairs, strict=True):
        one, other = pair.split("~")
        table, colour = _by_bin(probes, pair, last), style.COLOURS.get(one, style.INK)
        ends = pd.concat([table["other"] + k * table["other/sd"] for k in (-3, 3)])
        ends = [0, *ends, *table["cos/low"], *table["cos/high"]]
        x = np.linspace(np.nanmin(ends), np.nanmax(ends), 300)
        for y, row in table.iterrows():
            null = norm.pdf(x, row["other"], max(row["other/sd"], 1e-6))
            ax.fill_between(x, y, y + 0.75 * null / null.max(), color=style.FAINT, linewidth=0, zorder=1)
            random = 1.96 * row["random/sd"]
            ax.plot([-random, random], [y, y], color=style.INK, linewidth=4, solid_capstyle="butt", zorder=2)
            interval = row["cos/low"], row["cos/high"]
            style.draw_interval(ax, y, row["cos"], *interval, colour, undecided=bool(interval[0] <= 0 <= interval[1]))
        if first != last:
            before = _by_bin(probes, pair, first)["cos"]
            ax.plot(before, before.index, "|", color=style.INK, markersize=11, markeredgewidth=1.2)
        ax.axvline(0, color=style.INK, linewidth=0.8)
        ax.set_title(f"{style.label_of(one)} ~ {style.label_of(other)}", fontsize=8.5)
        ax.set(xlabel="cosine")
        ax.grid(False, axis="y")
    _label_bins(axes[0].yaxis, probes)
    return style.finish(fig, source)


@style.apply
def signal_by_timestep(probes: pd.DataFrame, source: str = "") -> Figure:
    """Signal-to-noise ratio of each objective's gradient and its noise scale, for each part of the timesteps.

    Dashed at the first probed step, solid at the last. A ratio below zero means that noise hides the signal; an
    infinite noise scale is left out.

    `probes`: as in `cosine_by_timestep`. The contrast has no timesteps: its line is level.
    """
    style.require_columns(probes, ("step", "bin", "of", "measure", "value"))
    steps = list(dict.fromkeys((probes["step"].max(), probes["step"].min())))
    rows = probes[~probes["of"].str.contains("~") & probes["step"].isin(steps) & np.isfinite(probes["value"])]
    rows = rows[rows["bin"].astype(str) != "all"]
    rows = rows.assign(bin=rows["bin"].astype(int), _of=rows["of"], _step="step " + rows["step"].astype(str))
    look = {"palette": style.colours_of(rows["of"].unique()), "marker": "o", "markersize": 4.5, "markeredgewidth": 0.5}
    fig, axes = style.make_panels(2, 2, 2.9)
    for ax, measure in zip(axes, ("snr", "noise_scale"), strict=True):
        sns.lineplot(rows[rows["measure"] == measure], x="bin", y="value", hue="_of", style="_step",
                     style_order=[f"step {step}" for step in steps], ax=ax, **look)  # fmt: skip
        _label_bins(ax.xaxis, probes)
    axes[0].axhline(0, color=style.INK, linewidth=0.8)
    axes[0].set(ylabel="signal / noise of a batch")
    axes[1].set(ylabel="noise scale, images", yscale="log")
    style.move_legend(fig, "outside upper left", 5)
    return style.finish(fig, source)
