"""The study of stage 3: every tower at every rung, once; towers that are not trained are named."""

from dataclasses import replace

import pandas as pd
import pytest

import tools.integration as integration
from diva_lab.training.stages import tune
from tools.feedback import SMALL, Row
from tools.integration import Plan, run_study


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A study of few steps and pairs; of towers `caption-contrast`, which needs no projector."""
    row = Row("caption-contrast", "none")
    monkeypatch.setattr(integration, "TOWERS", {"mixed": (row, False)})
    chosen = pd.Series({"lr": 1e-3, "mix": 0.5})
    monkeypatch.setattr(integration, "choose_trial", lambda study, row: (chosen, pd.DataFrame()))
    feedback = replace(SMALL, runs=tmp_path / "feedback", results=tmp_path / "results")
    tune(feedback.stage_2(row, 1e-3, 0), feedback.runs)
    return Plan(
        feedback, tmp_path / "runs", tmp_path / "integration.csv", seeds=(0, 1), steps=1, batch=2, records=4, each=1,
        patches=("correspondence",),
    )  # fmt: skip


@pytest.mark.slow
def test_every_tower_is_asked_at_every_rung_and_only_once(plan, capsys):
    table = run_study(plan)
    assert set(zip(table["tower"], table["seed"], strict=True)) == {
        *((name, 0) for name in ("original", "mixed", "random push")), ("original", 1)
    }  # fmt: skip
    assert capsys.readouterr().out.count("seed 1: not trained, see python -m tools.feedback run") == 1
    asked = table[table["benchmark"] == "mmvp"]
    assert set(asked["rung"]) == {
        "tower swapped, nothing trained", "projector retrained", "projector and LoRA retrained"
    }  # fmt: skip
    patches = table[table["rung"].isna() & (table["metric"] == "overlap") & (table["category"] == "all")]
    assert patches.query("seed == 0")["value"].nunique() == 3  # every tower is another
    assert set(table.loc[table["rung"].isna(), "benchmark"]) == {"mmvp-vlm", "correspondence"}
    written = plan.out.read_bytes()
    run_study(plan)
    assert plan.out.read_bytes() == written
