"""Two stages, one loop: `align` trains the projector, `tune` the encoder; the denoiser is frozen in both.

    run = align(Settings(condition="global", steps=1000))
    run = tune(Settings(objective="dcr", projector=run.folder, steps=200), evaluate=report)

Every draw of a step depends on (seed, step) alone, so a killed run goes on to the same bits on one machine.
"""

import atexit
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from tqdm import tqdm

from diva_lab.conditions import CONDITIONS, PROJECTIONS, Conditioner
from diva_lab.denoisers import TARGETS, Denoiser, load_denoiser
from diva_lab.encoders import Encoder, Features, embed, load_encoder, make_trainable, merge_lora, visual_weights
from diva_lab.gradients import COMBINE, FEATURES, Gradient, combine, measure, term_gradients
from diva_lab.images import augment, open_images
from diva_lab.machine import default_device, fast_bf16, generator
from diva_lab.objectives import OBJECTIVES, Step, timestep_weights
from diva_lab.runs import DATA, ROOT, RUNS, Run

# The settings of the shipped projectors, which `make run` and the notebooks start from.
SHIPPED = DATA / "tiny" / "projectors"
PROJECTORS = ("global", "recap")  # conditions whose projectors ship, for the tiny models


@dataclass(frozen=True)
class Settings:
    """All settings of both stages. Defaults are DCR's recipe at the tiny world's size.

    Attributes:
        encoder, denoiser: names of the registries, or folders.
        images: `world`, `world:SEED`, a folder, webdataset tars, or `hf:` and a Hugging Face dataset.
        objective: of stage 2; stage 1 reconstructs by `diva`'s loss (DCR's paper; its code runs the full DCR loss), or
            by `genhancer`'s.
        condition: what the denoiser is told of the picture.
        prompt: the empty prompt; DIVA's is its template without a class.
        projection: `mlp` (DCR: LayerNorm, Linear, GELU, Linear) or one `linear` (DIVA).
        projector: `shipped`, `new`, or the folder of a run of stage 1, or its weights' .safetensors file.
        train_projector: tune it together with the encoder, as DIVA as published does.
        batch, accumulate: pictures a micro-batch and process, micro-batches a step.
        optimizer: `adamw` or `sgd` (momentum .9).
        schedule: of lr after `warmup` steps, `constant`, or `cosine` down to zero at the last step.
        clip: largest norm of the gradient, 0 for none.
        lora_rank: 0 tunes all visual weights.
        lora_bias: whether the biases of LoRA's layers are tuned too.
        draws: DIVA's draws of (t, eps) an image.
        tau: temperature of both contrasts.
        target: DCR's ground truth, `noise` (paper) or `velocity` (released code).
        denominator: of DCR's softmax, `shared` (published) or `own`.
        rows: noisy latents that DCR takes at a time, 0 for all; 1 needs the least memory, and the encoder's blocks are
            then computed again in the backward pass. The result is the same.
        negatives: other pictures that DCR contrasts each with, drawn anew each step; 0 for all (published).
        negative_gradient: whether it flows through DCR's negatives (published).
        flips: in the augmentation.
        parts: DCR's pull to the truth, pull to the view and push as terms of their own, each with a backward pass.
        combine: how the terms' gradients become one: their `sum`, or a method of surgery, a key of `COMBINE`.
        align_by: stage 1's loss: `rec` (paper: L_rec, b evaluations) or `dcr` (released code: all of DCR's).
        timesteps: how t is drawn: a key of `TIMESTEPS`, or relative weights of equal parts of them, as `0,0,1,3`.
        vae_px: side of the pictures that the denoiser encodes, 0 for its own.
        latent: the posterior's `mean` (DIVA) or a `sample` (DCR's code).
        keep_latents: pictures whose latents are kept in memory, encoded once: pays from the second epoch on.
        compile: the UNet by torch.compile: a minute or more at the start, then faster steps.
        precision: `bf16`, `no`, or `auto`: bf16 where the machine multiplies it in hardware.
        evaluate_every, save_every: in steps; 0 for only at the end.
    """

    encoder: str = "tiny"
    denoiser: str = "tiny"
    images: str = "world"
    objective: str = "dcr"
    condition: str = "global"
    prompt: str = ""
    projection: str = "mlp"
    projector: str = "shipped"
    train_projector: bool = False
    seed: int = 0
    steps: int = 100
    batch: int = 8
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: int = 0
    schedule: str = "constant"
    clip: float = 1.0
    lora_rank: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    lora_bias: bool = True
    draws: int = 2
    tau: float = 0.1
    lambda_con: float = 1.0
    lambda_rec: float = 1.0
    target: str = "noise"
    denominator: str = "shared"
    rows: int = 0
    negatives: int = 0
    negative_gradient: bool = True
    parts: bool = False
    combine: str = "sum"
    align_by: str = "rec"
    flips: bool = True
    timesteps: str = "uniform"
    vae_px: int = 0
    latent: str = "mean"
    keep_latents: int = 0
    compile: bool = False
    precision: str = "auto"
    evaluate_every: int = 0
    save_every: int = 100

    def __post_init__(self):
        choices = {
            "objective": (*OBJECTIVES, *CONTROLS), "condition": CONDITIONS, "target": TARGETS, "combine": COMBINE,
            "align_by": ("rec", "dcr"),
            "denominator": ("shared", "own"), "latent": ("mean", "sample"), "optimizer": ("adamw", "sgd"),
            "precision": ("auto", "bf16", "no"), "schedule": SCHEDULES, "projection": PROJECTIONS,
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in tuple(known):  # a value of another type may have no hash
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; expected one of {', '.join(known)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Path):
                object.__setattr__(self, field.name, str(value))
            elif type(value) is not field.type and not (field.type is float and type(value) is int):
                raise ValueError(f"setting {field.name}={value!r}: expected {field.type.__name__}")
        timestep_weights(self.timesteps)
        if self.parts and self.rows:
            raise ValueError(f"setting rows={self.rows}: parts=True takes all rows at once, rows=0")
        for name in ("batch", "accumulate", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"setting {name}={getattr(self, name)}: expected at least 1")
        for name in (
            "steps",
            "warmup",
            "lora_rank",
            "rows",
            "negatives",
            "keep_latents",
            "evaluate_every",
            "save_every",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"setting {name}={getattr(self, name)}: expected 0 or more")
        if self.objective in ("dcr", "dcr-guidance", "contrastive", "naive") and self.batch < 2:
            raise ValueError(f"setting batch={self.batch}: a contrast needs other pictures, at least 2")

    @classmethod
    def of(cls, run: Run) -> "Settings":
        """The settings that a run was made with."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in run.settings.items() if name in known})


SCHEDULES = {  # name -> part of lr as a function of the part of the steps that is done
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
PROBE_SEED = 1_000_000  # added to the seed for the pictures of probe batches
CONTROLS = ("none", "perturb-norm", "perturb-drift")  # rows beside the objectives: untouched, or moved at random
Evaluate = Callable[..., dict[str, float]]
Probe = Callable[[Callable[..., Step], dict[str, Tensor]], list[dict]]


def rate(settings: Settings, step: int) -> float:
    """The learning rate of a step: linear warm-up, then the schedule over the steps that are left."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)
    return settings.lr * SCHEDULES[settings.schedule]((step - settings.warmup) / (settings.steps - settings.warmup))


# --- building what the settings name ----------------------------------------------------------------------------


def build_encoder(settings: Settings, device: torch.device | str = "cpu") -> Encoder:
    """The encoder, its visual tower open for training as the settings say."""
    encoder = load_encoder(settings.encoder, device)
    make_trainable(
        encoder, settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.seed, settings.lora_bias
    )
    encoder.model.visual.set_grad_checkpointing(settings.rows > 0)  # by rows, it is the encoder that holds most
    return encoder.to(device)


def build_denoiser(settings: Settings, device: torch.device | str = "cpu") -> Denoiser:
    """The frozen denoiser, with the settings' size of pictures and empty prompt; a light one as stage 1 left it.

    Raises:
        FileNotFoundError, ValueError: as `build_conditioner`, where a light denoiser's weights are asked for.
    """
    denoiser = load_denoiser(settings.denoiser, device, settings.vae_px or None)
    denoiser.prompt, denoiser.keep_latents = settings.prompt, settings.keep_latents
    if denoiser.scratch and settings.projector != "new":
        _load_aligned(settings, denoiser.network, "network.")
    return denoiser


def _load_aligned(settings: Settings, module: nn.Module, part: str) -> None:
    """Into `module` those weights of the settings' projector whose names begin with `part`."""
    if settings.projector == "shipped":
        path = SHIPPED / f"{settings.condition}.safetensors"
    else:
        path = Path(settings.projector)
        path = path if path.suffix == ".safetensors" else path / "checkpoint" / "weights.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"projector={settings.projector!r}: no {path}; expected 'new', 'shipped' (tiny models only) or the folder "
            "of a finished run of align()"
        )
    try:
        module.load_state_dict({n.removeprefix(part): w for n, w in load_file(path).items() if n.startswith(part)})
    except RuntimeError as error:
        raise ValueError(
            f"projector {path} does not fit encoder {settings.encoder!r} and denoiser {settings.denoiser!r}; align() a "
            f"new one: {error}"
        ) from error


