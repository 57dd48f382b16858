"""The look of all figures: colours, markers, names, and the helpers that several figures share."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
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
LABELS = {
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
styled = mpl.rc_context(STYLE)
CIRCLED = {1: "①", 2: "②"}
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g}")


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


def true_minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def finish(fig: Figure, source: str) -> Figure:
    if isinstance(fig.canvas, FigureCanvasAgg):
        fig.canvas.print_png = _in_48_colours(fig.canvas)
    if source:
        lines = "\n".join(textwrap.wrap(source, int(fig.get_figwidth() * 21)))
        fig.text(0.005, -0.09 / fig.get_figheight(), lines, fontsize=6, color=GREY, va="top", gid="source")
    return fig


def need_columns(frame: pd.DataFrame, columns: Iterable[str]) -> None:
    missing = [name for name in columns if name not in frame]
    if missing:
        raise KeyError(f"the record lacks {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")


def base_objective(key: object) -> str:
    """The objective that a row of the study varies: `dcr` of `dcr, velocity`."""
    return str(key).split(",")[0]


def label_of(key: object) -> str:
    key, base = str(key), base_objective(key)
    return LABELS[key] if key in LABELS else LABELS.get(base, base) + key.removeprefix(base)


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """The fixed colour of each objective and its variants; what is none takes the palette's coloured part in order."""
    spare = iter([*list(COLOURS.values())[3:], *list(COLOURS.values())[:3]] * 9)
    return {name: COLOURS[base_objective(name)] if base_objective(name) in COLOURS else next(spare) for name in names}


def draw_image(ax: Axes, pixels: np.ndarray) -> None:
    ax.imshow(pixels, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=FAINT, linewidth=0.6)


def pattern_scores(reports: pd.DataFrame, suffix: str = "") -> np.ndarray:
    columns = [f"pairs/{detail}{suffix}" for detail in DETAILS]
    need_columns(reports, columns)
    return reports[columns].to_numpy(float)  # [encoders, 9]


def ceiling_scores(ceiling: pd.DataFrame) -> np.ndarray:
    need_columns(ceiling, ("detail", "after"))
    return ceiling.set_index("detail")["after"].reindex(list(DETAILS)).to_numpy(float)  # [9]
