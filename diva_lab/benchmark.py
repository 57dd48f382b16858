"""Time and memory of a training step: against a plain implementation, and with each lever left out in turn.

    diva-lab benchmark dcr-step --scale tiny --batch 8 --json out.json
    diva-lab benchmark diva-step | align-step | conflict-step | evaluate | input

`reference` is the step of the papers' released code: eager, one call for all evaluations, the empty prompt encoded for
every image, images augmented one by one, all activations kept. `exact` is this project's training step. All variants
run in one process, in turn, on the same inputs and weights; medians are over the rounds. Weights are random except at
the scale `tiny`: speed does not depend on them. The scale `l14` is a CLIP of ViT-L/14's size without a denoiser, for
`evaluate`.
"""

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from weakref import finalize

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from open_clip import CLIP
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from diva_lab import messages
from diva_lab.evaluation.features import FeatureStore
from diva_lab.evaluation.world import world_report
from diva_lab.gradients import combine, measure, term_gradients
from diva_lab.image_files import Place
from diva_lab.images import augment, open_images
from diva_lab.machine import default_device, fast_bf16, free_memory, generator
from diva_lab.models.conditions import Conditioner
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.diffusion import StableDiffusion
from diva_lab.models.encoders import ENCODERS, Encoder, embed, load_encoder
from diva_lab.models.frozen import LEVERS
from diva_lab.models.lora import make_trainable
from diva_lab.models.registry import DENOISERS, load_denoiser
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.dcr import dcr_loss
from diva_lab.objectives.diva import reconstruction
from diva_lab.objectives.negatives import draw_others
from diva_lab.objectives.step import Step
from diva_lab.provenance import environment
from diva_lab.statistics import percent
from diva_lab.training.build import build_conditioner, make_step
from diva_lab.training.settings import Settings

COMPONENTS = ("vae", "network", "text_encoder", "tokenizer", "scheduler")
PHOTO = (375, 500)  # rows and columns of the JPEGs that `evaluate` reads
PHOTO_FILES = 256  # the most different JPEGs; more images read them again
COMPARED = {"sd21": 2}  # scale -> images whose gradients are compared in float32, of the others all
COMPILED = ("exact", "exact, row by row", "exact, two rows at a time", "sampled, K = 4")  # variants to compile too

ATTENTION = {  # torch counts the fused attention of GPUs, not the CPU's; shapes -> FLOPs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


@dataclass(frozen=True)
class Scale:
    """Sizes of a random CLIP and, unless `unet` is None, a random Stable Diffusion with prompts of `tokens` tokens."""

    vision: dict
    dim: int
    unet: dict | None = None
    vae: tuple[int, ...] = ()
    text: dict | None = None
    tokens: int = 77


VIT_L14 = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
SCALES = {
    "tiny": None,  # the models that ship
    "small": Scale(
        {"image_size": 64, "layers": 6, "width": 256, "patch_size": 8, "head_width": 64}, 256,
        {"sample_size": 16, "block_out_channels": (96, 192, 256), "layers_per_block": 1,
         "attention_head_dim": (3, 6, 8), "cross_attention_dim": 256, "norm_num_groups": 32,
         "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
        (32, 64, 64), {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
    "l14": Scale(VIT_L14, 768),
    "sd21": Scale(
        VIT_L14, 768,
        {"sample_size": 28, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
         "use_linear_projection": True},
        (128, 256, 512, 512),
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
         "hidden_act": "gelu"},
    ),
}  # fmt: skip


def build_clip(name: str) -> CLIP:
    """The CLIP of the named scale, as open_clip builds it."""
    if (scale := SCALES[name]) is None:
        return open_clip.create_model(ENCODERS["tiny"][0]).eval()
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}  # no step uses it
    clip = CLIP(scale.dim, scale.vision, text, quick_gelu=True)
    pixels = {"size": scale.vision["image_size"], "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.25,) * 3}
    open_clip.model.set_model_preprocess_cfg(clip, pixels | {"resize_mode": "shortest"})
    return clip.eval()


def open_encoder(name: str) -> Encoder:
    """The CLIP of the named scale as an `Encoder`; only the scale `tiny` has a tokenizer."""
    return load_encoder("tiny") if SCALES[name] is None else Encoder(build_clip(name), None)


def build_parts(scale: Scale, words: int) -> dict[str, nn.Module]:
    """VAE, UNet and text encoder of a random Stable Diffusion whose tokenizer has so many words."""
    blocks, text = len(scale.vae), {"vocab_size": words, "max_position_embeddings": scale.tokens}
    return {
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=scale.vae, layers_per_block=2, latent_channels=4,
        ),
        "network": UNet2DConditionModel(**scale.unet),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text | scale.text)),
    }  # fmt: skip