def build_conditioner(settings: Settings, encoder: Encoder, denoiser: Denoiser) -> Conditioner:
    """The condition with its projector: shipped, new, or of a run of stage 1.

    Raises:
        FileNotFoundError: where there is no such projector; says how to make one.
        ValueError: where it does not fit the encoder and the denoiser.
    """
    conditioner = Conditioner(settings.condition, encoder.dim, denoiser.width, settings.seed, settings.projection)
    if settings.projector != "new":
        _load_aligned(settings, conditioner, "conditioner.")
    return conditioner.to(denoiser.device)


def make_step(
    images: Tensor,
    encoder: Encoder,
    conditioner: Conditioner,
    denoiser: Denoiser,
    random: torch.Generator,
    settings: Settings,
    shift: Tensor | None = None,
) -> Step:
    """What an objective is given: pictures [b, 3, h, w] in [0, 1] and the models, all draws from `random`.

    `shift` [b, d], zeros, is added to the global embedding of every view of a picture: the gradient with respect to it
    is that with respect to the embeddings, without a backward pass through the encoder.
    """

    def encode(pictures: Tensor) -> Features:
        features = encoder.features(pictures)
        return features if shift is None else replace(features, embedding=features.embedding + shift)

    return Step(
        images=images,
        encode=encode,
        condition=lambda features: conditioner(features, denoiser.empty, random),
        augment=lambda pictures: augment(pictures, random, settings.flips),
        denoiser=denoiser,
        generator=random,
        settings=settings,
    )


