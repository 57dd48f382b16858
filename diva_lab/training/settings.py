"""All settings of both stages, in one flat record, and the learning rate of a step."""

import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, runtime_checkable

from diva_lab import messages
from diva_lab.gradients import COMBINE
from diva_lab.models.conditions import CONDITIONS, PROJECTIONS
from diva_lab.models.denoiser import TARGETS
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.diva import read_draw_weights
from diva_lab.objectives.step import models_of
from diva_lab.objectives.timesteps import timestep_weights
from diva_lab.paths import DATA
from diva_lab.training.runs import Run

SHIPPED = DATA / "tiny" / "projectors"  # where the projectors lie that `shipped`, `anchored` and `unpaired` mean
PROJECTORS = ("global", "recap")  # conditions whose projectors ship, for the tiny models


@dataclass(frozen=True)
class Settings:
    """All settings of both stages. The defaults are DCR's recipe at the tiny world's size.

    A path is taken for a text, a whole number for a float, and so is a number in a text: YAML reads `2e-5` as one.

    Raises:
        ValueError: for a value of another type, out of `RANGES`, or not among `CHOICES`; names the setting.
    """

    # models
    encoder: str = "tiny"  # a key of ENCODERS, an open_clip name, a folder, or a hub id
    denoiser: str = "tiny"  # a key of DENOISERS or LIGHT, a folder, or a hub id
    vae_px: int = 0  # side of the images that the denoiser encodes, in pixels; 0 for its own
    latent: str = "mean"  # of the VAE's posterior: the `mean` (DIVA) or a `sample` (DCR's code)
    prompt: str = ""  # the empty prompt; DIVA's is its template without a class
    prompt_mask: bool = False  # whether the prompt is encoded with the attention mask (DCR's code)
    vae_input: str = "image"  # what the VAE encodes: the `image`, or `imagenet`, of less contrast (DIVA's code)
    noise_precision: str = "float32"  # in which noise is added: `float32`, or `bf16` (DCR's code)
    encoder_resize: str = "own"  # to the encoder's size: its `own` way, or `bilinear`, not antialiased (DIVA's code)
    embedding_noise: int = 0  # noise on the embedding that an unCLIP decoder reads: a timestep of its scheduler
    teacher: str = "tiny-vision"  # of kuea: a key of VISION, `timm:NAME`, a folder, or a hub id
    normalise: str = "own"  # the encoder's input in training: its `own` mean and deviation, or `openai` (released)

    # images
    images: str = "world"  # `world`, `world:SEED`, a folder, webdataset tars (paths or URLs), or `hf:` and a dataset
    batch: int = 8  # images of a micro-batch, in each process
    accumulate: int = 1  # micro-batches of a step
    loader_crop: bool = False  # a random crop of .9 to 1 of an image, made square (released); else its centre's square
    shared_samples: bool = False  # whether all processes see the same images (DCR's code)
    resampled: bool = False  # tars are drawn with replacement, by each process: for sets too large for one epoch

    # condition and projector
    condition: str = "global"  # a key of CONDITIONS: which visual tokens the denoiser reads
    token_draws: str = "batch"  # of a condition that draws: one a `batch`; or `each` image and draw of noise (released)
    projection: str = "mlp"  # `mlp` (DCR: LayerNorm, Linear, GELU, Linear) or one `linear` (DIVA)
    projector: str = "shipped"  # `shipped`; `anchored`, `unpaired` (ship too); `new`; a run of stage 1, or its file
    train_projector: bool = False  # in stage 2 too, together with the encoder, as DIVA as published does

    # objective
    objective: str = "dcr"  # of stage 2, a key of OBJECTIVES; stage 1 takes genhancer's loss, or as `align_by` says
    align_by: str = "rec"  # stage 1's loss: `rec` (paper: L_rec, b evaluations) or `dcr` (code: all of DCR's)
    draws: int = 2  # of (t, eps) an image, in DIVA's loss
    draw_weights: str = ""  # of the draws, as `5,1`: their losses are added with them; "" for the mean (paper)
    timesteps: str = "uniform"  # a key of TIMESTEPS, or relative weights of equal parts of them, as `0,0,1,3`
    lambda_con: float = 1.0  # weight of the contrastive term
    lambda_rec: float = 1.0  # weight of the reconstruction term
    tau: float = 0.1  # temperature of both contrasts
    flips: bool = True  # horizontal and vertical flips in the augmentation
    augment_normalised: bool = False  # the augmentation takes the encoder's normalised input (DCR's code)
    centre: bool = False  # the batch's mean is taken out of the gradient in the embedding, over all processes
    combine: str = "sum"  # how the terms' gradients become one: `sum`, or surgery by a key of COMBINE

    # DCR
    target: str = "noise"  # the ground truth: `noise` (paper) or `velocity` (released code)
    denominator: str = "shared"  # of the softmax: `shared` by both positives (published) or each its `own`
    negatives: int = 0  # other images that each is contrasted with, drawn anew each step; 0 for all (published)
    negative_gradient: bool = True  # whether the gradient flows through the negatives too (published)
    parts: bool = False  # pull to the truth, pull to the view and push as terms of their own
    truth_weight: float = 1.0  # of the pull to the truth; all three weights are 1 as published
    view_weight: float = 1.0  # of the pull to the augmented view
    push_weight: float = 1.0  # of the push from the negatives

    # captions: stage 1 anchored in them, or an objective that reads them
    anchor: str = "none"  # `captions` of the images, `text` without images, or `shuffled` captions (a placebo)
    captions: str = ""  # for `text` a file with a prompt a line; of a Hugging Face dataset the column; "" for its own
    mentions: float = 1.0  # the world's captions mention each detail with p ~ U(0, mentions), drawn for each image
    anchor_share: float = 0.5  # of a batch's rows that a caption conditions
    anchor_weight: float = 1.0  # of these rows' loss
    anchor_noise: float = 0.1  # length of the noise that is added to a caption's embedding
    anchor_shift: bool = True  # whether a caption's embedding is moved by the gap between the modalities' means

    # optimisation
    seed: int = 0  # of every random draw
    steps: int = 100  # of the optimizer
    optimizer: str = "adamw"  # `adamw`, or `sgd` with momentum .9
    lr: float = 1e-4  # learning rate after the warm-up
    weight_decay: float = 0.01  # of the optimizer
    warmup: int = 0  # steps over which lr rises linearly
    warmup_zero: bool = False  # whether lr rises from 0, so that the first step changes nothing (DIVA's code)
    schedule: str = "constant"  # of lr after the warm-up: `constant`, or `cosine` down to zero at the last step
    clip: float = 1.0  # largest norm of the gradient; 0 for none

    # LoRA
    lora_rank: int = 16  # 0 tunes all weights of the image tower
    lora_alpha: float = 16.0  # the update is scaled by alpha / rank
    lora_dropout: float = 0.1  # on the input of each adapter
    lora_bias: bool = True  # whether the biases of the adapted layers are tuned too
    lora_targets: str = "all"  # `all` matrices; `released` leaves out SigLIP's pooling attention (DCR's code)

    # machine
    precision: str = "auto"  # `bf16`, `no`, or `auto`: bf16 where the device multiplies it in hardware
    rows: int = 0  # noisy latents that DCR takes at a time, 0 for all; 1 takes the least memory, the result is the same
    keep_latents: int = 0  # images whose latents are kept, encoded once: pays from the second epoch on
    latents_on_disk: bool = False  # they are kept in the cache, where stage 2 and later runs find them; else in memory
    workers: int = 0  # processes that decode images; 0 for threads
    compile: bool = False  # the UNet by torch.compile: a minute or more at the start, then faster steps

    # records
    evaluate_every: int = 0  # steps between evaluations; 0 for the last step only
    save_every: int = 100  # steps between checkpoints; 0 for the last step only

    def __post_init__(self):
        for field in fields(self):
            value = read_setting(field.name, field.type, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        timestep_weights(self.timesteps)
        read_draw_weights(self.draw_weights, self.draws)
        self._check_anchor()
        if (images := self.batch * self.accumulate) > IMAGES_A_STEP:
            raise ValueError(
                f"settings batch={self.batch}, accumulate={self.accumulate}: {images} images a step; expected at most "
                f"{IMAGES_A_STEP}"
            )
        if self.latents_on_disk and not self.keep_latents:
            raise ValueError(
                "setting latents_on_disk=True, keep_latents=0: none would be kept; expected keep_latents, the number "
                "of images whose latents may be kept"
            )
        if self.parts and self.rows:
            raise ValueError(f"setting rows={self.rows}: parts=True takes all rows at once, rows=0")
        contrasts = getattr(OBJECTIVES.get(self.objective), "needs_other_images", False)
        if contrasts and self.batch < 2:
            raise ValueError(f"setting batch={self.batch}: {self.objective} contrasts images; expected at least 2")

    def _check_anchor(self) -> None:
        """Refuse what no anchored stage 1 can do."""
        if self.anchor == "none":
            return
        for name, value in (("condition", "global"), ("align_by", "rec")):
            if getattr(self, name) != value:
                raise ValueError(
                    f"setting {name}={getattr(self, name)!r}: a caption has one embedding, and only L_rec is anchored; "
                    f"anchor={self.anchor!r} takes {name}={value!r}"
                )
        if self.objective == "genhancer":
            raise ValueError(f"setting anchor={self.anchor!r}: genhancer's denoiser reads no captions; expected none")

    @property
    def models(self) -> tuple[str, ...]:
        """The models beside the encoder that the objective reads: see `objectives.step.reads`."""
        return models_of(OBJECTIVES.get(self.objective))

    @property
    def anchored(self) -> bool:
        """Whether stage 1 reads captions."""
        return self.anchor != "none" and self.anchor_share > 0

    @property
    def reads_captions(self) -> bool:
        """Whether images come with their captions: for an anchored stage 1, or an objective that reads them."""
        own = getattr(OBJECTIVES.get(self.objective), "reads_captions", False)
        return own or (self.anchored and self.anchor != "text")

    @classmethod
    def of(cls, run: Run) -> "Settings":
        """The settings that a run was made with.

        Raises:
            ValueError: as `Settings`; names the run's file too.
        """
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in run.settings.items() if name in known})
        except ValueError as error:
            raise ValueError(f"{run.folder / 'settings.json'}: {error}") from error


