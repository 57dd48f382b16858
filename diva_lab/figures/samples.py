"""Figures of images: grids, minimal pairs with their similarities, and what the denoiser draws."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diva_lab.figures.style import (
    CIRCLED,
    GREY,
    INK,
    PERCENT,
    RIGHT,
    WIDTH,
    WRONG,
    draw_image,
    finish,
    label_of,
    need_columns,
    styled,
    true_minus,
)
from diva_lab.world import PATTERNS


@styled
def image_grid(
    images: UInt8[np.ndarray, "n h w 3"],
    captions: Sequence[str],
    columns: int = 6,
    title: str = "",
    source: str = "",
) -> Figure:
    """Pictures in rows of `columns`, each over its caption. ValueError if the counts differ."""
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images, but {len(captions)} captions")
    width = int(110 / columns)
    texts = ["\n".join(textwrap.wrap(text, width)) for text in captions]
    rows, lines = -(-len(images) // columns), max((text.count("\n") + 1 for text in texts), default=1)
    side = WIDTH / columns
    fig, axes = plt.subplots(rows, columns, squeeze=False, figsize=(WIDTH, rows * (0.93 * side + 0.11 * lines + 0.06)))
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, pixels, text in zip(axes.flat, images, texts, strict=False):
        ax.set_axis_on()
        draw_image(ax, pixels)
        ax.set_xlabel(text, fontsize=6.5, linespacing=1.1, labelpad=2)
    if title:
        fig.suptitle(title, x=0.005, ha="left", fontsize=9.5, fontweight="bold")
    return finish(fig, source)


@styled
def minimal_pairs(
    pairs: pd.DataFrame,
    images: UInt8[np.ndarray, "n 2 h w 3"],
    scores: Mapping[str, pd.DataFrame],
    source: str = "",
) -> Figure:
    """Minimal pairs with what each encoder makes of them: the four similarities and a verdict on each statement.

    The coloured cell of a row is the image chosen for that row's statement, by MMVP's rule (a tie chooses image 2);
    a pair counts, and has the large tick, if both are right.

    Args:
        pairs: one row a pair: `pattern`, `statement_1`, `statement_2`, as `read_pairs` gives them.
        images: the pictures of those pairs, in the same order.
        scores: encoder -> the same pairs, in the same order, with the cosines `t1i1`, `t1i2`, `t2i1`, `t2i2` of text
            and image, as `score_pairs` gives them.
    """
    need_columns(pairs, ("pattern", "statement_1", "statement_2"))
    for name, table in scores.items():
        need_columns(table, ("t1i1", "t1i2", "t2i1", "t2i2"))
        if not len(pairs) == len(images) == len(table):
            raise ValueError(f"{len(pairs)} pairs, {len(images)} of images and {len(table)} scored by {name}")
    fig, axes = plt.subplots(
        len(pairs),
        3 + len(scores),
        squeeze=False,
        figsize=(WIDTH, 0.35 + 0.86 * len(pairs)),
        gridspec_kw={"width_ratios": [2.15, 0.8, 0.8, *[1.55] * len(scores)]},
    )
    fig.get_layout_engine().set(w_pad=0.03, h_pad=0.03, hspace=0, wspace=0)
    counted = dict.fromkeys(scores, 0)
    for k, row in enumerate(axes):
        said = pairs.iloc[k]
        row[0].set_axis_off()
        row[0].text(0, 0.8, said["pattern"], fontsize=8, fontweight="bold", va="center")
        for i in (1, 2):
            text = "\n".join(textwrap.wrap(said[f"statement_{i}"], 36))
            row[0].text(0, 0.8 - 0.3 * i, f"{CIRCLED[i]} {text}", fontsize=7.5, va="center")
            draw_image(row[i], images[k, i - 1])
        for ax, (name, table) in zip(row[3:], scores.items(), strict=True):
            counted[name] += _verdict(ax, table.iloc[k])
    for i in (1, 2):
        axes[0, i].set_title(f"image {CIRCLED[i]}", fontsize=8, loc="center", fontweight="normal")
    for ax, (name, count) in zip(axes[0, 3:], counted.items(), strict=True):
        ax.set_title(f"{label_of(name)}: {count} of {len(pairs)}", fontsize=8, loc="center")
    return finish(fig, source)


def _verdict(ax: Axes, cosines: pd.Series) -> bool:
    """A 2 x 2 table, texts down and images across, the chosen cells coloured, with ticks; whether the pair counts."""
    ax.set(xlim=(-0.75, 3), ylim=(2.1, -0.1))
    ax.set_axis_off()
    verdicts = []
    for i in (1, 2):
        chosen = 1 if cosines[f"t{i}i1"] > cosines[f"t{i}i2"] else 2
        verdicts.append(chosen == i)
        colour, y = (RIGHT if chosen == i else WRONG), i - 0.5
        ax.text(-0.2, y, CIRCLED[i], ha="center", va="center", fontsize=7.5, color=GREY)
        for j in (1, 2):
            face, ink = (colour, "white") if j == chosen else ("#F1F2F4", GREY)
            ax.add_patch(plt.Rectangle((j - 0.97, i - 0.96), 0.94, 0.92, linewidth=0, facecolor=face))
            number = true_minus(f"{cosines[f't{i}i{j}']:.3f}")
            ax.text(j - 0.5, y, number, ha="center", va="center", fontsize=7, color=ink)
        ax.text(2.35, y, "✓" if chosen == i else "✗", ha="center", va="center", fontsize=11, color=colour)
    if all(verdicts):
        ax.text(2.78, 1, "✓", ha="center", va="center", fontsize=15, color=RIGHT, fontweight="bold", gid="counts")
    return all(verdicts)


@styled
def drawn_attributes(quality: pd.DataFrame, wanted: Mapping[str, float] | None = None, source: str = "") -> Figure:
    """Share of the denoiser's samples in which a classifier reads the value that the prompt asked for.

    Args:
        quality: one row an attribute: `attribute`, `share`, `low`, `high` (95 %), `n` samples.
        wanted: attribute -> the least share asked of the model, drawn as a bar.
    """
    need_columns(quality, ("attribute", "share", "low", "high", "n"))
    fig, ax = plt.subplots(figsize=(WIDTH, 0.75 + 0.24 * len(quality)))
    y = np.arange(len(quality))
    error = np.abs(np.stack([quality["share"] - quality["low"], quality["high"] - quality["share"]]))
    ax.errorbar(quality["share"], y, xerr=error, fmt="o", color=RIGHT, markersize=5, elinewidth=1.3,
                markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    if wanted is not None:
        least = quality["attribute"].map(wanted).to_numpy(float)
        ax.vlines(least, y - 0.34, y + 0.34, color=INK, linewidth=2.4, label="asked of the model")
        fig.legend(loc="outside upper right")
    for row, share in zip(y, quality["share"], strict=True):
        ax.annotate(f"{100 * share:.0f}", (1, row), (4, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", fontsize=8, va="center")  # fmt: skip
    ax.set(xlim=(-0.01, 1.01), ylim=(len(quality) - 0.4, -0.6), xlabel="samples with the value asked for, %")
    ax.set_yticks(y, [PATTERNS.get(name, name) for name in quality["attribute"]])
    ax.xaxis.set_major_formatter(PERCENT)
    ax.grid(False, axis="y")
    return finish(fig, source)