def tuned_encoder(run: Run, device: torch.device | str = "cpu") -> Encoder:
    """The encoder that a run of `tune` or `perturb` made, frozen, its LoRA merged."""
    settings = Settings.of(run)
    if run.settings["stage"] == "tune" and settings.objective != "none":
        encoder = build_encoder(settings, device)
        weights = {n.removeprefix("encoder."): w for n, w in run.weights().items() if n.startswith("encoder.")}
    else:
        encoder = load_encoder(settings.encoder, device)
        weights = run.weights() if run.settings["stage"] == "perturb" else {}
    unexpected = encoder.load_state_dict(weights, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"run {run.id} holds weights that its encoder does not have: {', '.join(unexpected[:3])} ...")
    return merge_lora(encoder).eval().requires_grad_(False)


# --- the loop ---------------------------------------------------------------------------------------------------


def _live() -> bool:
    """Whether somebody watches: a terminal, or a notebook's front end (which, unlike a batch run, can be asked)."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


@contextmanager
def _progress(total: int, first: int, label: str) -> Iterator[Callable[[int, float], None]]:
    """A bar where somebody watches; elsewhere one line every tenth of the way."""
    if _live():
        with tqdm(total=total, initial=first, desc=label) as bar:
            yield lambda step, loss: (bar.update(), bar.set_postfix(loss=f"{loss:.4f}"))
        return
    every = max(1, total // 10)

    def line(step: int, loss: float) -> None:
        if (step + 1) % every == 0 or step + 1 == total:
            print(f"{label}: step {step + 1}/{total}, loss {loss:.4f}", flush=True)

    yield line


def _train(
    run: Run,
    settings: Settings,
    encoder: Encoder,
    conditioner: Conditioner,
    denoiser: Denoiser,
    objective: Callable[[Step], dict[str, Tensor]],
    evaluate: Callable[[], dict[str, float]] | None,
    probe: Probe | None = None,
) -> Run:
    """Minimise the objective over all parameters of encoder and conditioner that ask for a gradient.

    Under `accelerate launch` each process takes pictures and draws of its own, gradients are averaged over processes
    before anything is measured or clipped, and the first process alone writes. A checkpoint keeps every process's
    position in its pictures, because each skips its own broken ones.
    """
    AcceleratorState._reset_state()  # one process may hold runs of different precision, one after the other
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if fast_bf16(default_device()) else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=default_device().type == "cpu")
    device, rank, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    models = {"encoder": encoder, "conditioner": conditioner}
    if any(p.requires_grad for p in denoiser.network.parameters()):
        models["network"] = denoiser.network
    elif precision == "bf16":
        nn.Module.to(denoiser.network, torch.bfloat16)  # frozen: nobody needs it in float32; diffusers' own warns
    if settings.compile:
        denoiser.network.compile(dynamic=False)
    modules = nn.ModuleDict(models).to(device)
    parameters = {name: p for name, p in modules.named_parameters() if p.requires_grad}
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
    else:
        optimizer = torch.optim.SGD(
            parameters.values(), lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay
        )
    optimizer = accelerator.prepare(optimizer)

    first, seconds, positions = 0, 0.0, []
    with accelerator.main_process_first():
        state = run.resume()
    if state is not None:
        first, seconds, positions = state["step"], state["seconds"], state.get("positions", [])
        optimizer.load_state_dict(state["optimizer"])
        modules.load_state_dict(run.weights(), strict=False)
    accelerator.wait_for_everyone()  # `resume` cuts records back: nobody writes before all have done it

    def at(number: int, **changes) -> Step:
        """A step of probe batch `number`, other pictures than are trained on, with other settings where given."""
        while len(shown) <= number:
            shown.append(next(probed).to(device).float() / 255)
        random = generator("probe", settings.seed, number)
        return make_step(shown[number], encoder, conditioner, denoiser, random, replace(settings, **changes))

    def watch(step: int) -> None:
        if rank == 0:
            modules.eval()
            if evaluate is not None:
                run.log("evaluations", step=step, **evaluate())
            if probe is not None:
                dtype = denoiser.network.dtype
                nn.Module.to(denoiser.network, torch.float32)  # differences of gradients would drown in rounding
                for row in probe(at, parameters):
                    run.log("probes", step=step, **row)
                nn.Module.to(denoiser.network, dtype)
        accelerator.wait_for_everyone()

    def averaged(values: Tensor) -> Tensor:
        return accelerator.reduce(values, "mean") if processes > 1 else values

    px = max(encoder.px, denoiser.px)
    position = first * settings.accumulate * settings.batch  # where no picture was broken
    if len(positions) == processes:
        position = positions[rank]
    source = open_images(settings.images, px, settings.batch, settings.seed, position, rank, processes)
    skipped: list[dict] = []  # since the last checkpoint
    shown: list[Tensor] = []  # to probes; their pictures are not opened where nobody probes
    probed = probe and open_images(settings.images, px, settings.batch, settings.seed + PROBE_SEED)

    def save(step: int) -> None:
        places, lines = gather_object([source.position]), gather_object(skipped)
        if rank == 0:
            for line in lines:
                run.log("skipped", **line)
            run.save(step, parameters, optimizer.state_dict(), seconds, places)
        skipped.clear()

    if first == 0:
        watch(0)
    with _progress(settings.steps, first, run.id) as tell:
        for step in range(first, settings.steps):
            start = time.perf_counter()
            modules.train()
            total: dict[str, Gradient] = {}
            line: dict[str, float] = {}
            shift = torch.zeros(settings.accumulate, settings.batch, encoder.dim, device=device, requires_grad=True)
            for micro in range(settings.accumulate):
                random = generator("step", settings.seed, step, micro, *([rank] if rank else []))
                torch.manual_seed(random.initial_seed())  # LoRA's dropout draws from the global generator
                images = next(source).to(device).float() / 255
                try:
                    with accelerator.autocast():
                        made = make_step(images, encoder, conditioner, denoiser, random, settings, shift[micro])
                        terms = objective(made)
                    gradients = term_gradients(terms, parameters | {FEATURES: shift})
                except torch.OutOfMemoryError as error:
                    raise RuntimeError(
                        f"run {run.id}: out of memory at step {step} with batch={settings.batch}, "
                        f"rows={settings.rows}; rows=1 gives DCR's gradients in the least memory"
                    ) from error
                for name, gradient in gradients.items():
                    line[name] = line.get(name, 0) + terms[name].mean().item() / settings.accumulate
                    for n, g in gradient.items():
                        part = g / settings.accumulate if settings.accumulate > 1 else g
                        total.setdefault(name, {})[n] = total[name][n] + part if n in total.get(name, {}) else part
                del gradients, made, terms
            if processes > 1:
                for gradient in total.values():
                    flat = averaged(torch.cat([g.flatten() for n, g in gradient.items() if n != FEATURES]))
                    parts = flat.split([p.numel() for p in parameters.values()])
                    gradient |= {n: x.view_as(p) for (n, p), x in zip(parameters.items(), parts, strict=True)}
                line = dict(zip(line, averaged(torch.tensor([*line.values()], device=device)).tolist(), strict=True))
            measured = measure(total)
            for n, g in combine(total, settings.combine).items():
                parameters[n].grad = g
            del total
            norm = nn.utils.clip_grad_norm_(parameters.values(), settings.clip or float("inf"))
            for group in optimizer.param_groups:
                group["lr"] = rate(settings, step)
            optimizer.step()
            loss = sum(line.values())
            if loss != loss:
                raise FloatingPointError(f"run {run.id}: the loss is not a number at step {step}; try a smaller lr")
            seconds += time.perf_counter() - start
            skipped += [{"step": step, "name": name, "reason": reason} for name, reason in source.skipped]
            source.skipped.clear()
            facts = {"loss": loss, **line, "grad_norm": norm.item(), **measured, "seconds": seconds}
            if rank == 0:
                run.log("metrics", step=step, **facts)
                tell(step, loss)
            done = step + 1
            last = done == settings.steps
            if last or (settings.evaluate_every and done % settings.evaluate_every == 0):
                watch(done)
            if last or (settings.save_every and done % settings.save_every == 0):
                save(done)
    if settings.steps == 0:
        save(0)
    if rank == 0 and len(broken := run.skipped()):
        print(f"{run.id}: {len(broken)} broken pictures were skipped, see {run.folder / 'skipped.jsonl'}", flush=True)
    accelerator.wait_for_everyone()
    return run.finish()


@atexit.register
def _leave() -> None:
    """End the process group: left to the interpreter's end, its threads may abort a process that has done its work."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _portable(settings: Settings) -> dict:
    """Settings as a run keeps them: folders inside the repository relative to it."""
    values = asdict(settings)
    for name in ("encoder", "denoiser", "projector", "images"):
        values[name] = values[name].removeprefix(f"{ROOT}/")
    return values


