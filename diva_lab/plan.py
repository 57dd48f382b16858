"""What a preset costs before it starts: images, evaluations, FLOPs, hours, memory, and the largest batch that fits.

    diva-lab plan openai-l14-dcr --processes 4 --device H100

The code that trains takes a micro-batch of each stage, forward and backward, with models of real size whose tensors
have a shape and no values, so that neither files nor a GPU are needed. FLOPs are those of matrix products and
convolutions. Memory is that of the tensors alive at one time; on a GPU its libraries' own comes on top, for which
`SPARE` of the device is left. Attention and dropout count as on a GPU, which keeps no scores, and of a mask one byte.
"""

import importlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, shape_wrapper

from diva_lab import messages
from diva_lab.benchmark import ATTENTION, SCALES, LiveBytes, Weightless, build_parts, build_scheduler, weight_bytes
from diva_lab.gradients import term_gradients
from diva_lab.machine import generator
from diva_lab.models.conditions import Conditioner
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.diffusion import StableDiffusion
from diva_lab.models.encoders import ENCODERS, Encoder
from diva_lab.models.flow import Light
from diva_lab.models.frozen import BiasedAttention
from diva_lab.models.lora import make_trainable
from diva_lab.models.registry import LIGHT
from diva_lab.statistics import percent
from diva_lab.training.build import make_step
from diva_lab.training.presets import preset, replace_settings, stages
from diva_lab.training.settings import Settings
from diva_lab.training.stages import objective_of, stage_one, stage_two

DEVICES = {  # name -> memory in bytes, FLOP/s of dense bfloat16 products by its data sheet
    "A100": (80e9, 312e12), "A100-40GB": (40e9, 312e12), "H100": (80e9, 989e12), "H200": (141e9, 989e12),
    "L40S": (48e9, 362e12), "RTX4090": (24e9, 165e12),
}  # fmt: skip
REACHED = 65 / 312  # of these FLOP/s: DIVA's published 66.4 hours of an A100 (second hand) give this with our count
SPARE = 0.1  # of a device's memory, for CUDA's context and what its allocator reserves
SD21 = replace(SCALES["sd21"], unet=SCALES["sd21"].unet | {"sample_size": 64})  # 2.1-base
WORDS = 49408  # of CLIP's tokenizer
FLUX_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "sample_size": 1024,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
PLANNED = ("sd21-base", "light", "light-flux")  # denoisers whose sizes are known here: those of the presets
BY_ROWS = ("dcr", "dcr-guidance")  # objectives that take `settings.rows` noisy latents at a time
MOST = 4096  # images that a largest batch is looked for among
STATES = {"adamw": 2, "sgd": 1}  # numbers that an optimizer keeps of each weight


# --- models without weights -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """What a stage trains with, opened for training as the stage does it; in `mode` its tensors have no values."""

    encoder: Encoder
    conditioner: Conditioner
    denoiser: Denoiser
    mode: Weightless = field(default_factory=Weightless)

    @property
    def trained(self) -> dict[str, Tensor]:
        parts = {"encoder": self.encoder, "conditioner": self.conditioner, "network": self.denoiser.network}
        return {name: p for name, p in nn.ModuleDict(parts).named_parameters() if p.requires_grad}

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return weight_bytes(self.encoder, self.conditioner, self.denoiser)


def is_half(settings: Settings) -> bool:
    """Whether a GPU would train in bfloat16."""
    return settings.precision != "no"


def open_models(settings: Settings, stage: int, encoder: Encoder, denoiser: Denoiser) -> Models:
    """The models of a stage, opened for training, from an encoder and a denoiser that lose their weights by it."""
    width = denoiser.widths or denoiser.width
    each = settings.token_draws == "each"
    conditioner = Conditioner(settings.condition, encoder.dim, width, settings.seed, settings.projection, each)
    if stage == 2:
        lora = settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.seed, settings.lora_bias
        make_trainable(encoder, *lora, settings.lora_targets)
    conditioner.requires_grad_(stage == 1 or settings.train_projector)
    denoiser.network.requires_grad_(stage == 1 and denoiser.scratch)
    if is_half(settings) and not any(p.requires_grad for p in denoiser.network.parameters()):
        nn.Module.to(denoiser.network, torch.bfloat16)
    models = Models(encoder, conditioner, denoiser)
    for module in (encoder, conditioner, denoiser):
        models.mode.drop_weights(module)
    for name in ("vae_input", "noise_precision"):
        setattr(denoiser, name, getattr(settings, name))
    with models.mode:
        if isinstance(denoiser, StableDiffusion):
            tokens = denoiser.text_encoder.config.max_position_embeddings
            denoiser.empty = torch.empty(tokens, denoiser.width, device="cpu")
        if settings.anchored:
            conditioner.gap = torch.empty(encoder.dim, device="cpu")
    for attention in getattr(denoiser.network, "attn_processors", {}).values():
        if isinstance(attention, BiasedAttention):
            attention.attend = F.scaled_dot_product_attention
    for module in encoder.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FusedDropout
    return models


