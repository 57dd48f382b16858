import numpy as np
import pandas as pd
import pytest
from figure_records import (
    BENCHMARKS,
    CEILING,
    CHOSEN,
    DIFFERENCES,
    LINE,
    PUBLISHED,
    REPLICATIONS,
    REPORTS,
    RUNS,
    SUMMARY,
    legend,
    lines,
    texts,
)
from matplotlib.colors import to_hex

from diva_lab import figures
from diva_lab.figures import style
from diva_lab.world import PATTERNS


def test_selection_draws_what_is_reported_and_what_holds_for_each_size():
    fig = figures.selection(CHOSEN)
    assert [ax.get_title("left") for ax in fig.axes] == ["best of so many checkpoints", "best of so many seeds"]
    assert list(legend(fig)) == [f"{name}, {n} pairs" for n in (135, 2700) for name in ("reported", "held")]
    for ax in fig.axes:
        drawn = [list(line.get_ydata()) for line in ax.lines][1:]
        assert drawn == [[0.01, 0.02], [0.001, 0.001]] * 2


def test_pair_scores_carry_values_intervals_and_ceiling():
    fig = figures.pair_scores(REPORTS, CEILING)
    ax = fig.axes[0]
    for name, score in (("none", 0.3), ("dcr", 0.5)):
        drawn = lines(ax, figures.COLOURS[name])
        dots, bars = np.concatenate(drawn[1::2]), drawn[::2]
        assert dots[:, 0] == pytest.approx(np.full(10, score))
        assert np.array(bars)[:, :, 0] == pytest.approx(np.tile([score - 0.05, score + 0.04], (10, 1)))
        assert np.array(bars)[:, :, 1] == pytest.approx(np.repeat(dots[:, 1], 2).reshape(10, 2))
        assert dots[:, 1].round() == pytest.approx(np.arange(10))
    assert [label.get_text() for label in ax.get_yticklabels()] == [*PATTERNS.values(), "mean of nine"]
    (ceiling,) = (c for c in ax.collections if c.get_label() == "supervised ceiling")
    drawn = np.array(ceiling.get_segments())[:, 0, 0]
    assert drawn == pytest.approx([*CEILING["after"], CEILING["after"].mean()])
    assert legend(fig) == ["chance", "none (original)", "DCR", "supervised ceiling"]
    assert lines(ax, style.GREY)[0][:, 0].tolist() == [0.25, 0.25]


def test_pair_scores_of_one_encoder_lie_on_the_rows():
    dots = lines(figures.pair_scores(REPORTS[:1]).axes[0], figures.COLOURS["none"])[1::2]
    assert np.concatenate(dots)[:, 1].tolist() == list(range(10))


@pytest.mark.parametrize(("score", "hollow"), [(0.20, True), (0.29, True), (0.31, False)])
def test_a_pair_score_is_hollow_where_its_interval_is_not_above_chance(score, hollow):
    row = {key: value + score - 0.3 if key.startswith("pairs") else value for key, value in REPORTS.loc["none"].items()}
    ax = figures.pair_scores(pd.DataFrame([row], index=["none"])).axes[0]
    faces = {line.get_markerfacecolor() for line in ax.lines if len(line.get_xdata()) == 1}
    assert faces == {"white" if hollow else figures.COLOURS["none"]}


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


def test_differences_are_in_points_hollow_where_undecided_and_without_an_interval_for_one_seed():
    fig = figures.objective_differences(DIFFERENCES)
    assert "+4.0 [+1.0, +7.0]" in texts(fig)
    assert "+2.0 [\N{MINUS SIGN}1.0, +5.0]" in texts(fig)
    assert "+1.0" in texts(fig)
    dots = {to_hex(line.get_color()): line for line in fig.axes[0].lines if len(line.get_xdata()) == 1}
    assert to_hex(dots[figures.COLOURS["dcr"].lower()].get_markerfacecolor()) == figures.COLOURS["dcr"].lower()
    assert dots[figures.COLOURS["diva"].lower()].get_markerfacecolor() == "white"


def test_claims_are_grouped_by_question_and_what_was_not_run_is_named():
    groups = {"Does it rise?": ["dcr", "dcr, velocity"], "And this?": ["diva"]}
    fig = figures.claims(DIFFERENCES, groups, baseline="naive")
    ax = fig.axes[0]
    heights = {label.get_text(): y for y, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
    assert heights == {"DCR": 1, "DCR, velocity (not run)": 2, "DIVA": 4, "Does it rise?": 0, "And this?": 3}
    dots = {float(line.get_ydata()[0]): float(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 1}
    assert dots == pytest.approx({1: 4.0, 4: 2.0})
    assert fig.get_supxlabel() == "points against naive sum, 95 % intervals"
    assert figures.claims(DIFFERENCES.assign(seeds=5), groups).get_supxlabel().endswith("95 % intervals over seeds")


def test_the_scatter_has_a_mark_a_run_its_line_and_a_legend_of_rows():
    fig = figures.runs_scatter(RUNS, "cos", "p", LINE)
    _, marks = fig.axes[0].collections  # the first is the line's interval
    assert np.asarray(marks.get_offsets()) == pytest.approx(RUNS[["cos", "p"]].to_numpy())
    assert len({path.vertices.tobytes() for path in marks.get_paths()}) == 3
    assert lines(fig.axes[0], style.INK)[0] == pytest.approx(LINE[["x", "mean"]].to_numpy())
    assert legend(fig) == ["regression, 95 %", "naive sum", "naive sum, upgrad", "DCR, velocity"]
    many = pd.DataFrame({"objective": [f"dcr, {k}" for k in range(30)], "cos": 0.0, "p": 1.0})
    assert legend(figures.runs_scatter(many, "cos", "p")) == ["DCR"]


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


def test_published_numbers_have_panels_of_their_own_and_second_hand_ones_are_thin_diamonds():
    fig = figures.benchmark_scores(BENCHMARKS, PUBLISHED)
    ours, theirs = fig.axes[:3], fig.axes[3:]
    titles = [ax.get_title(loc="left") for ax in theirs if ax.lines]
    assert titles == ["published, openai-l14: nmi\nsix sets", "published, siglip-so400m: nmi\nsix sets"]
    assert not any(line.get_marker() == "D" for ax in ours for line in ax.lines)
    drawn = [(line.get_xydata().tolist(), line.get_marker()) for line in theirs[1].lines]
    assert drawn == [([[78, 0]], "d"), ([[83, 1]], "D")]
    assert [to_hex(line.get_color()) for ax in theirs for line in ax.lines] == [style.GREY.lower()] * 3


def test_replications_stand_in_the_panel_of_what_they_repeat_in_words_where_there_is_no_number():
    fig = figures.benchmark_scores(BENCHMARKS, PUBLISHED, replications=REPLICATIONS)
    panels = {ax.get_title(loc="left"): ax for ax in fig.axes if ax.lines}
    assert list(panels)[2:] == ["published, openai-l14: nmi\nsix sets", "published, siglip-so400m: nmi\nsix sets"]
    ax = panels["published, openai-l14: nmi\nsix sets"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["DCR", "none (original)", "DCR"]
    drawn = [(*line.get_xydata()[0], line.get_marker()) for line in ax.lines if np.isfinite(line.get_xdata()).all()]
    assert drawn == [(76, 0, "d"), (70, 1, "X")]
    words = {text.get_position()[1]: " ".join(text.get_text().split()) for text in ax.texts}
    assert words == {0: "", 1: "CODE issue 1", 2: "CODE issue 2: not reproduced"}