def _open(settings: dict, root: str | Path) -> Run:
    """The run of these settings; of several processes the first one makes its folder."""
    with PartialState(cpu=default_device().type == "cpu").main_process_first():
        return Run.open(settings, root)


def align(settings: Settings, root: str | Path = RUNS, evaluate: Evaluate | None = None) -> Run:
    """Stage 1: train the projector by L_rec, encoder and denoiser frozen; B evaluations a step.

    A light denoiser has no weights before: it is trained with the projector (GenHancer).

    Args:
        settings: LoRA is not used here; the loss is `genhancer`'s where that is the objective, else as `align_by` says.
            `projector="new"` starts from random weights.
        root: the run's folder is made under it; a finished run of the same settings is returned at once.
        evaluate: called as `evaluate(conditioner, encoder, denoiser)`, returns what is to be recorded.
    """
    settings = _stage_one(settings)
    run = _open({**_portable(settings), "stage": "align"}, root)
    if run.done:
        return run
    device = default_device()
    encoder, denoiser = load_encoder(settings.encoder, device), build_denoiser(settings, device)
    conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(True)
    denoiser.network.requires_grad_(denoiser.scratch)
    watch = evaluate and (lambda: evaluate(conditioner, encoder, denoiser))
    return _train(run, settings, encoder, conditioner, denoiser, OBJECTIVES[settings.objective], watch)


