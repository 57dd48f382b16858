"""Records -> matplotlib figures: one function a figure, one style for all, no torch.

A *report table* is a DataFrame with one row an encoder, named by its index, and the columns of `world_report`
("pairs/colour", "pairs/colour/low", ..., "zeroshot", ...; fractions in 0..1). A *metrics table* is one row a step.
Every figure takes `source`, printed small under it: the run, seed, git sha and versions it was drawn from.
Columns that a figure needs and the record lacks raise KeyError with their names.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from diva_lab.world import DETAILS, PATTERNS

INK, GREY, FAINT, RIGHT, WRONG = "#262B33", "#6B7280", "#D9DCE1", "#0072B2", "#D55E00"
# one colour and one marker per objective, everywhere; Okabe and Ito's palette, safe for the colour-blind
COLOURS = {
    "none": "#33383F",
    "perturb-norm": "#9AA0A8",
    "perturb-drift": "#B08D57",
    "diva": "#0072B2",
    "contrastive": "#E69F00",
    "naive": "#CC79A7",
    "dcr": "#009E73",
    "genhancer": "#56B4E9",
    "dcr-guidance": "#7B4FA3",
}
MARKERS = dict(zip(COLOURS, "oXDp^vsP*", strict=True))
TERMS = {"loss": "none", "rec": "diva", "con": "contrastive", "dcr": "dcr"}  # a term has its objective's colour
TERMS |= {"truth": "diva", "view": "contrastive", "push": "naive"}  # DCR's parts: that of what pulls like it
NAMES = {
    "none": "none (original)",
    "perturb-norm": "perturbed, DCR's norms",
    "perturb-drift": "perturbed, DCR's drift",
    "diva": "DIVA",
    "contrastive": "contrastive",
    "naive": "naive sum",
    "dcr": "DCR",
    "genhancer": "GenHancer",
    "dcr-guidance": "DCR, guided (ours)",
    "truth": "pull to the truth",
    "view": "pull to the view",
    "push": "push of the negatives",
    "loss": "loss",
    "rec": "reconstruction",
    "con": "contrastive",
    "global": "global (DCR)",
    "recap": "recap (DIVA)",
    "pairs/mean": "pair score (P)",
    "probe/mean": "linear probes (P)",
    "zeroshot": "zero-shot (D)",
    "nmi": "clustering NMI (D)",
    "acc": "clustering ACC (D)",
    "ari": "clustering ARI (D)",
    **{f"pairs/{detail}": pattern for detail, pattern in PATTERNS.items()},
}
MEASURES = ("pairs/mean", "probe/mean", "zeroshot", "nmi", "acc", "ari")
DIVERGING = LinearSegmentedColormap.from_list("conflict", [WRONG, "#F3C5A5", "#FAFAF8", "#A9CDE6", RIGHT])
CHANCE = 0.25  # of a pair by MMVP's rule: two texts, each right half of the time
SPAN = 0.02  # least range of an axis of scores
WIDTH = 7.6  # inches, of every figure
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E9EBEE",
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
_styled = mpl.rc_context(STYLE)
_NUMBER = {1: "①", 2: "②"}
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g}")


# --- shared -------------------------------------------------------------------------------------------------------


def trace(environment: Mapping[str, object], *facts: str) -> str:
    """The line under a figure: `facts` (run ids, seeds), then git sha and versions of `runs.environment()`."""
    versions = dict(environment.get("versions", {}))
    short = (f"{name} {versions[name]}" for name in ("torch", "diffusers", "open_clip_torch") if name in versions)
    return " · ".join([*facts, f"git {environment.get('git', 'unknown')}", *short])


def save(fig: Figure, path: str | Path) -> Path:
    """Write `fig` as the PNG `path`, folders included, the same bytes each time. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, format="png", dpi=STYLE["savefig.dpi"], bbox_inches="tight")
    return path


