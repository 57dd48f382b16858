"""How fast and how small a step is: against a plain implementation, with each lever left out alone.

    diva-lab benchmark dcr-step --scale tiny --batch 8 --json out.json
    diva-lab benchmark diva-step | align-step | conflict-step | evaluate | input

`reference` is the step as METHOD describes the released code: eager, one call for all evaluations, the empty prompt
encoded for every picture, pictures augmented one by one, every activation held. `exact` is the training's own step.
All variants run in one process, in turn, on the same inputs; medians are over the rounds. Weights are random but at
the scale `tiny`: speed does not depend on them. `l14` is a CLIP of ViT-L/14's size alone, for `evaluate`.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from diva_lab.evaluation.features import FeatureStore
from diva_lab.evaluation.world import world_report
from diva_lab.gradients import combine, measure, term_gradients
from diva_lab.image_files import Place
from diva_lab.images import augment, open_images
from diva_lab.machine import default_device, fast_bf16, generator
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
from diva_lab.training.build import build_conditioner, make_step
from diva_lab.training.settings import Settings

COMPONENTS = ("vae", "network", "text_encoder", "tokenizer", "scheduler")
PHOTO = (375, 500)  # rows and columns of the JPEGs from which `evaluate` reads
PHOTO_FILES = 256  # so many different ones at most, read again and again


@dataclass(frozen=True)
class Scale:
    """The sizes of a random CLIP and, unless `unet` is None, a random Stable Diffusion; prompts of `tokens` tokens."""

    vision: dict
    dim: int
    unet: dict | None = None
    vae: tuple[int, ...] = ()
    text: dict | None = None
    tokens: int = 77


VIT_L14 = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
SCALES = {
    "tiny": None,  # as it ships
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
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}  # not used in a step
    clip = CLIP(scale.dim, scale.vision, text, quick_gelu=True)
    pixels = {"size": scale.vision["image_size"], "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.25,) * 3}
    open_clip.model.set_model_preprocess_cfg(clip, pixels | {"resize_mode": "shortest"})
    return clip.eval()


def open_scale(name: str) -> Encoder:
    """The CLIP of the named scale as an encoder of ours; without a tokenizer but at the scale `tiny`."""
    return load_encoder("tiny") if SCALES[name] is None else Encoder(build_clip(name), None)


def build_models(name: str, device: torch.device) -> tuple[Encoder, Denoiser]:
    """A CLIP and a denoiser without any lever, of the named scale."""
    encoder = open_scale(name)
    if (scale := SCALES[name]) is None:
        return encoder.to(device), load_denoiser("tiny", device, levers=())
    tokenizer = AutoTokenizer.from_pretrained(DENOISERS["tiny"], subfolder="tokenizer", model_max_length=scale.tokens)
    blocks = len(scale.vae)
    parts = (
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=scale.vae, layers_per_block=2, latent_channels=4,
        ),
        UNet2DConditionModel(**scale.unet),
        CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=scale.tokens, **scale.text)),
        tokenizer,
        DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )  # fmt: skip
    return encoder.to(device), StableDiffusion(*parts, levers=()).to(device)


@dataclass
class Variant:
    """One way to take a step: models, settings, and the function that gives the loss of a batch, or its terms."""

    encoder: Encoder
    conditioner: Conditioner
    denoiser: Denoiser
    settings: Settings
    loss: Callable[["Variant", Tensor], Tensor | dict[str, Tensor]]
    fused: bool = True
    autocast: bool = True

    def __post_init__(self):
        self.parameters = [p for p in self.encoder.parameters() if p.requires_grad]
        self.parameters += [p for p in self.conditioner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=self.fused)

    def start(self, images: Tensor) -> Step:
        """What the training's objectives are given, with the same draws each time."""
        random = generator("benchmark", 0)
        return make_step(images.float() / 255, self.encoder, self.conditioner, self.denoiser, random, self.settings)

    def backward(self, images: Tensor) -> Tensor:
        """The loss of uint8 pictures [b, 3, h, w]; gradients are left on the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self, images)
        if isinstance(loss, Tensor):
            loss.backward()
            return loss.detach()
        parts = {"encoder": self.encoder, "conditioner": self.conditioner}
        named = {n: p for n, p in nn.ModuleDict(parts).named_parameters() if p.requires_grad}
        gradients = term_gradients(loss, named)
        measure(gradients)
        for name, gradient in combine(gradients, "sum").items():
            named[name].grad = gradient
        return sum(term.mean() for term in loss.values()).detach()

    def gradients(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and the gradients of all that is trained as one vector, in float64."""
        loss = self.backward(images)
        return loss.double(), torch.cat([p.grad.flatten().double() for p in self.parameters])

    def step(self, images: Tensor) -> None:
        """A whole step, the optimiser's included; the weights stay put, so that all rounds do the same work."""
        kept = [p.detach().clone() for p in self.parameters]
        self.backward(images)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        for p, old in zip(self.parameters, kept, strict=True):
            p.data.copy_(old)


