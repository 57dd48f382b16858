import subprocess
import sys

import matplotlib
import pytest
from figure_records import DRAWN, METRICS, figure
from matplotlib.figure import Figure

from diva_lab import figures
from diva_lab.figures import style


def test_figures_know_no_torch():
    code = "import sys, diva_lab.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_has_one_width_and_its_source_under_it_and_keeps_its_style_to_itself(name):
    before = dict(matplotlib.rcParams)
    fig = DRAWN[name]("run dcr-s0 · git abc")
    assert dict(matplotlib.rcParams) == before  # the style stays inside the figure
    assert isinstance(fig, Figure)
    assert fig.get_figwidth() == style.WIDTH
    (source,) = (text for text in fig.texts if text.get_gid() == "source")
    assert source.get_text() == "run dcr-s0 · git abc"
    assert not any(text.get_gid() == "source" for text in figure(name).texts)


def test_a_missing_column_is_named():
    with pytest.raises(KeyError, match="cos; it has step"):
        figures.conflict_over_steps(METRICS[["step"]])
    with pytest.raises(KeyError, match="norm_<term>"):
        figures.term_norms(METRICS[["step", "loss"]])
