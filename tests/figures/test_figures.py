import io
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from diva_lab import figures
from diva_lab.figures import style
from diva_lab.objectives import OBJECTIVES
from diva_lab.training.settings import CONTROLS
from diva_lab.world import DETAILS, PATTERNS

matplotlib.use("agg")
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
RATES = pd.DataFrame({"objective": ["dcr", "dcr", "naive, upgrad"], "lr": [1e-5, 1e-4, 1e-5]})
RATES = RATES.assign(chosen=[False, True, True], zeroshot=[0.9, 0.9, 0.8], **{"pairs/mean": [0.2, 0.3, 0.2]})
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
PICTURES = RNG.integers(0, 256, (2, 2, 8, 8, 3), dtype=np.uint8)
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
QUALITY = pd.DataFrame({"attribute": ["class", *DETAILS], "share": 0.8, "low": 0.75, "high": 0.84, "n": 200})
BOUNDS = pd.DataFrame(
    [
        {"objective": name, "step": step, "t": t, "constants": kind, "inner_slack": 2 + step, "inter_slack": -step}
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
MAPS = {"global": np.broadcast_to(np.arange(8.0), (4, 4, 8)), "recap": RNG.normal(0, 1, (4, 4, 8))}

DRAWN = {
    "image_grid": lambda source="": figures.image_grid(PICTURES[0], ["one", "two"], source=source),
    "minimal_pairs": lambda source="": figures.minimal_pairs(PAIRS, PICTURES, SCORES, source),
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
    "benchmark_scores": lambda source="": figures.benchmark_scores(BENCHMARKS, PUBLISHED, source),
    "term_norms": lambda source="": figures.term_norms(METRICS, source=source),
    "theorem_bounds": lambda source="": figures.theorem_bounds(BOUNDS, source),
    "affine_range": lambda source="": figures.affine_range(AFFINE, 2.5, source),
    "message_maps": lambda source="": figures.message_maps(MAPS, source=source),
    "claims": lambda source="": figures.claims(DIFFERENCES, {"Does it?": ["diva", "dcr, velocity"]}, source),
    "runs_scatter": lambda source="": figures.runs_scatter(RUNS, "cos", "p", LINE, source=source),
    "learning_rates": lambda source="": figures.learning_rates(RATES, source),
    "parts_conflict": lambda source="": figures.parts_conflict(PARTS, source=source),
    "cosine_by_timestep": lambda source="": figures.cosine_by_timestep(PROBES, source=source),
    "signal_by_timestep": lambda source="": figures.signal_by_timestep(PROBES, source),
}


@pytest.fixture(autouse=True)
def _no_figure_left_open():
    yield
    plt.close("all")


def texts(fig: Figure) -> str:
    return "\n".join(text.get_text() for text in fig.findobj(matplotlib.text.Text))


def lines(ax, colour: str) -> list[np.ndarray]:
    return [line.get_xydata() for line in ax.lines if to_hex(line.get_color()) == colour.lower()]


def test_figures_know_no_torch():
    code = "import sys, diva_lab.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_a_figure_of_one_width_with_its_source_under_it(name):
    fig = DRAWN[name]("run dcr-s0 · git abc")
    assert isinstance(fig, Figure)
    assert fig.get_figwidth() == style.WIDTH
    (source,) = (text for text in fig.texts if text.get_gid() == "source")
    assert source.get_text() == "run dcr-s0 · git abc"
    assert not any(text.get_gid() == "source" for text in DRAWN[name]().texts)


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_saved_small_and_to_the_same_bytes_each_time(name, tmp_path):
    first, second = (figures.save(DRAWN[name](), tmp_path / "new" / f"{i}.png").read_bytes() for i in range(2))
    assert first == second
    assert len(first) < 60_000


def test_the_style_stays_inside_the_figures():
    before = dict(matplotlib.rcParams)
    DRAWN["pair_scores"]()
    assert dict(matplotlib.rcParams) == before


def test_each_objective_has_a_colour_and_a_marker_of_its_own():
    assert set(figures.COLOURS) == {*CONTROLS, *OBJECTIVES}
    assert len(set(figures.COLOURS.values())) == len(set(figures.MARKERS.values())) == len(figures.COLOURS)


def test_a_palette_of_48_colours_keeps_the_worlds_hues():
    hues = np.array([(242, 31, 31), (242, 242, 31), (31, 242, 31), (31, 242, 242), (31, 31, 242), (242, 31, 242)])
    noise = RNG.integers(-8, 9, (6, 32, 32, 3))
    fig = figures.image_grid((hues[:, None, None] + noise).clip(0, 255).astype(np.uint8), [""] * 6)
    fig.savefig(buffer := io.BytesIO(), format="png")
    pixels = np.asarray(Image.open(buffer).convert("RGB")).reshape(-1, 3).astype(int)
    for hue in hues:
        near = pixels[np.abs(pixels - hue).max(axis=1) <= 12]
        assert len(near) > 1000
        assert np.abs(near.mean(axis=0) - hue).max() < 4


def test_a_missing_column_is_named():
    with pytest.raises(KeyError, match="cos; it has step"):
        figures.conflict_over_steps(METRICS[["step"]])
    with pytest.raises(KeyError, match="norm_<term>"):
        figures.term_norms(METRICS[["step", "loss"]])


def test_the_image_grid_shows_every_image_over_its_caption():
    fig = figures.image_grid(PICTURES.reshape(4, 8, 8, 3), list("abcd"), columns=3)
    shown = [ax for ax in fig.axes if ax.images]
    assert [ax.get_xlabel() for ax in shown] == list("abcd")
    for ax, pixels in zip(shown, PICTURES.reshape(4, 8, 8, 3), strict=True):
        assert np.array_equal(ax.images[0].get_array(), pixels)
    with pytest.raises(ValueError, match="4 images, but 1 captions"):
        figures.image_grid(PICTURES.reshape(4, 8, 8, 3), ["a"])


def test_minimal_pairs_tick_what_the_rule_says_and_a_tie_chooses_image_2():
    fig = figures.minimal_pairs(PAIRS, PICTURES, SCORES)
    ticks = [[t.get_text() for t in ax.texts if t.get_text() in "✓✗"] for ax in fig.axes if len(ax.patches) == 4]
    none_1, dcr_1, none_2, dcr_2 = ticks
    assert (none_1, none_2) == (["✓", "✗"], ["✗", "✓"])  # the second pair: a tie for text 1
    assert (dcr_1, dcr_2) == (["✓", "✓", "✓"], ["✗", "✓"])
    assert "none (original): 0 of 2" in texts(fig)
    assert "DCR: 1 of 2" in texts(fig)


def test_minimal_pairs_refuses_scores_of_other_pairs():
    with pytest.raises(ValueError, match="1 scored by dcr"):
        figures.minimal_pairs(PAIRS, PICTURES, SCORES | {"dcr": SCORES["dcr"][:1]})


def test_pair_scores_carry_values_intervals_and_ceiling():
    ax = figures.pair_scores(REPORTS, CEILING).axes[0]
    for container, score in zip(ax.containers, (0.3, 0.5), strict=True):
        points, _, (bars,) = container.lines
        assert points.get_xdata() == pytest.approx(np.full(10, score))
        ends = np.array(bars.get_segments())[:, :, 0]
        assert ends == pytest.approx(np.tile([score - 0.05, score + 0.04], (10, 1)))
    (ceiling,) = (c for c in ax.collections if c.get_label() == "supervised ceiling")
    drawn = np.array(ceiling.get_segments())[:, 0, 0]
    assert drawn == pytest.approx([*CEILING["after"], CEILING["after"].mean()])


def test_the_radar_closes_each_line_and_draws_the_ceiling():
    ax = figures.radar(REPORTS, CEILING).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert drawn["DCR"] == pytest.approx(np.full(10, 0.5))
    assert drawn["supervised ceiling"] == pytest.approx([*CEILING["after"], CEILING["after"][0]])


def test_the_radar_has_the_patterns_of_any_folder_as_its_axes():
    ax = figures.radar(SUMMARY).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["Fur", "Ears", "Tail"]
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert drawn["mine"] == pytest.approx([0.1, 0.2, 0.8, 0.1]) and set(drawn) == {"chance", "openai-l14", "mine"}
    with pytest.raises(KeyError, match="<pattern>/low; it has mean, ties"):
        figures.radar(SUMMARY[["mean", "ties"]])


def test_benchmark_scores_draw_value_interval_and_chance_hollow_where_not_above_it():
    ax = figures.benchmark_scores(BENCHMARKS).axes[0]
    assert ax.get_title(loc="left") == "knn: top-1\ncifar10"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["none (original)", "DCR"]
    none, dcr = (lines(ax, figures.COLOURS[name]) for name in ("none", "dcr"))
    assert [line.tolist() for line in none] == [[[10, 0], [30, 0]], [[20, 0]]]
    assert [line.tolist() for line in dcr] == [[[5, 1], [20, 1]], [[10, 1]]]
    faces = [line.get_markerfacecolor() for line in ax.lines if len(line.get_xdata()) == 1]
    assert faces == [figures.COLOURS["none"], "white"]
    (chance,) = lines(ax, style.GREY)
    assert chance[:, 0].tolist() == [10, 10]


def test_benchmark_scores_have_a_panel_for_each_metric_of_the_whole_and_leave_patterns_out():
    fig = figures.benchmark_scores(BENCHMARKS)
    titles = [ax.get_title(loc="left") for ax in fig.axes if ax.lines]
    assert titles == ["knn: top-1\ncifar10", "clustering: nmi\ncifar10"]
    assert len(fig.axes[1].lines) == 1  # neither interval nor chance are known


def test_published_numbers_have_panels_of_their_own_and_second_hand_ones_are_hollow():
    fig = figures.benchmark_scores(BENCHMARKS, PUBLISHED)
    ours, theirs = fig.axes[:3], fig.axes[3:]
    titles = [ax.get_title(loc="left") for ax in theirs if ax.lines]
    assert titles == ["published, openai-l14: nmi\nsix sets", "published, siglip-so400m: nmi\nsix sets"]
    assert not any(line.get_marker() == "D" for ax in ours for line in ax.lines)
    drawn = [(line.get_xydata().tolist(), line.get_markerfacecolor()) for line in theirs[1].lines]
    assert drawn == [([[78, 0]], "white"), ([[83, 1]], style.GREY)]
    assert [to_hex(line.get_color()) for ax in theirs for line in ax.lines] == [style.GREY.lower()] * 3


def test_the_recovered_fraction_is_drawn_in_the_order_of_the_timesteps():
    ax = figures.recovered_fraction(RECOVERED.sample(frac=1, random_state=0)).axes[0]
    (curve,) = (line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 3)
    assert curve == pytest.approx(RECOVERED[["t", "recovered"]].to_numpy())


def test_loss_curves_show_every_step_and_the_running_mean():
    table = METRICS[["step", "loss"]].assign(dcr=np.arange(N, dtype=float), loss=np.arange(N, dtype=float))
    every, mean = lines(figures.loss_curves({"dcr": table}, window=4).axes[0], figures.COLOURS["dcr"])
    assert every == pytest.approx(table[["step", "dcr"]].to_numpy())
    assert mean[3:, 1] == pytest.approx(np.arange(3, N) - 1.5)


def test_the_running_mean_waits_for_half_of_its_window():
    mean = figures.running_mean(np.arange(1.0, 7.0), 4)
    assert mean == pytest.approx([np.nan, 1.5, 2, 2.5, 3.5, 4.5], nan_ok=True)


def test_the_trade_off_goes_from_before_to_the_mean_of_the_last_step():
    ax = figures.trade_off(PATHS, [("zeroshot", "pairs/mean")]).axes[0]
    ends = {line.get_label(): line.get_xydata()[-1] for line in ax.lines if not line.get_label().startswith("_")}
    assert ends["DIVA"] == pytest.approx([0.88, 0.32])
    assert ends["DCR"] == pytest.approx([0.88, 0.34])
    assert ends["before"] == pytest.approx([0.9, 0.3])


def test_differences_are_in_points_hollow_where_undecided_and_without_an_interval_for_one_seed():
    fig = figures.objective_differences(DIFFERENCES)
    assert "+4.0 [+1.0, +7.0]" in texts(fig)
    assert "+2.0 [\N{MINUS SIGN}1.0, +5.0]" in texts(fig)
    assert "+1.0" in texts(fig).splitlines()
    dots = {to_hex(line.get_color()): line for line in fig.axes[0].lines if len(line.get_xdata()) == 1}
    assert to_hex(dots[figures.COLOURS["dcr"].lower()].get_markerfacecolor()) == figures.COLOURS["dcr"].lower()
    assert dots[figures.COLOURS["diva"].lower()].get_markerfacecolor() == "white"


def test_the_histograms_counts_sum_to_the_number_of_steps_and_no_bar_has_both_signs():
    cosines = METRICS["cos"].to_numpy()
    ax = figures.conflict_histogram(cosines, (0.5, 0.4, 0.6)).axes[0]
    bars = [bar for bar in ax.patches if bar.get_height()]
    assert sum(bar.get_height() for bar in bars) == N
    negative = [bar for bar in bars if to_hex(bar.get_facecolor()) == style.WRONG.lower()]
    assert sum(bar.get_height() for bar in negative) == (cosines < 0).sum()
    assert all(bar.get_x() + bar.get_width() <= 1e-9 for bar in negative)


def test_the_histogram_states_the_rate_its_interval_and_the_effect_size():
    cosines = METRICS["cos"].to_numpy()
    said = texts(figures.conflict_histogram(cosines, (0.54, 0.45, 0.63)))
    assert "negative in 54 % of 60 steps\n95 % interval 45 to 63 %" in said
    assert f"{cosines.mean() / cosines.std(ddof=1):+.2f}".replace("-", "\N{MINUS SIGN}") in said


def test_cosines_over_steps_are_all_there_with_their_running_mean():
    ax = figures.conflict_over_steps(METRICS, window=10).axes[0]
    assert np.asarray(ax.collections[0].get_offsets()) == pytest.approx(METRICS[["step", "cos"]].to_numpy())
    mean = ax.lines[0].get_ydata()
    assert mean[9:] == pytest.approx(METRICS["cos"].rolling(10).mean()[9:].to_numpy())


def test_the_heat_map_has_a_row_a_block_and_stretches_of_steps_that_average_to_the_whole():
    fig = figures.conflict_by_block(METRICS.assign(**{"cos/stem": METRICS["cos"]}), bins=12)
    cells = fig.axes[0].images[0].get_array()
    assert cells.shape == (4, 12)
    assert cells[0].mean() == pytest.approx(METRICS["cos"].mean())
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["stem", "block0", "head", "features"]


def test_the_heat_map_of_kinds_has_no_block_and_that_of_blocks_no_kind():
    fig = figures.conflict_by_block(METRICS, of="kinds")
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["q", "fc1"]
    assert np.asarray(fig.axes[0].images[0].get_array())[:, 0] == pytest.approx([0.1, 0.3])
    with pytest.raises(ValueError, match="unknown parts 'heads'; expected blocks or kinds"):
        figures.conflict_by_block(METRICS, of="heads")
    with pytest.raises(KeyError, match="cos/kind/<kind>"):
        figures.conflict_by_block(METRICS[["step", "cos", "cos/head"]], of="kinds")


def test_norms_are_drawn_on_a_logarithmic_axis():
    ax = figures.term_norms(METRICS).axes[0]
    assert ax.get_yscale() == "log"
    assert sorted({float(line.get_ydata()[-1]) for line in ax.lines}) == pytest.approx([0.01, 30.0])


def test_the_bounds_have_a_column_a_timestep_and_a_line_an_objective_and_way_to_read_constants():
    fig = figures.theorem_bounds(BOUNDS.sample(frac=1, random_state=0).sort_values("t", kind="stable"))
    assert [ax.get_title(loc="left") for ax in fig.axes[:2]] == ["t = 100", "t = 900"]
    for ax, side in ((fig.axes[0], [2, 3, 4]), (fig.axes[3], [0, -1, -2])):
        for colour in (figures.COLOURS["diva"], figures.COLOURS["dcr"]):
            assert [line[:, 1].tolist() for line in lines(ax, colour)] == [side, side]


def test_the_affine_range_has_a_panel_a_form_and_a_line_a_timestep_in_the_order_of_the_cosines():
    fig = figures.affine_range(AFFINE)
    assert [ax.get_title(loc="left") for ax in fig.axes[:4]] == [
        f"{denominator} denominator\nview {view}" for view in ("moves", "stays") for denominator in ("shared", "own")
    ]
    drawn = [line.get_xydata() for line in fig.axes[0].lines if line.get_label().startswith("t = ")]
    assert len(drawn) == 2
    assert drawn[0] == pytest.approx(np.array([[-1, 0.2], [0, 0.1], [1, 1e-6]]))


def test_message_maps_show_the_first_maps_strongest_channels_and_their_spread():
    fig = figures.message_maps(MAPS, channels=2)
    assert [float(ax.images[0].get_array()[0, 0]) for ax in fig.axes[:2]] == [7, 6]
    assert np.array_equal(fig.axes[2].images[0].get_array(), MAPS["recap"][..., 7])
    assert [ax.get_title(loc="left") for ax in fig.axes] == [
        "sd 0", "sd 0", *(f"sd {MAPS['recap'][..., c].std():.2g}" for c in (7, 6))
    ]  # fmt: skip


def test_the_histograms_null_is_a_normal_curve_of_the_same_area():
    cosines = METRICS["cos"].to_numpy()
    ax = figures.conflict_histogram(cosines, (0.5, 0.4, 0.6), (0.02, 0.1)).axes[0]
    (curve,) = (line.get_xydata() for line in ax.lines if "null" in line.get_label())
    bar = next(iter(ax.containers[0]))
    width = (ax.get_xlim()[1] - ax.get_xlim()[0]) / len(ax.containers[0])
    assert bar.get_width() == pytest.approx(0.92 * width)
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(N * width, rel=0.02)
    assert curve[curve[:, 1].argmax(), 0] == pytest.approx(0.02, abs=0.01)


def test_a_variant_has_the_colour_and_the_name_of_its_objective():
    assert style.colours_of(["dcr, velocity", "naive, upgrad"]) == {
        "dcr, velocity": figures.COLOURS["dcr"],
        "naive, upgrad": figures.COLOURS["naive"],
    }
    assert style.label_of("dcr, velocity") == "DCR, velocity"
    assert style.label_of("dcr-guidance, τ .3") == f"{style.LABELS['dcr-guidance']}, τ .3"
    assert style.label_of("mine") == "mine"


def test_claims_are_grouped_by_question_and_what_was_not_run_is_named():
    groups = {"Does it rise?": ["dcr", "dcr, velocity"], "And this?": ["diva"]}
    fig = figures.claims(DIFFERENCES, groups, baseline="naive")
    ax = fig.axes[0]
    said = {label.get_text(): y for y, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
    assert said == {"DCR": 1, "DCR, velocity (not run)": 2, "DIVA": 4, "Does it rise?": 0, "And this?": 3}
    dots = {float(line.get_ydata()[0]): float(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 1}
    assert dots == pytest.approx({1: 4.0, 4: 2.0})
    assert fig.get_supxlabel().startswith("points against naive sum")


def test_the_scatter_has_a_mark_a_run_its_line_and_a_legend_of_rows():
    fig = figures.runs_scatter(RUNS, "cos", "p", LINE)
    marks = [line for line in fig.axes[0].lines if line.get_marker() not in ("None", None)]
    assert sorted(float(line.get_ydata()[0]) for line in marks) == [1, 2, 3]
    assert len({line.get_marker() for line in marks}) == 3
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [
        "regression, 95 %", "naive sum", "naive sum, upgrad", "DCR, velocity"
    ]  # fmt: skip
    many = pd.DataFrame({"objective": [f"dcr, {k}" for k in range(30)], "cos": 0.0, "p": 1.0})
    assert [text.get_text() for text in figures.runs_scatter(many, "cos", "p").legends[0].get_texts()] == ["DCR"]


def test_learning_rates_are_points_below_the_rows_best_and_the_chosen_ones_are_ringed():
    ax = figures.learning_rates(RATES).axes[0]
    shown = np.ma.filled(ax.images[0].get_array().astype(float), np.nan)
    assert shown == pytest.approx(np.array([[-5, 0], [0, np.nan]]), nan_ok=True)
    assert [tuple(line.get_xydata()[0]) for line in ax.lines] == [(1, 0), (0, 1)]


def test_the_parts_of_dcr_have_a_line_a_pair_and_a_norm_each_and_no_blocks():
    cosines, norms = figures.parts_conflict(PARTS).axes
    labels = [line.get_label() for line in cosines.lines if not line.get_label().startswith("_")]
    minus = "\N{MINUS SIGN}"
    assert labels == ["truth ~ view, mean +0.25", f"truth ~ push, mean {minus}0.50", f"view ~ push, mean {minus}0.75"]
    ends = {line.get_label(): line.get_ydata()[-1] for line in norms.lines if not line.get_label().startswith("_")}
    assert ends == pytest.approx({"pull to the truth": 0.5, "pull to the view": 0.1, "push of the negatives": 0.4})
    with pytest.raises(KeyError, match="<one>~<other>:cos"):
        figures.parts_conflict(METRICS)


def test_cosines_by_timestep_show_the_last_probed_step_over_the_first_and_leave_all_timesteps_out():
    ax = figures.cosine_by_timestep(PROBES).axes[0]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    last = [line.get_xydata()[0].tolist() for line in dots if line.get_markersize() == 6]
    first = [line.get_xydata()[0].tolist() for line in dots if line.get_markersize() == 9]
    assert np.array(last) == pytest.approx(np.array([[0.4, 0], [0.4, 1]]))
    assert np.array(first) == pytest.approx(np.array([[0.3, 0], [0.3, 1]]))
    assert len(ax.collections) == 2  # a ridge a bin
    assert ax.get_title(loc="left") == "DIVA ~ DCR"
    undecided = PROBES.assign(value=PROBES["value"].where(PROBES["measure"] != "cos/low", -0.3))
    faces = {line.get_markerfacecolor() for line in figures.cosine_by_timestep(undecided).axes[0].lines
             if line.get_markersize() == 6 and line.get_marker() == "o"}  # fmt: skip
    assert faces == {"white"}


def test_the_signal_is_drawn_by_timestep_and_an_infinite_noise_scale_left_out():
    snr, scale = figures.signal_by_timestep(PROBES).axes
    (last,) = (line.get_ydata() for line in snr.lines if line.get_label() == "DCR, step 9")
    assert last == pytest.approx([0.05, 0.05])
    assert [np.isnan(line.get_ydata()).all() for line in scale.lines if line.get_label() == "DCR, step 0"] == [True]
    assert scale.get_yscale() == "log"


def test_the_trace_names_the_runs_the_git_sha_and_the_versions():
    environment = {"git": "0123456789ab", "versions": {"torch": "2.11.0", "numpy": "2.3"}}
    assert (
        figures.trace(environment, "tune-dcr-s0", "seed 0") == "tune-dcr-s0 · seed 0 · git 0123456789ab · torch 2.11.0"
    )