def running_mean(values: Sequence[float] | np.ndarray | pd.Series, window: int) -> np.ndarray:
    """Mean over the last `window` values at each position; NaN until half of them are there."""
    return pd.Series(np.asarray(values, float)).rolling(window, min_periods=(window + 1) // 2).mean().to_numpy()


def _in_48_colours(canvas: FigureCanvasAgg):
    """A `print_png` for `canvas` that writes a palette image: a quarter of the bytes, so that notebooks stay small."""

    def print_png(file: object, **_: object) -> None:  # matplotlib's other wishes are for other formats
        canvas.draw()
        pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        small = pixels.quantize(48, kmeans=1, dither=Image.Dither.NONE)  # without k-means cyan would turn teal
        small.save(file, format="png", optimize=True, dpi=(canvas.figure.dpi,) * 2)

    return print_png


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _signed(fig: Figure, source: str) -> Figure:
    if isinstance(fig.canvas, FigureCanvasAgg):
        fig.canvas.print_png = _in_48_colours(fig.canvas)
    if source:
        lines = "\n".join(textwrap.wrap(source, int(fig.get_figwidth() * 21)))
        fig.text(0.005, -0.09 / fig.get_figheight(), lines, fontsize=6, color=GREY, va="top", gid="source")
    return fig


def _need(frame: pd.DataFrame, columns: Iterable[str]) -> None:
    missing = [name for name in columns if name not in frame]
    if missing:
        raise KeyError(f"the record lacks {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")


def _base(key: object) -> str:
    """The objective that a row of the study varies: `dcr` of `dcr, velocity`."""
    return str(key).split(",")[0]


def _name(key: object) -> str:
    key, base = str(key), _base(key)
    return NAMES[key] if key in NAMES else NAMES.get(base, base) + key.removeprefix(base)


def _colours(names: Iterable[str]) -> dict[str, str]:
    """The fixed colour of each objective and its variants; what is none takes the palette's coloured part in order."""
    spare = iter([*list(COLOURS.values())[3:], *list(COLOURS.values())[:3]] * 9)
    return {name: COLOURS[_base(name)] if _base(name) in COLOURS else next(spare) for name in names}


def _picture(ax: Axes, pixels: np.ndarray) -> None:
    ax.imshow(pixels, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=FAINT, linewidth=0.6)


def _scores(reports: pd.DataFrame, suffix: str = "") -> np.ndarray:
    columns = [f"pairs/{detail}{suffix}" for detail in DETAILS]
    _need(reports, columns)
    return reports[columns].to_numpy(float)  # [encoders, 9]


def _ceiling(ceiling: pd.DataFrame) -> np.ndarray:
    _need(ceiling, ("detail", "after"))
    return ceiling.set_index("detail")["after"].reindex(list(DETAILS)).to_numpy(float)  # [9]


# --- pictures -----------------------------------------------------------------------------------------------------


@_styled
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
        _picture(ax, pixels)
        ax.set_xlabel(text, fontsize=6.5, linespacing=1.1, labelpad=2)
    if title:
        fig.suptitle(title, x=0.005, ha="left", fontsize=9.5, fontweight="bold")
    return _signed(fig, source)


@_styled
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
    _need(pairs, ("pattern", "statement_1", "statement_2"))
    for name, table in scores.items():
        _need(table, ("t1i1", "t1i2", "t2i1", "t2i2"))
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
            row[0].text(0, 0.8 - 0.3 * i, f"{_NUMBER[i]} {text}", fontsize=7.5, va="center")
            _picture(row[i], images[k, i - 1])
        for ax, (name, table) in zip(row[3:], scores.items(), strict=True):
            counted[name] += _verdict(ax, table.iloc[k])
    for i in (1, 2):
        axes[0, i].set_title(f"image {_NUMBER[i]}", fontsize=8, loc="center", fontweight="normal")
    for ax, (name, count) in zip(axes[0, 3:], counted.items(), strict=True):
        ax.set_title(f"{_name(name)}: {count} of {len(pairs)}", fontsize=8, loc="center")
    return _signed(fig, source)


def _verdict(ax: Axes, cosines: pd.Series) -> bool:
    """A 2 x 2 table, texts down and images across, the chosen cells coloured, with ticks; whether the pair counts."""
    ax.set(xlim=(-0.75, 3), ylim=(2.1, -0.1))
    ax.set_axis_off()
    verdicts = []
    for i in (1, 2):
        chosen = 1 if cosines[f"t{i}i1"] > cosines[f"t{i}i2"] else 2
        verdicts.append(chosen == i)
        colour, y = (RIGHT if chosen == i else WRONG), i - 0.5
        ax.text(-0.2, y, _NUMBER[i], ha="center", va="center", fontsize=7.5, color=GREY)
        for j in (1, 2):
            face, ink = (colour, "white") if j == chosen else ("#F1F2F4", GREY)
            ax.add_patch(plt.Rectangle((j - 0.97, i - 0.96), 0.94, 0.92, linewidth=0, facecolor=face))
            number = _minus(f"{cosines[f't{i}i{j}']:.3f}")
            ax.text(j - 0.5, y, number, ha="center", va="center", fontsize=7, color=ink)
        ax.text(2.35, y, "✓" if chosen == i else "✗", ha="center", va="center", fontsize=11, color=colour)
    if all(verdicts):
        ax.text(2.78, 1, "✓", ha="center", va="center", fontsize=15, color=RIGHT, fontweight="bold", gid="counts")
    return all(verdicts)


@_styled
def drawn_attributes(quality: pd.DataFrame, wanted: Mapping[str, float] | None = None, source: str = "") -> Figure:
    """Share of the denoiser's samples in which a classifier reads the value that the prompt asked for.

    Args:
        quality: one row an attribute: `attribute`, `share`, `low`, `high` (95 %), `n` samples.
        wanted: attribute -> the least share asked of the model, drawn as a bar.
    """
    _need(quality, ("attribute", "share", "low", "high", "n"))
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
    ax.xaxis.set_major_formatter(_PERCENT)
    ax.grid(False, axis="y")
    return _signed(fig, source)


# --- the nine patterns --------------------------------------------------------------------------------------------


@_styled
def pair_scores(reports: pd.DataFrame, ceiling: pd.DataFrame | None = None, source: str = "") -> Figure:
    """Pair score per pattern with its 95 % interval, for each encoder of a report table; the mean at the bottom.

    `ceiling` (columns `detail`, `after`) is what supervised tuning of the same tower reaches, drawn as a bar.
    """
    values = np.column_stack([_scores(reports), reports["pairs/mean"]])
    low = np.column_stack([_scores(reports, "/low"), reports["pairs/mean/low"]])
    high = np.column_stack([_scores(reports, "/high"), reports["pairs/mean/high"]])
    y = np.append(np.arange(len(DETAILS)), len(DETAILS) + 0.35)
    fig, ax = plt.subplots(figsize=(WIDTH, 3.1 + 0.22 * len(reports)))
    ax.axvline(CHANCE, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
    if ceiling is not None:
        top = _ceiling(ceiling)
        ax.vlines(np.append(top, top.mean()), y - 0.34, y + 0.34, color=INK, linewidth=2.4, label="supervised ceiling")
    spread = 0.5 * (np.arange(len(reports)) - (len(reports) - 1) / 2) / max(len(reports), 3)
    for i, (name, colour) in enumerate(_colours(reports.index).items()):
        error = np.abs(np.stack([values[i] - low[i], high[i] - values[i]]))
        ax.errorbar(
            values[i], y + spread[i], xerr=error, fmt=MARKERS.get(name, "o"), color=colour, label=_name(name),
            markersize=5, elinewidth=1.3, markeredgecolor="white", markeredgewidth=0.6,
        )  # fmt: skip
    ax.axhline(len(DETAILS) - 0.33, color=FAINT, linewidth=0.8)
    ax.set(xlim=(-0.01, 1.01), ylim=(y[-1] + 0.6, -0.6), xlabel="pairs with both texts right, %")
    ax.set_yticks(y, [*PATTERNS.values(), "mean of nine"])
    ax.get_yticklabels()[-1].set_fontweight("bold")
    ax.xaxis.set_major_formatter(_PERCENT)
    ax.grid(False, axis="y")
    ax.annotate("chance", (CHANCE, 1), (2, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                fontsize=7, color=GREY)  # fmt: skip
    fig.legend(loc="outside upper right", ncols=4)
    return _signed(fig, source)


def _by_pattern(reports: pd.DataFrame) -> pd.DataFrame:
    """The pair scores of a report table, or of rows of `summarise`: a column a pattern, by its name."""
    if "pairs/mean" in reports:
        return pd.DataFrame(_scores(reports), reports.index, list(PATTERNS.values()))
    names = [name for name in reports if f"{name}/low" in reports and name != "mean"]
    _need(reports, names or ["<pattern>/low"])
    return reports[names].astype(float)


@_styled
def radar(reports: pd.DataFrame, ceiling: pd.DataFrame | None = None, source: str = "") -> Figure:
    """The pair scores of each encoder, pattern by pattern, as a closed line; the supervised ceiling behind them.

    Args:
        reports: a report table, or one row an encoder of what `summarise` says of any folder of pairs, whose patterns
            are then the axes, in their order.
        ceiling: as in `pair_scores`; of the tiny world's nine details, so for a report table only.
    """
    scores = _by_pattern(reports)
    angles = np.arange(scores.shape[1]) * (2 * np.pi / scores.shape[1])
    closed = lambda values: np.append(values, values[0])  # noqa: E731
    fig, ax = plt.subplots(figsize=(WIDTH, 4.9), subplot_kw={"projection": "polar"})
    ax.set_theta_zero_location("N")
    ax.set_theta_direction(-1)
    ax.plot(np.linspace(0, 2 * np.pi, 200), np.full(200, CHANCE), color=GREY, linewidth=0.9, linestyle=(0, (1, 2)),
            label="chance")  # fmt: skip
    if ceiling is not None:
        top = closed(_ceiling(ceiling))
        ax.fill(closed(angles), top, color="#F1F2F4", zorder=0)
        ax.plot(closed(angles), top, color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label="supervised ceiling")
    for (name, colour), row in zip(_colours(reports.index).items(), scores.to_numpy(), strict=True):
        ax.plot(closed(angles), closed(row), color=colour, label=_name(name), marker=MARKERS.get(name, "o"),
                markersize=4, markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
        ax.fill(closed(angles), closed(row), color=colour, alpha=0.07)
    ax.set_ylim(0, 1)
    ax.set_rgrids((0.25, 0.5, 0.75, 1), ("25", "50", "75", "100 %"), angle=20, fontsize=7, color=GREY)
    ax.set_thetagrids(np.degrees(angles), [textwrap.fill(name, 16) for name in scores], fontsize=8)
    for label, angle in zip(ax.get_xticklabels(), angles, strict=True):
        label.set_horizontalalignment("center" if angle == 0 else "left" if angle < np.pi else "right")
    ax.spines["polar"].set(color=FAINT)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return _signed(fig, source)


# --- training -----------------------------------------------------------------------------------------------------


@_styled
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
        _need(record, ("condition", x, "recovered"))
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.axhline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        colours = {"global": COLOURS["dcr"], "recap": COLOURS["diva"]}
        colours |= _colours(name for name in dict.fromkeys(record["condition"]) if name not in colours)
        for name, rows in record.groupby("condition", sort=False):
            rows = rows.sort_values(x)
            ax.plot(rows[x], rows["recovered"], color=colours[name], marker="o", markersize=4, label=_name(name))
            if {"low", "high"} <= set(rows):
                ax.fill_between(rows[x], rows["low"], rows["high"], color=colours[name], alpha=0.15, linewidth=0)
        ax.set(xlabel=label, title=title)
    for level, text in ((1, "as good as the full caption"), (0, "as good as no caption")):
        axes[0, 0].annotate(text, (0, level), (2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                            fontsize=7, color=GREY)  # fmt: skip
    axes[0, 0].set_ylabel("recovered fraction")
    axes[0, 0].set_ylim(top=1.13)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return _signed(fig, source)


@_styled
def loss_curves(metrics: Mapping[str, pd.DataFrame], window: int = 10, source: str = "") -> Figure:
    """A panel a run: every term of its loss, each step faint and the mean of the last `window` steps strong."""
    columns = min(len(metrics), 4)
    rows = -(-len(metrics) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH, 0.5 + 2 * rows), squeeze=False)
    for ax in axes.flat[len(metrics) :]:
        ax.set_axis_off()
    for ax, (name, table) in zip(axes.flat, metrics.items(), strict=False):
        _need(table, ("step", "loss"))
        terms = [term for term in TERMS if term != "loss" and term in table and table[term].notna().any()]
        for term in terms if len(terms) == 1 else ["loss", *terms]:
            colour = COLOURS[TERMS[term]]
            ax.plot(table["step"], table[term], color=colour, linewidth=0.7, alpha=0.35)
            ax.plot(table["step"], running_mean(table[term], window), color=colour, label=_name(term))
        if len(terms) > 1 and (table[["loss", *terms]] > 0).all(axis=None):
            ax.set_yscale("log")
        ax.set(title=_name(name), xlabel="step")
        ax.legend(loc="best", fontsize=7)
    axes[0, 0].set_ylabel("loss")
    return _signed(fig, source)


# --- P against D --------------------------------------------------------------------------------------------------


@_styled
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
    _need(evaluations, ("objective", "seed", "step", *{name for panel in panels for name in panel}))
    colours = _colours(dict.fromkeys(evaluations["objective"]))
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.4), squeeze=False)
    for ax, (x, y) in zip(axes[0], panels, strict=True):
        for name, rows in evaluations.groupby("objective", sort=False):
            seeds = [table.sort_values("step") for _, table in rows.groupby("seed")]
            mean = rows.groupby("step")[list(dict.fromkeys((x, y)))].mean()
            for table in seeds if len(seeds) > 1 else []:
                ax.plot(table[x], table[y], color=colours[name], linewidth=0.7, alpha=0.45)
            ax.plot(mean[x], mean[y], color=colours[name], marker=".", markersize=3)
            ax.plot(mean[x].iloc[-1:], mean[y].iloc[-1:], color=colours[name], marker=MARKERS.get(str(name), "o"),
                    markersize=7, markeredgecolor="white", linestyle="none", label=_name(name), zorder=4)  # fmt: skip
        start = evaluations[evaluations["step"] == evaluations["step"].min()]
        ax.plot(start[x].mean(), start[y].mean(), marker="o", markersize=9, markerfacecolor="none",
                markeredgecolor=INK, markeredgewidth=1.2, linestyle="none", label="before", zorder=5)  # fmt: skip
        ax.set(xlabel=f"{_name(x)}, %", ylabel=f"{_name(y)}, %")
        for axis in (ax.xaxis, ax.yaxis):
            low, high = axis.get_view_interval()
            if high - low < SPAN:  # else a few live steps would look like a result
                axis.set_view_interval(*((low + high) / 2 + SPAN * np.array([-0.5, 0.5])), ignore=True)
            axis.set_major_formatter(_PERCENT)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper left", ncols=5)
    return _signed(fig, source)


@_styled
def objective_differences(differences: pd.DataFrame, source: str = "", baseline: str = "none") -> Figure:
    """A table of what each objective changed, paired with the `baseline`: dot, 95 % interval and numbers.

    `differences`: columns `objective`, `measure`, `difference`, `low`, `high` (fractions; shown as points). Intervals
    that hold zero are drawn hollow; undefined ones (a single seed) are left out.
    """
    _need(differences, ("objective", "measure", "difference", "low", "high"))
    measures, objectives = (list(dict.fromkeys(differences[name])) for name in ("measure", "objective"))
    columns = min(len(measures), 3)
    rows = -(-len(measures) // columns)
    shape = (WIDTH, 0.25 + rows * (0.5 + 0.26 * len(objectives)))
    fig, axes = plt.subplots(rows, columns, figsize=shape, squeeze=False, sharey=True)
    colours = _colours(objectives)
    for ax in axes.flat[len(measures) :]:
        ax.set_axis_off()
    for ax, measure in zip(axes.flat, measures, strict=False):
        table = differences[differences["measure"] == measure].set_index("objective")
        ax.axvline(0, color=INK, linewidth=0.9)
        for y, name in enumerate(objectives):
            if name not in table.index:
                continue
            _difference(ax, y, table.loc[name], colours[name], MARKERS.get(_base(name), "o"))
        ax.set(ylim=(len(objectives) - 0.4, -0.6))
        ax.set_title(textwrap.shorten(_name(measure), 36, placeholder=" …"), fontsize=8.5)
        ax.set_yticks(range(len(objectives)), [_name(name) for name in objectives])
        ax.grid(False, axis="y")
    for ax in axes.flat[max(len(measures) - columns, 0) : len(measures)]:
        ax.set_xlabel(f"points against {baseline}", fontsize=8)
    return _signed(fig, source)


def _difference(ax: Axes, y: float | int | np.integer, row: pd.Series, colour: str, marker: str) -> None:
    """A dot with its interval at height `y` and both in numbers at the right edge; hollow where undecided."""
    value, low, high = (100 * float(row[column]) for column in ("difference", "low", "high"))
    known = np.isfinite([low, high]).all()
    if known:
        ax.plot([low, high], [y, y], color=colour, linewidth=1.6)
    hollow = not known or low <= 0 <= high
    face = "white" if hollow else colour
    ax.plot(value, y, marker=marker, color=colour, markersize=5.5, markerfacecolor=face)
    text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" if known else f"{value:+.1f}"
    ax.annotate(_minus(text), (1, y), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                fontsize=6.5, va="center", color=GREY if hollow else INK)  # fmt: skip


@_styled
def claims(
    differences: pd.DataFrame, groups: Mapping[str, Sequence[str]], source: str = "", baseline: str = "none"
) -> Figure:
    """What rows of the study changed against the `baseline`, grouped by question; a column a measure.

    Args:
        differences: as in `objective_differences`, of at least one measure.
        groups: question -> its rows of the study, in order. One that `differences` lacks is named as not run.
    """
    _need(differences, ("objective", "measure", "difference", "low", "high"))
    measures = list(dict.fromkeys(differences["measure"]))
    rows = [name for group in groups.values() for name in group]
    tops = np.cumsum([0, *(len(group) + 1 for group in groups.values())])[:-1]  # a line for each question
    places = [top + 1 + k for top, group in zip(tops, groups.values(), strict=True) for k in range(len(group))]
    shape = (WIDTH, 0.6 + 0.21 * (len(rows) + len(groups)))
    fig, axes = plt.subplots(1, max(len(measures), 1), figsize=shape, squeeze=False, sharey=True)
    colours = _colours(rows)
    for ax, measure in zip(axes[0], measures, strict=False):
        table = differences[differences["measure"] == measure].set_index("objective")
        ax.axvline(0, color=INK, linewidth=0.9)
        for y, name in zip(places, rows, strict=True):
            if name in table.index:
                _difference(ax, y, table.loc[name], colours[name], MARKERS.get(_base(name), "o"))
        ax.set_title(_name(measure), fontsize=8.5)
        ax.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        ax.margins(x=0.15)
    fig.supxlabel(f"points against {_name(baseline)}, 95 % intervals over seeds", fontsize=8)
    for ax in axes[0]:
        ax.set(ylim=(max(places, default=0) + 0.6, -0.5))
        ax.grid(False, axis="y")
    run = set(differences["objective"])
    labels = [_name(name) + ("" if name in run else " (not run)") for name in rows]
    axes[0, 0].set_yticks([*places, *tops], [*labels, *groups])
    for label in axes[0, 0].get_yticklabels()[len(rows) :]:
        label.set_fontweight("bold")
    for label, name in zip(axes[0, 0].get_yticklabels(), rows, strict=False):
        label.set_color(INK if name in run else GREY)
    return _signed(fig, source)


@_styled
def runs_scatter(
    runs: pd.DataFrame,
    x: str,
    y: str,
    line: pd.DataFrame | None = None,
    labels: tuple[str, str] = ("", ""),
    source: str = "",
) -> Figure:
    """A mark a run at (x, y), a shape a row of the study where they are ten at most, else one an objective.

    Args:
        runs: columns `objective` and those named by `x` and `y`.
        line: a regression with its interval: columns `x`, `mean`, `low`, `high`, in the units of `runs`.
        labels: of the two axes.
    """
    _need(runs, ("objective", x, y))
    fig, ax = plt.subplots(figsize=(WIDTH, 3.2))
    if line is not None:
        ax.fill_between(line["x"], line["low"], line["high"], color=FAINT, alpha=0.6, linewidth=0)
        ax.plot(line["x"], line["mean"], color=INK, linewidth=1.2, label="regression, 95 %")
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.axvline(0, color=INK, linewidth=0.8)
    few = runs["objective"].nunique() <= len(MARKERS) + 1
    key = runs["objective"] if few else runs["objective"].map(_base)
    colours = _colours(dict.fromkeys(key))
    spare = {name: list(MARKERS.values())[k % len(MARKERS)] for k, name in enumerate(colours)}
    for name, rows in runs.groupby(key, sort=False):
        marker = spare[name] if few else MARKERS.get(name, "o")
        ax.plot(rows[x], rows[y], marker, color=colours[name], markersize=6, markeredgecolor="white",
                markeredgewidth=0.6, alpha=0.85, label=_name(name))  # fmt: skip
    ax.set(xlabel=labels[0] or _name(x), ylabel=labels[1] or _name(y))
    fig.legend(loc="outside right upper")
    return _signed(fig, source)


@_styled
def learning_rates(rates: pd.DataFrame, source: str = "") -> Figure:
    """Every learning rate tried for each row of the study: the mean of P and D by which one was chosen (ring).

    `rates`: columns `objective`, `lr`, `chosen`, `pairs/mean`, `zeroshot`. In points below the row's best.
    """
    _need(rates, ("objective", "lr", "chosen", "pairs/mean", "zeroshot"))
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
            ax.annotate(_minus(f"{value:.1f}"), (j, i), ha="center", va="center", fontsize=6.5)
    ax.set_yticks(range(len(names)), [_name(name) for name in names])
    ax.set_xticks(range(table.shape[1]), [f"{rate:g}" for rate in table.columns])
    ax.set(xlabel="learning rate")
    ax.grid(False)
    return _signed(fig, source)


@_styled
def benchmark_scores(table: pd.DataFrame, published: pd.DataFrame | None = None, source: str = "") -> Figure:
    """One panel a benchmark, set and metric: each encoder's value with its interval, chance as a line.

    Args:
        table: rows of `diva_lab.evaluate.evaluate`; an encoder that is not above chance is drawn hollow.
        published: rows of data/published/results.csv, which have panels of their own beneath, one more for each
            backbone, in grey: their sets, backbones and seeds are not ours. What was read second hand is drawn hollow.
    """
    _need(table, ("encoder", "benchmark", "set", "metric", "category", "value", "low", "high", "chance", "note"))
    groups = ["benchmark", "set", "metric"]
    ours = list(table[table["category"] == "all"].groupby(groups, sort=False))
    theirs = [] if published is None else list(published.groupby([*groups, "backbone"], sort=False))
    columns = 3
    above, below = -(-len(ours) // columns), -(-len(theirs) // columns)
    tall = max([table["encoder"].nunique()] + [len(rows) for _, rows in theirs])
    shape = (WIDTH, 0.3 + (above + below) * (0.65 + 0.2 * tall))
    fig, axes = plt.subplots(above + below, columns, figsize=shape, squeeze=False)
    for ax in [*axes.flat[len(ours) : above * columns], *axes.flat[above * columns + len(theirs) :]]:
        ax.set_axis_off()
    for ax, ((benchmark, name, metric), rows) in zip(axes.flat, ours, strict=False):
        colours = _colours(rows["encoder"])
        for y, row in enumerate(rows.itertuples()):
            colour = colours[row.encoder]
            if np.isfinite(row.low):
                ax.plot([100 * row.low, 100 * row.high], [y, y], color=colour, linewidth=1.6)
            ax.plot(100 * row.value, y, marker=MARKERS.get(row.encoder, "o"), color=colour, markersize=5.5,
                    markerfacecolor="white" if row.note else colour)  # fmt: skip
        chance = rows["chance"].iloc[0]
        if np.isfinite(chance):
            ax.axvline(100 * chance, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
        _panel(ax, rows["encoder"], f"{benchmark}: {metric}\n{name}")
    for ax, ((_, name, metric, backbone), rows) in zip(axes.flat[above * columns :], theirs, strict=False):
        for y, row in enumerate(rows.itertuples()):
            hollow = "second hand" in row.source
            ax.plot(row.percent, y, "D", color=GREY, markersize=4, markerfacecolor="white" if hollow else GREY)
        _panel(ax, rows["method"], f"published, {backbone}: {metric}\n{name}")
    return _signed(fig, source)


def _panel(ax: Axes, names: Iterable[str], title: str) -> None:
    names = [_name(name) for name in names]
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="%")
    ax.set_yticks(range(len(names)), [textwrap.shorten(name, 22, placeholder="…") for name in names])
    ax.set_title(title, fontsize=8.5)
    ax.grid(False, axis="y")


# --- the conflict of gradients ------------------------------------------------------------------------------------


def _normal(x: np.ndarray, mean: float, sd: float) -> np.ndarray:
    return np.exp(-(((x - mean) / sd) ** 2) / 2) / (sd * np.sqrt(2 * np.pi))


@_styled
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
    size = _minus(f"mean cosine {mean:+.4f}\neffect size, mean / sd: {mean / spread if spread else np.nan:+.2f}")
    ax.set_title(facts, fontsize=8.5, color=WRONG)
    ax.set_title(size, fontsize=8.5, loc="right", fontweight="normal")
    return _signed(fig, source)


@_styled
def conflict_over_steps(metrics: pd.DataFrame, window: int = 10, source: str = "") -> Figure:
    """cos(g_con, g_rec) at each `step` (column `cos`), its running mean and, below, the running rate of negatives."""
    _need(metrics, ("step", "cos"))
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
    axes[1].yaxis.set_major_formatter(_PERCENT)
    return _signed(fig, source)


@_styled
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
    _need(metrics, ("step", *(blocks or ["cos/<block>" if of == "blocks" else "cos/kind/<kind>"])))
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
    return _signed(fig, source)


@_styled
def term_norms(metrics: pd.DataFrame, window: int = 10, source: str = "") -> Figure:
    """Norms of the terms' gradients over the steps, from the columns `norm_<term>`, on a logarithmic axis."""
    norms = [name for name in metrics if str(name).startswith("norm_")]
    _need(metrics, ("step", *(norms or ["norm_<term>"])))
    metrics = metrics.sort_values("step")
    fig, ax = plt.subplots(figsize=(WIDTH, 2.6))
    for name in norms:
        term = str(name).removeprefix("norm_")
        colour = COLOURS[TERMS.get(term, "none")]
        ax.plot(metrics["step"], metrics[name], color=colour, linewidth=0.7, alpha=0.35)
        ax.plot(metrics["step"], running_mean(metrics[name], window), color=colour)
        ax.annotate(_name(term), (1, metrics[name].tail(window).mean()), (5, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", color=colour, va="center", fontsize=8.5)  # fmt: skip
    ax.set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    return _signed(fig, source)


@_styled
def parts_conflict(metrics: pd.DataFrame, window: int = 5, source: str = "") -> Figure:
    """Cosines among the gradients of more than two terms over the steps, and the norm of each.

    `metrics`: `step`, `norm_<term>` and `<one>~<other>:cos`, as of DCR with `parts`. Each step faint, the running mean
    strong; beside the first panel each pair's mean over all steps.
    """
    pairs = [str(name) for name in metrics if str(name).endswith(":cos")]
    norms = [str(name) for name in metrics if str(name).startswith("norm_")]
    _need(metrics, ("step", *(pairs or ["<one>~<other>:cos"]), *(norms or ["norm_<term>"])))
    metrics = metrics.sort_values("step")
    fig, axes = plt.subplots(2, 1, figsize=(WIDTH, 4.2), sharex=True)
    spare = [COLOURS[name] for name in ("dcr", "dcr-guidance", "genhancer", "none")]
    drawn = [(axes[0], name, spare[k % len(spare)], " ~ ".join(name.removesuffix(":cos").split("~")))
             for k, name in enumerate(pairs)]  # fmt: skip
    for name in norms:
        term = name.removeprefix("norm_")
        drawn.append((axes[1], name, COLOURS[TERMS.get(term, "none")], _name(term)))
    for ax, name, colour, text in drawn:
        ax.plot(metrics["step"], metrics[name], color=colour, linewidth=0.7, alpha=0.4)
        said = f"{text}, mean {metrics[name].mean():+.2f}" if ax is axes[0] else text
        ax.plot(metrics["step"], running_mean(metrics[name], window), color=colour, label=_minus(said))
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes[0].axhline(0, color=INK, linewidth=0.9)
    axes[0].set(ylabel="cosine", ylim=(-1.05, 1.05))
    axes[1].set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    return _signed(fig, source)


# --- probes -------------------------------------------------------------------------------------------------------


def _probed(probes: pd.DataFrame, of: str, measure: str, step: int) -> pd.Series:
    """A measure by bin of timesteps, `all` left out, low noise first."""
    rows = probes[(probes["of"] == of) & (probes["measure"] == measure) & (probes["step"] == step)]
    rows = rows[rows["bin"].astype(str) != "all"]
    return rows.set_index(rows["bin"].astype(int))["value"].sort_index()


def _noise_axis(axis: mpl.axis.Axis, bins: int) -> None:
    names = [str(k) for k in range(bins)]
    names[0], names[-1] = f"{names[0]}\nlow noise", f"{names[-1]}\nhigh noise"
    axis.set_ticks(range(bins), names)


@_styled
def cosine_by_timestep(probes: pd.DataFrame, pairs: Sequence[str] = (), source: str = "") -> Figure:
    """Ridgelines: what a batch's own two gradients have in common, part of the timesteps by part, above its null.

    A ridge is the null, a normal curve of the mean and spread of gradients of *different* batches; on its line the dot
    is the mean over batches of a batch's *own* two gradients with its 95 % interval, at the last probed step, the ring
    at the first. The thick bar at zero holds 95 % of random directions.

    Args:
        probes: one run's records of `diva_lab.evaluation.conflict.probe`: `step`, `bin`, `of`, `measure`, `value`.
        pairs: of objectives, as `a~b`; by default all that are there. A panel each.
    """
    _need(probes, ("step", "bin", "of", "measure", "value"))
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
        ax.set_title(f"{_name(one)} ~ {_name(other)}", fontsize=8.5)
        ax.set(xlabel="cosine")
        ax.grid(False, axis="y")
    _noise_axis(axes[0, 0].yaxis, len(set(probes["bin"].astype(str)) - {"all"}))
    axes[0, 0].set(ylabel="part of the timesteps")
    return _signed(fig, source)


@_styled
def signal_by_timestep(probes: pd.DataFrame, source: str = "") -> Figure:
    """Signal-to-noise ratio of each objective's gradient and its noise scale, part of the timesteps by part.

    Dashed at the first probed step, solid at the last. A ratio below zero is one whose signal noise has swallowed; an
    infinite noise scale is left out.

    `probes`: as in `cosine_by_timestep`. The contrast has no timesteps: its line is level.
    """
    _need(probes, ("step", "bin", "of", "measure", "value"))
    names = list(dict.fromkeys(name for name in probes["of"] if "~" not in str(name)))
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.9))
    steps = dict.fromkeys((int(probes["step"].min()), int(probes["step"].max())))
    for ax, measure in zip(axes, ("snr", "noise_scale"), strict=True):
        for name, colour in _colours(names).items():
            for step, dashes in zip(reversed(steps), ("solid", (0, (3, 2))), strict=False):
                values = _probed(probes, name, measure, step).replace([np.inf, -np.inf], np.nan)
                ax.plot(values.index, values, color=colour, linestyle=dashes, marker=MARKERS.get(name, "o"),
                        markersize=4.5, markeredgecolor="white", markeredgewidth=0.5,
                        label=f"{_name(name)}, step {step}")  # fmt: skip
        _noise_axis(ax.xaxis, len(set(probes["bin"].astype(str)) - {"all"}))
        ax.set(xlabel="part of the timesteps")
    axes[0].axhline(0, color=INK, linewidth=0.8)
    axes[0].set(ylabel="signal / noise of a batch")
    axes[1].set(ylabel="noise scale, pictures", yscale="log")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return _signed(fig, source)


# --- the theory ---------------------------------------------------------------------------------------------------


@_styled
def theorem_bounds(record: pd.DataFrame, source: str = "") -> Figure:
    """Theorem 1 over the steps of training: each bound over what it bounds, a column a timestep.

    Args:
        record: columns `objective`, `step`, `t`, `constants` (`extremes` drawn through, others dashed) and
            `inner_slack`, `inter_slack`, each with `/low` and `/high`: of `evaluation.theory.theorem_1`.
    """
    sides = {"inner_slack": "bound / S_inner", "inter_slack": "bound / S_inter"}
    ends = [f"{side}/{end}" for side in sides for end in ("low", "high")]
    _need(record, ("objective", "step", "t", "constants", *sides, *ends))
    timesteps, kinds = (list(dict.fromkeys(record[name])) for name in ("t", "constants"))
    fig, axes = plt.subplots(2, len(timesteps), figsize=(WIDTH, 4.2), sharex=True, sharey="row", squeeze=False)
    for (_, column), (side, label) in [((i, t), item) for i, t in enumerate(timesteps) for item in sides.items()]:
        ax = axes[list(sides).index(side), timesteps.index(column)]
        for (name, kind), rows in record[record["t"] == column].groupby(["objective", "constants"], sort=False):
            rows, first = rows.sort_values("step"), kind == kinds[0]
            ax.fill_between(rows["step"], rows[f"{side}/low"], rows[f"{side}/high"], color=COLOURS[name], alpha=0.13,
                            linewidth=0)  # fmt: skip
            ax.plot(rows["step"], rows[side], color=COLOURS[name], marker=MARKERS[name], markersize=4, linewidth=1.2,
                    linestyle="-" if first else (0, (3, 2)), label=_name(name) if first else None)  # fmt: skip
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
    return _signed(fig, source)


@_styled
def affine_range(record: pd.DataFrame, limit: float | None = None, source: str = "") -> Figure:
    """Theorem 2: how straight DCR's loss is in the reconstruction error, and how steep, as its negatives part.

    Args:
        record: columns `denominator`, `view`, `negatives`, `cosine`, `t`, and `r2` and `slope` with `/low` and
            `/high`: of `evaluation.theory.theorem_2`, one distance. Negatives that are not `turned` are a point each.
        limit: the slope where negatives make up the denominator.
    """
    rows = {"r2": "1 − R² of the line", "slope": "slope"}
    ends = [f"{name}/{end}" for name in rows for end in ("low", "high")]
    _need(record, ("denominator", "view", "negatives", "cosine", "t", *rows, *ends))
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
    return _signed(fig, source)


@_styled
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
        row[0].set_ylabel(_name(name))
    return _signed(fig, source)