def exact_loss(variant: Variant, images: Tensor) -> Tensor:
    """The training's step."""
    return sum(term.mean() for term in OBJECTIVES[variant.settings.objective](variant.start(images)).values())


def exact_terms(variant: Variant, images: Tensor) -> dict[str, Tensor]:
    """The training's step with its terms apart: cosines and norms of their gradients are taken in the backward pass."""
    return OBJECTIVES[variant.settings.objective](variant.start(images))


def _plain_context(variant: Variant, pictures: Tensor, random: torch.Generator) -> Tensor:
    """The condition of every picture, the empty prompt encoded for each: [b, l, c]."""
    empty = torch.stack([variant.denoiser.encode_text([""])[0] for _ in pictures])
    added = variant.conditioner(variant.encoder.features(pictures), torch.zeros_like(empty[0]), random)
    return empty + added


def plain_dcr(variant: Variant, images: Tensor) -> Tensor:
    """DCR's step as released but for its known faults: all b^2 + b evaluations in one call, everything held."""
    settings, step, b = variant.settings, variant.start(images), len(images)
    pictures, random = step.images, step.generator
    x0 = step.latents()
    x_t, t, noise = step.draw_noisy(x0)
    c = _plain_context(variant, pictures, random)
    views = torch.cat([augment(one[None].cpu(), random, settings.flips) for one in pictures]).to(pictures.device)
    c_augmented = _plain_context(variant, views, random)
    order = torch.cat([torch.arange(b)[:, None], draw_others(b, b - 1, random)], dim=1).to(c.device)
    contexts = torch.cat([c[order], c_augmented[:, None]], dim=1).flatten(0, 1)
    predicted = step.denoiser.predict(x_t.repeat_interleave(b + 1, 0), t.repeat_interleave(b + 1), contexts)
    rows = predicted.flatten(1).unflatten(0, (b, b + 1))
    return dcr_loss(rows[:, :-1], rows[:, -1], noise.flatten(1), settings.tau, settings.denominator).mean()


def plain_diva(variant: Variant, images: Tensor) -> Tensor:
    """DIVA's step as released: each draw by itself, picture, prompt and latent encoded again; draws averaged."""
    settings, step = variant.settings, variant.start(images)
    x_t, t, noise = step.draw_noisy(step.latents().repeat(settings.draws, 1, 1, 1))
    losses = []
    for parts in zip(x_t.chunk(settings.draws), t.chunk(settings.draws), noise.chunk(settings.draws), strict=True):
        step.latents()
        context = _plain_context(variant, step.images, step.generator)
        losses.append(reconstruction(step.denoiser.predict(*parts[:2], context), parts[2]).mean())
    return sum(losses) / settings.draws


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made under it that are alive at the same time; `peak` is the most so far."""

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


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that `work` holds beyond what was there before, in bytes; by CUDA's allocator on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        work()
    return live.peak


def time_call(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call of `work`, the device's queue emptied."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def quartiles(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of `times`, in seconds."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return {"median": middle, "low": low, "high": high}


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of matrices: what a step is measured against."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(time_call(lambda: a @ b, device) for _ in range(5))


def relative_differences(one: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative differences |a - b| / |b| of a loss and of the gradients that belong to it."""
    pairs = zip(("loss", "gradient"), one, truth, strict=True)
    return {name: ((a - b).norm() / b.norm()).item() for name, a, b in pairs}


