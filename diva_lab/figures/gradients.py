"""Figures of gradients: conflict, norms, and what the probes found by timestep."""

from collections.abc import Sequence
from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from diva_lab.figures.style import (
    COLOURS,
    DIVERGING,
    FAINT,
    GREY,
    INK,
    MARKERS,
    PERCENT,
    RIGHT,
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


def _normal(x: np.ndarray, mean: float, sd: float) -> np.ndarray:
    return np.exp(-(((x - mean) / sd) ** 2) / 2) / (sd * np.sqrt(2 * np.pi))


@styled
def conflict_histogram(
    cosines: Float[np.ndarray, " n"],
    rate: tuple[float, float, float],
    null: tuple[float, float] | None = None,
    bins: int = 30,
    source: str = "",
) -> Figure:
    """Histogram of cos(g_con, g_rec) over the steps, with the rate of negative ones and the size of the effect.

    Args:
        cosines: one a step, in -1..1.
        rate: share of negative cosines and its 95 % interval (value, low, high).
        null: mean and standard deviation of cosines of gradients that have nothing to do with each other (unrelated
            batches): the dashed line, a normal curve of the same area.
    """
    mean_null, spread_null = null or (0.0, 0.0)
    reach = 1.05 * max(np.abs(cosines).max(initial=0.01), abs(mean_null) + 3 * spread_null)
    edges = np.linspace(-reach, reach, 2 * (bins // 2) + 1)  # zero is an edge, so no bin has both signs
    fig, ax = plt.subplots(figsize=(WIDTH, 3))
    counts, _, patches = ax.hist(cosines, edges, rwidth=0.92)
    for patch, left in zip(patches, edges, strict=False):
        patch.set_facecolor(WRONG if left + 1e-12 < 0 else RIGHT)
    top = counts.max()
    if null is not None:
        places = np.linspace(-reach, reach, 200)
        heights = len(cosines) * (edges[1] - edges[0]) * _normal(places, mean_null, spread_null)
        top = max(top, heights.max())
        ax.plot(places, heights, color=INK, linewidth=1, linestyle=(0, (3, 2)), label="null: unrelated batches")
        ax.legend(loc="best")
    mean, spread = float(np.mean(cosines)), float(np.std(cosines, ddof=1)) if len(cosines) > 1 else float("nan")
    ax.axvline(0, color=INK, linewidth=0.9)
    ax.axvline(mean, color=INK, linewidth=1.3, linestyle=(0, (1, 1.5)))
    ax.set(xlabel="cos(g_con, g_rec)", ylabel="steps", xlim=(-reach, reach), ylim=(0, 1.05 * max(top, 1)))
    value, low, high = (100 * number for number in rate)
    facts = f"negative in {value:.0f} % of {len(cosines)} steps\n95 % interval {low:.0f} to {high:.0f} %"
    size = true_minus(f"mean cosine {mean:+.4f}\neffect size, mean / sd: {mean / spread if spread else np.nan:+.2f}")
    ax.set_title(facts, fontsize=8.5, color=WRONG)
    ax.set_title(size, fontsize=8.5, loc="right", fontweight="normal")
    return finish(fig, source)


@styled
def conflict_over_steps(metrics: pd.DataFrame, window: int = 10, source: str = "") -> Figure:
    """cos(g_con, g_rec) at each `step` (column `cos`), its running mean and, below, the running rate of negatives."""
    need_columns(metrics, ("step", "cos"))
    metrics = metrics.sort_values("step")
    fig, axes = plt.subplots(2, 1, figsize=(WIDTH, 3.4), sharex=True, height_ratios=(2, 1))
    cosines = metrics["cos"].to_numpy(float)
    axes[0].scatter(metrics["step"], cosines, s=11, c=np.where(cosines < 0, WRONG, RIGHT), alpha=0.6, linewidth=0)
    axes[0].plot(metrics["step"], running_mean(cosines, window), color=INK, label=f"mean of the last {window}")
    axes[0].axhline(0, color=INK, linewidth=0.9)
    axes[0].set(ylabel="cos(g_con, g_rec)")
    axes[0].legend(loc="best")
    axes[1].plot(metrics["step"], running_mean(cosines < 0, window), color=WRONG)
    axes[1].axhline(0.5, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
    axes[1].set(ylabel="negative, %", xlabel="step", ylim=(-0.03, 1.03))
    axes[1].yaxis.set_major_formatter(PERCENT)
    return finish(fig, source)


@styled
def conflict_by_block(metrics: pd.DataFrame, bins: int = 40, source: str = "", of: str = "blocks") -> Figure:
    """Heat map of the cosine, part of the encoder by step (means over at most `bins` stretches of steps).

    On the right, each part's mean over the steps with its 95 % interval (normal, steps taken as independent).

    Args:
        metrics: with columns `cos/<block>` and `cos/kind/<kind>`, drawn in their order, first at the top.
        of: `blocks`, with the gradient in the global embedding (`cos/features`) where it is there, or `kinds` of layer.
    """
    if of not in ("blocks", "kinds"):
        raise ValueError(f"unknown parts {of!r}; expected blocks or kinds")
    parts = [str(name) for name in metrics if str(name).startswith("cos/")]
    blocks = [name for name in parts if name.startswith("cos/kind/") == (of == "kinds")]
    need_columns(metrics, ("step", *(blocks or ["cos/<block>" if of == "blocks" else "cos/kind/<kind>"])))
    metrics = metrics.sort_values("step")
    edges = np.linspace(0, len(metrics), min(bins, len(metrics)) + 1).astype(int)
    values = metrics[blocks].to_numpy(float)  # [steps, blocks]
    cells = np.stack([np.nanmean(values[a:b], axis=0) for a, b in pairwise(edges)], axis=1)
    reach = max(float(np.nanmax(np.abs(cells))), 1e-3)
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 1.2 + 0.27 * len(blocks)), width_ratios=(3, 1), sharey=True)
    first, last = metrics["step"].iloc[0] - 0.5, metrics["step"].iloc[-1] + 0.5
    image = axes[0].imshow(cells, aspect="auto", cmap=DIVERGING, vmin=-reach, vmax=reach, interpolation="nearest",
                           extent=(first, last, len(blocks) - 0.5, -0.5))  # fmt: skip
    axes[0].set(xlabel="step")
    axes[0].set_yticks(range(len(blocks)), [name.split("/")[-1] for name in blocks])
    axes[0].grid(False)
    bar = fig.colorbar(image, ax=axes[0], location="top", shrink=0.5, aspect=30, pad=0.02)
    bar.set_label("cos(g_con, g_rec)", fontsize=8)
    bar.outline.set_visible(False)
    mean, error = np.nanmean(values, axis=0), 1.96 * np.nanstd(values, axis=0, ddof=1) / np.sqrt(len(values))
    for y, (value, half) in enumerate(zip(mean, error, strict=True)):
        colour = WRONG if value + half < 0 else RIGHT if value - half > 0 else GREY
        axes[1].errorbar(value, y, xerr=half, fmt="o", color=colour, markersize=4.5, elinewidth=1.3)
    axes[1].axvline(0, color=INK, linewidth=0.9)
    axes[1].set(xlabel="mean over the steps")
    axes[1].tick_params(labelleft=False)
    return finish(fig, source)


@styled
def term_norms(metrics: pd.DataFrame, window: int = 10, source: str = "") -> Figure:
    """Norms of the terms' gradients over the steps, from the columns `norm_<term>`, on a logarithmic axis."""
    norms = [name for name in metrics if str(name).startswith("norm_")]
    need_columns(metrics, ("step", *(norms or ["norm_<term>"])))
    metrics = metrics.sort_values("step")
    fig, ax = plt.subplots(figsize=(WIDTH, 2.6))
    for name in norms:
        term = str(name).removeprefix("norm_")
        colour = COLOURS[TERMS.get(term, "none")]
        ax.plot(metrics["step"], metrics[name], color=colour, linewidth=0.7, alpha=0.35)
        ax.plot(metrics["step"], running_mean(metrics[name], window), color=colour)
        ax.annotate(label_of(term), (1, metrics[name].tail(window).mean()), (5, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", color=colour, va="center", fontsize=8.5)  # fmt: skip
    ax.set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    return finish(fig, source)


@styled
def parts_conflict(metrics: pd.DataFrame, window: int = 5, source: str = "") -> Figure:
    """Cosines among the gradients of more than two terms over the steps, and the norm of each.

    `metrics`: `step`, `norm_<term>` and `<one>~<other>:cos`, as of DCR with `parts`. Each step faint, the running mean
    strong; beside the first panel each pair's mean over all steps.
    """
    pairs = [str(name) for name in metrics if str(name).endswith(":cos")]
    norms = [str(name) for name in metrics if str(name).startswith("norm_")]
    need_columns(metrics, ("step", *(pairs or ["<one>~<other>:cos"]), *(norms or ["norm_<term>"])))
    metrics = metrics.sort_values("step")
    fig, axes = plt.subplots(2, 1, figsize=(WIDTH, 4.2), sharex=True)
    spare = [COLOURS[name] for name in ("dcr", "dcr-guidance", "genhancer", "none")]
    drawn = [(axes[0], name, spare[k % len(spare)], " ~ ".join(name.removesuffix(":cos").split("~")))
             for k, name in enumerate(pairs)]  # fmt: skip
    for name in norms:
        term = name.removeprefix("norm_")
        drawn.append((axes[1], name, COLOURS[TERMS.get(term, "none")], label_of(term)))
    for ax, name, colour, text in drawn:
        ax.plot(metrics["step"], metrics[name], color=colour, linewidth=0.7, alpha=0.4)
        said = f"{text}, mean {metrics[name].mean():+.2f}" if ax is axes[0] else text
        ax.plot(metrics["step"], running_mean(metrics[name], window), color=colour, label=true_minus(said))
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes[0].axhline(0, color=INK, linewidth=0.9)
    axes[0].set(ylabel="cosine", ylim=(-1.05, 1.05))
    axes[1].set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    return finish(fig, source)


def _probed(probes: pd.DataFrame, of: str, measure: str, step: int) -> pd.Series:
    """A measure by bin of timesteps, `all` left out, low noise first."""
    rows = probes[(probes["of"] == of) & (probes["measure"] == measure) & (probes["step"] == step)]
    rows = rows[rows["bin"].astype(str) != "all"]
    return rows.set_index(rows["bin"].astype(int))["value"].sort_index()


def _noise_axis(axis: mpl.axis.Axis, bins: int) -> None:
    names = [str(k) for k in range(bins)]
    names[0], names[-1] = f"{names[0]}\nlow noise", f"{names[-1]}\nhigh noise"
    axis.set_ticks(range(bins), names)


@styled
def cosine_by_timestep(probes: pd.DataFrame, pairs: Sequence[str] = (), source: str = "") -> Figure:
    """Ridgelines: what a batch's own two gradients have in common, part of the timesteps by part, above its null.

    A ridge is the null, a normal curve of the mean and spread of gradients of *different* batches; on its line the dot
    is the mean over batches of a batch's *own* two gradients with its 95 % interval, at the last probed step, the ring
    at the first. The thick bar at zero holds 95 % of random directions.

    Args:
        probes: one run's records of `diva_lab.evaluation.conflict.probe`: `step`, `bin`, `of`, `measure`, `value`.
        pairs: of objectives, as `a~b`; by default all that are there. A panel each.
    """
    need_columns(probes, ("step", "bin", "of", "measure", "value"))
    pairs = list(pairs or dict.fromkeys(name for name in probes["of"] if "~" in str(name)))
    first, last = int(probes["step"].min()), int(probes["step"].max())
    fig, axes = plt.subplots(1, len(pairs), figsize=(WIDTH, 3.6), squeeze=False, sharey=True)
    for ax, pair in zip(axes[0], pairs, strict=True):
        found = {m: _probed(probes, pair, m, last)
                 for m in ("cos", "cos/low", "cos/high", "other", "other/sd", "random/sd")}  # fmt: skip
        begun = _probed(probes, pair, "cos", first)
        colour = COLOURS.get(pair.split("~")[0], INK)
        ends = pd.concat([found["cos/low"], found["cos/high"], found["other"] - 3 * found["other/sd"],
                          found["other"] + 3 * found["other/sd"], pd.Series([0.0])])  # fmt: skip
        x = np.linspace(ends.min(), ends.max(), 300)
        for k in found["cos"].index:
            null = _normal(x, found["other"][k], max(found["other/sd"][k], 1e-6))
            ax.fill_between(x, k, k + 0.75 * null / null.max(), color=FAINT, linewidth=0, zorder=1)
            wide = 1.96 * found["random/sd"][k]
            ax.plot([-wide, wide], [k, k], color=INK, linewidth=4, solid_capstyle="butt", zorder=2)
            ax.plot([found["cos/low"][k], found["cos/high"][k]], [k, k], color=colour, zorder=3)
            clear = found["cos/low"][k] > 0 or found["cos/high"][k] < 0
            ax.plot(found["cos"][k], k, "o", color=colour, markersize=6, zorder=4,
                    markerfacecolor=colour if clear else "white")  # fmt: skip
            if k in begun.index and first != last:
                ax.plot(begun[k], k, "o", color=INK, markersize=9, markerfacecolor="none", markeredgewidth=0.7)
        ax.axvline(0, color=INK, linewidth=0.8)
        one, other = pair.split("~")
        ax.set_title(f"{label_of(one)} ~ {label_of(other)}", fontsize=8.5)
        ax.set(xlabel="cosine")
        ax.grid(False, axis="y")
    _noise_axis(axes[0, 0].yaxis, len(set(probes["bin"].astype(str)) - {"all"}))
    axes[0, 0].set(ylabel="part of the timesteps")
    return finish(fig, source)


@styled
def signal_by_timestep(probes: pd.DataFrame, source: str = "") -> Figure:
    """Signal-to-noise ratio of each objective's gradient and its noise scale, part of the timesteps by part.

    Dashed at the first probed step, solid at the last. A ratio below zero is one whose signal noise has swallowed; an
    infinite noise scale is left out.

    `probes`: as in `cosine_by_timestep`. The contrast has no timesteps: its line is level.
    """
    need_columns(probes, ("step", "bin", "of", "measure", "value"))
    names = list(dict.fromkeys(name for name in probes["of"] if "~" not in str(name)))
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.9))
    steps = dict.fromkeys((int(probes["step"].min()), int(probes["step"].max())))
    for ax, measure in zip(axes, ("snr", "noise_scale"), strict=True):
        for name, colour in colours_of(names).items():
            for step, dashes in zip(reversed(steps), ("solid", (0, (3, 2))), strict=False):
                values = _probed(probes, name, measure, step).replace([np.inf, -np.inf], np.nan)
                ax.plot(values.index, values, color=colour, linestyle=dashes, marker=MARKERS.get(name, "o"),
                        markersize=4.5, markeredgecolor="white", markeredgewidth=0.5,
                        label=f"{label_of(name)}, step {step}")  # fmt: skip
        _noise_axis(ax.xaxis, len(set(probes["bin"].astype(str)) - {"all"}))
        ax.set(xlabel="part of the timesteps")
    axes[0].axhline(0, color=INK, linewidth=0.8)
    axes[0].set(ylabel="signal / noise of a batch")
    axes[1].set(ylabel="noise scale, pictures", yscale="log")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return finish(fig, source)
