"""What tests compare of two runs, and an evaluation that stops one."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings


def same_weights(one: Run, two: Run) -> bool:
    a, b = one.weights(), two.weights()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_records(one: Run, two: Run) -> None:
    pd.testing.assert_frame_equal(one.metrics().drop(columns="seconds"), two.metrics().drop(columns="seconds"))
    pd.testing.assert_frame_equal(one.evaluations(), two.evaluations())


def kill_and_resume(train: Callable[..., Run], settings: Settings, root: Path, stop: int) -> tuple[Run, Run]:
    """An uninterrupted run of `align` or `tune`, and one that was killed at evaluation number `stop` and went on."""
    whole = train(settings, root / "whole", Watch())
    with pytest.raises(KeyboardInterrupt):
        train(settings, root / "killed", Watch(stop=stop))
    return whole, train(settings, root / "killed", Watch())


class Watch:
    """An `evaluate` that sums the weights and draws random numbers; stops its run at call number `stop`."""

    def __init__(self, stop: int | None = None):
        self.calls, self.stop = 0, stop

    def __call__(self, *modules) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        torch.rand(100)
        if len(modules) > 1:
            modules[2].empty  # noqa: B018, as an evaluation of the alignment does
        return {"sum": sum(p.double().sum().item() for p in modules[0].parameters())}