def variants(
    what: str, scale: str, device: torch.device, dtype: torch.dtype, batch: int
) -> dict[str, Callable[[], Variant]]:
    """By name, what makes the reference and our ways to take the step `what`.

    Each works on its own copy of the same models, computing in `dtype`.
    """
    encoder, denoiser = build_models(scale, device)
    objective = {"dcr-step": "dcr", "conflict-step": "naive"}.get(what, "diva")
    settings = Settings(objective=objective, batch=batch, lora_dropout=0.0)
    settings = replace(settings, projector="shipped" if scale == "tiny" else "new")
    conditioner = build_conditioner(settings, encoder, denoiser).to(device)
    if what == "align-step":
        conditioner.requires_grad_(True)
    else:
        conditioner.requires_grad_(False)
        make_trainable(encoder, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
        torch.manual_seed(0)
        for name, p in encoder.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.02)  # zero at first, when half of the gradients would be zero too
    encoder.to(device)

    def variant(loss: Callable, levers: Sequence[str] = tuple(LEVERS), fused: bool = True, **changes) -> Variant:
        own = [copy.deepcopy(module) for module in (encoder, conditioner)]
        own[0].model.visual.set_grad_checkpointing(changes.get("rows", 0) > 0)  # as the training does
        parts = {part: copy.deepcopy(getattr(denoiser, part)) for part in COMPONENTS}
        frozen = StableDiffusion(**parts, levers=levers).to(device)
        nn.Module.to(frozen.network, dtype)
        if changes.get("compile"):
            frozen.network.compile(dynamic=False)
        return Variant(*own, frozen, replace(settings, **changes), loss, fused, dtype is torch.bfloat16)

    plain = partial(variant, plain_diva if what == "diva-step" else plain_dcr, (), fused=False)
    if what == "align-step":  # the released code aligns by the whole DCR loss, ours by reconstruction as in the paper
        return {"reference": plain, "exact": partial(variant, exact_loss, draws=1)}
    if what == "conflict-step":  # the naive sum by one backward pass, and with both gradients apart and measured
        return {"reference": partial(variant, exact_loss), "exact, measured": partial(variant, exact_terms)}
    made = {"reference": plain, "exact": partial(variant, exact_loss)}
    if what == "dcr-step":
        made["exact, row by row"] = partial(variant, exact_loss, rows=1)
        made["exact, two rows at a time"] = partial(variant, exact_loss, rows=2)
        made["exact, three rows at a time"] = partial(variant, exact_loss, rows=3)
        made["sampled, K = 4"] = partial(variant, exact_loss, negatives=4)
        made["no gradient through negatives"] = partial(variant, exact_loss, negative_gradient=False)
        for name in LEVERS:
            made[f"exact without {name}"] = partial(variant, exact_loss, [n for n in LEVERS if n != name])
        made["exact without fused"] = partial(variant, exact_loss, fused=False)
    for name in ("exact", "exact, row by row", "exact, two rows at a time", "sampled, K = 4"):
        if name in made:
            made[f"{name}, compiled"] = partial(made[name], compile=True)
    return made


