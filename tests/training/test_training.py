import inspect
import os
import shutil
import signal
import time
from dataclasses import fields, replace

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from one_step import pictures
from PIL import Image
from run_checks import Watch, kill_and_resume, same_records, same_weights
from safetensors.torch import save_file

from diva_lab.gradients import COMBINE
from diva_lab.images import Images, open_images
from diva_lab.models.conditions import CONDITIONS
from diva_lab.models.denoiser import TARGETS
from diva_lab.models.encoders import embed, load_encoder
from diva_lab.models.lora import visual_weights
from diva_lab.models.registry import load_denoiser
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.diva import diva
from diva_lab.objectives.timesteps import TIMESTEPS
from diva_lab.provenance import sha256
from diva_lab.training.build import build_conditioner, tuned_encoder
from diva_lab.training.controls import perturb
from diva_lab.training.progress import Stop
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.training.stages import align, tune


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures in a folder."""
    root = tmp_path_factory.mktemp("pictures")
    for k, pixels in enumerate(pictures(5)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(root / f"{k}.png")
    return root


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked():
    """Without jaxtyping's own check, which would come before that of the settings."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("name", "registry"),
    [("objective", OBJECTIVES), ("condition", CONDITIONS), ("timesteps", TIMESTEPS), ("target", TARGETS),
     ("combine", COMBINE)],
)  # fmt: skip
def test_every_key_of_a_registry_is_a_choice_also_one_that_is_added_later(name, registry, monkeypatch):
    for choice in registry:
        assert getattr(Settings(**{name: choice}), name) == choice
    if isinstance(registry, dict):
        monkeypatch.setitem(registry, "mine", next(iter(registry.values())))
        assert getattr(Settings(**{name: "mine"}), name) == "mine"


@pytest.mark.parametrize("name", [f.name for f in fields(Settings) if f.type is str and f.name != "draw_weights"])
def test_an_unknown_choice_is_refused_and_every_choice_that_the_error_lists_is_taken(name):
    try:
        Settings(**{name: "bogus"})
    except ValueError as error:
        listed = str(error).partition("expected one of ")[2].split(", ")
        assert f"unknown {name} 'bogus'" in str(error) and len(listed) > 1
        for choice in listed if name != "timesteps" else TIMESTEPS:
            assert getattr(Settings(**{name: choice}), name) == choice
    else:
        assert name in (
            "encoder",
            "denoiser",
            "teacher",
            "images",
            "projector",
            "prompt",
            "captions",
        )  # open: a folder, a text


def test_every_setting_has_its_line_of_help():
    source = inspect.getsource(Settings).splitlines()
    for field in fields(Settings):
        (line,) = [line for line in source if line.startswith(f"    {field.name}: ")]
        assert len(line.partition("  # ")[2].split()) > 2, field.name


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_a_setting_of_the_wrong_type_is_refused_by_name(unchecked, name):
    kind = type(getattr(Settings(), name))
    for value in ("ten", 2.5, True, None, ["dcr"], {"a": 1}):
        if type(value) is not kind:
            with pytest.raises(ValueError, match=name) as caught:
                Settings(**{name: value})
            assert "expected" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 0},
        {"accumulate": 0},
        {"draws": -1},
        {"steps": -1},
        {"warmup": -1},
        {"lora_rank": -1},
        {"save_every": -1},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_by_name(change):
    with pytest.raises(ValueError, match=f"setting {next(iter(change))}={next(iter(change.values()))}: expected"):
        Settings(**change)


@pytest.mark.parametrize("objective", ["contrastive", "naive", "dcr"])
def test_a_contrast_within_a_batch_of_one_is_refused(objective):
    with pytest.raises(ValueError, match=f"batch=1: {objective} contrasts images; expected at least 2"):
        Settings(objective=objective, batch=1)
    assert Settings(objective="diva", batch=1).batch == 1


