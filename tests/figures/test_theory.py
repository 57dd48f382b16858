import numpy as np
import pytest
from figure_records import AFFINE, BOUNDS, MAPS, legend
from matplotlib.colors import to_hex

from diva_lab import figures


def test_the_bounds_have_a_column_a_timestep_and_a_line_an_objective_and_way_to_read_constants():
    fig = figures.theorem_bounds(BOUNDS.sample(frac=1, random_state=0).sort_values("t", kind="stable"))
    assert [ax.get_title(loc="left") for ax in fig.axes[:2]] == ["t = 100", "t = 900"]
    assert set(legend(fig)) == {"DIVA", "DCR", "m, M: extremes", "m, M: quantiles", "equal", "says nothing"}
    extremes_dashed = legend(fig).index("m, M: extremes") > legend(fig).index("m, M: quantiles")
    for ax, extremes, quantiles in (
        *((ax, [2, 3, 4], [3, 4, 5]) for ax in fig.axes[:2]),
        *((ax, [0, -1, -2], [-1, -2, -3]) for ax in fig.axes[2:]),
    ):
        for colour in (figures.COLOURS["diva"], figures.COLOURS["dcr"]):
            curves = [line for line in ax.lines if to_hex(line.get_color()) == colour.lower() and len(line.get_xdata())]
            drawn = {line.is_dashed(): line.get_ydata().tolist() for line in curves}
            assert drawn == {extremes_dashed: extremes, not extremes_dashed: quantiles}


def test_the_affine_range_has_a_panel_a_form_and_a_line_a_timestep_in_the_order_of_the_cosines():
    fig = figures.affine_range(AFFINE)
    assert [ax.get_title(loc="left") for ax in fig.axes[:4]] == [
        f"{denominator} denominator\nview {view}" for view in ("moves", "stays") for denominator in ("shared", "own")
    ]
    drawn = [line.get_xydata() for line in fig.axes[0].lines if len(line.get_xdata()) == 3]
    assert len(drawn) == 2
    assert legend(fig) == ["t = 100", "t = 900", "R² = .99"]
    assert drawn[0] == pytest.approx(np.array([[-1, 0.2], [0, 0.1], [1, 1e-6]]))


def test_message_maps_show_the_first_maps_strongest_channels_and_their_spread():
    fig = figures.message_maps(MAPS, channels=2)
    assert [float(ax.images[0].get_array()[0, 0]) for ax in fig.axes[:2]] == [7, 6]
    assert np.array_equal(fig.axes[2].images[0].get_array(), MAPS["recap"][..., 7])
    assert [ax.get_title(loc="left") for ax in fig.axes] == [
        "sd 0", "sd 0", *(f"sd {MAPS['recap'][..., c].std():.2g}" for c in (7, 6))
    ]  # fmt: skip