def time_in_turn(works: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each work in each of the rounds, which come after a first call of each."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(time_call(work, device))
    return times


def compare_works(
    works: dict[str, Callable[[], object]], rounds: int, device: torch.device, compiled: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Seconds (`time_in_turn`), FLOPs and peak memory of each work, and ratios to the first.

    On a CPU memory is left out for those in `compiled`: under `LiveBytes` they would run uncompiled.
    """
    times = time_in_turn(works, rounds, device)
    rows: dict[str, dict[str, float]] = {}
    for name, work in works.items():
        with FlopCounterMode(display=False) as counter:
            work()
        row = rows[name] = quartiles(times[name]) | {"flop": counter.get_total_flops()}
        first = next(iter(rows.values()))
        row["faster"] = first["median"] / row["median"]
        if device.type == "cuda" or name not in compiled:
            row["peak_bytes"] = peak_bytes(work, device)
            row["memory"] = row["peak_bytes"] / first["peak_bytes"]
    return rows


def measure_step(
    what: str, scale: str, batch: int, rounds: int, precision: str, compiled: bool, only: Sequence[str] = ()
) -> dict:
    """All figures of one step: seconds, ratios to the reference, peak bytes, FLOPs, differences.

    Raises:
        ValueError: where `only` names no variant; lists them.
    """
    device = default_device()
    half = precision == "bf16" or (precision == "auto" and fast_bf16(device))
    dtype = torch.bfloat16 if half else torch.float32
    makers = variants(what, scale, device, dtype, batch)
    if unknown := set(only) - set(makers):
        raise ValueError(f"no variant {', '.join(unknown)}; expected some of: {'; '.join(makers)}")
    wanted = {"reference", *only} if only else set(makers)
    made = {
        name: make() for name, make in makers.items() if name in wanted and (compiled or not name.endswith("compiled"))
    }
    px = made["reference"].encoder.px
    world = next(open_images("world", 32, batch, 0))
    images = F.interpolate(world.float(), (px, px)).round().byte().to(device)
    works = {name: partial(variant.step, images) for name, variant in made.items()}
    rows = compare_works(works, rounds, device, [name for name in made if name.endswith("compiled")])
    top = matmul_ceiling(device, dtype)
    for row in rows.values():
        row["of_ceiling"] = row["flop"] / row["median"] / top
    found = {"dtype": str(dtype).removeprefix("torch."), "ceiling_flops": top, "variants": rows}
    if what != "align-step":  # whose reference minimises another loss
        plain = variants(what, scale, device, torch.float32, batch)
        same = [name for name in made if name == "reference" or name.startswith("exact")]
        truth = plain["reference"]().gradients(images)
        found["apart_float32"] = {
            name: relative_differences(plain[name]().gradients(images), truth)
            for name in same
            if not name.endswith("compiled")
        }
        if half:
            found["apart_bfloat16"] = {name: relative_differences(made[name].gradients(images), truth) for name in same}
    return found


def measure_input(source: str, scale: str, batch: int, rounds: int) -> dict:
    """The loader alone, in pictures a second, against what our steps eat."""
    device = default_device()
    dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
    rows = {}
    for what in ("diva-step", "dcr-step"):
        exact = variants(what, scale, device, dtype, batch)["exact"]()
        batches = open_images(source, exact.encoder.px, batch, 0)
        images = next(batches).to(device)
        exact.step(images)
        step = statistics.median(time_call(lambda v=exact, x=images: v.step(x), device) for _ in range(rounds))
        load = statistics.median(time_call(lambda b=batches: next(b), torch.device("cpu")) for _ in range(10 * rounds))
        rows[what] = {"loader": batch / load, "step": batch / step, "ratio": step / load}
    return {"source": source, "pictures_per_second": rows}


def write_photos(folder: Path, n: int) -> list[Place]:
    """So many JPEGs of `PHOTO` pixels, about as many bytes each as a photograph of that size has."""
    random, places = np.random.default_rng(0), []
    for i in range(n):
        coarse = Image.fromarray(random.integers(256, size=(12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(PHOTO[::-1], Image.Resampling.BICUBIC)) + random.normal(0, 16, (*PHOTO, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        places.append(Place(str(folder / f"{i}.jpg")))
    return places


def measure_evaluate(scale: str, batch: int, rounds: int, workers: int | None = None, pictures: int = 0) -> dict:
    """Pictures a second, in float32, against a bare loop over open_clip's `encode_image` on tensors made ready.

    `exact` is `embed` on uint8 pictures in memory; `ratio` its throughput by the bare loop's, a median over the rounds.
    `from files` is what `evaluate` does on a set of `PHOTO` JPEGs: they are decoded and resized too; `waited`
    is the share of that time without data. At the scale `tiny` beside it one whole evaluation on the tiny world.

    Args:
        workers: processes that decode; see `FeatureStore`.
        pictures: that are embedded in one go, of which at most four batches lie in memory; 0 is four batches, or one on
            a CPU at ViT-L/14's size.
    """
    device = default_device()
    encoder, bare = open_scale(scale).to(device), build_clip(scale).to(device)
    pictures = pictures or batch * (1 if device.type == "cpu" and scale in ("l14", "sd21") else 4)
    images = (torch.rand(min(pictures, 4 * batch), 3, encoder.px, encoder.px) * 255).byte()
    ready = encoder.preprocess(images.to(device).float() / 255)
    store = FeatureStore(encoder, None, batch=batch, workers=workers)
    shares = []

    @torch.no_grad()
    def loop(part: Tensor = ready) -> Tensor:
        return torch.cat([bare.encode_image(own, normalize=True) for own in part.split(batch)])

    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder), min(pictures, PHOTO_FILES))

        def from_files() -> None:
            waited, whole = store.waited, store.seconds
            store([photos[i % len(photos)] for i in range(pictures)])
            shares.append((store.waited - waited) / (store.seconds - whole))

        works = {"reference": loop, "exact": lambda: embed(encoder, images, batch), "from files": from_files}
        times = time_in_turn(works, rounds, device)
    rows = {name: quartiles(taken) for name, taken in times.items()}
    for name, row in rows.items():
        row["pictures_per_second"] = (pictures if name == "from files" else len(images)) / row["median"]
    rows["from files"]["waited"] = statistics.median(shares[1:])
    found = {"variants": rows, "workers": store.workers, "pictures": pictures, "photo": PHOTO}
    found["ratio"] = statistics.median(a / b for a, b in zip(times["reference"], times["exact"], strict=True))
    found["largest_difference"] = (loop(ready[:2]).cpu() - embed(encoder, images[:2])).abs().max().item()
    if scale == "tiny":
        found["world_report_seconds"] = quartiles([time_call(lambda: world_report(encoder), device) for _ in range(3)])
    return found


def markdown_table(found: dict) -> str:
    """The figures as a Markdown table."""
    if "variants" not in found:
        return json.dumps(found["pictures_per_second"], indent=1)
    if found["what"] == "evaluate":
        lines = ["| | pictures/s | s | waits for data |", "|---" * 4 + "|"]
        for name, row in found["variants"].items():
            waits = f"{100 * row['waited']:.1f} %" if "waited" in row else ""
            times = f"{row['median']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            lines.append(f"| {name} | {row['pictures_per_second']:.1f} | {times} | {waits} |")
        return "\n".join([*lines, f"in memory {found['ratio']:.3f} of the bare loop, {found['workers']} workers"])
    lines = ["| | s | faster | memory | MB | TFLOP | of ceiling | loss | gradients |", "|---" * 9 + "|"]
    for name, row in found["variants"].items():
        off = found.get("apart_float32", {}).get(name, {})
        cells = [f"{row['median']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", f"{row['faster']:.2f} ×"]
        cells += [f"{row['memory']:.2f} ×", f"{row['peak_bytes'] / 1e6:.0f}"] if "memory" in row else ["", ""]
        cells += [f"{row['flop'] / 1e12:.3f}", f"{100 * row['of_ceiling']:.0f} %" if "of_ceiling" in row else ""]
        cells += [f"{off[key]:.0e}" if off else "" for key in ("loss", "gradient")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
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
    only: Sequence[str] = (),
    threads: int | None = None,
    json_path: Path | None = None,
) -> dict:
    """Measure a step, the loader (`input`) or the evaluation, print a table, and write all figures as json.

    Raises:
        ValueError: for an unknown scale, or one without a denoiser where a step needs one.
    """
    scale = scale or ("l14" if what == "evaluate" else "tiny")
    if scale not in SCALES or (scale == "l14" and what != "evaluate"):
        known = ", ".join(name for name in SCALES if name != "l14" or what == "evaluate")
        raise ValueError(f"--scale {scale}: expected one of {known} for {what}")
    torch.set_num_threads(threads or torch.get_num_threads())
    # many variants in turn: oneDNN is not to forget one's kernels while another runs, as one training alone never does
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    found = {"what": what, "scale": scale, "batch": batch, "threads": torch.get_num_threads()}
    if what == "input":
        found |= measure_input(images, scale, batch, rounds)
    elif what == "evaluate":
        found |= measure_evaluate(scale, batch, rounds, workers, files)
    else:
        found |= measure_step(what, scale, batch, rounds, precision, compiled, only)
    found |= environment()
    print(markdown_table(found))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(found, indent=1) + "\n")
    return found