class FusedDropout(nn.Dropout):
    """Dropout as on a GPU, where one byte of each number is kept; a CPU keeps four."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, self.training)[0]


def load_shapes(settings: Settings, stage: int) -> Models:
    """The models of a preset's stage at their real size.

    Raises:
        ValueError: for an encoder or a denoiser whose sizes are not known here; lists the known ones.
    """
    name = settings.denoiser.partition("@")[0]
    if name not in PLANNED:
        raise ValueError(f"no plan for denoiser {settings.denoiser!r}; {messages.expected(name, PLANNED)}")
    if settings.encoder not in ENCODERS or settings.encoder == "tiny":
        known = [encoder for encoder in ENCODERS if encoder != "tiny"]
        raise ValueError(f"no plan for encoder {settings.encoder!r}; {messages.expected(settings.encoder, known)}")
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    try:
        with torch.device("meta"):
            model = open_clip.create_model(ENCODERS[settings.encoder][0], load_weights=False, device="meta")
            return open_models(settings, stage, Encoder(model, None), _shape_denoiser(name, settings.vae_px or None))
    finally:
        logging.disable(logging.NOTSET)


def _shape_denoiser(name: str, px: int | None) -> Denoiser:
    if name == "light-flux":
        return Light(AutoencoderKL(**FLUX_VAE), LIGHT[name][1], px)
    parts = build_parts(SD21, WORDS)
    if name == "light":
        return Light(parts["vae"], LIGHT[name][1], px)
    return StableDiffusion(**parts, tokenizer=None, scheduler=build_scheduler(), px=px)


# --- counts -----------------------------------------------------------------------------------------------------


class Tally(LiveBytes):
    """`LiveBytes` that also adds up FLOPs, by torch's formulas; `FlopCounterMode` takes several times as long."""

    formulas = flop_registry | {function: shape_wrapper(formula) for function, formula in ATTENTION.items()}

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # two of three calls
            return args[0].device
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if formula := self.formulas.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


@dataclass(frozen=True)
class Count:
    """Of a micro-batch, forward and backward: FLOPs, evaluations of the denoiser, and the most bytes alive at once."""

    flops: int
    evaluations: int
    live: int


def count_micro_batch(settings: Settings, models: Models) -> Count:
    """What a micro-batch takes; with `rows` the FLOPs of the parts that are computed: see `first_rows_alone`."""
    encoder, denoiser, texts = models.encoder.train(), models.denoiser, models.encoder.model
    tuned = any(p.requires_grad for p in encoder.parameters())
    texts.visual.set_grad_checkpointing(tuned and settings.rows > 0)  # as in training
    calls, trained = [], models.trained
    hook = denoiser.network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))

    def embed_text(captions: list[str]) -> Tensor:
        with torch.no_grad():
            tokens = torch.zeros(len(captions), texts.context_length, dtype=torch.long)
            return F.normalize(texts.encode_text(tokens).float(), dim=-1)  # [n, d]

    with models.mode, Tally() as tally:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half(settings)):
            px = max(encoder.px, denoiser.px)
            images, captions = torch.empty(settings.batch, 3, px, px), [""] * settings.batch
            random = generator("plan")
            step = make_step(images, encoder, models.conditioner, denoiser, random, settings, captions=captions)
            terms = objective_of(settings)(replace(step, embed_text=embed_text))
        term_gradients(terms, trained)
    hook.remove()
    return Count(tally.flops, sum(calls), tally.peak)


@contextmanager
def first_rows_alone() -> Iterator[None]:
    """Within it DCR computes the first of its parts of rows alone.

    They follow one another and each is freed, so that the most memory is that of one.
    """
    module = importlib.import_module("diva_lab.objectives.dcr")
    by_rows = module.by_rows

    def first(loss, size: int, *inputs: Tensor) -> Tensor:
        return by_rows(loss, size, *(x[: size or None] for x in inputs)).mean().expand(len(inputs[0]))

    module.by_rows = first
    try:
        yield
    finally:
        module.by_rows = by_rows


def count_live(settings: Settings, models: Models) -> int:
    """The most bytes that a micro-batch holds at once."""
    with first_rows_alone():
        return count_micro_batch(settings, models).live


