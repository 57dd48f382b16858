"""Figures of readable feedback: where a detail is lost before training, and what each alignment gives over the dose."""

from collections.abc import Mapping, Sequence

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from diva_lab.figures import style

# a colour and a marker for each alignment, in every figure
ALIGNMENTS = {
    "anchored": ("#0072B2", "o"),
    "mentions .3": ("#4C9BD0", "v"),  # anchored in captions that say less
    "mentions .1": ("#8FC1E3", "<"),
    "unpaired": ("#7B4FA3", "D"),
    "image-only": ("#33383F", "s"),
    "placebo": ("#B08D57", "X"),
}
SOURCES = ALIGNMENTS | {"un2clip": ("#009E73", "^")}  # of feedback; un2CLIP needs no alignment
ROWS = {  # objective and alignment -> name, colour and marker where rows of several objectives are compared
    (objective, alignment): (name + f", {alignment}", *ALIGNMENTS[alignment])
    for objective, name in (("diva", "DIVA"), ("diva, mixed", "DIVA, rate and mix chosen"))
    for alignment in ALIGNMENTS
} | {
    ("dcr", "anchored"): ("DCR, anchored", style.COLOURS["dcr"], "s"),
    ("dcr, bounded", "anchored"): ("DCR, bounded, anchored", "#56B4E9", "h"),
    ("naive, equal norms", "anchored"): ("naive sum, anchored", style.COLOURS["naive"], "v"),
    ("dcr, guided", "anchored"): ("DCR, guided, anchored", "#8C6D1F", "*"),
    ("caption-contrast", "none"): ("CLIP's loss on captions", style.COLOURS["caption-contrast"], "P"),
    ("caption-contrast, mixed", "none"): (
        "CLIP's loss on captions, rate and mix chosen", style.COLOURS["caption-contrast"], "P"
    ),
}  # fmt: skip
DECISIONS = {  # measure -> its name and colour
    "known": ("known by the denoiser", "#009E73"),
    "readable: diva": ("readable in the feedback", "#0072B2"),
    "said": ("said by the text match", "#CC79A7"),
    "seen": ("seen by the image tower", "#E69F00"),
}


@style.apply
def readability(tables: Mapping[str, pd.DataFrame], source: str = "") -> Figure:
    """Where is a detail lost: denoiser, projector, words or encoder? A panel a projector, a line a pattern.

    Args:
        tables: projector -> rows of `analysis.readability`; columns `measure`, `bin`, `pattern`, `value`, `low`,
            `high`. Those of the bin `all` are drawn, hollow where not above chance.
    """
    fig, axes = style.make_panels(len(tables), len(tables), 3.7, sharey=True)
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        style.require_columns(table, ("measure", "bin", "pattern", "value", "low", "high"))
        table = table[table["bin"] == "all"]
        patterns = list(dict.fromkeys(table["pattern"]))
        ax.axvline(0.5, color=style.INK, linewidth=0.9, linestyle=(0, (1, 2)))
        for k, (measure, (label, colour)) in enumerate(DECISIONS.items()):
            rows = table[table["measure"] == measure].set_index("pattern")
            for y, pattern in enumerate(patterns):
                value, low, high = rows.loc[pattern, ["value", "low", "high"]]
                style.draw_interval(ax, y + 0.18 * (k - 1.5), value, low, high, colour, undecided=low <= 0.5)
            ax.plot([], [], "o-", color=colour, markersize=5.5, label=label)
        ax.set_yticks(range(len(patterns)), [style.shorten(name, 40) for name in patterns])
        ax.set(title=style.shorten(name, 60), xlabel="right decisions, %", xlim=(0, 1.03))
        ax.xaxis.set_major_formatter(style.PERCENT)
        ax.grid(False, axis="y")
    axes[0].invert_yaxis()
    style.move_legend(fig, "outside upper center", 4)
    return style.finish(fig, source)


