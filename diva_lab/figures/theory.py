"""Figures of DCR's two theorems and of its additive bias."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from diva_lab.figures.style import (
    COLOURS,
    DIVERGING,
    GREY,
    INK,
    MARKERS,
    WIDTH,
    WRONG,
    finish,
    label_of,
    need_columns,
    styled,
)


@styled
def theorem_bounds(record: pd.DataFrame, source: str = "") -> Figure:
    """Theorem 1 over the steps of training: each bound over what it bounds, a column a timestep.

    Args:
        record: columns `objective`, `step`, `t`, `constants` (`extremes` drawn through, others dashed) and
            `inner_slack`, `inter_slack`, each with `/low` and `/high`: of `evaluation.theory.theorem_1`.
    """
    sides = {"inner_slack": "bound / S_inner", "inter_slack": "bound / S_inter"}
    ends = [f"{side}/{end}" for side in sides for end in ("low", "high")]
    need_columns(record, ("objective", "step", "t", "constants", *sides, *ends))
    timesteps, kinds = (list(dict.fromkeys(record[name])) for name in ("t", "constants"))
    fig, axes = plt.subplots(2, len(timesteps), figsize=(WIDTH, 4.2), sharex=True, sharey="row", squeeze=False)
    for (_, column), (side, label) in [((i, t), item) for i, t in enumerate(timesteps) for item in sides.items()]:
        ax = axes[list(sides).index(side), timesteps.index(column)]
        for (name, kind), rows in record[record["t"] == column].groupby(["objective", "constants"], sort=False):
            rows, first = rows.sort_values("step"), kind == kinds[0]
            ax.fill_between(rows["step"], rows[f"{side}/low"], rows[f"{side}/high"], color=COLOURS[name], alpha=0.13,
                            linewidth=0)  # fmt: skip
            ax.plot(rows["step"], rows[side], color=COLOURS[name], marker=MARKERS[name], markersize=4, linewidth=1.2,
                    linestyle="-" if first else (0, (3, 2)), label=label_of(name) if first else None)  # fmt: skip
        ax.axhline(1, color=INK, linewidth=0.9)
        if side == "inner_slack":
            ax.set_title(f"t = {column}")
        else:
            ax.axhline(0, color=WRONG, linewidth=0.9)
            ax.set_xlabel("step")
        if column == timesteps[0]:
            ax.set_ylabel(label)
    lowest = axes[1, 0].get_ylim()[0]
    for ax in axes[1]:
        ax.axhspan(lowest, 0, color=WRONG, alpha=0.07, linewidth=0)
    axes[1, 0].set_ylim(lowest, 1.15)
    axes[0, 0].set_yscale("log")
    axes[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0, 0].yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value in (2, 5) else ""))
    for ax, text, y in ((axes[0, 0], "equal", 1), (axes[1, 0], "equal", 1), (axes[1, -1], "says nothing", lowest)):
        ax.annotate(text, (1, y), (-2, -2 if y == 1 else 3), xycoords=("axes fraction", "data"), fontsize=6.5,
                    textcoords="offset points", color=GREY if y == 1 else WRONG, ha="right",
                    va="top" if y == 1 else "bottom")  # fmt: skip
    axes[0, 0].set_ylim(bottom=0.85)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    styles = " · ".join(f"{kind}: {style}" for kind, style in zip(kinds, ("line", "dashes"), strict=False))
    fig.text(0.01, 0.975, f"m and M from {styles}", fontsize=7.5, color=GREY)
    return finish(fig, source)


@styled
def affine_range(record: pd.DataFrame, limit: float | None = None, source: str = "") -> Figure:
    """Theorem 2: how straight DCR's loss is in the reconstruction error, and how steep, as its negatives part.

    Args:
        record: columns `denominator`, `view`, `negatives`, `cosine`, `t`, and `r2` and `slope` with `/low` and
            `/high`: of `evaluation.theory.theorem_2`, one distance. Negatives that are not `turned` are a point each.
        limit: the slope where negatives make up the denominator.
    """
    rows = {"r2": "1 − R² of the line", "slope": "slope"}
    ends = [f"{name}/{end}" for name in rows for end in ("low", "high")]
    need_columns(record, ("denominator", "view", "negatives", "cosine", "t", *rows, *ends))
    panels = [(d, v) for v in dict.fromkeys(record["view"]) for d in dict.fromkeys(record["denominator"])]
    timesteps = list(dict.fromkeys(record["t"]))
    shades = dict(zip(timesteps, plt.get_cmap("viridis")(np.linspace(0.05, 0.85, len(timesteps))), strict=True))
    fig, axes = plt.subplots(2, len(panels), figsize=(WIDTH, 4), sharex=True, sharey="row", squeeze=False)
    for column, (denominator, view) in enumerate(panels):
        part = record[(record["denominator"] == denominator) & (record["view"] == view)]
        for ax, (measure, label) in zip(axes[:, column], rows.items(), strict=True):
            for t, each in part.groupby("t", sort=False):
                if measure == "r2":
                    bent = 1 - each[[measure, *ends[:2]]]
                    each = each.assign(**bent.clip(lower=1e-6))
                turned = each[each["negatives"] == "turned"].sort_values("cosine")
                ax.fill_between(turned["cosine"], turned[f"{measure}/low"], turned[f"{measure}/high"], color=shades[t],
                                alpha=0.15, linewidth=0)  # fmt: skip
                ax.plot(turned["cosine"], turned[measure], color=shades[t], linewidth=1.3, label=f"t = {t}")
                still = each[each["negatives"] != "turned"]
                ax.plot(still["cosine"], still[measure], "o", color=shades[t], markerfacecolor="white", markersize=4.5)
            if column == 0:
                ax.set_ylabel(label)
        axes[0, column].axhline(0.01, color=WRONG, linewidth=0.9, linestyle=(0, (3, 2)))
        axes[0, column].set_title(f"{denominator} denominator\nview {view}", fontsize=8.5)
        axes[1, column].set(xlabel="negatives' cosine")
        if limit is not None:
            axes[1, column].axhline(limit, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    axes[0, 0].annotate("R² = .99", (0, 0.01), (2, -2), xycoords=("axes fraction", "data"), textcoords="offset points",
                        fontsize=7, color=WRONG, va="top")  # fmt: skip
    if limit is not None:
        axes[1, 0].annotate("1 / 4τ", (0, limit), (2, 2), xycoords=("axes fraction", "data"), fontsize=7, color=INK,
                            textcoords="offset points")  # fmt: skip
    axes[0, 0].set(yscale="log", ylim=(7e-7, 1.3))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=len(timesteps))
    return finish(fig, source)


@styled
def message_maps(maps: Mapping[str, Float[np.ndarray, "h w c"]], channels: int = 6, source: str = "") -> Figure:
    """How a layer's messages under two conditions differ at each position: a row a condition, a column a channel.

    The channels are those of the first map's largest mean difference; titles say the standard deviation over positions.
    """
    first = next(iter(maps.values()))
    shown = np.argsort(-np.abs(first.mean((0, 1))), kind="stable")[:channels]
    fig, axes = plt.subplots(len(maps), len(shown), figsize=(WIDTH, 0.4 + 1.35 * len(maps)), squeeze=False)
    reach = max(float(np.abs(values[..., shown]).max()) for values in maps.values())
    for row, (name, values) in zip(axes, maps.items(), strict=True):
        for ax, channel in zip(row, shown, strict=True):
            ax.imshow(values[..., channel], cmap=DIVERGING, vmin=-reach, vmax=reach, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            spread = float(values[..., channel].std())
            ax.set_title(f"sd {spread:.2g}" if spread > 1e-9 else "sd 0", fontsize=7.5, fontweight="normal")
        row[0].set_ylabel(label_of(name))
    return finish(fig, source)
