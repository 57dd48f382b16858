"""Small records of every kind, a call of every figure with them, and ways to read what it drew."""

from functools import cache

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from diva_lab import figures
from diva_lab.world import DETAILS, PATTERNS

RNG = np.random.default_rng(0)
N = 60


def report(score: float) -> dict[str, float]:
    rows = {f"pairs/{name}": (score, score - 0.05, score + 0.04) for name in (*DETAILS, "mean")}
    flat = {f"{key}{end}": value[i] for key, value in rows.items() for i, end in enumerate(("", "/low", "/high"))}
    return flat | {"probe/mean": score, "zeroshot": 0.9, "nmi": 0.7, "acc": 0.6, "ari": 0.5}


REPORTS = pd.DataFrame([report(0.3), report(0.5)], index=["none", "dcr"])
CEILING = pd.DataFrame({"detail": list(DETAILS), "before": 0.25, "after": np.linspace(0.5, 0.9, 9)})
METRICS = pd.DataFrame({"step": np.arange(N), "loss": 2.0, "rec": 0.03, "con": 1.97, "cos": RNG.normal(0, 0.1, N)})
METRICS = METRICS.assign(norm_con=30.0, norm_rec=0.01, **{"cos/stem": 0.2, "cos/block0": -0.1, "cos/head": 0.0})
METRICS = METRICS.assign(**{"cos/kind/q": 0.1, "cos/kind/fc1": 0.3, "cos/features": -0.2})
PARTS = pd.DataFrame({"step": np.arange(6), "norm_truth": 0.5, "norm_view": 0.1, "norm_push": 0.4})
PARTS = PARTS.assign(
    **{"truth~view:cos": 0.25, "truth~push:cos": -0.5, "view~push:cos": -0.75, "truth~view:cos/stem": 1.0}
)
PROBES = pd.DataFrame(
    [(step, bin_, of, measure, value + (0.1 if step else 0.0))
     for step in (0, 9) for bin_ in ("all", "0", "1")
     for of, facts in {"diva": {"snr": 0.5, "noise_scale": 16.0}, "dcr": {"snr": -0.05, "noise_scale": np.inf},
                       "diva~dcr": {"cos": 0.3, "cos/low": 0.2, "cos/high": 0.4, "other": 0.0, "other/sd": 0.1,
                                    "random/sd": 0.01}}.items()
     for measure, value in facts.items()],
    columns=["step", "bin", "of", "measure", "value"],
)  # fmt: skip
RUNS = pd.DataFrame(
    {"objective": ["naive", "naive, upgrad", "dcr, velocity"], "cos": [-0.1, 0.0, 0.1], "p": [1.0, 2, 3]}
)
LINE = pd.DataFrame({"x": [-0.1, 0.1], "mean": [1.0, 3.0], "low": [0.5, 2.5], "high": [1.5, 3.5]})
RECOVERED = pd.DataFrame({"condition": ["global"] * 3, "t": [50, 150, 250], "recovered": [0.2, 0.5, 0.4]})
RECOVERED = RECOVERED.assign(low=RECOVERED["recovered"] - 0.1, high=RECOVERED["recovered"] + 0.1)
PATHS = pd.DataFrame(
    [
        {"objective": name, "seed": seed, "step": step, "zeroshot": 0.9 - step / 1e3, "pairs/mean": 0.3 + gain * step}
        for name, gain in (("diva", 1e-3), ("dcr", 2e-3))
        for seed in (0, 1)
        for step in (0, 10, 20)
    ]
).assign(**{"probe/mean": 0.5})
DIFFERENCES = pd.DataFrame(
    [("dcr", "pairs/mean", 0.04, 0.01, 0.07), ("diva", "pairs/mean", 0.02, -0.01, 0.05),
     ("dcr", "nmi", 0.01, np.nan, np.nan)],
    columns=["objective", "measure", "difference", "low", "high"],
)  # fmt: skip
PAIRS = pd.DataFrame(
    {"pattern": list(PATTERNS.values())[:2], "statement_1": "a red disc", "statement_2": "a blue disc"}
)
IMAGES = RNG.integers(0, 256, (2, 2, 8, 8, 3), dtype=np.uint8)
SCORES = {
    "none": pd.DataFrame({"t1i1": [0.3, 0.3], "t1i2": [0.2, 0.3], "t2i1": [0.2, 0.1], "t2i2": [0.1, 0.2]}),
    "dcr": pd.DataFrame({"t1i1": [0.3, 0.1], "t1i2": [0.2, 0.3], "t2i1": [0.1, 0.1], "t2i2": [0.2, 0.2]}),
}
SUMMARY = pd.DataFrame(  # of a folder with three patterns of its own, as `summarise` tells it
    [{"Fur": 0.1, "Fur/low": 0.0, "Fur/high": 0.3, "Ears": 0.2, "Ears/low": 0.1, "Ears/high": 0.4, "Tail": value,
      "Tail/low": 0.2, "Tail/high": 0.9, "mean": 0.3, "mean/low": 0.2, "mean/high": 0.4, "ties": 0.0, "group": 0.1}
     for value in (0.6, 0.8)],
    index=["openai-l14", "mine"],
)  # fmt: skip
BENCHMARKS = pd.DataFrame(
    [("none", "knn", "cifar10", "top-1", "all", 0.2, 0.1, 0.3, 0.1, ""),
     ("dcr", "knn", "cifar10", "top-1", "all", 0.1, 0.05, 0.2, 0.1, "not above chance"),
     ("none", "clustering", "cifar10", "nmi", "all", 0.4, np.nan, np.nan, np.nan, ""),
     ("none", "mmvp-vlm", "mmvp", "pairs", "Texts", 0.9, 0.8, 1.0, 0.25, "")],
    columns=["encoder", "benchmark", "set", "metric", "category", "value", "low", "high", "chance", "note"],
)  # fmt: skip
PUBLISHED = pd.DataFrame(
    [("clustering", "six sets", "nmi", "openai-l14", "dcr", 76.0, "a paper (second hand)"),
     ("clustering", "six sets", "nmi", "siglip-so400m", "none", 78.0, "a paper (second hand)"),
     ("clustering", "six sets", "nmi", "siglip-so400m", "dcr", 83.0, "a paper")],
    columns=["benchmark", "set", "metric", "backbone", "method", "percent", "source"],
)  # fmt: skip
REPLICATIONS = pd.DataFrame(
    [("clustering", "six sets", "nmi", "all", "openai-l14", "none", 70.0, "official code", "owner/CODE issue 1"),
     ("clustering", "six sets", "nmi", "Texts", "openai-l14", "none", 60.0, "official code", "owner/CODE issue 1"),
     ("clustering", "six sets", "nmi", "all", "openai-l14", "dcr", np.nan, "not reproduced", "owner/CODE issue 2"),
     ("clustering", "other sets", "nmi", "all", "openai-l14", "dcr", 50.0, "official code", "owner/CODE issue 3")],
    columns=["benchmark", "set", "metric", "category", "backbone", "method", "percent", "finding", "source"],
)  # fmt: skip
QUALITY = pd.DataFrame({"attribute": ["class", *DETAILS], "share": 0.8, "low": 0.75, "high": 0.84, "n": 200})
BOUNDS = pd.DataFrame(
    [
        {
            "objective": name,
            "step": step,
            "t": t,
            "constants": kind,
            "inner_slack": 2 + step + (kind == "quantiles"),
            "inter_slack": -step - (kind == "quantiles"),
        }
        for name in ("diva", "dcr")
        for step in (0, 1, 2)
        for t in (100, 900)
        for kind in ("extremes", "quantiles")
    ]
)
BOUNDS = BOUNDS.assign(
    **{
        f"{side}/{end}": BOUNDS[side] + d
        for side in ("inner_slack", "inter_slack")
        for end, d in (("low", -0.1), ("high", 0.1))
    }
)
AFFINE = pd.DataFrame(
    [
        {"denominator": d, "view": view, "negatives": "turned", "cosine": s, "t": t, "r2": 0.9 + s / 10, "slope": s}
        for d in ("shared", "own")
        for view in ("moves", "stays")
        for s in (1, 0, -1)
        for t in (100, 900)
    ]
)
AFFINE = AFFINE.assign(**{f"{name}/{end}": AFFINE[name] for name in ("r2", "slope") for end in ("low", "high")})
READABLE = pd.DataFrame(
    [(m, b, p, v, v - 0.1, v + 0.05, 8) for b, v in (("all", 0.7), ("0", 0.1))
     for m in ("known", "readable: diva", "said", "seen") for p in ("Texts", "Quantity and Count", "mean")],
    columns=["measure", "bin", "pattern", "value", "low", "high", "n"],
)  # fmt: skip
DOSE = pd.DataFrame(
    [(a, s, 10_000 + s, i, 0.2 + g * i / 1000, 0.5, 0.9 - i / 10_000, 0.8)
     for a, g in (("image-only", 0), ("anchored", 0.1)) for s in (0, 1) for i in (0, 500, 1000)],
    columns=["alignment", "seed", "align_seed", "images", "pairs/mean", "probe/mean", "zeroshot", "nmi"],
)  # fmt: skip
MIXES = pd.DataFrame(
    [(o, a, s, 10_000 + s, m, m == best, 0.2 + gain * m + s / 100, 0.9 - m / 10, 0.8 - m / 10)
     for o, a, gain, best in (("diva", "anchored", 0.2, 1.0), ("diva, mixed", "anchored", 0.4, 0.5),
                              ("caption-contrast", "none", 0.3, 1.0))
     for s in (0, 1) for m in (0.0, 0.5, 1.0)],
    columns=["objective", "alignment", "seed", "align_seed", "mix", "chosen", "pairs/mean", "zeroshot", "nmi"],
)  # fmt: skip
MIXES.loc[MIXES["alignment"] == "none", "align_seed"] = np.nan
PUSHES = pd.DataFrame({"pairs/mean": [0.19, 0.18], "zeroshot": [0.85, 0.88], "nmi": [0.7, 0.75]})
GAINS = pd.DataFrame({"alignment": ["anchored", "anchored", "placebo"], "readable": [0.8, 0.9, 0.5]})
GAINS = GAINS.assign(gain=[9.0, 20.0, -1.0])
MAPS = {"global": np.broadcast_to(np.arange(8.0), (4, 4, 8)), "recap": RNG.normal(0, 1, (4, 4, 8))}
PATCH_MAPS = {"changed": np.eye(4, dtype=bool)[None].repeat(len(IMAGES), 0)}
PATCH_MAPS |= {name: RNG.random((len(IMAGES), 4, 4)) for name in ("before", "after")}
CHOSEN = pd.DataFrame(
    [
        (of, k, size, 0.01 * k, 0, 0.02 * k, 0.001)
        for of in ("checkpoints", "seeds")
        for size in (135, 2700)
        for k in (1, 2)
    ],
    columns=["of", "choices", "size", "reported", "reported/low", "reported/high", "held"],
)
PATCH_COSINES = {name: 0.9 - 0.1 * RNG.random((n, n)) for name, n in (("none", 16), ("diva", 4))}
SAID = {"none": [0.3, 0.2], "diva": [0.1, -0.2]}
LOSSES = RNG.normal([0.03, 0.04], 0.001, (24, 2))
ANSWERS = {"none": [["red", "red"], ["one", "two"]], "diva": [["red", "blue"], ["two", "one"]]}

