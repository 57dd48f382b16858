import numpy as np
import pytest
from figure_records import METRICS, PARTS, PROBES, N, legend, lines, texts
from matplotlib.colors import to_hex

from diva_lab import figures
from diva_lab.figures import style


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
    written = texts(figures.conflict_histogram(cosines, (0.54, 0.45, 0.63)))
    assert {"negative in 54 % of 60 steps", "95 % interval 45 to 63 %"} <= set(written)
    assert (
        f"effect size, mean / sd: {cosines.mean() / cosines.std(ddof=1):+.2f}".replace("-", "\N{MINUS SIGN}") in written
    )


def test_the_histograms_null_is_a_normal_curve_of_the_same_area():
    cosines = METRICS["cos"].to_numpy()
    ax = figures.conflict_histogram(cosines, (0.5, 0.4, 0.6), (0.02, 0.1)).axes[0]
    (curve,) = (line.get_xydata() for line in ax.lines if "null" in line.get_label())
    bar = next(iter(ax.containers[0]))
    width = (ax.get_xlim()[1] - ax.get_xlim()[0]) / len(ax.containers[0])
    assert bar.get_width() == pytest.approx(0.92 * width)
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(N * width, rel=0.02)
    assert curve[curve[:, 1].argmax(), 0] == pytest.approx(0.02, abs=0.01)


def test_cosines_over_steps_are_all_there_with_their_running_mean():
    ax = figures.conflict_over_steps(METRICS, window=10).axes[0]
    assert np.asarray(ax.collections[0].get_offsets()) == pytest.approx(METRICS[["step", "cos"]].to_numpy())
    mean = ax.lines[0].get_ydata()
    assert mean[9:] == pytest.approx(METRICS["cos"].rolling(10).mean()[9:].to_numpy())


def test_the_heat_map_has_a_row_a_block_and_stretches_of_steps_that_average_to_the_whole():
    metrics = METRICS.assign(**{"cos/stem": METRICS["cos"]}).sample(frac=1, random_state=0)
    fig = figures.conflict_by_block(metrics, bins=12)
    cells = fig.axes[0].collections[0].get_array()
    assert cells.shape == (4, 12)
    assert cells[0].mean() == pytest.approx(METRICS["cos"].mean())
    assert cells[0, 0] == pytest.approx(METRICS["cos"][:5].mean())
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["stem", "block0", "head", "features"]
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()][:2] == ["0", "5"]


def test_the_parts_means_are_coloured_by_the_sign_of_their_interval():
    ax = figures.conflict_by_block(METRICS.assign(**{"cos/stem": METRICS["cos"]})).axes[1]
    mean, half = METRICS["cos"].mean(), 1.96 * METRICS["cos"].std() / np.sqrt(N)
    interval, dot = lines(ax, style.GREY)[:2]
    assert interval[:, 0] == pytest.approx([mean - half, mean + half])
    assert dot[0] == pytest.approx([mean, 0.5])
    dots = np.concatenate([dot for dot in lines(ax, style.WRONG) if len(dot) == 1])
    assert dots == pytest.approx(np.array([[-0.1, 1.5], [-0.2, 3.5]]))


def test_the_heat_map_of_kinds_has_no_block_and_that_of_blocks_no_kind():
    fig = figures.conflict_by_block(METRICS, of="kinds")
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["q", "fc1"]
    assert np.asarray(fig.axes[0].collections[0].get_array())[:, 0] == pytest.approx([0.1, 0.3])
    with pytest.raises(ValueError, match="unknown parts 'heads'; expected blocks or kinds"):
        figures.conflict_by_block(METRICS, of="heads")
    with pytest.raises(KeyError, match="cos/kind/<kind>"):
        figures.conflict_by_block(METRICS[["step", "cos", "cos/head"]], of="kinds")


def test_norms_are_drawn_on_a_logarithmic_axis():
    ax = figures.term_norms(METRICS).axes[0]
    assert ax.get_yscale() == "log"
    assert sorted({float(line.get_ydata()[-1]) for line in ax.lines}) == pytest.approx([0.01, 30.0])


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
    last = [line.get_xydata() for line in ax.lines if line.get_marker() == "o"]
    (first,) = (line.get_xydata() for line in ax.lines if line.get_marker() == "|")
    assert np.concatenate(last) == pytest.approx(np.array([[0.4, 0], [0.4, 1]]))
    assert first == pytest.approx(np.array([[0.3, 0], [0.3, 1]]))
    assert len(ax.collections) == 2  # a ridge a bin
    assert ax.get_title(loc="left") == "DIVA ~ DCR"
    undecided = PROBES.assign(value=PROBES["value"].where(PROBES["measure"] != "cos/low", -0.3))
    last = (line for line in figures.cosine_by_timestep(undecided).axes[0].lines if line.get_marker() == "o")
    assert [line.get_markerfacecolor() for line in last] == ["white", "white"]


def test_the_signal_is_drawn_by_timestep_and_an_infinite_noise_scale_left_out():
    fig = figures.signal_by_timestep(PROBES)
    snr, scale = fig.axes
    last, first = (line for line in snr.lines
                   if to_hex(line.get_color()) == figures.COLOURS["dcr"].lower() and len(line.get_xdata()))  # fmt: skip
    assert last.get_xydata() == pytest.approx(np.array([[0, 0.05], [1, 0.05]])) and not last.is_dashed()
    assert first.get_ydata() == pytest.approx([-0.05, -0.05]) and first.is_dashed()
    assert lines(scale, figures.COLOURS["dcr"]) == []
    assert len(lines(scale, figures.COLOURS["diva"])) == 2
    assert scale.get_yscale() == "log"
    assert legend(fig) == ["DIVA", "DCR", "step 9", "step 0"]