def build_scheduler() -> DDPMScheduler:
    """Stable Diffusion's, of 1000 timesteps."""
    return DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def build_models(name: str, device: torch.device) -> tuple[Encoder, Denoiser]:
    """A CLIP and a denoiser without any lever, of the named scale."""
    encoder = open_encoder(name)
    if (scale := SCALES[name]) is None:
        return encoder.to(device), load_denoiser("tiny", device, levers=())
    tokenizer = AutoTokenizer.from_pretrained(DENOISERS["tiny"], subfolder="tokenizer", model_max_length=scale.tokens)
    parts = build_parts(scale, len(tokenizer)) | {"tokenizer": tokenizer, "scheduler": build_scheduler()}
    return encoder.to(device), StableDiffusion(**parts, levers=()).to(device)


@dataclass
class Variant:
    """One way to take a step: models, settings, and the function that returns the loss of a batch, or its terms."""

    encoder: Encoder
    conditioner: Conditioner
    denoiser: Denoiser
    settings: Settings
    loss: Callable[["Variant", Tensor], Tensor | dict[str, Tensor]]
    fused: bool = True
    autocast: bool = True

    def __post_init__(self):
        modules = nn.ModuleDict({"encoder": self.encoder, "conditioner": self.conditioner})
        self.parameters = {name: p for name, p in modules.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-5, fused=self.fused)

    def new_step(self, images: Tensor) -> Step:
        """The `Step` that training passes to an objective, with the same draws each time."""
        random = generator("benchmark", 0)
        return make_step(images.float() / 255, self.encoder, self.conditioner, self.denoiser, random, self.settings)

    def backward(self, images: Tensor) -> Tensor:
        """The loss of uint8 images [b, 3, h, w]; the gradients are left in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self, images)
        if isinstance(loss, Tensor):
            loss.backward()
            return loss.detach()
        gradients = term_gradients(loss, self.parameters)
        measure(gradients)
        for name, gradient in combine(gradients, "sum").items():
            self.parameters[name].grad = gradient
        return sum(term.mean() for term in loss.values()).detach()

    def gradients(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch and its gradient in all trained parameters as one vector, in float64."""
        loss = self.backward(images)
        return loss.double(), torch.cat([p.grad.flatten().double() for p in self.parameters.values()])

    def step(self, images: Tensor) -> None:
        """A whole step with the optimizer's; the old weights are put back, so that all rounds do the same work."""
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.backward(images)
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        for name, p in self.parameters.items():
            p.data.copy_(before[name])


def exact_terms(variant: Variant, images: Tensor) -> dict[str, Tensor]:
    """This project's training step with separate terms, so that cosines and norms of their gradients are measured."""
    return OBJECTIVES[variant.settings.objective](variant.new_step(images))


def exact_loss(variant: Variant, images: Tensor) -> Tensor:
    """This project's training step with one loss."""
    return sum(term.mean() for term in exact_terms(variant, images).values())


def _plain_context(variant: Variant, images: Tensor, random: torch.Generator) -> Tensor:
    """The condition of every image, the empty prompt encoded for each: [b, l, c]."""
    empty = torch.stack([variant.denoiser.encode_text([""])[0] for _ in images])
    added = variant.conditioner(variant.encoder.features(images), torch.zeros_like(empty[0]), random)
    return empty + added


def plain_dcr(variant: Variant, images: Tensor) -> Tensor:
    """DCR's step as released, without its known faults: all b^2 + b evaluations in one call, all activations kept."""
    settings, step, b = variant.settings, variant.new_step(images), len(images)
    images, random = step.images, step.generator
    x0 = step.latents()
    x_t, t, noise = step.draw_noisy(x0)
    c = _plain_context(variant, images, random)
    views = torch.cat([augment(one[None].cpu(), random, settings.flips) for one in images]).to(images.device)
    c_augmented = _plain_context(variant, views, random)
    order = torch.cat([torch.arange(b)[:, None], draw_others(b, b - 1, random)], dim=1).to(c.device)
    contexts = torch.cat([c[order], c_augmented[:, None]], dim=1).flatten(0, 1)
    predicted = step.denoiser.predict(x_t.repeat_interleave(b + 1, 0), t.repeat_interleave(b + 1), contexts)
    rows = predicted.flatten(1).unflatten(0, (b, b + 1))
    return dcr_loss(rows[:, :-1], rows[:, -1], noise.flatten(1), settings.tau, settings.denominator).mean()


