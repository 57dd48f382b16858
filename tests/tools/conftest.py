"""A study of small models, shared by the tests of what runs it and of what makes its tables."""

from dataclasses import replace
from pathlib import Path

import pytest


class Report:
    """In place of `world_report`: a score that is best at the first learning rate tried."""

    def __init__(self, measures: tuple[str, ...]):
        self.calls, self.measures = 0, measures

    def __call__(self, encoder, **_) -> dict[str, float]:
        self.calls += 1
        return {name: 0.5 - 1e-3 * self.calls for name in self.measures}


def make_study(settings, folder: Path, patch: pytest.MonkeyPatch):
    """A study of four rows on small models, with `Report` in place of the world's benchmarks."""
    from diva_lab.analysis.conflict import probe_gradients  # inside: jaxtyping's hook has to come first
    from diva_lab.evaluation.world import WORLD_MEASURES
    from tools import study

    models = {name: getattr(settings, name) for name in ("encoder", "denoiser", "projector", "batch", "precision")}
    rows = {
        "objectives": {"naive": models | {"objective": "naive"}, "dcr": models | {"objective": "dcr"}},
        "rivals": {"naive, upgrad": models | {"objective": "naive", "combine": "upgrad"}},
        "variants": {"dcr, aligned": models | {"objective": "dcr", "align": {"steps": 1}}}, "ours": {},
    }  # fmt: skip
    patch.setattr(study, "ROWS", rows)
    patch.setattr(study, "world_report", Report(WORLD_MEASURES))
    patch.setattr(study, "alignment_report", None)
    names = ("naive", "dcr", "naive, upgrad", "dcr, aligned")
    few = lambda at, parameters: probe_gradients(at, parameters, batches=2, bins=1)  # noqa: E731
    return study.Study(folder / "runs", folder / "results", 2, 1, (1e-4, 1e-3), 2, names, few)


@pytest.fixture
def small_study(small_settings, tmp_path, monkeypatch):
    """A study that has not been run."""
    return make_study(small_settings, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def finished_runs(small_settings, tmp_path_factory) -> Path:
    """The runs of the small study."""
    from tools.study import run_rows

    with pytest.MonkeyPatch.context() as patch:
        study = make_study(small_settings, tmp_path_factory.mktemp("study"), patch)
        run_rows(study)
    return study.root


@pytest.fixture
def finished_study(small_study, finished_runs):
    """A study whose runs are finished, without tables."""
    return replace(small_study, root=finished_runs)