# --- a stage ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StagePlan:
    """What a stage costs; memory in bytes, of one process.

    Attributes:
        models: without weights.
        flops, evaluations: of a micro-batch of one process.
        kept: the optimizer's state, and the gradients that are there while the next ones are computed.
        live: rows -> the most bytes that a micro-batch holds at once; 0 stands for all rows.
        disk: of a checkpoint.
    """

    stage: int
    settings: Settings
    processes: int
    models: Models
    flops: int
    evaluations: int
    kept: int
    live: dict[int, int]
    disk: int

    @property
    def images(self) -> int:
        """Of a step of all processes."""
        return self.settings.batch * self.settings.accumulate * self.processes

    @property
    def total(self) -> float:
        """FLOPs of all steps and processes."""
        return float(self.flops * self.settings.accumulate * self.processes * self.settings.steps)

    def memory(self, rows: int | None = None) -> int:
        """All bytes, at the settings' rows or at others."""
        return self.models.weights + self.kept + self.live[self.settings.rows if rows is None else rows]

    def hours(self, rate: float) -> float:
        """GPU hours at so many FLOP/s."""
        return self.total / rate / 3600


def plan_stage(
    settings: Settings, stage: int, processes: int = 1, models: Models | None = None, rows: tuple[int, ...] = ()
) -> StagePlan:
    """Count a stage.

    Args:
        settings: of the stage.
        models: as of `open_models`; `load_shapes` if None.
        rows: more of them to count memory for, where the objective takes rows at all.

    Raises:
        ValueError: as `load_shapes`.
    """
    settings = (stage_one if stage == 1 else stage_two)(settings)
    models = models or load_shapes(settings, stage)
    in_rows = settings.rows > 0 and settings.objective in BY_ROWS
    whole = count_micro_batch(replace(settings, rows=settings.batch) if in_rows else settings, models)
    live = {} if in_rows else {settings.rows: whole.live}
    for size in {settings.rows, *rows} - live.keys() if settings.objective in BY_ROWS else ():
        live[size] = count_live(replace(settings, rows=size), models)
    trained = sum(p.numel() * 4 for p in models.trained.values())
    states = STATES[settings.optimizer]
    kept = (states + 1 + (settings.accumulate > 1)) * trained  # beside the state the last step's gradient, and the sum
    counts = whole.flops, whole.evaluations, kept, dict(sorted(live.items()))
    return StagePlan(stage, settings, processes, models, *counts, (states + 1) * trained)


def plan_preset(
    name: str, processes: int = 1, changes: dict | None = None, rows: tuple[int, ...] = ()
) -> list[StagePlan]:
    """`plan_stage` of every stage of a preset, its settings changed by name."""
    chosen = [(stage, replace_settings(preset(name, stage, processes), changes or {})) for stage in stages(name)]
    return [plan_stage(settings, stage, processes, rows=rows) for stage, settings in chosen]


def largest_batch(plan: StagePlan, rows: int, room: float) -> int:
    """The largest batch that fits into `room` bytes with so many rows at a time; 0 for none.

    Memory grows with the square of a batch whose rows are all taken at once, else linearly: it is counted at two or
    three sizes from the settings' on.
    """
    settings = replace(plan.settings, rows=rows)
    several = (1, 2, 3) if rows == 0 and settings.objective in BY_ROWS else (1, 2)
    live = {
        settings.batch * k: count_live(replace(settings, batch=settings.batch * k), plan.models) for k in several[1:]
    }
    return _largest({settings.batch: plan.live[rows]} | live, room - plan.models.weights - plan.kept)


def largest_rows(plan: StagePlan, room: float) -> int:
    """The largest `rows` with which the settings' batch fits into `room` bytes, from two that were counted."""
    live = {rows: live for rows, live in plan.live.items() if rows}
    return min(plan.settings.batch, _largest(live, room - plan.models.weights - plan.kept))


def _largest(live: dict[int, int], room: float) -> int:
    """The largest size whose bytes fit, by the polynomial through those of a few sizes."""
    tried = np.arange(1, MOST + 1)
    fits = np.polyval(np.polyfit(list(live), list(live.values()), len(live) - 1), tried) <= room
    return int(tried[fits].max(initial=0))


# --- what a user sees -------------------------------------------------------------------------------------------


def read_rate(text: str) -> float:
    """FLOP/s from a number of TFLOP/s, or from the json of `diva-lab benchmark`: those of its training step.

    Raises:
        ValueError: for anything else.
    """
    with suppress(ValueError):
        if 0 < (rate := float(text)) < float("inf"):
            return rate * 1e12
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        row = json.loads(Path(text).read_text(encoding="utf-8"))["variants"]["exact"]
        return row["flop"] / row["median"]
    raise ValueError(
        f"--rate {text}: expected TFLOP/s as 65, or a file of `diva-lab benchmark dcr-step --scale sd21 --json FILE`"
    )


