"""An experiment tracker is told what a run's records hold, and changes nothing of the run."""

import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from run_checks import same_weights

from diva_lab.training import tracking
from diva_lab.training.stages import tune


class Notes(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory, tracker = "notes", False, None
    told: list = []  # noqa: RUF012

    def __init__(self, project: str, **kwargs):
        super().__init__()
        self.told.append((project, kwargs))

    def start(self): ...

    def store_init_configuration(self, values):
        self.told.append(values)

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.told.append("finished")


def test_a_tracker_is_told_what_is_recorded_and_goes_on_with_a_run(small_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "TRACKERS", ("notes",))
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notes", Notes)
    monkeypatch.setattr(Notes, "told", [])
    settings = replace(small_settings, steps=3, evaluate_every=3)
    plain = tune(settings, tmp_path / "plain", lambda encoder: {"score": 0.5, "name": "words"})
    assert not Notes.told
    monkeypatch.setenv("DIVA_LAB_TRACK", "notes")
    run = tune(settings, tmp_path / "tracked", lambda encoder: {"score": 0.5, "name": "words"})
    assert same_weights(plain, run) and run.id == plain.id
    started, values, *told, end = Notes.told
    assert started == ("diva-lab", {"name": run.id, "resume": "allow"}) and end == "finished"
    assert values["steps"] == 3 and values["objective"] == settings.objective
    assert [step for step, _ in told] == [0, 0, 1, 2, 3]
    assert told[0] == (0, {"score": 0.5}) and [line["loss"] for _, line in told[1:4]] == run.metrics()["loss"].tolist()


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboards_files_hold_what_the_records_hold(small_settings, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("DIVA_LAB_TRACK", "tensorboard")
    run = tune(replace(small_settings, steps=2), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / run.id)).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(run.metrics()["loss"].tolist())


@pytest.mark.parametrize(
    "name, missing, error, words",
    [
        ("tensorbord", None, ValueError, "did you mean 'tensorboard'"),
        ("wandb", "wandb", ModuleNotFoundError, "pip install wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_a_run_begins(
    name, missing, error, words, small_settings, tmp_path, monkeypatch
):
    monkeypatch.setenv("DIVA_LAB_TRACK", name)
    if missing:
        monkeypatch.delitem(sys.modules, missing, raising=False)
        monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(error, match=words):
        tune(small_settings, tmp_path)
    assert not list(tmp_path.iterdir())