def plain_diva(variant: Variant, images: Tensor) -> Tensor:
    """DIVA's step as released: image, prompt and latent are encoded again for each draw; draws averaged."""
    settings, step = variant.settings, variant.new_step(images)
    x_t, t, noise = step.draw_noisy(step.latents().repeat(settings.draws, 1, 1, 1))
    losses = []
    for parts in zip(x_t.chunk(settings.draws), t.chunk(settings.draws), noise.chunk(settings.draws), strict=True):
        step.latents()
        context = _plain_context(variant, step.images, step.generator)
        losses.append(reconstruction(step.denoiser.predict(*parts[:2], context), parts[2]).mean())
    return sum(losses) / settings.draws


class Weightless(FakeTensorMode):
    """A context of tensors that have a shape and no values, as if on the CPU; a number that is read out of one is 1.

    DCR reads whether its three weights are 1, which they are unless a setting changes them.
    """

    def __init__(self):
        # Autograd's first backward pass starts a thread for each device that torch knows of, and FakeTensorMode makes
        # it know a GPU: a process with such a thread could not fork one that trains.
        torch.ones(1, requires_grad=True).sum().backward()
        super().__init__()

    def dispatch(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return super().dispatch(func, types, args, kwargs)

    def drop_weights(self, module: nn.Module) -> nn.Module:
        """`module`, with a tensor of this context in place of each parameter and buffer."""
        for part in module.modules():
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer if buffer is None else self._empty(buffer)
            for name, p in part._parameters.items():
                part._parameters[name] = p if p is None else nn.Parameter(self._empty(p), p.requires_grad)
        return module

    def _empty(self, like: Tensor) -> Tensor:
        with self:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the modules' parameters."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


class LiveBytes(TorchDispatchMode):
    """Counts bytes of tensors that are created under it: `now` alive, and `peak`, the most alive at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self._seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in before | self._seen:
                self._seen.add(key)
                self.now += x.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
                finalize(x.untyped_storage(), self._gone, key, x.untyped_storage().nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that `call` needs beyond what was allocated before, in bytes; by CUDA's allocator on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        call()
    return live.peak


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from an empty queue of the device to an empty queue."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def quartiles(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of `times`, in seconds."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return {"median": middle, "low": low, "high": high}


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the most that a step could reach."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(time_call(lambda: a @ b, device) for _ in range(5))


def time_in_turns(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one untimed call of each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(time_call(call, device))
    return times


def compare_calls(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device, compiled: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Seconds (`time_in_turns`), FLOPs and peak memory of each call, and their ratios to the first.

    On a CPU the memory of `compiled` calls is not measured: under `LiveBytes` they would run uncompiled.
    """
    times = time_in_turns(calls, rounds, device)
    rows: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            call()
        row = rows[name] = quartiles(times[name]) | {"flop": counter.get_total_flops()}
        first = next(iter(rows.values()))
        row["faster"] = first["median"] / row["median"]
        if device.type == "cuda" or name not in compiled:
            row["peak_bytes"] = peak_bytes(call, device)
            row["memory"] = row["peak_bytes"] / first["peak_bytes"]
    return rows


def share(module: nn.Module) -> nn.Module:
    """A copy of `module` with the same parameters and buffers: the tensors themselves."""
    return copy.deepcopy(module, {id(x): x for x in (*module.parameters(), *module.buffers())})


def step_variants(
    what: str, scale: str, models: tuple[Encoder, Denoiser], dtype: torch.dtype, batch: int, folder: Path | None = None
) -> dict[str, Callable[[], Variant]]:
    """Name -> function that builds the reference, or one of our variants, of the step `what`.

    They share the weights of `models`, as of `build_models`, which compute in `dtype`; a network whose weights are laid
    out otherwise in memory has its own. `folder` takes the latents of a variant that keeps them on disk.
    """
    encoder, denoiser = models
    device = denoiser.device
    objective = {"dcr-step": "dcr", "conflict-step": "naive"}.get(what, "diva")
    projector = "shipped" if scale == "tiny" else "new"
    settings = Settings(objective=objective, batch=batch, lora_dropout=0.0, projector=projector)
    conditioner = build_conditioner(settings, encoder, denoiser).to(device).requires_grad_(what == "align-step")
    if what != "align-step":
        make_trainable(encoder, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
        torch.manual_seed(0)
        for name, p in encoder.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.02)  # LoRA's own zeros would make half of the gradients zero
    encoder.to(device)
    nn.Module.to(denoiser.network, dtype)
    networks = {False: denoiser.network}  # whether it is laid out by a lever -> its weights

    def build(loss: Callable, levers: Sequence[str] = tuple(LEVERS), fused: bool = True, **changes) -> Variant:
        trained = share(encoder), share(conditioner)
        trained[0].model.visual.set_grad_checkpointing(changes.get("rows", 0) > 0)  # as in training
        laid = "layout" in levers and device.type == "cuda"
        if laid not in networks:
            networks[laid] = copy.deepcopy(denoiser.network)
        parts = {part: share(getattr(denoiser, part)) for part in ("vae", "text_encoder")}
        parts |= {"network": share(networks[laid]), "tokenizer": denoiser.tokenizer, "scheduler": denoiser.scheduler}
        frozen = StableDiffusion(**parts, levers=levers).to(device)
        frozen.keep_latents = changes.get("keep_latents", 0)
        frozen.latents_folder = folder if changes.get("latents_on_disk") else None
        if changes.get("compile"):
            frozen.network.compile(dynamic=False)
        return Variant(*trained, frozen, replace(settings, **changes), loss, fused, dtype is torch.bfloat16)

    reference = partial(build, plain_diva if what == "diva-step" else plain_dcr, (), fused=False)
    exact = partial(build, exact_loss)
    if what == "align-step":  # the released code aligns by the whole DCR loss, ours by reconstruction as in the paper
        kept = partial(exact, draws=1, keep_latents=batch)
        builders = {"exact": partial(exact, draws=1), "exact, latents in memory": kept}
        return {"reference": reference, **builders, "exact, latents on disk": partial(kept, latents_on_disk=True)}
    if what == "conflict-step":  # the naive sum in one backward pass, and with separate, measured gradients
        return {"reference": exact, "exact, measured": partial(build, exact_terms)}
    builders = {"reference": reference, "exact": exact}
    if what == "dcr-step":
        builders |= {
            "exact, row by row": partial(exact, rows=1),
            "exact, two rows at a time": partial(exact, rows=2),
            "exact, three rows at a time": partial(exact, rows=3),
            "sampled, K = 4": partial(exact, negatives=4),
            "no gradient through negatives": partial(exact, negative_gradient=False),
            **{f"exact without {name}": partial(exact, [n for n in LEVERS if n != name]) for name in LEVERS},
            "exact without fused": partial(exact, fused=False),
        }
    return builders | {f"{n}, compiled": partial(builders[n], compile=True) for n in COMPILED if n in builders}


def relative_differences(one: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative differences |a - b| / |b| of a loss and of its gradient."""
    pairs = zip(("loss", "gradient"), one, truth, strict=True)
    return {name: ((a - b).norm() / b.norm()).item() for name, a, b in pairs}


def needed_bytes(what: str, scale: str, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a step's models, and the most that its reference holds beside them; counted without any of them."""
    mode, meta = Weightless(), torch.device("meta")
    with meta:
        variant = step_variants(what, scale, build_models(scale, meta), dtype, batch)["reference"]()
    parts = variant.encoder, variant.conditioner, variant.denoiser
    for part in parts:
        mode.drop_weights(part)
    px = variant.encoder.px
    with mode, LiveBytes() as live:
        replace(variant).backward(torch.empty(batch, 3, px, px, dtype=torch.uint8))
    return weight_bytes(*parts), live.peak


def require_memory(what: str, scale: str, batch: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError where a step at real size does not fit into what is free on the device; the others always do."""
    if scale != "sd21":
        return
    weights, step = needed_bytes(what, scale, batch, dtype)
    if weights + step > (free := free_memory(device)):
        raise ValueError(
            f"{what} --scale {scale} --batch {batch}: the models take {weights / 1e9:.1f} GB and the reference's step "
            f"{step / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device.type}; expected a smaller --batch, or a "
            "device with more memory"
        )


def measure_step(
    what: str, scale: str, batch: int, rounds: int, precision: str, compiled: bool, names: Sequence[str], folder: Path
) -> dict:
    """Seconds, memory, FLOPs and ratios to the reference of each variant of a step, and differences of its gradients.

    `names` are the variants to measure beside the reference, all if empty; `folder` as in `step_variants`. Raises
    ValueError for an unknown one, and where the memory does not suffice.
    """
    device = default_device()
    half = precision == "bf16" or (precision == "auto" and fast_bf16(device))
    dtype = torch.bfloat16 if half else torch.float32
    require_memory(what, scale, batch, dtype, device)
    builders = step_variants(what, scale, build_models(scale, device), dtype, batch, folder)
    if unknown := set(names) - set(builders):
        raise ValueError(f"no variant {', '.join(unknown)}; expected some of: {'; '.join(builders)}")
    chosen = {"reference", *names} if names else set(builders)
    chosen = [name for name in builders if name in chosen and (compiled or not name.endswith("compiled"))]
    variants = {name: builders[name]() for name in chosen}
    del builders
    px = variants["reference"].encoder.px
    world = next(open_images("world", 32, batch, 0))
    images = F.interpolate(world.float(), (px, px)).round().byte().to(device)
    calls = {name: partial(variant.step, images) for name, variant in variants.items()}
    rows = compare_calls(calls, rounds, device, [name for name in chosen if name.endswith("compiled")])
    del calls
    ceiling = matmul_ceiling(device, dtype)
    for row in rows.values():
        row["of_ceiling"] = row["flop"] / row["median"] / ceiling
    record = {"dtype": str(dtype).removeprefix("torch."), "ceiling_flops": ceiling, "variants": rows}
    if what == "align-step":  # its reference minimises another loss
        return record
    exact = [name for name in chosen if name == "reference" or name.startswith("exact")]
    images = images[: COMPARED.get(scale, batch)]
    rounded = {name: variants[name].gradients(images) for name in exact} if half else {}
    if half:
        del variants  # before the same in float32 takes memory
        builders = step_variants(what, scale, build_models(scale, device), torch.float32, batch)
        variants = {name: builders[name]() for name in exact if "compiled" not in name}
    truth = variants["reference"].gradients(images)
    record["apart_float32"] = {
        name: relative_differences(variants[name].gradients(images), truth) for name in exact if "compiled" not in name
    }
    if half:
        record["apart_bfloat16"] = {name: relative_differences(found, truth) for name, found in rounded.items()}
    return record


def measure_input(source: str, scale: str, batch: int, rounds: int) -> dict:
    """Images a second that the loader alone delivers, and that our steps consume."""
    device = default_device()
    dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
    rows = {}
    for what in ("diva-step", "dcr-step"):
        variant = step_variants(what, scale, build_models(scale, device), dtype, batch)["exact"]()
        batches = open_images(source, variant.encoder.px, batch, 0)
        images = next(batches).to(device)
        variant.step(images)
        step = statistics.median(time_call(partial(variant.step, images), device) for _ in range(rounds))
        load = statistics.median(time_call(partial(next, batches), torch.device("cpu")) for _ in range(10 * rounds))
        rows[what] = {"loader": batch / load, "step": batch / step, "ratio": step / load}
    return {"source": source, "images_per_second": rows}


def write_photos(folder: Path, n: int) -> list[Place]:
    """`n` JPEGs of `PHOTO` pixels, with about as many bytes as photographs of that size."""
    random, places = np.random.default_rng(0), []
    for i in range(n):
        coarse = Image.fromarray(random.integers(256, size=(12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(PHOTO[::-1], Image.Resampling.BICUBIC)) + random.normal(0, 16, (*PHOTO, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        places.append(Place(str(folder / f"{i}.jpg")))
    return places


def measure_evaluate(scale: str, batch: int, rounds: int, workers: int | None = None, images: int = 0) -> dict:
    """Images a second in float32, against a bare loop over open_clip's `encode_image` on preprocessed tensors.

    `exact` is `embed` on uint8 images in memory; `ratio` is its speed over the bare loop's, a median over the rounds.
    `from files` is the work of `evaluate` on a set of `PHOTO` JPEGs, which also decodes and resizes them; `waited` is
    the share of this time spent without data. The scale `tiny` adds one whole evaluation on the tiny world.

    Args:
        workers: processes that decode; see `FeatureStore`.
        images: number that is embedded in one go, of which at most four batches are in memory; 0 for four batches, or
            for one batch on a CPU at ViT-L/14's size.
    """
    device = default_device()
    encoder, bare = open_encoder(scale).to(device), build_clip(scale).to(device)
    images = images or batch * (1 if device.type == "cpu" and scale in ("l14", "sd21") else 4)
    pixels = (torch.rand(min(images, 4 * batch), 3, encoder.px, encoder.px) * 255).byte()
    ready = encoder.preprocess(pixels.to(device).float() / 255)
    store = FeatureStore(encoder, None, batch=batch, workers=workers)
    waits = []

    @torch.no_grad()
    def loop(part: Tensor = ready) -> Tensor:
        return torch.cat([bare.encode_image(x, normalize=True) for x in part.split(batch)])

    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder), min(images, PHOTO_FILES))

        def from_files() -> None:
            waited, seconds = store.waited, store.seconds
            store([photos[i % len(photos)] for i in range(images)])
            waits.append((store.waited - waited) / (store.seconds - seconds))

        calls = {"reference": loop, "exact": lambda: embed(encoder, pixels, batch), "from files": from_files}
        times = time_in_turns(calls, rounds, device)
    rows = {name: quartiles(seconds) for name, seconds in times.items()}
    for name, row in rows.items():
        row["images_per_second"] = (images if name == "from files" else len(pixels)) / row["median"]
    rows["from files"]["waited"] = statistics.median(waits[1:])
    record = {"variants": rows, "workers": store.workers, "images": images, "photo": PHOTO}
    record["ratio"] = statistics.median(a / b for a, b in zip(times["reference"], times["exact"], strict=True))
    record["largest_difference"] = (loop(ready[:2]).cpu() - embed(encoder, pixels[:2])).abs().max().item()
    if scale == "tiny":
        record["world_report_seconds"] = quartiles([time_call(lambda: world_report(encoder), device) for _ in range(3)])
    return record


def markdown_table(record: dict) -> str:
    """A record of `run_benchmark` as a Markdown table."""
    if record["what"] == "input":
        return json.dumps(record["images_per_second"], indent=1)
    heads = ["", "s", "faster", "memory", "MB", "TFLOP", "of ceiling", "loss", "gradients"]
    if record["what"] == "evaluate":
        heads = ["", "s", "images/s", "waits for data"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in record["variants"].items():
        cells = [name, f"{row['median']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"]
        if record["what"] == "evaluate":
            cells += [f"{row['images_per_second']:.1f}", percent(row["waited"]) if "waited" in row else ""]
        else:
            apart = record.get("apart_float32", {}).get(name, {})
            memory = [f"{row['memory']:.2f} ×", f"{row['peak_bytes'] / 1e6:.0f}"] if "memory" in row else ["", ""]
            cells += [
                f"{row['faster']:.2f} ×",
                *memory,
                f"{row['flop'] / 1e12:.3f}",
                percent(row["of_ceiling"], digits=0),
            ]
            cells += [f"{apart[key]:.0e}" if apart else "" for key in ("loss", "gradient")]
        lines.append("| " + " | ".join(cells) + " |")
    if record["what"] == "evaluate":
        lines.append(f"in memory {record['ratio']:.3f} of the bare loop, {record['workers']} workers")
    return "\n".join(lines)


def run_benchmark(
    what: str,
    scale: str | None = None,
    batch: int = 8,
    rounds: int = 7,
    precision: str = "auto",
    images: str = "world",
    workers: int | None = None,
    files: int = 0,
    compiled: bool = False,
    names: Sequence[str] = (),
    threads: int | None = None,
    json_path: Path | None = None,
) -> dict:
    """Measure a step, the loader (`input`) or the evaluation; print a table, and write all figures as json.

    Raises:
        ValueError: for an unknown scale or variant, or for a scale without a denoiser if a step needs one.
    """
    scale = scale or ("l14" if what == "evaluate" else "tiny")
    scales = [name for name in SCALES if name != "l14" or what == "evaluate"]
    if scale not in scales:
        raise ValueError(f"--scale {scale}: {messages.expected(scale, scales)} for {what}")
    torch.set_num_threads(threads or torch.get_num_threads())
    # many variants run in turn: oneDNN keeps the kernels of all of them, as it keeps those of a single training
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    record = {"what": what, "scale": scale, "batch": batch, "threads": torch.get_num_threads()}
    if what == "input":
        record |= measure_input(images, scale, batch, rounds)
    elif what == "evaluate":
        record |= measure_evaluate(scale, batch, rounds, workers, files)
    else:
        with tempfile.TemporaryDirectory() as folder:
            record |= measure_step(what, scale, batch, rounds, precision, compiled, names, Path(folder))
    record |= environment()
    print(markdown_table(record))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record
