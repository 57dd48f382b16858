import numpy as np
import pytest
from figure_records import METRICS, PATHS, RECOVERED, N, legend, lines
from matplotlib.colors import to_hex

from diva_lab import figures


def test_the_recovered_fraction_is_drawn_in_the_order_of_the_timesteps_with_its_interval():
    ax = figures.recovered_fraction(RECOVERED.sample(frac=1, random_state=0)).axes[0]
    (curve,) = lines(ax, figures.COLOURS["dcr"])
    assert curve == pytest.approx(RECOVERED[["t", "recovered"]].to_numpy())
    (band,) = (collection.get_paths()[0].vertices for collection in ax.collections)
    for t, low, high in RECOVERED[["t", "low", "high"]].itertuples(index=False):
        assert sorted({round(y, 9) for x, y in band if x == t}) == pytest.approx([low, high])
    without = figures.recovered_fraction(RECOVERED.drop(columns=["low", "high"]))
    (curve,) = lines(without.axes[0], figures.COLOURS["dcr"])
    assert curve == pytest.approx(RECOVERED[["t", "recovered"]].to_numpy())


def test_loss_curves_show_every_step_and_the_running_mean():
    table = METRICS[["step", "loss"]].assign(dcr=np.arange(N, dtype=float), loss=np.arange(N, dtype=float))
    every, mean = lines(figures.loss_curves({"dcr": table}, window=4).axes[0], figures.COLOURS["dcr"])
    assert every == pytest.approx(table[["step", "dcr"]].to_numpy())
    assert mean[3:, 1] == pytest.approx(np.arange(3, N) - 1.5)


def test_the_trade_off_goes_from_before_to_the_mean_of_the_last_step():
    fig = figures.trade_off(PATHS.sample(frac=1, random_state=0), [("zeroshot", "pairs/mean")])
    ax = fig.axes[0]
    (ends,) = (dots for dots in ax.collections if len(dots.get_offsets()))
    ends = dict(zip(map(to_hex, ends.get_facecolors()), np.asarray(ends.get_offsets()), strict=True))
    for name, end in (("diva", [0.88, 0.32]), ("dcr", [0.88, 0.34])):
        assert ends[figures.COLOURS[name].lower()] == pytest.approx(end)
        *seeds, mean = lines(ax, figures.COLOURS[name])
        assert len(seeds) == 2
        assert mean[0] == pytest.approx([0.9, 0.3]) and mean[-1] == pytest.approx(end)
    (before,) = (line.get_xydata() for line in ax.lines if line.get_label() == "before")
    assert before == pytest.approx(np.array([[0.9, 0.3]]))
    assert sorted(legend(fig)) == ["DCR", "DIVA", "before"]


def test_the_trade_off_does_not_magnify_less_than_two_points():
    low, high = (
        figures.trade_off(PATHS.assign(zeroshot=0.9 + PATHS["step"] / 1e5), [("zeroshot", "pairs/mean")])
        .axes[0]
        .get_xlim()
    )
    assert high - low == pytest.approx(0.02)