@style.apply
def dose_curves(
    curves: pd.DataFrame,
    measures: Sequence[str] = ("pairs/mean", "probe/mean", "zeroshot", "nmi"),
    source: str = "",
) -> Figure:
    """Each measure over the images that were trained on: a thin line a seed, a strong one the mean, by alignment.

    `curves`: columns `alignment`, `seed`, `images` and the measures. Chance of the pair score is dotted.
    """
    style.require_columns(curves, ("alignment", "seed", "images", *measures))
    names = [name for name in ALIGNMENTS if name in set(curves["alignment"])]
    palette = {name: ALIGNMENTS[name][0] for name in names}
    look = {"hue": "alignment", "hue_order": names, "palette": palette}
    columns = 2 if len(measures) > 3 else len(measures)
    fig, axes = style.make_panels(len(measures), columns, 0.4 + 2.3 * -(-len(measures) // columns), sharex=True)
    for ax, measure in zip(axes, measures, strict=True):
        if measure.startswith("pairs"):
            ax.axhline(style.CHANCE, color=style.INK, linewidth=0.9, linestyle=(0, (1, 2)), label="chance")
        path = {"x": "images", "y": measure, "estimator": None, "ax": ax}
        sns.lineplot(curves, units="seed", linewidth=0.6, alpha=0.45, legend=False, **path, **look)
        means = curves.groupby(["alignment", "images"])[measure].mean().reset_index()
        sns.lineplot(means, style="alignment", markers={name: ALIGNMENTS[name][1] for name in names}, dashes=False,
                     markersize=5, markeredgewidth=0.5, **path, **look)  # fmt: skip
        ax.set(title=style.label_of(measure), ylabel="%", xlabel="images")
        ax.yaxis.set_major_formatter(style.PERCENT)
    style.move_legend(fig, "outside upper right", 5)
    return style.finish(fig, source)


@style.apply
def gain_by_readability(runs: pd.DataFrame, source: str = "") -> Figure:
    """Readability before training against the change of the pair score after it, one mark a pattern and projector.

    `runs`: columns `alignment` (of `SOURCES`), `readable` (a fraction) and `gain` (points).
    """
    style.require_columns(runs, ("alignment", "readable", "gain"))
    names = [name for name in SOURCES if name in set(runs["alignment"])]
    fig, (ax,) = style.make_panels(1, 1, 3.4)
    ax.axvline(0.5, color=style.INK, linewidth=0.9, linestyle=(0, (1, 2)))
    ax.axhline(0, color=style.GREY, linewidth=0.8)
    markers, palette = ({name: SOURCES[name][k] for name in names} for k in (1, 0))
    sns.scatterplot(runs, x="readable", y="gain", hue="alignment", style="alignment", hue_order=names,
                    style_order=names, palette=palette, markers=markers, s=45, ax=ax)  # fmt: skip
    ax.set(xlabel="readable before training, %", ylabel="change of the pair score, points")
    ax.xaxis.set_major_formatter(style.PERCENT)
    style.move_legend(fig, "outside upper right", 5)
    return style.finish(fig, source)


@style.apply
def front(
    mixes: pd.DataFrame,
    pushes: pd.DataFrame | None = None,
    measures: Sequence[str] = ("zeroshot", "nmi"),
    source: str = "",
) -> Figure:
    """Perception against discrimination between the original encoder and each tuned one; the means over seeds.

    A line a row from the original (mix 0, the dark dot) to the tuned weights (mix 1); the large mark is the mix that
    was chosen beforehand. Chance of the pair score is dotted.

    Args:
        mixes: columns `objective`, `alignment` (keys of `ROWS`), `seed`, `mix`, `chosen`, `pairs/mean` and `measures`.
        pushes: random pushes as far as the runs went, drawn as crosses; columns `pairs/mean` and `measures`. Those that
            lost more than any row are counted at the left.
        measures: of discrimination, a panel each.
    """
    style.require_columns(mixes, ("objective", "alignment", "seed", "mix", "chosen", "pairs/mean", *measures))
    fig, axes = style.make_panels(len(measures), len(measures), 3.9, sharey=True)
    look = {"markeredgewidth": 0.5, "markeredgecolor": "white"}
    for ax, measure in zip(axes, measures, strict=True):
        ax.axhline(style.CHANCE, color=style.INK, linewidth=0.9, linestyle=(0, (1, 2)))
        for row, (name, colour, marker) in ROWS.items():
            mine = mixes[(mixes["objective"] == row[0]) & (mixes["alignment"] == row[1])]
            if mine.empty:
                continue
            means = mine.groupby("mix")[[measure, "pairs/mean"]].mean()
            line = "--" if row[0].endswith("mixed") else "-"
            path = {"color": colour, "marker": marker, "markersize": 3.5, "label": name}
            ax.plot(means[measure], means["pairs/mean"], line, **path, **look)
            chosen = means.loc[mine.loc[mine["chosen"], "mix"].iloc[0]]
            ax.plot(*chosen, marker, color=colour, markersize=9, zorder=3, **look)
        start = mixes.loc[mixes["mix"] == 0, [measure, "pairs/mean"]].mean()
        ax.plot(*start, "o", color=style.INK, label="original", **style.ORIGINAL)
        left = ax.get_xlim()[0]  # the rows fill the panel
        if pushes is not None and len(pushes):
            ax.plot(pushes[measure], pushes["pairs/mean"], "x", color=style.GREY, markersize=6, label="random push")
            ax.set_xlim(left=left)
            if beyond := int((pushes[measure] < left).sum()):
                ax.annotate(f"← {beyond} more", (0.01, 0.015), xycoords="axes fraction", color=style.GREY, fontsize=8)
        ax.set(xlabel=f"{style.label_of(measure)}, %", ylabel=f"{style.label_of('pairs/mean')}, %")
        ax.xaxis.set_major_formatter(style.PERCENT)
        ax.yaxis.set_major_formatter(style.PERCENT)
    style.move_legend(fig, "outside upper center", 3)
    return style.finish(fig, source)