def test_whole_numbers_are_taken_for_floats_and_paths_for_strings(unchecked, tmp_path):
    settings = Settings(lr=1, images=tmp_path, projector=tmp_path)
    assert settings.lr == 1 and settings.images == settings.projector == str(tmp_path)


def test_settings_can_be_read_back_from_their_run(small_settings, tmp_path):
    settings = replace(small_settings, objective="none", images="world:2")
    assert Settings.of(tune(settings, tmp_path)) == settings


def test_no_training_is_made_of_a_control(small_settings, tmp_path):
    with pytest.raises(ValueError, match="perturb"):
        tune(replace(small_settings, objective="perturb-norm"), tmp_path)


# --- projectors -------------------------------------------------------------------------------------------------


def parts(settings: Settings):
    return load_encoder(settings.encoder), load_denoiser(settings.denoiser)


@pytest.mark.parametrize("projector", ["shipped", "nowhere"])
def test_a_missing_projector_is_refused_saying_what_was_expected_where(
    small_settings, monkeypatch, tmp_path, projector
):
    monkeypatch.setattr("diva_lab.training.build.SHIPPED", tmp_path)
    name = projector if projector == "shipped" else str(tmp_path / projector)
    with pytest.raises(FileNotFoundError, match="projector=") as caught:
        build_conditioner(replace(small_settings, projector=name), *parts(small_settings))
    assert str(tmp_path) in str(caught.value) and "'new', 'shipped'" in str(caught.value)


def test_the_projector_of_an_alignment_is_the_one_that_tuning_starts_from(small_settings, tmp_path):
    aligned = align(small_settings, tmp_path)
    conditioner = build_conditioner(replace(small_settings, projector=str(aligned.folder)), *parts(small_settings))
    assert all(torch.equal(aligned.weights()[f"conditioner.{n}"], w) for n, w in conditioner.state_dict().items())


