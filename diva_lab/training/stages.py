"""Two stages: `align` trains the projector, `tune` the encoder; the denoiser is frozen in both.

    >>> run = align(Settings(condition="global", projector="new", steps=1000))
    >>> run = tune(Settings(objective="dcr", projector=run.folder, steps=200), evaluate=world_report)

Asked for again, a finished run is returned at once, and a stopped one goes on where it was.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import PartialState

from diva_lab.image_files import find_tars
from diva_lab.machine import default_device
from diva_lab.models.encoders import load_encoder
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.anchored import anchored
from diva_lab.paths import ROOT, RUNS
from diva_lab.provenance import source_hash
from diva_lab.training.batches import estimate_gap
from diva_lab.training.build import build_conditioner, build_denoiser, build_encoder
from diva_lab.training.loop import Probe, Trainer, train
from diva_lab.training.presets import preset, replace_settings, stages
from diva_lab.training.runs import ADDED, Run
from diva_lab.training.settings import CAPTIONED, CAPTIONS, Settings

Evaluate = Callable[..., dict[str, float]]


def align(settings: Settings, root: str | Path = RUNS, evaluate: Evaluate | None = None) -> Run:
    """Stage 1: train the projector, encoder and denoiser frozen.

    The loss is L_rec, b evaluations of the denoiser a step, as in DCR's paper, or all of DCR's as `align_by` says. A
    light denoiser has no weights before: it is trained with the projector (GenHancer).

    Args:
        settings: `projector="new"` starts from random weights; LoRA is not used here.
        root: the run's folder is made under it.
        evaluate: called as `evaluate(conditioner, encoder, denoiser)`, returns what is recorded.

    Raises:
        ValueError, FileNotFoundError, FloatingPointError, RuntimeError: as `tune`.
    """
    settings = _stage_one(settings)
    run = open_run({**portable(settings), "stage": "align"}, root, objective_of(settings))
    if run.done:
        return run
    device = default_device()
    encoder, denoiser = load_encoder(settings.encoder, device), build_denoiser(settings, device)
    conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(True)
    denoiser.network.requires_grad_(denoiser.scratch)
    watch = evaluate and (lambda: evaluate(conditioner, encoder, denoiser))
    if settings.anchored and conditioner.gap is None:
        conditioner.gap = estimate_gap(settings, encoder)
    trainer = Trainer(run, settings, encoder, conditioner, denoiser, objective_of(settings))
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
        ValueError, FileNotFoundError: for settings that name what does not exist.
        FloatingPointError: where the loss stops being a number.
        RuntimeError: where the device's memory is too small; says what needs less.
    """
    settings = _stage_two(settings)
    if settings.objective not in (*OBJECTIVES, "none"):
        raise ValueError(f"objective {settings.objective!r} trains nothing; see diva_lab.training.controls.perturb")
    run = open_run({**portable(settings), "stage": "tune"}, root, objective_of(settings))
    if run.done:
        return run
    device = default_device()
    if settings.objective == "none":
        if evaluate is not None:
            run.log("evaluations", step=0, **evaluate(load_encoder(settings.encoder, device)))
        return run.finish()
    encoder, denoiser = build_encoder(settings, device), build_denoiser(settings, device)
    if denoiser.scratch and settings.projector == "new":
        raise ValueError(
            f"denoiser {settings.denoiser!r} has no weights yet: align() it, and name that run as projector"
        )
    conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(settings.train_projector)
    watch = evaluate and (lambda: evaluate(encoder))
    trainer = Trainer(run, settings, encoder, conditioner, denoiser, objective_of(settings))
    return train(trainer, watch, probe)


def align_preset(
    name: str, root: str | Path = RUNS, processes: int = 1, stage1: dict | None = None, stage2: dict | None = None
) -> Settings:
    """A preset's settings for `tune`, after stage 1 where it has one and `stage2` names no projector.

    Args:
        name: one of `PRESETS`.
        root: where the run of stage 1 is made; a finished one is taken as it is.
        processes: how many train together.
        stage1, stage2: settings to change, by name; `stage1` is not read where there is no stage 1.

    Raises:
        ValueError: for an unknown preset or setting, of either stage, before anything is trained.
        FileNotFoundError: for tars that are not there, before anything is trained.
    """
    changes = {1: stage1 or {}, 2: stage2 or {}}
    chosen = {stage: replace_settings(preset(name, stage, processes), changes[stage]) for stage in stages(name)}
    if "projector" in changes[2]:
        chosen.pop(1, None)
    for settings in chosen.values():
        if settings.images.endswith(".tar"):
            find_tars(settings.images)
    if 1 in chosen:
        return replace(chosen[2], projector=str(align(chosen[1], root).folder))
    return chosen[2]


# --- which run belongs to which settings ------------------------------------------------------------------------


def find_run(settings: Settings, root: str | Path = RUNS, stage: str = "tune") -> Run:
    """The run of `tune` (or of `align`, by `stage`) with these settings: finished, stopped, or not begun."""
    kept = _stage_one(settings) if stage == "align" else _stage_two(settings)
    return Run.at({**portable(kept), "stage": stage}, root)


def open_run(settings: dict, root: str | Path, objective: Callable | None) -> Run:
    """The run of these settings, its folder made if there is none; of several processes the first one makes it.

    Says so where the run was made by another version of its objective's code; the run is returned all the same.
    """
    code = source_hash(objective)
    state = PartialState(cpu=default_device().type == "cpu")
    with state.main_process_first():
        run = Run.open(settings, root, {"objective": code} if code else {})
    before = run.environment.get("objective")
    if state.is_main_process and code and before and code != before:
        print(
            f"run {run.id} was made by another version of objective {settings['objective']!r}: delete {run.folder} to "
            "train it anew",
            flush=True,
        )
    return run


def portable(settings: Settings) -> dict:
    """Settings as a run keeps them: folders inside the repository relative to it."""
    values = asdict(settings)
    for name in ("encoder", "denoiser", "projector", "images"):
        values[name] = values[name].removeprefix(f"{ROOT}/")
    return values


def objective_of(settings: Settings) -> Callable | None:
    """The objective that a run with these settings minimises; None where it trains nothing."""
    return anchored if settings.anchored else OBJECTIVES.get(settings.objective)


def _stage_two(settings: Settings) -> Settings:
    """Settings of stage 2 as its run keeps them: nothing is anchored, and only some objectives read captions."""
    bare = replace(settings, anchor=ADDED["anchor"])
    kept = CAPTIONS if bare.reads_captions else ()
    return replace(bare, **{name: ADDED[name] for name in CAPTIONED if name not in kept})


def _stage_one(settings: Settings) -> Settings:
    """Settings of stage 1 as its run keeps them: its own objective, and no LoRA."""
    by_dcr = settings.align_by == "dcr" and settings.objective != "genhancer"
    objective = "genhancer" if settings.objective == "genhancer" else "dcr" if by_dcr else "diva"
    return replace(settings, objective=objective, lora_rank=0)
