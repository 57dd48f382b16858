"""Whole optimiser steps of each recipe equal those of a second implementation: loss, gradients, updated weights.

The reference is written here from the papers and from what their released code does, on other models: the towers are
transformers' own, which DCR's authors train, LoRA is peft's on them by the names of layers that the released code
gives, the denoiser is a plain diffusers UNet. It shares with a run the files of weights and the random draws: images,
timesteps, noise, tokens, augmented views, and the initial weights of projector and LoRA. A parameter of one model is
found in the other by its initial values.

From a preset differ: the models and images, which are small; `precision="no"`; `lora_dropout=0`, as its masks belong to
the layers of one model; the rank, so that alpha / rank is not 1; rates large enough for an update to be seen at 1e-5,
a warm-up short enough to be left, and `clip` small enough to bind. DIVA's released recipe keeps its 5 micro-batches, by
which its second draw is divided; the others have 2.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from image_writers import pixels
from peft import LoraConfig, get_peft_model
from small_models import UNET2, write_diffusion, write_transformers_clip
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.transforms import v2
from transformers import AutoModel, CLIPTextModel, CLIPTokenizer, get_cosine_schedule_with_warmup

from diva_lab.objectives.step import Step
from diva_lab.training.batches import Batches, Pixels
from diva_lab.training.loop import Trainer
from diva_lab.training.presets import preset, replace_settings
from diva_lab.training.settings import Settings
from diva_lab.training.stages import align, tune

OPENAI = v2.Normalize([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET_MEAN, IMAGENET_STD = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
RANK = 4  # of LoRA, which has 16: alpha / rank is then 4
STEPS, WARMUP = 2, 1  # of 4600 and 23
RATE, CLIP = {"diva": 1e4, "dcr": 1e1}, 0.02  # times the recipe's
KINDS = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Small models of both families, a small Stable Diffusion 2, and images of other sizes than theirs."""
    root = tmp_path_factory.mktemp("parity")
    made = {kind: write_transformers_clip(root / kind, kind, act) for kind, act in KINDS.items()}
    (root / "images").mkdir()
    for i in range(12):
        pixels(i, (80, 90)).save(root / "images" / f"{i}.png")
    return made | {"denoiser": write_diffusion(root / "denoiser", unet=UNET2), "images": root / "images"}


# --- what a run draws and makes ---------------------------------------------------------------------------------


@dataclass
class Micro:
    """The draws of a micro-batch."""

    images: Tensor  # uint8 [b, 3, h, w]
    t: Tensor | None = None
    normal: list[Tensor] = field(default_factory=list)  # of a latent's shape: the posterior's sample, the noise
    tokens: list[Tensor] = field(default_factory=list)  # indices of patch tokens
    view: Tensor | None = None  # augmented images


