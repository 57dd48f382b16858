"""All settings of both stages, in one flat record, and the learning rate of a step."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from diva_lab.gradients import COMBINE
from diva_lab.models.conditions import CONDITIONS, PROJECTIONS
from diva_lab.models.denoiser import TARGETS
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.timesteps import timestep_weights
from diva_lab.paths import DATA
from diva_lab.training.runs import Run

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
        contrasts = getattr(OBJECTIVES.get(self.objective), "needs_other_images", False)
        if contrasts and self.batch < 2:
            raise ValueError(f"setting batch={self.batch}: {self.objective} contrasts images; expected at least 2")

    @classmethod
    def of(cls, run: Run) -> "Settings":
        """The settings that a run was made with."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in run.settings.items() if name in known})


SCHEDULES = {  # name -> part of lr as a function of the part of the steps that is done
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
CONTROLS = ("none", "perturb-norm", "perturb-drift")  # rows beside the objectives: untouched, or moved at random


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of a step: linear warm-up, then the schedule over the steps that are left."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)
    return settings.lr * SCHEDULES[settings.schedule]((step - settings.warmup) / (settings.steps - settings.warmup))
