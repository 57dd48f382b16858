"""Figures of images: grids, minimal pairs with their similarities, and how well the denoiser draws each attribute."""

import textwrap
from collections.abc import Mapping, Sequence
from math import isqrt

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diva_lab.figures import style
from diva_lab.statistics import paired_t, percent

CIRCLED = {1: "①", 2: "②"}


@style.apply
def image_grid(
    images: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str], columns: int = 6, title: str = "", source: str = ""
) -> Figure:
    """Images in rows, each over its caption.

    Raises:
        ValueError: if the counts differ.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images, but {len(captions)} captions")
    texts = ["\n".join(textwrap.wrap(style.shorten(text), int(110 / columns))) for text in captions]
    rows, lines = -(-len(images) // columns), max((text.count("\n") + 1 for text in texts), default=1)
    height = rows * (0.93 * style.WIDTH / columns + 0.11 * lines + 0.06)
    fig, axes = style.make_panels(len(images), columns, height)
    for ax, pixels, text in zip(axes, images, texts, strict=True):
        style.draw_image(ax, pixels)
        ax.set_xlabel(text, fontsize=6.5, linespacing=1.1, labelpad=2)
    if title:
        fig.suptitle(style.shorten(title), x=0.005, ha="left", fontsize=9.5, fontweight="bold")
    return style.finish(fig, source)


@style.apply
def patch_maps(
    images: UInt8[np.ndarray, "n k h w 3"], maps: Mapping[str, Shaped[np.ndarray, "_ _ _"]], source: str = ""
) -> Figure:
    """A row for each of n groups of k images (a pair, or one image), with maps of it beside: before and after.

    Args:
        maps: title -> a map of each group: of numbers from 0 on, the darker the larger, all on one scale; or of whole
            numbers or true and false, as masks are, a colour for each.

    Raises:
        ValueError: if there are not as many maps as groups.
    """
    for title, each in maps.items():
        if len(each) != len(images):
            raise ValueError(f"{len(images)} groups of images, but {len(each)} maps of {title!r}")
    columns = images.shape[1] + len(maps)
    fig, axes = style.make_panels(len(images) * columns, columns, 0.97 * style.WIDTH / columns * len(images) + 0.2)
    scales = [each.max() for each in maps.values() if each.dtype.kind == "f"]
    sequential = {"cmap": "Blues", "vmin": 0, "vmax": max(scales, default=1)}
    classes = {"cmap": "tab20", "vmin": 0, "vmax": 19}
    for row, (group, ax) in enumerate(zip(images, np.array(axes).reshape(-1, columns), strict=True)):
        for place, pixels in zip(ax, group, strict=False):
            style.draw_image(place, pixels)
        for place, (title, each) in zip(ax[len(group) :], maps.items(), strict=True):
            whole = each.dtype.kind != "f"
            style.draw_image(place, each[row] % 20 if whole else each[row], **(classes if whole else sequential))
            if row == 0:
                place.set_title(style.shorten(title, 40), fontsize=8, loc="center", fontweight="normal")
    return style.finish(fig, source)


@style.apply
def minimal_pairs(
    pairs: pd.DataFrame, images: UInt8[np.ndarray, "n 2 h w 3"], scores: Mapping[str, pd.DataFrame], source: str = ""
) -> Figure:
    """Minimal pairs with the four similarities that each encoder gives them, and a verdict on each statement.

    The coloured cell of a row is the image chosen for that row's statement, by MMVP's rule (a tie chooses image 2);
    a pair counts, and has the large tick, if both choices are right.

    Args:
        pairs: one row for each pair: `pattern`, `statement_1`, `statement_2`, as `read_pairs` gives them.
        images: the images of those pairs, in the same order.
        scores: encoder -> the same pairs, in the same order, with the cosines `t1i1`, `t1i2`, `t2i1`, `t2i2` of text
            and image, as `score_pairs` gives them.

    Raises:
        ValueError: if the numbers of pairs, images and scores differ.
    """
    style.require_columns(pairs, ("pattern", "statement_1", "statement_2"))
    for name, table in scores.items():
        style.require_columns(table, ("t1i1", "t1i2", "t2i1", "t2i2"))
        if not len(pairs) == len(images) == len(table):
            raise ValueError(f"{len(pairs)} pairs, {len(images)} of images and {len(table)} scored by {name}")
    size, widths = (style.WIDTH, 0.35 + 0.86 * len(pairs)), [2.15, 0.8, 0.8, *[1.55] * len(scores)]
    fig, axes = plt.subplots(len(pairs), len(widths), squeeze=False, figsize=size, width_ratios=widths)
    fig.get_layout_engine().set(w_pad=0.03, h_pad=0.03, hspace=0, wspace=0)
    for pair, both, row in zip(pairs.itertuples(), images, axes, strict=True):
        row[0].set_axis_off()
        row[0].text(0, 0.8, style.shorten(pair.pattern, 36), fontsize=8, fontweight="bold", va="center")
        for i, statement in ((1, pair.statement_1), (2, pair.statement_2)):
            text = "\n".join(textwrap.wrap(style.shorten(statement, 100), 36))
            row[0].text(0, 0.8 - 0.3 * i, f"{CIRCLED[i]} {text}", fontsize=7.5, va="center")
            style.draw_image(row[i], both[i - 1])
    for i in (1, 2):
        axes[0, i].set_title(f"image {CIRCLED[i]}", fontsize=8, loc="center", fontweight="normal")
    for column, (name, table) in zip(axes[:, 3:].T, scores.items(), strict=True):
        right = [_draw_verdict(ax, cosines) for ax, (_, cosines) in zip(column, table.iterrows(), strict=True)]
        column[0].set_title(f"{style.label_of(name)}: {sum(right)} of {len(pairs)}", fontsize=8, loc="center")
    return style.finish(fig, source)


@style.apply
def answers(
    questions: Sequence[str],
    images: UInt8[np.ndarray, "n 2 h w 3"],
    right: Sequence[Sequence[str]],
    said: Mapping[str, Sequence[Sequence[str]]],
    source: str = "",
) -> Figure:
    """A question asked about both images of a minimal pair, and what each language model says.

    Args:
        questions: one for each of the n pairs.
        right: the right answers, two for each pair.
        said: language model -> its answers, in the same order.

    Raises:
        ValueError: if the numbers of questions, images and answers differ.
    """
    for name, each in {"right": right, **said}.items():
        if not len(questions) == len(images) == len(each):
            raise ValueError(f"{len(questions)} questions, {len(images)} pairs of images and {len(each)} of {name!r}")
    size, widths = (style.WIDTH, 0.35 + 0.86 * len(questions)), [2, 0.8, 0.8, *[1.3] * len(said)]
    fig, axes = plt.subplots(len(questions), len(widths), squeeze=False, figsize=size, width_ratios=widths)
    for row, question, both, true in zip(axes, questions, images, right, strict=True):
        row[0].text(0, 0.8, "\n".join(textwrap.wrap(style.shorten(question, 100), 34)), fontsize=8, va="top")
        for i in (1, 2):
            row[0].text(0, 0.5 - 0.22 * i, f"{CIRCLED[i]} {style.shorten(true[i - 1], 34)}", fontsize=7.5, va="center")
            style.draw_image(row[i], both[i - 1])
    for column, (name, each) in zip(axes[:, 3:].T, said.items(), strict=True):
        column[0].set_title(style.label_of(name), fontsize=8, loc="center")
        for ax, words, true in zip(column, each, right, strict=True):
            for i in (1, 2):
                hit = words[i - 1] == true[i - 1]
                text = f"{CIRCLED[i]} {'✓' if hit else '✗'} {style.shorten(words[i - 1], 24)}"
                ax.text(0.05, 0.95 - 0.32 * i, text, fontsize=8, va="center", color=style.RIGHT if hit else style.WRONG)
    for ax in [*axes[:, 0], *axes[:, 3:].flat]:
        ax.set_axis_off()
    return style.finish(fig, source)


def _draw_verdict(ax: Axes, cosines: pd.Series) -> bool:
    """A 2 x 2 table, texts down and images across, the chosen cells coloured, with ticks; whether the pair counts."""
    ax.set(xlim=(-0.75, 3), ylim=(2.1, -0.1))
    ax.set_axis_off()
    centred = {"ha": "center", "va": "center"}
    choices = {i: 1 if cosines[f"t{i}i1"] > cosines[f"t{i}i2"] else 2 for i in (1, 2)}
    for i, choice in choices.items():
        colour, y = (style.RIGHT if choice == i else style.WRONG), i - 0.5
        ax.text(-0.2, y, CIRCLED[i], fontsize=7.5, color=style.GREY, **centred)
        for j in (1, 2):
            face, ink = (colour, "white") if j == choice else ("#F1F2F4", style.GREY)
            ax.add_patch(plt.Rectangle((j - 0.97, i - 0.96), 0.94, 0.92, linewidth=0, facecolor=face))
            number = style.minus_signs(f"{cosines[f't{i}i{j}']:.3f}")
            ax.text(j - 0.5, y, number, fontsize=7, color=ink, **centred)
        ax.text(2.35, y, "✓" if choice == i else "✗", fontsize=11, color=colour, **centred)
    counts = all(choice == i for i, choice in choices.items())
    if counts:
        ax.text(2.78, 1, "✓", fontsize=15, color=style.RIGHT, fontweight="bold", gid="counts", **centred)
    return counts


@style.apply
def own_image(
    image: UInt8[np.ndarray, "h w 3"],
    statements: Sequence[str],
    similarities: Mapping[str, Sequence[float]],
    drawn: Mapping[str, UInt8[np.ndarray, "h2 w2 3"]],
    losses: Float[np.ndarray, "n 2"] | None = None,
    source: str = "",
) -> Figure:
    """An image, what the denoiser draws from each embedding of it, and which of two statements each model prefers.

    A column's dark cell is the preferred statement: of the larger cosine, and for the denoiser of the smaller loss, if
    the 95 % interval of the difference over the draws of noise does not hold zero.

    Args:
        similarities: encoder -> the cosine of each of the two statements with the image.
        drawn: encoder -> what the denoiser draws from its embedding.
        losses: L_rec in n draws of noise under each statement; None for no column.
    """
    pictures = {"your image": image} | {f"drawn from\n{style.label_of(name)}": each for name, each in drawn.items()}
    columns = {style.label_of(name): [f"{c:.3f}" for c in each] for name, each in similarities.items()}
    preferred = {style.label_of(name): int(np.argmax(each)) for name, each in similarities.items()}
    if losses is not None:
        difference, low, high = paired_t(losses[:, 1] - losses[:, 0])
        columns["denoiser's loss"] = [f"{loss:.4f}" for loss in losses.mean(0)]
        preferred["denoiser's loss"] = int(difference < 0) if low * high > 0 else -1
    widths = [*[1] * len(pictures), 1.2 + 0.6 * len(columns)]
    fig, axes = plt.subplots(1, len(widths), figsize=(style.WIDTH, 1.9), width_ratios=widths)
    for ax, (title, pixels) in zip(axes, pictures.items(), strict=False):
        style.draw_image(ax, pixels)
        ax.set_title(title, fontsize=8, loc="center", fontweight="normal")
    table = axes[-1]
    table.set(xlim=(0, len(columns)), ylim=(4.2, -0.8))
    table.set_axis_off()
    for i, statement in enumerate(statements):
        table.text(0, 1.9 * i, f"{CIRCLED[i + 1]} {style.shorten(statement, 60)}", fontsize=8, va="center")
        for k, (name, numbers) in enumerate(columns.items()):
            chosen = preferred[name] == i
            face, ink = (style.INK, "white") if chosen else ("#F1F2F4", style.GREY)
            table.add_patch(plt.Rectangle((k + 0.02, 1.9 * i + 0.4), 0.96, 0.8, linewidth=0, facecolor=face))
            text = style.minus_signs(numbers[i]) + ", preferred" * chosen
            table.text(k + 0.5, 1.9 * i + 0.8, text, fontsize=7.5, color=ink, ha="center", va="center")
    for k, name in enumerate(columns):
        table.text(k + 0.5, -0.6, name, fontsize=8, ha="center", va="center")
    if losses is not None:
        text = f"loss of ② less that of ①: {difference:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
        table.text(0, 3.7, style.minus_signs(text), fontsize=7, color=style.GREY, va="center")
    return style.finish(fig, source)


@style.apply
def patch_similarity(
    image: UInt8[np.ndarray, "h w 3"],
    cosines: Mapping[str, Float[np.ndarray, "_ _"]],
    place: tuple[float, float],
    source: str = "",
) -> Figure:
    """An image and, for each encoder, the cosine of the patch token in the frame with every other one.

    Args:
        cosines: encoder -> the cosine of each patch token with each other one, [p, p].
        place: of the patch, from its row's and column's middle: shares of the image's height and width, in [0, 1).
    """
    fig, axes = plt.subplots(1, 1 + len(cosines), figsize=(style.WIDTH, 0.35 + 0.86 * style.WIDTH / (1 + len(cosines))))
    maps = {}
    for name, each in cosines.items():
        side = isqrt(len(each))
        row, column = (int(share * side) for share in place)
        maps[name] = each[row * side + column].reshape(side, side)
    least = min(each.min() for each in maps.values())
    sides = [len(next(iter(maps.values()))), *map(len, maps.values())]
    for ax, side, (name, each) in zip(axes, sides, ({"image": image} | maps).items(), strict=True):
        style.draw_image(ax, each, **({} if each.ndim == 3 else {"cmap": "Blues", "vmin": least, "vmax": 1}))
        ax.set_title(style.label_of(name), fontsize=8, loc="center", fontweight="normal")
        size = len(each) / side  # of a patch, in pixels of the image or cells of the map
        corner = [int(share * side) * size - 0.5 for share in place[::-1]]
        ax.add_patch(plt.Rectangle(corner, size, size, fill=False, edgecolor=style.WRONG, linewidth=1.6))
    fig.colorbar(axes[-1].images[0], ax=list(axes), fraction=0.02, pad=0.01, label="cosine")
    return style.finish(fig, source)


@style.apply
def drawn_attributes(quality: pd.DataFrame, wanted: Mapping[str, float] | None = None, source: str = "") -> Figure:
    """Share of the denoiser's samples in which a classifier reads the value that the prompt names.

    Args:
        quality: one row for each attribute: `attribute`, `share`, `low`, `high` (95 %), `n` samples.
        wanted: attribute -> the least share that the denoiser should reach, drawn as a bar.
    """
    style.require_columns(quality, ("attribute", "share", "low", "high", "n"))
    fig, ax = plt.subplots(figsize=(style.WIDTH, 0.75 + 0.24 * len(quality)))
    for y, row in enumerate(quality.itertuples()):
        style.draw_interval(ax, y, row.share, row.low, row.high, style.RIGHT)
        ax.text(1, y, f"  {percent(row.share, digits=0)}", transform=ax.get_yaxis_transform(), fontsize=8, va="center")
    if wanted is not None:
        y = np.arange(len(quality))
        least = quality["attribute"].map(wanted).to_numpy(float)
        ax.vlines(least, y - 0.34, y + 0.34, color=style.INK, linewidth=2.4, label="least share required")
        style.move_legend(fig)
    ax.set(xlim=(-0.01, 1.01), xlabel="samples with the value that the prompt names, %", ylabel="")
    ax.set_yticks(range(len(quality)), list(map(style.label_of, quality["attribute"])))
    ax.xaxis.set_major_formatter(style.PERCENT)
    ax.grid(False, axis="y")
    ax.invert_yaxis()
    return style.finish(fig, source)