@dataclass
class Seen:
    """A run: the weights that it starts from, and of each step its draws, loss, gradients and weights."""

    start: dict[str, Tensor] = field(default_factory=dict)
    micros: list[list[Micro]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # as the optimizer is given them
    weights: list[dict[str, Tensor]] = field(default_factory=list)


def is_text(name: str) -> bool:
    return name.startswith("encoder.model.") and not name.startswith("encoder.model.visual.")


def watch(patch: pytest.MonkeyPatch) -> Seen:
    """Record the next run."""
    seen, take, draw = Seen(), Trainer.take_step, Step.draw_noisy
    following, augment = Batches.__next__, Pixels.augment

    def take_step(trainer: Trainer, step: int) -> dict[str, float]:
        if step == 0:
            named = trainer.modules.named_parameters()
            seen.start = {name: p.detach().clone() for name, p in named if not is_text(name)}
        seen.micros.append([])
        line = take(trainer, step)
        seen.losses.append(line["loss"])
        seen.gradients.append({name: p.grad.clone() for name, p in trainer.parameters.items()})
        seen.weights.append({name: p.detach().clone() for name, p in trainer.parameters.items()})
        return line

    def next_batch(batches: Batches) -> tuple[Tensor, list[str]]:
        images, captions = following(batches)
        seen.micros[-1].append(Micro(images))
        return images, captions

    def keep(name: str, value: Tensor) -> Tensor:
        setattr(seen.micros[-1][-1], name, value)
        return value

    def keep_draws(draws: str, make):
        def drawn(*args, **options) -> Tensor:
            value = make(*args, **options)
            if options.get("generator") is not None and (draws == "tokens" or value.ndim == 4):
                getattr(seen.micros[-1][-1], draws).append(value)
            return value

        return drawn

    def draw_noisy(step: Step, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = draw(step, x0)
        keep("t", out[1])
        return out

    patch.setattr(Trainer, "take_step", take_step)
    patch.setattr(Batches, "__next__", next_batch)
    patch.setattr(Step, "draw_noisy", draw_noisy)
    patch.setattr(Pixels, "augment", lambda *args: keep("view", augment(*args)))
    for name, draws in {"randn": "normal", "randint": "tokens", "randperm": "tokens"}.items():
        patch.setattr(torch, name, keep_draws(draws, getattr(torch, name)))
    return seen


# --- one parameter, two names -----------------------------------------------------------------------------------


def plain(name: str) -> str:
    """A parameter's name without what peft and torch put around its layer; `.a` and `.b` behind it are LoRA's."""
    name = re.sub(r"^(tower\.)?(base_model\.model\.)?", "", name).replace("base_layer.", "")
    name = re.sub(r"parametrizations\.(\w+)\.(original|0\.([ab]))$", lambda m: m[1] + f".{m[3]}" * bool(m[3]), name)
    return re.sub(r"\.lora_([AB])\.default\.weight$", lambda m: f".weight.{m[1].lower()}", name)


def flat(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Copies of tensors, flat, by plain name; packed projections as three, `0:` to `2:` before their names."""
    out = {}
    for name, value in tensors.items():
        if value is not None and "in_proj_" in name:
            out |= {f"{i}:{plain(name)}": part.flatten() for i, part in enumerate(value.detach().clone().chunk(3))}
        elif value is not None:
            out[plain(name)] = value.detach().clone().flatten()
    return out


def put(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Set the parameters of a model that are in `values`, which has the form of `flat`."""
    for name, p in model.named_parameters():
        keys = [f"{i}:{plain(name)}" for i in range(3)] if "in_proj_" in name else [plain(name)]
        if keys[0] in values:
            p.data.copy_(torch.cat([values[key] for key in keys]).view_as(p))


class Names:
    """From a run's names to the reference's: those of the same values at the start; LoRA's go with their matrices."""

    def __init__(self, start: dict[str, Tensor], reference: nn.Module):
        by_value = {value.numpy().tobytes(): name for name, value in flat(dict(reference.named_parameters())).items()}
        ours = {name.removeprefix("encoder."): value for name, value in flat(start).items()}
        self.names = {name: by_value.get(value.numpy().tobytes()) for name, value in ours.items()}

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, value in flat(tensors).items():
            if name.startswith("conditioner."):
                out[name.removeprefix("conditioner.")] = value
            else:
                matrix, low_rank = re.fullmatch(r"encoder\.(.*?)(\.[ab])?", name).groups()
                out[f"{self.names[matrix]}{low_rank or ''}"] = value
        return out


# --- the reference ----------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """W + alpha / rank B A for each of the matrices that are packed in one parameter."""

    def __init__(self, matrix: Tensor, packed: int, rank: int, alpha: float):
        super().__init__()
        out, into = matrix.shape[0] // packed, matrix.shape[1]
        self.a, self.b = nn.Parameter(torch.zeros(packed, rank, into)), nn.Parameter(torch.zeros(packed, out, rank))
        self.scale = alpha / rank

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix + self.scale * (self.b @ self.a).flatten(0, 1)


def adapt_all(model: nn.Module) -> nn.Module:
    """LoRA by plain matrices on every linear layer of the image tower, attention pooling included; biases trained."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        for weight, packed, kind in (("weight", 1, nn.Linear), ("in_proj_weight", 3, nn.MultiheadAttention)):
            if isinstance(layer, kind) and name.startswith(("vision_model.", "visual_projection")):
                low_rank = LowRank(getattr(layer, weight), packed, RANK, alpha=16)
                parametrize.register_parametrization(layer, weight, low_rank)
                if (bias := getattr(layer, weight.replace("weight", "bias"))) is not None:
                    bias.requires_grad_(True)
    return model


def adapt_released(model: nn.Module, kind: str) -> nn.Module:
    """LoRA as in the released code: peft, on all linear layers of a CLIP, and by the names of layers of a SigLIP."""
    layers = "all-linear" if kind == "clip" else ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"]
    chosen = LoraConfig(r=RANK, lora_alpha=16, target_modules=layers, lora_dropout=0.0, bias="lora_only")
    return get_peft_model(model, chosen).train()


class Reference:
    """A recipe on transformers' tower and diffusers' parts, with the recipe's numbers.

    DIVA's code calls `backward` on draw 1 inside the model. What the model returns is draw 2, and that alone is divided
    by the accumulation steps.

    Args:
        recipe: `diva` or `dcr`, with `-released` behind it for what the code does.
        stage: 1 trains the projector, 2 the tower, and with DIVA both.
        settings: of the run, for the models' names and the condition.
        start: the run's weights before its first step.
    """

    def __init__(self, recipe: str, stage: int, settings: Settings, start: dict[str, Tensor]):
        self.diva, self.released, self.stage = recipe.startswith("diva"), recipe.endswith("released"), stage
        self.condition, self.accumulate = settings.condition, settings.accumulate
        folder = settings.denoiser
        self.vae, self.unet, text = (
            part.from_pretrained(folder, subfolder=name).requires_grad_(False).eval()
            for name, part in (("vae", AutoencoderKL), ("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel))
        )
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.empty = self._encode_prompt(CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"), text)
        model = AutoModel.from_pretrained(settings.encoder)
        self.kind, self.side = model.config.model_type, model.config.vision_config.image_size
        self.names = Names(start, model)
        self.model = nn.ModuleDict({"tower": self._open(model), "projector": self._new_projector(model)})
        put(self.model, self.names(start))
        self.tower, self.projector = model, self.model["projector"].requires_grad_(stage == 1 or self.diva)
        self.optimizer = self._new_optimizer()
        self.schedule = self._new_schedule()

    def _encode_prompt(self, tokenizer: CLIPTokenizer, text: CLIPTextModel) -> Tensor:
        """The empty prompt's tokens [l, c]: DIVA's is its template without a class; DCR's code has a mask."""
        prompt = "a photo of a ." if self.diva else ""
        tokens = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        mask = {"attention_mask": tokens.attention_mask} if self.released and not self.diva else {}
        with torch.no_grad():
            return text(tokens.input_ids, **mask).last_hidden_state[0]

    def _open(self, model: nn.Module) -> nn.Module:
        if self.stage == 1 or self.diva:
            return model.requires_grad_(self.stage == 2)
        return adapt_released(model, self.kind) if self.released else adapt_all(model)

    def _new_projector(self, model: nn.Module) -> nn.Module:
        vision = model.config.vision_config
        dim, width = getattr(model.config, "projection_dim", vision.hidden_size), self.empty.shape[1]
        if self.diva:
            return nn.Linear(dim, width)
        return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))

    def _new_optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.diva:
            return torch.optim.SGD(trained, lr=1e-4 * RATE["diva"], momentum=0.9, weight_decay=0)
        rate = (1e-4 if self.stage == 1 else 1e-5) * RATE["dcr"]
        return torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)

    def _new_schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        if not self.diva:
            return torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        if self.released:
            return get_cosine_schedule_with_warmup(self.optimizer, WARMUP, STEPS)
        # the first step has a rate, and the warm-up's end is the step behind it
        rise = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1 / (WARMUP + 1), 1, WARMUP)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS - WARMUP)
        return torch.optim.lr_scheduler.SequentialLR(self.optimizer, [rise, fall], [WARMUP])

    # --- one step -----------------------------------------------------------------------------------------------

    def take_step(self, micros: list[Micro]) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
        """The loss, the gradients that the optimizer is given, and the weights after the step."""
        self.optimizer.zero_grad()
        loss = sum((self._diva if self.diva else self._dcr)(micro) for micro in micros)
        if self.released or not self.diva:  # the paper of DIVA names no clip
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0 * CLIP)
        gradients = flat({name: p.grad for name, p in self.model.named_parameters()})
        self.optimizer.step()
        self.schedule.step()
        weights = flat({name: p for name, p in self.model.named_parameters() if p.grad is not None})
        return loss, gradients, weights

    def _diva(self, micro: Micro) -> float:
        """Backward passes of a micro-batch's two draws; the part of the step's loss that they are the gradient of."""
        images = micro.images / 255
        normal = OPENAI(images)
        x0 = self._posterior(normal * IMAGENET_STD + IMAGENET_MEAN if self.released else images).mean
        x0 = x0 * self.vae.config.scaling_factor
        seen = v2.Resize((self.side, self.side), antialias=False)(normal) if self.released else self._own(images)
        total = 0.0
        for draw, (t, noise) in enumerate(zip(micro.t.chunk(2), micro.normal[0].chunk(2), strict=True)):
            tokens = micro.tokens[draw if self.released else 0] if micro.tokens else None
            x_t = self.scheduler.add_noise(x0, noise, t)
            predicted = self.unet(x_t, t, self._recap(*self._features(seen), tokens)).sample
            loss = F.mse_loss(predicted, noise)
            shares = (1, self.accumulate) if self.released else (2 * self.accumulate,) * 2  # see the class
            loss = loss / shares[draw]
            loss.backward()
            total += loss.item()
        return total

    def _dcr(self, micro: Micro) -> float:
        images, (sample, noise), t = micro.images / 255, micro.normal, micro.t
        posterior = self._posterior(images)
        x0 = (posterior.mean + posterior.std * sample) * self.vae.config.scaling_factor
        x0, noise = (x.bfloat16() if self.released else x for x in (x0, noise))
        x_t = self.scheduler.add_noise(x0, noise, t).float()
        context = self._global(self._dcr_input(images))
        b = len(images)
        if self.stage == 1 and not self.released:
            loss = F.mse_loss(self.unet(x_t, t, context).sample, noise)
        else:
            augmented = self._dcr_input(micro.view)
            jittered = augmented if self.released else micro.view  # the code's jitter clamps what was normalised
            assert jittered.min() >= -1e-5 and jittered.max() <= 1 + 1e-5
            view = self._global(augmented)
            grid = torch.stack([self.unet(x_t, t, context[j].expand(b, -1, -1)).sample for j in range(b)], 1)
            truth = self.scheduler.get_velocity(x0, noise, t).float() if self.released else noise
            loss = self._contrast(grid, self.unet(x_t, t, view).sample, truth)
        (loss / self.accumulate).backward()
        return loss.item() / self.accumulate

    def _contrast(self, grid: Tensor, view: Tensor, truth: Tensor) -> Tensor:
        """DCR of predictions [b, b, ...], noisy latent by condition, those under augmented views, and the truth."""
        losses = []
        for i in range(len(grid)):
            anchor, others = grid[i, i].flatten(), [grid[i, j].flatten() for j in range(len(grid)) if j != i]
            positives = [view[i].flatten(), truth[i].flatten()]
            scores = torch.stack([F.cosine_similarity(anchor, other, dim=0) / 0.1 for other in positives + others])
            if self.released:  # by hand
                losses += [-torch.log(scores[k].exp() / scores.exp().sum()) for k in range(2)]
            else:
                losses += [-scores.log_softmax(0)[k] for k in range(2)]
        return torch.stack(losses).mean()

    # --- what the models read -----------------------------------------------------------------------------------

    def _posterior(self, images: Tensor):
        with torch.no_grad():
            return self.vae.encode(images * 2 - 1).latent_dist

    def _own(self, images: Tensor) -> Tensor:
        """The tower's own preprocessing of images in [0, 1]."""
        bicubic = v2.InterpolationMode.BICUBIC
        images = v2.Resize((self.side, self.side), bicubic, antialias=True)(images).clamp(0, 1)
        return images * 2 - 1 if self.kind == "siglip" else OPENAI(images)

    def _dcr_input(self, images: Tensor) -> Tensor:
        return OPENAI(images) if self.released else self._own(images)

    def _features(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The global embedding [b, d] and the patch tokens [b, n, d]."""
        out = self.tower.vision_model(seen)
        if self.kind == "siglip":
            return out.pooler_output, out.last_hidden_state
        tokens = self.tower.visual_projection(self.tower.vision_model.post_layernorm(out.last_hidden_state))
        return self.tower.visual_projection(out.pooler_output), tokens[:, 1:]

    def _global(self, seen: Tensor) -> Tensor:
        return self.projector(self._features(seen)[0])[:, None] + self.empty

    def _recap(self, embedding: Tensor, patches: Tensor, drawn: Tensor | None) -> Tensor:
        """DIVA's conditions; `drawn` are patches' numbers, of a batch [m] or of each image [b, m]."""
        length, half = len(self.empty), patches.shape[1] // 2
        if self.condition in ("recap", "recap-half"):
            drawn = drawn[:half] if drawn.ndim == 1 and self.condition == "recap-half" else drawn
            assert drawn.shape[-1] == (length - 1 if self.condition == "recap" else half)
            drawn = drawn.expand(len(patches), -1)
            patches = torch.stack([own[chosen] for own, chosen in zip(patches, drawn, strict=True)])
        elif self.condition.startswith("recap-pool"):
            window = int(self.condition.removeprefix("recap-pool"))
            whole = patches.shape[1] // window * window
            patches = patches[:, :whole].unflatten(1, (-1, window)).mean(2)
        tokens = self.projector(torch.cat([embedding[:, None], patches], 1))
        return tokens + (self.empty if self.condition == "recap" else self.empty.mean(0))


# --- the comparison ---------------------------------------------------------------------------------------------


def small_recipe(name: str, stage: int, kind: str, folders: dict[str, Path]) -> Settings:
    """A preset with what the head of this file says that is changed."""
    recipe = preset(name, stage)
    diva = recipe.objective == "diva"
    changes = {
        "encoder": str(folders[kind]), "denoiser": str(folders["denoiser"]), "images": str(folders["images"]),
        "projector": "new", "precision": "no", "lora_dropout": 0.0, "lora_rank": recipe.lora_rank and RANK,
        "batch": 2, "accumulate": 5 if name.endswith("diva-released") else 2, "vae_px": 40 if diva else 32,
        "steps": STEPS, "warmup": recipe.warmup and WARMUP, "lr": recipe.lr * RATE["diva" if diva else "dcr"],
        "clip": recipe.clip * CLIP,
    }  # fmt: skip
    return replace_settings(recipe, changes)


def assert_same_steps(name: str, recipe: str, stage: int, kind: str, folders: dict[str, Path], root: Path) -> None:
    settings = small_recipe(name, stage, kind, folders)
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        (align if stage == 1 else tune)(settings, root)
    reference = Reference(recipe, stage, settings, seen.start)
    before = theirs_before = reference.names(seen.start)
    for step, micros in enumerate(seen.micros):
        loss, gradients, theirs = reference.take_step(micros)
        assert loss == pytest.approx(seen.losses[step], rel=1e-5)
        found, ours = reference.names(seen.gradients[step]), reference.names(seen.weights[step])
        assert found.keys() == gradients.keys() == ours.keys() == theirs.keys()
        size = torch.cat(list(gradients.values())).norm()
        assert size > 1e-3
        for key, gradient in gradients.items():
            assert (found[key] - gradient).norm() <= 1e-5 * (gradient.norm() + 1e-2 * size), key
            if gradient.norm() < 1e-5 * size:  # rounding, as of a key's bias, which AdamW makes a step of full size
                continue
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-5, msg=lambda text, k=key: k + text)
            moved, expected = ours[key] - before[key], theirs[key] - theirs_before[key]
            assert (moved - expected).norm() <= 5e-4 * expected.norm(), key
        before, theirs_before = ours, theirs


LARGE = pytest.param("siglip-so400m-384", "siglip", marks=pytest.mark.slow)  # another window
FAMILIES = [("openai-l14", "clip"), ("metaclip-l14", "clip"), ("dfn-h14-378", "clip"), ("siglip-so400m", "siglip")]


@pytest.mark.parametrize("recipe", ["diva", "diva-released"])
@pytest.mark.parametrize(("backbone", "kind"), [*FAMILIES, LARGE])
def test_divas_steps_are_those_of_the_reference(backbone, kind, recipe, folders, tmp_path):
    assert_same_steps(f"{backbone}-{recipe}", recipe, 2, kind, folders, tmp_path)


@pytest.mark.parametrize("recipe", ["dcr", "dcr-released"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("backbone", "kind"), [("openai-l14", "clip"), ("siglip-so400m", "siglip")])
def test_dcrs_steps_are_those_of_the_reference(backbone, kind, stage, recipe, folders, tmp_path):
    assert_same_steps(f"{backbone}-{recipe}", recipe, stage, kind, folders, tmp_path)