def read_device(name: str) -> tuple[float, float]:
    """Memory in bytes and FLOP/s of a key of `DEVICES`; ValueError for another name."""
    if name not in DEVICES:
        raise ValueError(f"--device {name}: {messages.expected(name, DEVICES)}")
    return DEVICES[name]


def gigabytes(number: int | float) -> str:
    if number < 1e8:
        return f"{number / 1e6:.0f} MB"
    return f"{number / 1e9:.{0 if number >= 1e10 else 1}f} GB"


def describe_plan(name: str, plans: Sequence[StagePlan], device: str, rate: float | None = None) -> str:
    """The plans of a preset's stages as a table: one column a stage.

    Args:
        name: of the preset.
        device: a key of `DEVICES`.
        rate: FLOP/s of one of them; `REACHED` of the data sheet's if None.
    """
    memory, peak = read_device(device)
    reached = rate or REACHED * peak
    how = "as given" if rate else "assumed, the share that DIVA's published hours give; --rate takes another"
    cells = [_cells(plan, reached, memory * (1 - SPARE)) for plan in plans]
    labels = dict.fromkeys(label for column in sorted(cells, key=len, reverse=True) for label in column)
    rows = {"": [f"stage {plan.stage}" for plan in plans]}
    rows |= {label: [column.get(label, "–") for column in cells] for label in labels}
    head = (
        f"{name} on {plans[0].processes} x {device} of {gigabytes(memory)} at {reached / 1e12:.0f} TFLOP/s each: "
        f"{percent(reached / peak, digits=0)} of its bfloat16 peak, {how}"
    )
    return "\n".join([head, *(f"{label:44}" + "".join(f"{cell:>18}" for cell in row) for label, row in rows.items())])


def _cells(plan: StagePlan, rate: float, room: float) -> dict[str, str]:
    """Label -> what it is in this stage."""
    settings = plan.settings
    cells = {
        "steps": f"{settings.steps}",
        "images a step: batch x accumulate x processes": (
            f"{plan.images} = {settings.batch}x{settings.accumulate}x{plan.processes}"
        ),
        "images in all": f"{plan.images * settings.steps / 1e6:.2f} M",
        "evaluations of the denoiser a step": f"{plan.evaluations * settings.accumulate * plan.processes}",
        "TFLOP a micro-batch": f"{plan.flops / 1e12:.2f}",
        "EFLOP in all": f"{plan.total / 1e18:.1f}",
        "GPU hours": f"{plan.hours(rate):.0f}",
        "hours on the clock": f"{plan.hours(rate) / plan.processes:.1f}",
        "images a second": f"{plan.images * settings.steps / plan.hours(rate) * plan.processes / 3600:.1f}",
        "memory: weights": gigabytes(plan.models.weights),
        "memory: optimizer and gradients": gigabytes(plan.kept),
    }
    for rows, live in plan.live.items():
        cells[f"memory: a micro-batch, {_rows(rows)}"] = gigabytes(live)
        cells[f"memory in all, {_rows(rows)}"] = gigabytes(plan.memory(rows))
        if rows in (0, 1):
            cells[f"largest batch, {_rows(rows)}"] = f"{largest_batch(plan, rows, room)}"
    if 1 in plan.live:
        most = "all" if plan.memory(0) <= room else f"{largest_rows(plan, room)}"
        cells[f"largest rows at batch={settings.batch}"] = most
    return cells | {"disk of the run": gigabytes(plan.disk)}


def _rows(rows: int) -> str:
    return f"rows={rows}" if rows else "all rows at once"


def describe_start(plan: StagePlan, device: torch.device) -> str:
    """A line for before the first step: what the stage costs on this machine's device."""
    settings, hours = plan.settings, ""
    kind = next((k for k in DEVICES if device.type == "cuda" and k in torch.cuda.get_device_name(device)), None)
    if kind:
        rate = REACHED * DEVICES[kind][1]
        hours = f", about {plan.hours(rate):.0f} GPU hours at {rate / 1e12:.0f} TFLOP/s (assumed)"
    return (
        f"stage {plan.stage}: {settings.steps} steps of {plan.images} images, "
        f"{plan.evaluations * settings.accumulate * plan.processes} evaluations of the denoiser a step; "
        f"{plan.total / 1e18:.2g} EFLOP{hours}; {gigabytes(plan.memory())} of memory"
    )
