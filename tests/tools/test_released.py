"""What a setting does to a gradient: cosine and ratio of norms, beside what other draws do."""

from dataclasses import fields

import pandas as pd
import pytest

from diva_lab.training.settings import Settings
from tools import released


def test_a_change_is_compared_with_the_same_gradient_and_with_other_draws(monkeypatch, tmp_path):
    base = released.BASES["diva"]
    monkeypatch.setattr(released, "BASES", {"diva": Settings(**{**vars(base), "batch": 2})})
    monkeypatch.setattr(released, "CHANGES", {"diva": {"draw_weights": "2,2", "prompt_mask": False}})
    monkeypatch.setattr(released, "BATCHES", 1)
    monkeypatch.setattr(released, "measure", lambda measure=released.measure: measure(1))
    released.main(["--out", str(tmp_path / "released.csv")])
    table = pd.read_csv(tmp_path / "released.csv").set_index("setting")
    assert table.loc["draw_weights", ["cosine", "norms"]].tolist() == pytest.approx([1, 4], rel=1e-3)
    assert table.loc["prompt_mask", ["cosine", "norms"]].tolist() == pytest.approx([1, 1], rel=1e-4)
    assert table.loc["other draws", "cosine"] < 0.99 and table["git"].notna().all()


def test_the_changes_are_settings_that_differ_from_the_papers():
    known = {field.name for field in fields(Settings)}
    for name, changes in released.CHANGES.items():
        assert changes.keys() <= known
        assert all(getattr(released.BASES[name], setting) != value for setting, value in changes.items())