def _stage_one(settings: Settings) -> Settings:
    """Settings of stage 1 as its run keeps them: its own objective, and no LoRA."""
    by_dcr = settings.align_by == "dcr" and settings.objective != "genhancer"
    objective = "genhancer" if settings.objective == "genhancer" else "dcr" if by_dcr else "diva"
    return replace(settings, objective=objective, lora_rank=0)


def planned(settings: Settings, root: str | Path = RUNS, stage: str = "tune") -> Run:
    """Where the run of `tune` (or of `align`, by `stage`) with these settings lies, done, begun, or not."""
    kept = _stage_one(settings) if stage == "align" else settings
    return Run.at({**_portable(kept), "stage": stage}, root)


def tune(
    settings: Settings, root: str | Path = RUNS, evaluate: Evaluate | None = None, probe: Probe | None = None
) -> Run:
    """Stage 2: tune the encoder under `settings.objective`, denoiser frozen, projector too unless asked.

    Args:
        settings: the objective `none` leaves the encoder as it is and only evaluates: the first control.
        root: the run's folder is made under it; a finished run of the same settings is returned at once.
        evaluate: called as `evaluate(encoder)`, returns what is to be recorded.
        probe: called at the same steps, in float32 and without dropout, as `probe(at, parameters)`; `at(number,
            **changes)` makes a `Step` of a batch of other pictures, with other settings where given. Returns records.

    Raises:
        ValueError, FileNotFoundError: for settings that name what does not exist.
        FloatingPointError: where the loss stops being a number.
        RuntimeError: where the device's memory is short; says what needs less.
    """
    if settings.objective not in (*OBJECTIVES, "none"):
        raise ValueError(f"objective {settings.objective!r} is no training; see perturb()")
    run = _open({**_portable(settings), "stage": "tune"}, root)
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
            f"denoiser {settings.denoiser!r} has no weights yet: align() it, and give that run as projector"
        )
    conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(settings.train_projector)
    watch = evaluate and (lambda: evaluate(encoder))
    return _train(run, settings, encoder, conditioner, denoiser, OBJECTIVES[settings.objective], watch, probe)