DRAWN = {
    "readability": lambda source="": figures.readability({"before": READABLE, "after": READABLE}, source),
    "dose_curves": lambda source="": figures.dose_curves(DOSE, source=source),
    "gain_by_readability": lambda source="": figures.gain_by_readability(GAINS, source),
    "front": lambda source="": figures.front(MIXES, PUSHES, source=source),
    "image_grid": lambda source="": figures.image_grid(IMAGES[0], ["one", "two"], source=source),
    "minimal_pairs": lambda source="": figures.minimal_pairs(PAIRS, IMAGES, SCORES, source),
    "selection": lambda source="": figures.selection(CHOSEN, source),
    "answers": lambda source="": figures.answers(["Colour?", "How many?"], IMAGES, ANSWERS["diva"], ANSWERS, source),
    "patch_maps": lambda source="": figures.patch_maps(IMAGES, PATCH_MAPS, source),
    "own_image": lambda source="": figures.own_image(
        IMAGES[0, 0],
        ["a photo of one", "a photo of two"],
        SAID,
        dict(zip(SAID, IMAGES[1], strict=True)),
        LOSSES,
        source,
    ),
    "patch_similarity": lambda source="": figures.patch_similarity(IMAGES[0, 0], PATCH_COSINES, (0.3, 0.8), source),
    "drawn_attributes": lambda source="": figures.drawn_attributes(QUALITY, {"class": 0.8}, source),
    "pair_scores": lambda source="": figures.pair_scores(REPORTS, CEILING, source),
    "radar": lambda source="": figures.radar(REPORTS, CEILING, source),
    "recovered_fraction": lambda source="": figures.recovered_fraction(
        RECOVERED, RECOVERED.rename(columns={"t": "step"}), source
    ),
    "loss_curves": lambda source="": figures.loss_curves({"naive": METRICS}, source=source),
    "trade_off": lambda source="": figures.trade_off(PATHS, source=source),
    "objective_differences": lambda source="": figures.objective_differences(DIFFERENCES, source),
    "conflict_histogram": lambda source="": figures.conflict_histogram(
        METRICS["cos"].to_numpy(), (0.5, 0.4, 0.6), (0.0, 0.1), source=source
    ),
    "conflict_over_steps": lambda source="": figures.conflict_over_steps(METRICS, source=source),
    "conflict_by_block": lambda source="": figures.conflict_by_block(METRICS, source=source),
    "benchmark_scores": lambda source="": figures.benchmark_scores(BENCHMARKS, PUBLISHED, source, REPLICATIONS),
    "term_norms": lambda source="": figures.term_norms(METRICS, source=source),
    "theorem_bounds": lambda source="": figures.theorem_bounds(BOUNDS, source),
    "affine_range": lambda source="": figures.affine_range(AFFINE, 2.5, source),
    "message_maps": lambda source="": figures.message_maps(MAPS, source=source),
    "claims": lambda source="": figures.claims(DIFFERENCES, {"Does it?": ["diva", "dcr, velocity"]}, source),
    "runs_scatter": lambda source="": figures.runs_scatter(RUNS, "cos", "p", LINE, source=source),
    "parts_conflict": lambda source="": figures.parts_conflict(PARTS, source=source),
    "cosine_by_timestep": lambda source="": figures.cosine_by_timestep(PROBES, source=source),
    "signal_by_timestep": lambda source="": figures.signal_by_timestep(PROBES, source),
}


@cache
def figure(name: str) -> Figure:
    """A figure to read from; one that is changed or saved is drawn anew."""
    return DRAWN[name]()


def texts(fig: Figure) -> list[str]:
    """Every line of text in the figure."""
    lines = (text.get_text().splitlines() for text in fig.findobj(matplotlib.text.Text))
    return [line.strip() for text in lines for line in text]


def lines(ax, colour: str) -> list[np.ndarray]:
    """The points of the lines of one colour; a legend's entries, which have none, are left out."""
    drawn = [line.get_xydata() for line in ax.lines if to_hex(line.get_color()) == colour.lower()]
    return [points for points in drawn if len(points)]


def legend(fig: Figure) -> list[str]:
    return [text.get_text() for text in fig.legends[0].get_texts()]
