"""A study of small models, shared by the tests of what runs it and of what makes its tables."""

import pytest


class Report:
    """In place of `world_report`: a score that is best at the first learning rate tried."""

    def __init__(self, measures: tuple[str, ...]):
        self.calls, self.measures = 0, measures

    def __call__(self, encoder, **_) -> dict[str, float]:
        self.calls += 1
        return {name: 0.5 - 1e-3 * self.calls for name in self.measures}


@pytest.fixture
def small_study(small_settings, tmp_path, monkeypatch):
    """A study of four rows on small models, with `Report` in place of the world's benchmarks."""
    from diva_lab.analysis.conflict import probe_gradients  # inside: jaxtyping's hook has to come first
    from diva_lab.workbook.notebooks import SUMMARY_MEASURES
    from tools import study

    models = {
        name: getattr(small_settings, name) for name in ("encoder", "denoiser", "projector", "batch", "precision")
    }
    rows = {
        "objectives": {"naive": models | {"objective": "naive"}, "dcr": models | {"objective": "dcr"}},
        "rivals": {"naive, upgrad": models | {"objective": "naive", "combine": "upgrad"}},
        "variants": {"dcr, aligned": models | {"objective": "dcr", "align": {"steps": 1}}}, "ours": {},
    }  # fmt: skip
    monkeypatch.setattr(study, "ROWS", rows)
    monkeypatch.setattr(study, "world_report", Report(SUMMARY_MEASURES))
    monkeypatch.setattr(study, "alignment_report", None)
    names = ("naive", "dcr", "naive, upgrad", "dcr, aligned")
    few = lambda at, parameters: probe_gradients(at, parameters, batches=2, bins=1)  # noqa: E731
    return study.Study(tmp_path / "runs", tmp_path / "results", 2, 1, (1e-4, 1e-3), 2, names, few)