@torch.no_grad()
def perturb(
    like: Run, images: Tensor, match: str = "norm", root: str | Path = RUNS, evaluate: Evaluate | None = None
) -> Run:
    """The control that no signal went into: move the weights at random, as far as the run `like` moved them.

    Args:
        like: a finished run of `tune`.
        images: held-out pictures, uint8 [n, 3, h, w], on which drift is measured.
        match: `norm` gives each tensor a Gaussian change of the norm that `like` gave it; `drift` scales that change,
            by bisection, until the mean of 1 - cos between old and new embeddings of `images` equals that of `like`.
        evaluate: called as `evaluate(encoder)`.

    Returns:
        A run of objective `perturb-norm` or `perturb-drift` that holds the moved weights; its evaluation is at step
        `like.settings["steps"]`, and its metrics hold the scale, the drift, and the drift of `like`.
    """
    if match not in ("norm", "drift"):
        raise ValueError(f"unknown match {match!r}; expected norm or drift")
    if not like.done:
        raise ValueError(f"run {like.id} is not finished; tune() it to its end first")
    settings = replace(Settings.of(like), objective=f"perturb-{match}")
    shown = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:8]
    run = Run.open({**_portable(settings), "stage": "perturb", "like": like.id, "held_out": shown}, root)
    if run.done:
        return run
    device = default_device()
    run.resume()
    encoder, tuned = load_encoder(settings.encoder, device), tuned_encoder(like, device)
    before, goal = embed(encoder, images), embed(tuned, images)
    original = {name: w.clone() for name, w in visual_weights(encoder).items()}
    random = generator("perturb", settings.seed)
    direction = {}
    for name, new in visual_weights(tuned).items():
        noise = torch.randn(new.shape, generator=random).to(new)
        direction[name] = noise * (torch.linalg.vector_norm(new - original[name]) / torch.linalg.vector_norm(noise))

    def drift(scale: float) -> float:
        for name, weight in visual_weights(encoder).items():
            weight.copy_(original[name] + scale * direction[name])
        return (1 - (embed(encoder, images) * before).sum(1)).mean().item()

    wanted = (1 - (goal * before).sum(1)).mean().item()
    low, high = 0.0, 1.0
    if match == "drift":
        while drift(high) < wanted and high < 1e4:
            low, high = high, 2 * high
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if drift(middle) < wanted else (low, middle)
    run.log("metrics", step=0, loss=0.0, scale=high, drift=drift(high), drift_like=wanted, seconds=0.0)
    if evaluate is not None:
        run.log("evaluations", step=settings.steps, **evaluate(encoder))
    run.save(settings.steps, visual_weights(encoder), {}, 0.0)
    return run.finish()
