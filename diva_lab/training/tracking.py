"""What a run records, in an experiment tracker too: one of accelerate's, named by DIVA_LAB_TRACK in the environment."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from numbers import Real

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from diva_lab import messages
from diva_lab.training.runs import Run

PROJECT = "diva-lab"
TRACKERS = ("tensorboard", "trackio", "wandb")
Track = Callable[[int, dict], None]  # of so many steps, what is recorded


def tracker_name() -> str:
    """The tracker that the environment names; "" for none.

    Raises:
        ValueError: for an unknown one. ModuleNotFoundError: for one that is not installed.
    """
    name = os.environ.get("DIVA_LAB_TRACK", "")
    if name and name not in TRACKERS:
        raise ValueError(f"DIVA_LAB_TRACK={name!r}: unknown tracker; {messages.expected(name, TRACKERS)}")
    if name and find_spec(name) is None:
        raise ModuleNotFoundError(f"DIVA_LAB_TRACK={name!r}: not installed; pip install {name}")
    return name


def ignore(step: int, values: dict) -> None:
    """Track nothing."""


@contextmanager
def track_run(run: Run, settings: object) -> Iterator[Track]:
    """A context with a function that sends numbers to the tracker; only the first process sends anything.

    TensorBoard's files lie beside the runs, in `tensorboard/RUN`. In wandb and trackio the run's name is its id, and a
    run that goes on goes on there too; WANDB_MODE=offline keeps wandb from the network.

    Raises:
        ValueError, ModuleNotFoundError: as `tracker_name`.
    """
    if not (name := tracker_name()):
        yield ignore
        return
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        tracker = kind(run.id, run.folder.parent / name)
    else:
        tracker = kind(PROJECT, name=run.id, resume="allow", **({"id": run.id} if name == "wandb" else {}))
    tracker.start()
    tracker.store_init_configuration(asdict(settings))
    try:
        yield lambda step, values: tracker.log({k: v for k, v in values.items() if isinstance(v, Real)}, step=step)
    finally:
        tracker.finish()