def test_a_projector_of_another_width_is_refused(small_settings, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from diva_lab.models.conditions import Conditioner

    other = {f"conditioner.{name}": weight for name, weight in Conditioner("global", 7, 5).state_dict().items()}
    save_file(other, tmp_path / "global.safetensors")
    monkeypatch.setattr("diva_lab.training.build.SHIPPED", tmp_path)
    with pytest.raises(ValueError, match=r"does not fit encoder .* and denoiser .* is \[7\], expected \[48\]"):
        build_conditioner(replace(small_settings, projector="shipped"), *parts(small_settings))


# --- the loop ---------------------------------------------------------------------------------------------------

CASES = {
    "dcr, LoRA with dropout": {"objective": "dcr", "lora_dropout": 0.5},
    "naive, recap, all weights, SGD, accumulated": {
        "objective": "naive", "condition": "recap", "lora_rank": 0, "optimizer": "sgd", "accumulate": 2, "warmup": 3,
    },
    "diva, projector too, folder, bf16": {
        "objective": "diva", "train_projector": True, "precision": "bf16", "latent": "sample", "images": "folder",
    },
    "contrastive, no clipping": {"objective": "contrastive", "clip": 0.0, "timesteps": "logit-normal"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_training_equals_the_uninterrupted_one_bit_for_bit(small_settings, folder, tmp_path, case):
    changes = CASES[case] | ({"images": str(folder)} if CASES[case].get("images") == "folder" else {})
    settings = replace(small_settings, steps=5, save_every=2, evaluate_every=1, lr=1e-2, **changes)
    whole = tune(settings, tmp_path / "whole", Watch())
    with pytest.raises(KeyboardInterrupt):
        tune(settings, tmp_path / "killed", Watch(stop=4))  # after three steps, of which two are saved
    killed = Run(tmp_path / "killed" / whole.id)
    assert not killed.done and list(killed.metrics()["step"]) == [0, 1, 2]
    resumed = tune(settings, tmp_path / "killed", Watch())
    assert resumed == killed and resumed.done
    assert same_weights(whole, resumed)
    same_records(whole, resumed)
    assert list(whole.metrics()["step"]) == [0, 1, 2, 3, 4]
    assert list(whole.evaluations()["step"]) == [0, 1, 2, 3, 4, 5]
    assert resumed.metrics()["seconds"].is_monotonic_increasing


def test_broken_pictures_are_skipped_and_a_resumed_run_still_equals_the_uninterrupted_one(
    small_settings, folder, tmp_path, capsys
):
    pictures = shutil.copytree(folder, tmp_path / "pictures")
    for k in range(5):
        (pictures / f"broken{k}.png").write_bytes(b"words")
    settings = replace(small_settings, steps=5, save_every=2, evaluate_every=1, lr=1e-2, images=str(pictures))
    settings = replace(settings, objective="diva", accumulate=2)
    whole = tune(settings, tmp_path / "whole", Watch())
    skipped = whole.skipped()
    assert f"{whole.id}: skipped {len(skipped)} images" in capsys.readouterr().out

    stream = open_images(pictures, 32, settings.batch, settings.seed)  # the bare source skips the same ones
    expected = [(step, *found) for step in range(5) for found in skipped_by(stream, settings.accumulate)]
    assert list(skipped.itertuples(index=False, name=None)) == expected
    assert skipped["step"].lt(2).any() and skipped["step"].gt(2).any()

    with pytest.raises(KeyboardInterrupt):
        tune(settings, tmp_path / "killed", Watch(stop=4))
    killed = Run(tmp_path / "killed" / whole.id)
    assert list(killed.skipped()["step"]) == [step for step in skipped["step"] if step < 2]
    killed.log("skipped", step=2, name="met between the records and the checkpoint", reason="")
    resumed = tune(settings, tmp_path / "killed", Watch())
    assert same_weights(whole, resumed)
    same_records(whole, resumed)
    pd.testing.assert_frame_equal(resumed.skipped(), skipped)


def skipped_by(stream: Images, batches: int) -> list[tuple[str, str]]:
    """What a source skips in its next batches."""
    before = len(stream.skipped)
    for _ in range(batches):
        next(stream)
    return stream.skipped[before:]


def test_a_checkpoint_without_positions_is_resumed_by_its_step(small_settings, folder, tmp_path):
    settings = replace(small_settings, steps=2, save_every=1, evaluate_every=1, images=str(folder), accumulate=2)
    whole = tune(settings, tmp_path / "whole", Watch())
    with pytest.raises(KeyboardInterrupt):
        tune(settings, tmp_path / "killed", Watch(stop=3))
    path = tmp_path / "killed" / whole.id / "checkpoint" / "optimizer.pt"
    state = torch.load(path)
    assert state.pop("positions") == [settings.accumulate * settings.batch]
    torch.save(state, path)
    assert same_weights(whole, tune(settings, tmp_path / "killed", Watch()))
    assert whole.skipped().empty and not (whole.folder / "skipped.jsonl").exists()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_killed_and_resumed_alignment_equals_the_uninterrupted_one_bit_for_bit(small_settings, tmp_path, precision):
    settings = replace(small_settings, steps=5, save_every=2, evaluate_every=3, lr=1e-2, precision=precision)
    whole, resumed = kill_and_resume(align, settings, tmp_path, stop=2)
    assert same_weights(whole, resumed)
    same_records(whole, resumed)


def test_training_that_was_killed_before_its_first_checkpoint_starts_again(small_settings, tmp_path):
    settings = replace(small_settings, save_every=0, evaluate_every=1)
    with pytest.raises(KeyboardInterrupt):
        tune(settings, tmp_path, Watch(stop=3))
    run = tune(settings, tmp_path, Watch())
    assert list(run.metrics()["step"]) == [0, 1, 2, 3] and list(run.evaluations()["step"]) == [0, 1, 2, 3, 4]


def test_the_same_settings_give_the_same_weights_and_another_seed_others(small_settings, tmp_path):
    one, two = (tune(small_settings, tmp_path / name) for name in ("one", "two"))
    assert one.id == two.id and same_weights(one, two)
    same_records(one, two)
    assert not same_weights(one, tune(replace(small_settings, seed=1), tmp_path))


def test_evaluation_has_no_influence_on_training(small_settings, tmp_path):
    watched = tune(small_settings, tmp_path / "watched", Watch())
    every = tune(replace(small_settings, evaluate_every=1), tmp_path / "every", Watch())
    assert same_weights(watched, tune(small_settings, tmp_path / "alone")) and same_weights(watched, every)
    assert list(watched.evaluations()["step"]) == [0, 4]


def test_a_finished_run_is_returned_without_training(small_settings, tmp_path, monkeypatch):
    run = tune(small_settings, tmp_path, Watch())
    written = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    monkeypatch.setattr("diva_lab.training.stages.build_encoder", lambda *_: pytest.fail("trained again"))
    watch = Watch()
    assert tune(small_settings, tmp_path, watch) == run and watch.calls == 0
    assert written == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tuning_moves_the_visual_tower_and_nothing_else(settings_of, tmp_path, objective):
    settings = replace(settings_of(objective), steps=2, lr=1e-2)
    run, original = tune(settings, tmp_path), load_encoder(settings.encoder)
    tuned = [name for name in run.weights() if "lora_" in name or name.endswith("base_layer.bias")]
    kernel = {"teacher.gamma", "teacher.coef0"} if objective == "kuea" else set()
    assert all(name.startswith("encoder.") for name in tuned) and set(tuned) == set(run.weights()) - kernel
    tuned = tuned_encoder(run)
    visual = visual_weights(tuned)
    for name, weight in original.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], weight) or name in visual, name
    assert (embed(tuned, pictures(3)) - embed(original, pictures(3))).abs().max() > 1e-4
    terms = set(run.metrics().columns) & {"rec", "con", "dcr", "cap", "kernel", "keep"}
    assert {"loss", "seconds", "grad_norm", *(f"norm_{term}" for term in terms)} <= set(run.metrics().columns)
    assert run.metrics()[list(terms)].sum(axis=1).tolist() == pytest.approx(run.metrics()["loss"].tolist())


def test_the_terms_of_the_naive_sum_are_compared_in_every_step_and_block(small_settings, tmp_path):
    columns = tune(replace(small_settings, objective="naive"), tmp_path).metrics()
    assert {"cos", "magnitude", "norm_con", "norm_rec", "cos/block0", "cos/block1", "cos/head"} <= set(columns)
    assert columns["cos"].between(-1, 1).all() and columns["magnitude"].between(0, 1).all()


def test_the_kinds_of_layers_and_the_embeddings_are_compared_too(small_settings, tmp_path):
    columns = tune(replace(small_settings, objective="naive", accumulate=2), tmp_path).metrics()
    assert {"cos/kind/q", "cos/kind/fc2", "cos/kind/projection", "cos/features"} <= set(columns)
    assert columns["cos/features"].between(-1, 1).all()


def test_dcrs_parts_are_terms_of_a_run(small_settings, tmp_path):
    settings = replace(small_settings, objective="dcr", lora_dropout=0.0)
    one, parts = (tune(replace(settings, parts=parts), tmp_path).metrics() for parts in (False, True))
    assert {"truth~view:cos", "truth~push:cos", "view~push:cos", "norm_push", "view~push:cos/block0"} <= set(parts)
    np.testing.assert_allclose(parts[["truth", "view", "push"]].sum(axis=1), one["loss"], rtol=1e-4)
    np.testing.assert_allclose(parts["grad_norm"], one["grad_norm"], rtol=1e-2)
    with pytest.raises(ValueError, match="all rows at once"):
        replace(settings, parts=True, rows=1)


@pytest.mark.parametrize("how", sorted(set(COMBINE) - {"sum"}))
def test_surgery_is_an_option_of_every_sum(small_settings, tmp_path, how):
    settings = replace(small_settings, objective="naive", steps=2, lr=1e-2)
    plain, mended = (tune(replace(settings, combine=name), tmp_path) for name in ("sum", how))
    one, two = (run.metrics().drop(columns="seconds").iloc[0] for run in (plain, mended))
    assert one.drop("grad_norm").equals(two.drop("grad_norm"))  # measured before it is mended
    weights = plain.weights()
    assert any(not torch.equal(w, weights[name]) for name, w in mended.weights().items())


def test_stage_one_can_be_asked_for_the_whole_loss_of_dcr(small_settings, tmp_path):
    settings = replace(small_settings, objective="dcr", steps=1)
    assert "dcr" in align(replace(settings, align_by="dcr"), tmp_path).metrics()
    assert "rec" in align(settings, tmp_path).metrics()


def test_a_killed_run_repeats_its_probes_as_it_does_its_evaluations(small_settings, tmp_path):
    settings = replace(small_settings, evaluate_every=1, save_every=2)
    calls = []

    def probe(at, parameters):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return [{"bin": "all", "of": "dcr", "measure": "norm", "value": 1.0}]

    with pytest.raises(KeyboardInterrupt):
        tune(settings, tmp_path, probe=probe)
    assert tune(settings, tmp_path, probe=probe).probes()["step"].tolist() == [0, 1, 2, 3, 4]


def test_aligning_moves_the_projector_and_nothing_else(small_settings, tmp_path):
    run = align(replace(small_settings, condition="recap"), tmp_path)
    assert run.weights() and all(name.startswith("conditioner.projector.") for name in run.weights())
    assert run.settings["stage"] == "align" and list(run.metrics()["step"]) == [0, 1, 2, 3]


def test_aligning_does_not_depend_on_what_only_tuning_uses(small_settings, tmp_path):
    one = align(replace(small_settings, objective="dcr", lora_rank=2), tmp_path)
    assert align(replace(small_settings, objective="naive", lora_rank=8), tmp_path) == one


def test_a_tuned_encoder_is_the_one_that_was_last_evaluated(small_settings, tmp_path):
    images = pictures(4)
    for rank in (0, 4):
        settings = replace(small_settings, lora_rank=rank, lr=1e-2)
        run = tune(settings, tmp_path, lambda encoder: {"x": embed(encoder, images)[:, 0].sum().item()})
        tuned = tuned_encoder(run)
        assert embed(tuned, images)[:, 0].sum().item() == pytest.approx(run.evaluations()["x"].iloc[-1], abs=1e-5)
        assert not any(p.requires_grad for p in tuned.parameters())
        assert not any(module.training for module in tuned.modules())


def test_the_untouched_control_is_evaluated_once_and_is_the_original(small_settings, tmp_path):
    run = tune(replace(small_settings, objective="none"), tmp_path, Watch())
    assert run.done and list(run.evaluations()["step"]) == [0]
    assert torch.equal(embed(tuned_encoder(run), pictures(2)), embed(load_encoder(small_settings.encoder), pictures(2)))


def test_warming_up_starts_with_smaller_steps(small_settings, tmp_path):
    def moved(warmup: int) -> float:
        run = tune(replace(small_settings, warmup=warmup, steps=1, weight_decay=0.0), tmp_path)
        return sum(w.norm() for name, w in run.weights().items() if "lora_B" in name).item()

    assert moved(9) == pytest.approx(moved(0) / 10, rel=1e-3)


def test_the_gradient_is_clipped_to_the_norm_asked_for(small_settings, tmp_path):
    def moved(clip: float) -> float:
        settings = replace(small_settings, clip=clip, steps=1, optimizer="sgd", lr=1.0, weight_decay=0.0)
        run = tune(settings, tmp_path)
        assert run.metrics()["grad_norm"][0] > 1e-3  # as it was before clipping
        zero = load_encoder(small_settings.encoder)  # LoRA's B begins at zero, the biases at the encoder's
        start = {f"encoder.{n.replace('.bias', '.base_layer.bias')}": w for n, w in zero.named_parameters()}
        moved = [w - start.get(n, 0.0) for n, w in run.weights().items() if "lora_A" not in n]
        return sum(change.square().sum() for change in moved).item() ** 0.5

    assert moved(1e-3) == pytest.approx(1e-3, rel=1e-2) and moved(0.0) > 2e-3


def test_a_loss_or_weight_that_stops_being_finite_stops_the_run(small_settings, tmp_path):
    with pytest.raises(FloatingPointError, match=r"(loss|gradient|weight) is not finite at step \d, of which"):
        tune(replace(small_settings, lr=1e6, lora_rank=0), tmp_path)


@pytest.mark.parametrize("save_every", [1, 3])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step_and_leaves_the_last_checkpoint(
    small_settings, tmp_path, monkeypatch, save_every
):
    calls = []

    def steep(step):
        rec = diva(step)["rec"]
        calls.append(1)
        return {"rec": rec + (rec - rec.detach()).sqrt() if len(calls) == 3 else rec}  # 0, whose slope is infinite

    monkeypatch.setitem(OBJECTIVES, "diva", steep)
    settings = replace(small_settings, objective="diva", steps=3, save_every=save_every)
    with pytest.raises(FloatingPointError, match=r"a gradient is not finite at step 2, of which nothing is saved; try"):
        tune(settings, tmp_path)
    (folder,) = tmp_path.iterdir()
    run = Run(folder)
    assert not run.done and list(run.metrics()["step"]) == [0, 1] and run.metrics()["loss"].notna().all()
    assert run.saved == (save_every == 1)
    resumed = tune(settings, tmp_path)  # of a machine that erred once
    assert resumed.done and all(weight.isfinite().all() for weight in resumed.weights().values())


def test_a_last_checkpoint_with_weights_that_are_not_finite_never_makes_a_run_done(small_settings, tmp_path):
    run = tune(replace(small_settings, steps=1), tmp_path)
    (run.folder / "done").unlink()
    weights = {name: torch.full_like(weight, float("nan")) for name, weight in run.weights().items()}
    save_file(weights, run.folder / "checkpoint" / "weights.safetensors")
    state = run.state() | {"weights": sha256(run.folder / "checkpoint" / "weights.safetensors")}
    torch.save(state, run.folder / "checkpoint" / "optimizer.pt")
    with pytest.raises(FloatingPointError, match="a weight is not finite at step 1"):
        tune(replace(small_settings, steps=1), tmp_path)
    assert not run.done


# --- when it is asked to stop -----------------------------------------------------------------------------------


class Signalled(Watch):
    """Sends this process a signal at evaluation number `at`, and waits."""

    def __init__(self, at: int, number: int):
        super().__init__()
        self.at, self.number = at, number

    def __call__(self, *modules) -> dict[str, float]:
        value = super().__call__(*modules)
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)
            time.sleep(60)
        return value


