import numpy as np
import pytest
from small_models import write_clip, write_diffusion

from diva_lab.evaluation.conflict import conflict_rate, gradient_cosines
from diva_lab.evaluation.intervals import wilson
from diva_lab.training import Settings, tune


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conflict")
    clip, diffusion = write_clip(folder / "clip"), write_diffusion(folder / "diffusion")
    models = {"encoder": str(clip), "denoiser": str(diffusion), "projector": "new"}
    return tune(Settings(objective="naive", steps=2, batch=2, precision="no", **models), folder)


def test_the_rate_is_the_share_of_negative_cosines_with_wilsons_interval():
    assert conflict_rate(np.array([-0.1, 0.2, -0.3, 0.4, np.nan])) == (0.5, *wilson(2, 4))
    with pytest.raises(ValueError, match="no proportion"):
        conflict_rate(np.array([np.nan]))


def test_every_batch_meets_every_batch_and_the_cosines_are_cosines(run):
    table = gradient_cosines(run, batches=3)
    assert len(table) == 9
    assert (table["con"] == table["rec"]).sum() == 3
    assert table["cos"].between(-1, 1).all()
    assert table["cos"].nunique() == 9


def test_the_cosines_are_the_same_each_time_and_leave_the_run_as_it_was(run):
    before = run.weights()
    assert gradient_cosines(run, 2).equals(gradient_cosines(run, 2))
    assert all((weight == before[name]).all() for name, weight in run.weights().items())
