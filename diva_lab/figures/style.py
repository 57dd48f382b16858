"""The look of all figures: colours, markers, names, and the helpers that several figures share."""

import functools
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from numbers import Real

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogFormatter

from diva_lab.world import PATTERNS

HOUSE = INK, GREY, FAINT, RIGHT, WRONG = "#262B33", "#6B7280", "#D9DCE1", "#0072B2", "#D55E00"
# one colour and one marker for each objective, in every figure; Okabe and Ito's palette, safe for the colour-blind
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
    "caption-contrast": "#D55E00",
    "un2clip": "#1B3A6B",
    "kuea": "#8A8D00",
    "soup": "#8C4A2F",
}
MARKERS = dict(zip(COLOURS, "oXDp^vsP*h<>8", strict=True))
# a term of a loss has the colour of an objective: its own, or for DCR's parts one that pulls alike
TERMS = {"loss": "none", "rec": "diva", "con": "contrastive", "dcr": "dcr", "cap": "caption-contrast"}
TERMS |= {"truth": "diva", "view": "contrastive", "push": "naive", "kernel": "kuea", "keep": "un2clip"}
TERMS = {term: COLOURS[objective] for term, objective in TERMS.items()}
LABELS = {
    "none": "none (original)",
    "perturb-norm": "perturbed, DCR's norms",
    "perturb-drift": "perturbed, DCR's drift",
    "perturb-norm, own": "random push, same norms",  # matched to a run of any objective; those above to DCR's
    "perturb-drift, own": "random push, same drift",
    "diva": "DIVA",
    "contrastive": "contrastive",
    "naive": "naive sum",
    "dcr": "DCR",
    "genhancer": "GenHancer",
    "un2clip": "un2CLIP",
    "kuea": "KUEA",
    "soup": "soup of runs",
    "dcr-guidance": "DCR, guided (ours)",
    "caption-contrast": "CLIP's loss on captions",
    "truth": "pull to the truth",
    "view": "pull to the view",
    "push": "push of the negatives",
    "kernel": "kernel alignment",
    "keep": "distance to the original",
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
    "emoji/mean": "emoji by name (P)",
    "emoji-match/mean": "emoji without text (P)",
    "conflict_rate": "steps in conflict",
    "seconds_per_step": "seconds a step",
    **{f"{start}{detail}": pattern for start in ("", "pairs/") for detail, pattern in PATTERNS.items()},
}
ORIGINAL = {"markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.6}  # of where a path of training starts
MEASURES = ("pairs/mean", "probe/mean", "zeroshot", "nmi", "acc", "ari")
DIVERGING = sns.blend_palette([WRONG, "#F3C5A5", "#FAFAF8", "#A9CDE6", RIGHT], as_cmap=True)
CHANCE = 0.25  # share of pairs that guessing gets right by MMVP's rule: two texts, each right half of the time
WIDTH = 7.6  # inches, of every figure
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a statement or a name is a `$`
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
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g}")  # of an axis whose label ends in %
# keywords by which seaborn draws the rows of `with_intervals`: lines with bands
BANDS = {"estimator": "median", "errorbar": ("pi", 100), "err_kws": {"alpha": 0.15, "linewidth": 0}}


def trace(environment: Mapping[str, object], *facts: str) -> str:
    """The line under a figure: `facts` (run ids, seeds), then git sha and versions of `provenance.environment()`."""
    versions = dict(environment.get("versions", {}))
    short = (f"{name} {versions[name]}" for name in ("torch", "diffusers", "open_clip_torch") if name in versions)
    return " · ".join([*facts, f"git {environment.get('git', 'unknown')}", *short])


