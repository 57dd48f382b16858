import importlib
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diva_lab.benchmark import ATTENTION, LiveBytes
from diva_lab.cli import main
from diva_lab.models import frozen
from diva_lab.models.encoders import load_encoder
from diva_lab.models.registry import load_denoiser
from diva_lab.paths import DATA
from diva_lab.plan import (
    DEVICES,
    REACHED,
    FusedDropout,
    StagePlan,
    count_live,
    describe_start,
    largest_batch,
    largest_rows,
    open_models,
    plan_stage,
    read_rate,
)
from diva_lab.training.loop import Trainer
from diva_lab.training.settings import Settings
from diva_lab.training.stages import align, stage_one, tune

dcr = importlib.import_module("diva_lab.objectives.dcr")  # the name in the package is the function's
SMALL = Settings(objective="dcr", projector="new", batch=3, steps=1, precision="no")
WHOLE = replace(SMALL, objective="diva", lora_rank=0)
CASES = {  # stage, settings
    "DCR": (2, SMALL),
    "DCR, a row at a time": (2, replace(SMALL, rows=1)),
    "DIVA, all weights": (2, replace(WHOLE, train_projector=True, condition="recap")),
    "DIVA in bfloat16": (2, replace(SMALL, objective="diva", precision="bf16")),
    "stage 1, anchored": (1, replace(SMALL, anchor="captions", draws=1)),
    "stage 1 of a light denoiser": (1, replace(SMALL, objective="genhancer", denoiser="light-tiny", draws=1)),
}


def small_plan(stage: int, settings: Settings) -> StagePlan:
    settings = stage_one(settings) if stage == 1 else settings
    encoder, denoiser, draws = load_encoder(settings.encoder), load_denoiser(settings.denoiser), torch.get_rng_state()
    plan = plan_stage(settings, stage, models=open_models(settings, stage, encoder, denoiser))
    assert torch.equal(torch.get_rng_state(), draws), "a plan draws nothing that a run would draw"
    return plan


@pytest.fixture(scope="module")
def plan() -> StagePlan:
    """Of one step of DIVA that tunes all weights."""
    return small_plan(2, WHOLE)


def measure(stage: int, settings: Settings, folder) -> tuple[int, int, int]:
    """FLOPs, evaluations of the denoiser and the most bytes alive at once in the micro-batch of a run of one step."""
    found, compute, calls = [], Trainer._gradients_of_terms, []

    def measured(trainer: Trainer, step: int):
        network, _ = trainer.work.denoiser.network, trainer.work.denoiser.empty  # encoded once in a run
        network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
        with LiveBytes() as live, FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            out = compute(trainer, step)
        found.extend([counter.get_total_flops(), sum(calls), live.peak])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_gradients_of_terms", measured)
        patch.setattr(frozen, "attend", F.scaled_dot_product_attention)  # as on a GPU, and the next
        patch.setattr(nn.Dropout, "forward", FusedDropout.forward)
        (align if stage == 1 else tune)(settings, folder)
    return tuple(found)


QUICK = ("DCR", "stage 1 of a light denoiser")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES])
def test_a_plan_counts_the_flops_and_evaluations_of_a_run_exactly_and_its_memory_to_a_seventh(case, tmp_path):
    stage, settings = CASES[case]
    flops, evaluations, live = measure(stage, settings, tmp_path)
    by_rows = dcr.by_rows
    plan = small_plan(stage, settings)
    assert dcr.by_rows is by_rows
    assert (plan.flops, plan.evaluations) == (flops, evaluations)
    assert plan.memory() - plan.models.weights - plan.kept == pytest.approx(live, rel=0.15)


