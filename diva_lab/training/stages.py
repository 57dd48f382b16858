"""Two stages: `align` trains the projector, `tune` the encoder; the denoiser is frozen in both.

    >>> run = align(Settings(condition="global", projector="new", steps=1000))
    >>> run = tune(Settings(objective="dcr", projector=run.folder, steps=200), evaluate=world_report)

Asked for again, a finished run is returned at once, and a stopped one goes on where it was: in as many processes to the
same bits, in more or fewer with another `accumulate`, so that a step is of as many images.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from diva_lab.image_files import find_tars
from diva_lab.machine import count_processes, default_device
from diva_lab.models.encoders import load_encoder
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.anchored import anchored
from diva_lab.paths import ROOT, RUNS
from diva_lab.provenance import source_hash
from diva_lab.training.batches import estimate_gap
from diva_lab.training.build import build_conditioner, build_denoiser, build_encoder, build_teacher, weight_hashes
from diva_lab.training.loop import Feedback, Probe, Trainer, train
from diva_lab.training.presets import preset, replace_settings, stages
from diva_lab.training.runs import ADDED, Run, begun_settings
from diva_lab.training.settings import CAPTIONED, CAPTIONS, Settings
from diva_lab.training.tracking import tracker_name

Evaluate = Callable[..., dict[str, float | str]]


def align(settings: Settings, root: str | Path = RUNS, evaluate: Evaluate | None = None) -> Run:
    """Stage 1: train the projector, encoder and denoiser frozen.

    The loss is L_rec, b evaluations of the denoiser a step, as in DCR's paper, or all of DCR's as `align_by` says. A
    light denoiser has no weights before: it is trained with the projector (GenHancer).

    Args:
        settings: `projector="new"` starts from random weights; LoRA is not used here.
        root: the run's folder is made under it.
        evaluate: called as `evaluate(conditioner, encoder, denoiser)`, returns what is recorded.

    Raises:
        ValueError, OSError, FloatingPointError, RuntimeError, KeyboardInterrupt: as `tune`.
    """
    settings = stage_one(settings)
    with open_run(settings, root, "align") as run:
        if run.done:
            return run
        device = default_device()
        encoder, denoiser = load_encoder(settings.encoder, device), build_denoiser(settings, device)
        conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(True)
        denoiser.network.requires_grad_(denoiser.scratch)
        watch = evaluate and (lambda: evaluate(conditioner, encoder, denoiser))
        if settings.anchored and conditioner.gap is None:  # of a stopped run it is in the checkpoint
            new = not run.saved
            conditioner.gap = estimate_gap(settings, encoder) if new else torch.zeros(encoder.dim, device=device)
        trainer = Trainer(run, settings, Feedback(settings, encoder, conditioner, denoiser, objective_of(settings)))
        return train(trainer, watch)


def tune(
    settings: Settings, root: str | Path = RUNS, evaluate: Evaluate | None = None, probe: Probe | None = None
) -> Run:
    """Stage 2: tune the encoder under `settings.objective`, denoiser frozen, the projector too unless asked.

    Args:
        settings: the objective `none` leaves the encoder as it is and only evaluates: the first control.
        root: the run's folder is made under it.
        evaluate: called as `evaluate(encoder)`, returns what is recorded.
        probe: called at the same steps, in float32 and without dropout, as `probe(at, parameters)`; `at(number,
            **changes)` makes a `Step` of a batch of images that are not trained on, with other settings where given.
            Returns records.

    Raises:
        ValueError, FileNotFoundError: for settings that name what does not exist; for a run whose files are damaged, or
            that was stopped with other weights, or whose step cannot be shared by so many processes.
        OSError: where the run cannot be written.
        FloatingPointError: where the loss, a gradient or a weight stops being finite.
        RuntimeError: where the device's memory is too small; where another process trains the run.
        KeyboardInterrupt: where it was asked to stop; it is saved before.
    """
    settings = stage_two(settings)
    if settings.objective not in (*OBJECTIVES, "none"):
        raise ValueError(f"objective {settings.objective!r} trains nothing; see diva_lab.training.controls.perturb")
    with open_run(settings, root, "tune") as run:
        if run.done:
            return run
        if settings.objective != "none":
            return _tune(run, settings, evaluate, probe)
        run.resume()
        if evaluate is not None:
            run.log("evaluations", step=0, **evaluate(load_encoder(settings.encoder, default_device())))
        return run.finish()


def _tune(run: Run, settings: Settings, evaluate: Evaluate | None, probe: Probe | None) -> Run:
    device = default_device()
    encoder = build_encoder(settings, device)
    watch = evaluate and (lambda: evaluate(encoder))
    if "teacher" in settings.models:
        if probe is not None:
            raise ValueError(f"objective {settings.objective!r} reads no denoiser, whose gradients a probe compares")
        feedback = Feedback(settings, encoder, None, None, objective_of(settings), build_teacher(settings, device))
        return train(Trainer(run, settings, feedback), watch)
    denoiser = build_denoiser(settings, device)
    if denoiser.scratch and settings.projector == "new":
        raise ValueError(
            f"denoiser {settings.denoiser!r} has no weights yet: align() it, and name that run as projector"
        )
    conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(settings.train_projector)
    trainer = Trainer(run, settings, Feedback(settings, encoder, conditioner, denoiser, objective_of(settings)))
    return train(trainer, watch, probe)


def preset_settings(name: str, processes: int, changes: dict[int, dict]) -> dict[int, Settings]:
    """Stage -> a preset's settings with `changes`, for the stages that `changes` names; their tars are there.

    Raises:
        ValueError: for an unknown preset, stage or setting.
        FileNotFoundError: for tars that are not there.
    """
    chosen = {stage: replace_settings(preset(name, stage, processes), own) for stage, own in changes.items()}
    for settings in chosen.values():
        if settings.images.endswith(".tar"):
            find_tars(settings.images)
    return chosen


def align_preset(
    name: str, root: str | Path = RUNS, processes: int = 1, stage1: dict | None = None, stage2: dict | None = None
) -> Settings:
    """A preset's settings for `tune`, after stage 1 where it has one and `stage2` names no projector.

    Args:
        name: one of `PRESETS`.
        root: where the run of stage 1 is made; a finished one is taken as it is.
        processes: how many train together.
        stage1, stage2: settings to change, by name; `stage1` is not read where no stage 1 is run.

    Raises:
        ValueError: for an unknown preset or setting, of either stage, before anything is trained.
        FileNotFoundError: for tars that are not there, before anything is trained.
    """
    changes = {1: stage1 or {}, 2: stage2 or {}}
    wanted = (2,) if "projector" in changes[2] else stages(name)
    chosen = preset_settings(name, processes, {stage: changes[stage] for stage in wanted})
    if 1 in chosen:
        return replace(chosen[2], projector=str(align(chosen[1], root).folder))
    return chosen[2]


# --- which run belongs to which settings ------------------------------------------------------------------------


def find_run(settings: Settings, root: str | Path = RUNS, stage: str = "tune") -> Run:
    """The run of `tune` (or of `align`, by `stage`) with these settings: finished, stopped, or not begun.

    A run's id is made of its settings alone. Where that run is finished and started from other weights than the models
    hold now (by `weight_hashes`, on record in its environment), it is another one, whose id ends in a hash of the
    weights. So a replaced model never passes for the old one, and every id on record stays as it is; a run without
    hashes, of a version before, is taken as it is.
    """
    kept = stage_one(settings) if stage == "align" else stage_two(settings)
    return _locate(settings, Run.at(begun_settings({**portable(kept), "stage": stage}, count_processes(), root), root))


def _locate(settings: Settings, run: Run) -> Run:
    """`run`, or the other one of the same settings where it is finished with other weights."""
    if not run.done or replaced_weights(settings, run) is None:
        return run
    digest = hashlib.sha256(json.dumps(weight_hashes(settings), sort_keys=True).encode()).hexdigest()[:8]
    return Run(run.folder.with_name(f"{run.id}-w{digest}"))


def replaced_weights(settings: Settings, run: Run) -> str | None:
    """Which model is not the one that a run started from, as far as its record says; None where all are."""
    before = run.environment.get("weights")
    now = weight_hashes(settings) if before else {}
    return next((model for model in now if now[model] != before.get(model, now[model])), None)


@contextmanager
def open_run(settings: Settings, root: str | Path, stage: str, **more: str) -> Iterator[Run]:
    """A context with the run of these settings, its folder made if there is none; see `find_run`.

    Of several processes the first one makes it, and holds its lock until the context ends. Says so where the run is
    finished, or was made by another version of its objective's code; it is returned all the same. Where an error leaves
    a run without a step and without an evaluation, its folder is taken away.

    Args:
        settings: of the stage, as the run keeps them.
        more: what the run keeps beside.

    Raises:
        ValueError: for a stopped run that started from other weights, or whose settings were edited.
        RuntimeError: where another process trains the run.
        OSError: where the folder cannot be written.
    """
    tracker_name()  # refused before anything is made
    state, runs = PartialState(cpu=default_device().type == "cpu"), [None]
    with ExitStack() as held:
        if state.is_main_process:
            kept = begun_settings({**portable(settings), "stage": stage, **more}, state.num_processes, root)
            runs = [run := _locate(settings, Run.at(kept, root))]
            if run.done:
                print(f"{run.id}: done before, see {run.folder}", flush=True)
            else:
                held.enter_context(run.lock())
                _begin(run, settings, kept)
            code, before = source_hash(objective_of(settings)), run.environment.get("objective")
            if code and before and code != before:
                print(
                    f"run {run.id} was made by another version of objective {settings.objective!r}: delete "
                    f"{run.folder} to train it anew",
                    flush=True,
                )
        (run,) = broadcast_object_list(runs)
        try:
            yield run
        except BaseException:
            if state.is_main_process:
                run.remove_empty()
            raise


def _begin(run: Run, settings: Settings, kept: dict) -> None:
    """Make the run's folder with the hashes of code and weights, or see that the weights are still those."""
    new, code = not (run.folder / "settings.json").exists(), source_hash(objective_of(settings))
    facts = {"objective": code} if code else {}
    run.make(kept, facts | {"weights": weight_hashes(settings)} if new else None)
    if model := replaced_weights(settings, run):
        raise ValueError(
            f"run {run.id} was stopped, and its {model} has other weights now than it started from: put the old files "
            f"back to go on, or delete {run.folder} to train it anew (its environment.json has their sha256)"
        )


def portable(settings: Settings) -> dict:
    """Settings as a run keeps them: folders inside the repository relative to it."""
    values = asdict(settings)
    for name in ("encoder", "denoiser", "projector", "teacher", "images"):
        values[name] = values[name].removeprefix(f"{ROOT}/") or "."  # the repository itself
    return values


def objective_of(settings: Settings) -> Callable | None:
    """The objective that a run with these settings minimises; None where it trains nothing."""
    return anchored if settings.anchored else OBJECTIVES.get(settings.objective)


def stage_two(settings: Settings) -> Settings:
    """Settings of stage 2 as its run keeps them: nothing is anchored, and only some objectives read captions."""
    bare = replace(settings, anchor=ADDED["anchor"])
    kept = CAPTIONS if bare.reads_captions else ()
    return replace(bare, **{name: ADDED[name] for name in CAPTIONED if name not in kept})


def stage_one(settings: Settings) -> Settings:
    """Settings of stage 1 as its run keeps them: its own objective, and no LoRA."""
    by_dcr = settings.align_by == "dcr" and settings.objective != "genhancer"
    objective = "genhancer" if settings.objective == "genhancer" else "dcr" if by_dcr else "diva"
    return replace(settings, objective=objective, lora_rank=0)