def apply(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """The decorator of every figure's function: this style, and the docstring's first lines as the figure's label."""

    @functools.wraps(draw)
    def styled(*args: object, **options: object) -> Figure:
        with mpl.rc_context(STYLE):
            fig = draw(*args, **options)
        fig.set_label(" ".join((draw.__doc__ or "").split("\n\n")[0].replace("`", "").split()))
        return fig

    return styled


def running_mean(values: Sequence[float] | np.ndarray | pd.Series, window: int) -> np.ndarray:
    """Mean over the last `window` values at each position; NaN until half of them are there."""
    return pd.Series(np.asarray(values, float)).rolling(window, min_periods=(window + 1) // 2).mean().to_numpy()


def finish(fig: Figure, source: str) -> Figure:
    """Write `source` small under the figure. Returns the figure.

    Texts that matplotlib makes later, when it draws, are literal too; powers of ten on a logarithmic axis are formulas.
    """
    axes = [axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]
    powers = [axis for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)]
    powers = {label for axis in powers for label in axis.get_ticklabels(which="both")}
    for text in fig.findobj(Text):
        text.set_parse_math(text in powers)
    if source:
        lines = "\n".join(textwrap.wrap(shorten(source, 2000), int(fig.get_figwidth() * 21)))
        fig.text(0.005, -0.09 / fig.get_figheight(), lines, fontsize=6, color=GREY, va="top", gid="source",
                 parse_math=False)  # fmt: skip
    return fig


def require_columns(record: pd.DataFrame, columns: Iterable[str]) -> None:
    """Raise a KeyError that names the columns which `record` lacks and those which it has."""
    missing = [name for name in columns if name not in record]
    if missing:
        raise KeyError(f"the record lacks {', '.join(missing)}; it has {', '.join(map(str, record.columns))}")


def minus_signs(text: str) -> str:
    """`text` with minus signs in place of the hyphens of its numbers, as matplotlib writes its own."""
    return re.sub(r"(?:(?<!\w)|(?<=\de))-(?=[.\d])", "\N{MINUS SIGN}", text)


def shorten(text: object, most: int = 120) -> str:
    """A text of the data on one line of at most `most` characters, cut between words where it has words."""
    text = " ".join(str(text).split())
    short = textwrap.shorten(text, most, placeholder="…")
    return short if short != "…" else f"{text[: most - 1]}…"


def base_objective(key: object) -> str:
    """The objective that a row of the study varies: `dcr` of `dcr, velocity`."""
    return str(key).split(",")[0]


def label_of(key: object) -> str:
    """The name that a figure shows for a key of a record; a variant has its objective's name and what it changes."""
    key, base = str(key), base_objective(key)
    return LABELS[key] if key in LABELS else shorten(LABELS.get(base, base) + key.removeprefix(base), 60)


def marker_of(key: object) -> str:
    """The marker of an objective and its variants; a dot for everything else."""
    return MARKERS.get(base_objective(key), "o")


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """The fixed colour of each objective and its variants; other names take those that these leave."""
    names = list(names)
    fixed = {name: COLOURS[base_objective(name)] for name in names if base_objective(name) in COLOURS}
    palette = [*list(COLOURS.values())[3:], *list(COLOURS.values())[:3]]
    spare = cycle([colour for colour in palette if colour not in fixed.values()] or palette)
    return {name: fixed[name] if name in fixed else next(spare) for name in names}


def draw_image(ax: Axes, pixels: np.ndarray, **colours: object) -> None:
    """Show an image in a thin frame, without ticks; `colours` are `cmap`, `vmin`, `vmax` for one of one channel."""
    ax.imshow(pixels, interpolation="nearest", **colours)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=FAINT, linewidth=0.6)


def make_panels(count: int, columns: int, height: float, **options: object) -> tuple[Figure, list[Axes]]:
    """A figure of `height` inches with `count` panels, `columns` in a row; what is left of the last row stays empty."""
    fig, axes = plt.subplots(-(-count // columns), columns, figsize=(WIDTH, height), squeeze=False, **options)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return fig, list(axes.flat[:count])


def move_legend(fig: Figure, place: str = "outside upper right", columns: int = 4) -> None:
    """Put one legend for all panels outside of them: every key once, by its label."""
    entries = {}
    for ax in fig.axes:
        handles, keys = ax.get_legend_handles_labels()
        entries |= dict(zip(keys, handles, strict=True))
        if ax.get_legend():
            ax.get_legend().remove()
    fig.legend(entries.values(), [label_of(key) for key in entries], loc=place, ncols=columns)


def with_intervals(record: pd.DataFrame, value: str, ends: tuple[str, str] | None = None) -> pd.DataFrame:
    """Three rows for each row of `record`: with its value and with both ends of its interval in the column `value`.

    Seaborn draws intervals of samples, so these are the samples: their median is the value, their range the interval.
    `ends` are the columns of the interval, by default <value>/low and <value>/high.
    """
    table = record[[value, *(ends or (f"{value}/low", f"{value}/high"))]]
    return pd.concat(
        [record.assign(**{value: column}) for column in (table.min(axis=1), table[value], table.max(axis=1))]
    )


def draw_interval(
    ax: Axes, y: Real, value: Real, low: Real, high: Real, colour: str, marker: str = "o", undecided: bool = False
) -> None:
    """A dot at height `y` and its interval, where there is one.

    A hollow dot means one thing in every figure: `undecided`, no effect is shown. Its interval holds zero, or there is
    none, or the score is not above chance. No other mark is hollow.
    """
    if np.isfinite([low, high]).all():
        ax.plot([low, high], [y, y], color=colour)
    ax.plot(value, y, marker, color=colour, markersize=5.5, markerfacecolor="white" if undecided else colour)


def draw_steps(
    ax: Axes, steps: pd.Series, values: pd.Series, window: int, colour: str, label: str | None = None
) -> None:
    """The value of each step as a faint line, the mean of the last `window` as a strong one."""
    ax.plot(steps, values, color=colour, linewidth=0.7, alpha=0.4)
    ax.plot(steps, running_mean(values, window), color=colour, label=label)