@pytest.fixture
def hears_ctrl_c():
    """SIGINT as in a terminal; a worker of pytest-xdist ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize(
    ("during", "number"),
    [("step", signal.SIGINT), ("step", signal.SIGTERM), ("evaluation", signal.SIGINT),
     ("first evaluation", signal.SIGTERM), ("last evaluation", signal.SIGINT)],
)  # fmt: skip
def test_a_run_that_is_asked_to_stop_is_saved_and_goes_on_to_the_same_bits(
    small_settings, tmp_path, monkeypatch, capsys, number, during
):
    settings = replace(small_settings, objective="diva", steps=4, save_every=0, evaluate_every=1, lr=1e-2)
    whole, calls = tune(settings, tmp_path / "whole", Watch()), []

    def signalled(step):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return diva(step)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    at = {"step": 0, "evaluation": 3, "first evaluation": 1, "last evaluation": 5}[during]
    steps = at - 1 if at else 3
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if not at:
            patch.setitem(OBJECTIVES, "diva", signalled)
        capsys.readouterr()
        tune(settings, tmp_path, Signalled(at, number))
    run = Run(tmp_path / whole.id)
    told = f"{run.id}: stopped after {steps} of 4 steps; run again, it goes on from there"
    assert capsys.readouterr().out.splitlines()[-1] == told
    assert not run.done and run.saved == (steps > 0) and list(run.metrics().get("step", [])) == list(range(steps))
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    resumed = tune(settings, tmp_path, Watch())
    assert same_weights(whole, resumed)
    same_records(whole, resumed)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("steps", [0, 1])
def test_ctrl_c_a_second_time_ends_at_once_and_leaves_the_last_checkpoint(small_settings, tmp_path, monkeypatch, steps):
    diva, taken = OBJECTIVES["diva"], []

    def signalled(step):
        if len(taken) < steps:
            taken.append(step)
            return diva(step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setitem(OBJECTIVES, "diva", signalled)
    with pytest.raises(KeyboardInterrupt):
        tune(replace(small_settings, objective="diva", save_every=1), tmp_path)
    folders = list(tmp_path.iterdir())
    assert [Run(folder).state()["step"] for folder in folders] == [1] * steps  # where nothing was done, nothing is left


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Stop() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert not stop.asked and signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.parametrize("change", ["tensor", "shape", "metrics"])
def test_a_checkpoint_that_does_not_fit_is_told_with_what_to_do(small_settings, tmp_path, change):
    settings = replace(small_settings, save_every=2)
    run = tune(settings, tmp_path)
    (run.folder / "done").unlink()
    state, weights = run.state(), run.weights()
    name = min(weights)
    if change == "metrics":
        lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run.folder / "metrics.jsonl").write_text("".join(lines[:2]))
    else:
        weights |= {name: weights[name][:1]} if change == "shape" else {"other": weights.pop(name)}
    run.save(4, weights, state["optimizer"], 0.0, state["positions"])
    told = {
        "metrics": r"does not fit metrics.jsonl with 2 steps of 4; put .* back from a copy, or delete it",
    }.get(change, rf"its checkpoint does not fit {name}; put .* back from a copy, or delete it")
    with pytest.raises(ValueError, match=told):
        tune(settings, tmp_path)


def test_where_memory_is_short_it_is_said_what_needs_less(small_settings, tmp_path, monkeypatch):
    def hungry(step):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setitem(OBJECTIVES, "dcr", hungry)
    with pytest.raises(RuntimeError, match=r"out of memory at step 0 with batch=\d, rows=0; rows=1 gives"):
        tune(replace(small_settings, objective="dcr"), tmp_path)


@pytest.mark.parametrize("rows", [1, 2])
def test_dcr_by_rows_takes_the_same_steps(small_settings, tmp_path, rows):
    whole, parts = (tune(replace(small_settings, objective="dcr", rows=n), tmp_path) for n in (0, rows))
    for name, weight in whole.weights().items():
        torch.testing.assert_close(parts.weights()[name], weight, atol=1e-4, rtol=1e-3)


def test_progress_is_told_line_by_line_where_there_is_no_terminal(small_settings, tmp_path, capsys):
    run = tune(replace(small_settings, objective="contrastive", steps=20), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[-1].startswith(f"{run.id}: step 20/20, loss ")


# --- the control without a signal -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def like(small_settings, tmp_path_factory) -> Run:
    return tune(replace(small_settings, lr=1e-2), tmp_path_factory.mktemp("like"))


def changes(encoder, settings) -> dict[str, torch.Tensor]:
    original = visual_weights(load_encoder(settings.encoder))
    return {name: weight - original[name] for name, weight in visual_weights(encoder).items()}


def test_a_perturbation_has_the_norm_of_the_tuning_in_every_tensor(small_settings, like, tmp_path):
    run = perturb(like, pictures(8), "norm", tmp_path, Watch())
    random, tuned = changes(tuned_encoder(run), small_settings), changes(tuned_encoder(like), small_settings)
    for name, change in tuned.items():
        torch.testing.assert_close(random[name].norm(), change.norm(), rtol=1e-3, atol=1e-6)
    matrices = [name for name, change in tuned.items() if change.norm() > 0 and change.ndim == 2]
    assert len(matrices) == 13
    flat = [torch.cat([change[name].flatten() for name in matrices]) for change in (random, tuned)]
    assert abs(torch.cosine_similarity(*flat, dim=0)) < 0.05  # in another direction
    assert run.settings["objective"] == "perturb-norm" and list(run.evaluations()["step"]) == [4]


def test_a_perturbation_drifts_as_far_as_the_tuning(small_settings, like, tmp_path):
    images = pictures(16, seed=9)
    run = perturb(like, images, "drift", tmp_path)
    before = embed(load_encoder(small_settings.encoder), images)
    drift, wanted = (
        (1 - (embed(tuned_encoder(r), images) * before).sum(1)).mean().item() for r in (run, like)
    )  # fmt: skip
    assert wanted > 1e-4 and drift == pytest.approx(wanted, rel=0.01)
    row = run.metrics().iloc[0]
    assert row["drift"] == pytest.approx(drift, rel=1e-3) and row["drift_like"] == pytest.approx(wanted, rel=1e-3)


def test_a_perturbation_goes_as_far_as_a_mix_of_the_tuning(like, tmp_path):
    images = pictures(16, seed=9)
    whole, half = (perturb(like, images, "norm", tmp_path, mix=mix) for mix in (1.0, 0.5))
    assert whole.id != half.id and half.settings["mix"] == "0.5" and "mix" not in whole.settings
    start = visual_weights(load_encoder(like.settings["encoder"]))
    for name, weight in visual_weights(tuned_encoder(half)).items():
        change = visual_weights(tuned_encoder(whole))[name] - start[name]
        torch.testing.assert_close(weight - start[name], change / 2, rtol=1e-3, atol=1e-6)
    row = perturb(like, images, "drift", tmp_path, mix=0.5).metrics().iloc[0]
    mixed, before = embed(tuned_encoder(like, mix=0.5), images), embed(load_encoder(like.settings["encoder"]), images)
    assert row["drift"] == pytest.approx(row["drift_like"], rel=1e-3)
    assert row["drift_like"] == pytest.approx((1 - (mixed * before).sum(1)).mean().item(), rel=1e-3)


def test_a_perturbation_is_fixed_by_its_settings(like, tmp_path):
    one, two = (perturb(like, pictures(8), "norm", tmp_path / name) for name in ("one", "two"))
    assert one.id == two.id and same_weights(one, two) and perturb(like, pictures(8), "norm", tmp_path / "one") == one


def test_an_unknown_match_is_refused_with_the_known_ones(like, tmp_path):
    with pytest.raises(ValueError, match="unknown match 'size'; expected norm or drift"):
        perturb(like, pictures(2), "size", tmp_path)


# --- on a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_every_objective_takes_a_step_on_cuda_in_bfloat16(settings_of, tmp_path):
    devices = []

    def watch(encoder) -> dict[str, float]:
        devices.append(next(encoder.parameters()).device.type)
        return {"x": embed(encoder, pictures(2)).sum().item()}

    for objective in OBJECTIVES:
        run = tune(replace(settings_of(objective), steps=1, precision="bf16"), tmp_path, watch)
        assert run.metrics()["loss"].notna().all() and run.evaluations().notna().all(axis=None)
        assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in run.weights().values())
    assert set(devices) == {"cuda"}