def test_weights_and_what_the_optimizer_keeps_are_those_of_the_run(plan, tmp_path):
    run = tune(WHOLE, tmp_path)
    trained = sum(w.numel() * 4 for w in run.weights().values())
    moments = [x for state in run.state()["optimizer"]["state"].values() for x in state.values() if x.ndim]
    kept = sum(x.numel() * 4 for x in moments)
    assert plan.disk == trained + kept and plan.kept == kept + trained  # and the gradient
    accumulating = plan_stage(replace(WHOLE, accumulate=2), 2, models=plan.models)
    assert accumulating.kept == plan.kept + trained
    assert accumulating.total == pytest.approx(2 * plan.total, rel=0.05)  # what is kept of the empty prompt is there
    encoder, denoiser = load_encoder("tiny"), load_denoiser("tiny")
    frozen_weights = sum(p.numel() * 4 for part in (encoder, denoiser) for p in part.parameters())
    assert plan.models.weights == frozen_weights + sum(p.numel() * 4 for p in plan.models.conditioner.parameters())


@pytest.mark.slow
def test_the_largest_batch_and_the_largest_rows_are_the_last_that_fit():
    plan = plan_stage(replace(SMALL, batch=6), 2, models=small_plan(2, SMALL).models, rows=(1, 4))
    beside = float(plan.models.weights + plan.kept)

    def live(**changes: int) -> int:
        return count_live(replace(plan.settings, **changes), plan.models)

    for rows in (0, 1):
        room = beside + 1.02 * live(batch=20, rows=rows)
        assert largest_batch(plan, rows, room) == 20
        assert largest_batch(plan, rows, beside) == 0
    assert largest_rows(plan, beside + 1.02 * live(rows=3)) == 3


def test_hours_follow_from_a_rate_that_is_given_or_was_measured(plan):
    ten = replace(plan, settings=replace(WHOLE, steps=10))
    assert ten.hours(float(plan.flops)) == pytest.approx(10 / 3600)
    record = DATA / "results" / "benchmark" / "dcr-small.json"
    exact = json.loads(record.read_text())["variants"]["exact"]
    assert read_rate(str(record)) == exact["flop"] / exact["median"] and read_rate("65") == 65e12
    for wrong in ("fast", "-1", "nan", str(DATA)):
        with pytest.raises(ValueError, match=r"expected TFLOP/s as 65, or a file of `diva-lab benchmark"):
            read_rate(wrong)


def test_before_the_first_step_a_gpu_that_is_known_has_hours_and_another_device_none(plan, monkeypatch):
    long = replace(plan, settings=replace(WHOLE, steps=10**9))
    said = describe_start(long, torch.device("cpu"))
    assert said.startswith("stage 2: 1000000000 steps of 3 images, 6 evaluations") and "hours" not in said
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    hours = long.hours(REACHED * DEVICES["H100"][1])
    assert f"about {hours:.0f} GPU hours at 206 TFLOP/s" in describe_start(long, torch.device("cuda"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet-dcr"], "unknown preset 'resnet-dcr'"),
        (["openai-l14-dcr", "--device", "H10"], "--device H10: did you mean 'H100'?"),
        (["openai-l14-dcr", "--rate", "quick"], "--rate quick: expected TFLOP/s"),
        (["openai-l14-dcr", "--processes", "3"], "cannot be shared by 3 processes"),
        (["openai-l14-dcr", "--set", "denoiser=sd15"], "no plan for denoiser 'sd15'"),
        (["openai-l14-dcr", "--set", "encoder=tiny"], "no plan for encoder 'tiny'"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message, capsys):
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


# --- at real size -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_preset_is_planned_at_real_size_without_any_file(capsys):
    assert main(["plan", "openai-l14-dcr", "--processes", "4", "--device", "H100"]) == 0
    said = capsys.readouterr().out
    print(said)
    assert "openai-l14-dcr" in said.splitlines()[0] and "H100" in said


@pytest.mark.slow
def test_training_says_what_a_preset_costs_before_it_starts(capsys, tmp_path):
    assert main(["train", "--preset", "openai-l14-dcr", "--shards", "world", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert first.startswith("stage 1: 100000 steps of 256 images, 256 evaluations")
    assert second.startswith("stage 2: 4600 steps of 256 images, 4352 evaluations")
    assert "no weights" in said.err
