"""Figures of DCR's two theorems and of its additive bias."""

from collections.abc import Mapping
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from diva_lab.figures import style


@style.apply
def theorem_bounds(record: pd.DataFrame, source: str = "") -> Figure:
    """Theorem 1 over the steps of training: each bound divided by what it bounds, a column for each timestep.

    Args:
        record: columns `objective`, `step`, `t`, `constants` (the first one solid, the second dashed) and
            `inner_slack`, `inter_slack`, each with `/low` and `/high`: of `analysis.theory.theorem_1`.
    """
    sides = {"inner_slack": "bound / S_inner", "inter_slack": "bound / S_inter"}
    ends = [f"{side}/{end}" for side in sides for end in ("low", "high")]
    style.require_columns(record, ("objective", "step", "t", "constants", *sides, *ends))
    record = record.assign(_of=record["objective"], _kind="m, M: " + record["constants"])  # "_": no title in the legend
    timesteps, kinds = (list(dict.fromkeys(record[name])) for name in ("t", "_kind"))
    fig, axes = plt.subplots(2, len(timesteps), figsize=(style.WIDTH, 4.2), sharex=True, sharey="row", squeeze=False)
    for row, (side, label) in zip(axes, sides.items(), strict=True):
        for ax, t in zip(row, timesteps, strict=True):
            rows = style.with_intervals(record[record["t"] == t], side)
            sns.lineplot(rows, x="step", y=side, hue="_of", style="_kind", style_order=kinds, palette=style.COLOURS,
                         linewidth=1.2, marker="o", markersize=4, markeredgewidth=0, ax=ax, **style.BANDS)  # fmt: skip
            ax.axhline(1, color=style.INK, linewidth=0.9, label="equal")
            ax.set_ylabel(label)
    lowest = axes[1, 0].get_ylim()[0]
    for (above, below), t in zip(axes.T, timesteps, strict=True):
        above.set_title(f"t = {t}")
        below.axhline(0, color=style.WRONG, linewidth=0.9)
        below.axhspan(lowest, 0, color=style.WRONG, alpha=0.07, linewidth=0, label="says nothing")
    axes[1, 0].set_ylim(lowest, 1.15)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylim(bottom=0.85)
    axes[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_formatter(NullFormatter())
    style.move_legend(fig)
    return style.finish(fig, source)


@style.apply
def affine_range(record: pd.DataFrame, limit: float | None = None, source: str = "") -> Figure:
    """Theorem 2: the straight line through DCR's loss against the reconstruction error, by the negatives' cosine.

    Above, the share of variance that the line leaves; below, its slope.

    Args:
        record: columns `denominator`, `view`, `negatives`, `cosine`, `t`, and `r2` and `slope` with `/low` and
            `/high`: of `analysis.theory.theorem_2`, one distance. Negatives that are not `turned` are a diamond each.
        limit: the slope in the limit where the negatives make up the whole denominator.
    """
    measures = {"r2": "1 − R² of the line", "slope": "slope"}
    ends = [f"{name}/{end}" for name in measures for end in ("low", "high")]
    style.require_columns(record, ("denominator", "view", "negatives", "cosine", "t", *measures, *ends))
    bent = (1 - record[["r2", "r2/low", "r2/high"]]).clip(lower=1e-6)
    record = record.assign(**bent, t="t = " + record["t"].astype(str))
    timesteps = list(dict.fromkeys(record["t"]))
    shades = dict(zip(timesteps, sns.color_palette("viridis", len(timesteps)).as_hex(), strict=True))
    panels = list(product(dict.fromkeys(record["view"]), dict.fromkeys(record["denominator"])))
    fig, axes = plt.subplots(2, len(panels), figsize=(style.WIDTH, 4), sharex=True, sharey="row", squeeze=False)
    for column, (view, denominator) in zip(axes.T, panels, strict=True):
        part = record[(record["view"] == view) & (record["denominator"] == denominator)]
        turned, others = part[part["negatives"] == "turned"], part[part["negatives"] != "turned"]
        for ax, (measure, label) in zip(column, measures.items(), strict=True):
            sns.lineplot(style.with_intervals(turned, measure), x="cosine", y=measure, hue="t", palette=shades,
                         linewidth=1.3, ax=ax, **style.BANDS)  # fmt: skip
            ax.scatter(others["cosine"], others[measure], s=16, c=others["t"].map(shades), marker="D", zorder=3)
            ax.set(xlabel="negatives' cosine", ylabel=label)
        column[0].axhline(0.01, color=style.WRONG, linewidth=0.9, linestyle=(0, (3, 2)), label="R² = .99")
        column[0].set_title(f"{denominator} denominator\nview {view}", fontsize=8.5)
        if limit is not None:
            column[1].axhline(limit, color=style.INK, linewidth=0.9, linestyle=(0, (3, 2)), label="1 / 4τ")
    axes[0, 0].set(yscale="log", ylim=(7e-7, 1.3))
    style.move_legend(fig, columns=len(timesteps) + 2)
    return style.finish(fig, source)


@style.apply
def message_maps(maps: Mapping[str, Float[np.ndarray, "h w c"]], channels: int = 6, source: str = "") -> Figure:
    """The difference of a layer's messages for two images at each position: a row for each kind of condition.

    The channels, a column for each, are those of the first map's largest mean difference. The titles are standard
    deviations over the positions.
    """
    strongest = np.argsort(-np.abs(next(iter(maps.values())).mean((0, 1))), kind="stable")[:channels]
    fig, axes = style.make_panels(len(maps) * len(strongest), len(strongest), 0.4 + 1.35 * len(maps))
    reach = max(float(np.abs(values[..., strongest]).max()) for values in maps.values())
    for ax, ((name, values), channel) in zip(axes, product(maps.items(), strongest), strict=True):
        style.draw_image(ax, values[..., channel], cmap=style.DIVERGING, vmin=-reach, vmax=reach)
        spread = float(values[..., channel].std())
        ax.set_title(f"sd {spread:.2g}" if spread > 1e-9 else "sd 0", fontsize=7.5, fontweight="normal")
        ax.set_ylabel(style.label_of(name) if channel == strongest[0] else "")
    return style.finish(fig, source)