CAPTIONS = ("captions", "mentions")  # which captions are read
CAPTIONED = (  # settings of an anchored stage 1 alone, and what objectives that read captions take too
    *CAPTIONS, "anchor", "anchor_share", "anchor_weight", "anchor_noise", "anchor_shift",
)  # fmt: skip
SCHEDULES = {  # name -> part of lr as a function of the part of the steps that is done
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
CONTROLS = ("none", "perturb-norm", "perturb-drift", "soup")  # beside objectives: untouched, moved at random, a mean
CHOICES: dict[str, Callable[[], Iterable[str]]] = {  # setting -> its values; registries may grow, so they are read late
    "objective": lambda: (*OBJECTIVES, *CONTROLS),
    "condition": lambda: CONDITIONS,
    "projection": lambda: PROJECTIONS,
    "combine": lambda: COMBINE,
    "target": lambda: TARGETS,
    "schedule": lambda: SCHEDULES,
    "align_by": lambda: ("rec", "dcr"),
    "anchor": lambda: ("none", "captions", "text", "shuffled"),
    "denominator": lambda: ("shared", "own"),
    "latent": lambda: ("mean", "sample"),
    "optimizer": lambda: ("adamw", "sgd"),
    "precision": lambda: ("auto", "bf16", "no"),
    "vae_input": lambda: ("image", "imagenet"),
    "noise_precision": lambda: ("float32", "bf16"),
    "encoder_resize": lambda: ("own", "bilinear"),
    "normalise": lambda: ("own", "openai"),
    "token_draws": lambda: ("batch", "each"),
    "lora_targets": lambda: ("all", "released"),
    "trained": lambda: ("projector", "all", "lora"),  # of `llava.tuning`, as the next
    "dialogue": lambda: ("chat", "plain"),
}
NAMES = (
    "encoder",
    "denoiser",
    "teacher",
    "images",
    "projector",
    "llava",
    "data",
)  # settings that name something, so "" is none
LONGEST = 4096  # characters of a text
IMAGES_A_STEP = 1_000_000  # in each process
RANGES: dict[str, tuple[float, float]] = {  # setting -> its least and its largest value; every number has a range
    "vae_px": (0, 4096),
    "batch": (1, 65_536),
    "accumulate": (1, 65_536),
    "embedding_noise": (0, 999),
    "draws": (1, 1024),
    "lambda_con": (0, 1e6),  # a negative weight would train away from what its term asks for
    "lambda_rec": (0, 1e6),
    "tau": (1e-3, 1e3),  # below, the softmax overflows; above, it no longer tells its terms apart
    "negatives": (0, 65_535),
    "truth_weight": (0, 1e6),
    "view_weight": (0, 1e6),
    "push_weight": (0, 1e6),
    "mentions": (0, 1),
    "anchor_share": (0, 1),
    "anchor_weight": (0, 1e6),
    "anchor_noise": (0, 1e3),
    "seed": (0, 2**32 - 1),  # as numpy and scikit-learn take it
    "steps": (0, 10**9),
    "lr": (0, 1e6),
    "weight_decay": (0, 1e3),
    "warmup": (0, 10**9),
    "clip": (0, 1e6),  # a negative norm would turn the gradient around
    "lora_rank": (0, 4096),
    "lora_alpha": (0, 1e6),
    "lora_dropout": (0, 0.99),
    "rows": (0, 10**6),
    "keep_latents": (0, 10**8),
    "workers": (0, 256),
    "evaluate_every": (0, 10**9),
    "save_every": (0, 10**9),
    "projector_lr": (0, 1e6),  # the rest is of `llava.tuning`
    "warmup_share": (0, 0.99),
    "max_tokens": (1, 10**6),
}


def read_setting(name: str, kind: type, value: object) -> object:
    """A setting's value as it is kept.

    Raises:
        ValueError: for a value of the wrong type, out of its range, or not among its choices.
    """
    if kind is str and isinstance(value, Path):
        value = str(value)
    if kind is float and isinstance(value, str):
        with suppress(ValueError):  # refused below
            value = float(value)
    if name in CHOICES and (not isinstance(value, str) or value not in CHOICES[name]()):
        raise ValueError(f"unknown {name} {_shown(value)}; {messages.expected(value, CHOICES[name]())}")
    least, most = RANGES.get(name, (None, None))
    expected = kind.__name__ if least is None else f"{kind.__name__} from {least:g} to {most:.10g}"
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"setting {name}={_shown(value)}: expected {expected}")
    if least is not None and not least <= value <= most:  # so written, it refuses NaN
        raise ValueError(f"setting {name}={_shown(value)}: expected {expected}")
    if kind is str and (len(value) > LONGEST or re.search("[\0\ud800-\udfff]", value)):
        raise ValueError(
            f"setting {name}: {len(value)} characters; expected at most {LONGEST}, all of which UTF-8 can hold, no NUL"
        )
    if name in NAMES and not value.strip():
        raise ValueError(f"setting {name}={value!r}: expected a name or a path")
    return value


def _shown(value: object) -> str:
    """A value for an error message, at most 200 characters of it; Python refuses to print an int of 5000 digits."""
    text = f"<{value.bit_length()} bits>" if isinstance(value, int) and value.bit_length() > 500 else repr(value)
    return text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)"


@runtime_checkable
class LoopSettings(Protocol):
    """What the loop of training reads of any settings; see `Settings` for each."""

    seed: int
    steps: int
    batch: int
    accumulate: int
    optimizer: str
    lr: float
    weight_decay: float
    warmup: int
    warmup_zero: bool
    schedule: str
    clip: float
    combine: str
    precision: str
    evaluate_every: int
    save_every: int


def learning_rate(settings: LoopSettings, step: int) -> float:
    """The learning rate of a step: linear warm-up, then the schedule over the steps that are left.

    Over w steps of warm-up it is lr (step + 1) / (w + 1), or with `warmup_zero` lr step / w.
    """
    if step < settings.warmup:
        first = not settings.warmup_zero
        return settings.lr * (step + first) / (settings.warmup + first)
    return settings.lr * SCHEDULES[settings.schedule]((step - settings.warmup) / (settings.steps - settings.warmup))
