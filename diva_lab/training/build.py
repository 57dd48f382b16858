"""The models that the settings name: encoder, conditioner, denoiser, and what an objective is given of them."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from diva_lab import paths
from diva_lab.models.conditions import Conditioner
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.diffusion import StableDiffusion
from diva_lab.models.encoders import Encoder, Features, encoder_files, load_encoder
from diva_lab.models.lora import make_trainable, merge_lora, mix_weights, visual_weights
from diva_lab.models.registry import denoiser_files, load_denoiser
from diva_lab.models.teacher import Teacher
from diva_lab.models.vision import load_vision, vision_files
from diva_lab.models.weights import load_weights, read_weights
from diva_lab.objectives import OBJECTIVES
from diva_lab.objectives.step import Step, models_of
from diva_lab.provenance import sha256
from diva_lab.training.batches import Pixels
from diva_lab.training.runs import Run
from diva_lab.training.settings import CONTROLS, SHIPPED, Settings

SHIPPED_NAMES = {  # projector -> file of a condition
    "shipped": "{}.safetensors", "anchored": "{}-anchored.safetensors", "unpaired": "{}-unpaired.safetensors",
}  # fmt: skip


def build_encoder(settings: Settings, device: torch.device | str = "cpu") -> Encoder:
    """The encoder, its image tower open for training as the settings say."""
    encoder = load_encoder(settings.encoder, device)
    make_trainable(
        encoder, settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.seed, settings.lora_bias,
        settings.lora_targets,
    )  # fmt: skip
    encoder.model.visual.set_grad_checkpointing(settings.rows > 0)  # by rows, the encoder holds the most memory
    return encoder.to(device)


def build_denoiser(settings: Settings, device: torch.device | str = "cpu") -> Denoiser:
    """The frozen denoiser, with the settings' size of images and empty prompt; a light one as stage 1 left it.

    Raises:
        FileNotFoundError, ValueError: as `build_conditioner`, where a light denoiser's weights are asked for.
        ValueError: for a `prompt_mask` that the denoiser does not take; for an unCLIP decoder under an objective that
            reads none, and the other way around.
    """
    denoiser = load_denoiser(settings.denoiser, device, settings.vae_px or None)
    if denoiser.labelled != ("decoder" in settings.models):
        wrong = "reads CLIP's embedding by no projector" if denoiser.labelled else "is no unCLIP decoder"
        read = "decoder" if denoiser.labelled else "denoiser"
        takers = ", ".join(name for name, function in OBJECTIVES.items() if read in models_of(function))
        raise ValueError(
            f"objective {settings.objective!r}: denoiser {settings.denoiser!r} {wrong}; it is for {takers}, and unCLIP "
            "decoders are unclip-tiny, unclip-l14, unclip-h14 and folders in their layout"
        )
    if settings.prompt_mask and not isinstance(denoiser, StableDiffusion):
        raise ValueError(
            f"setting prompt_mask=True: denoiser {settings.denoiser!r} takes no attention mask of a prompt; expected "
            "Stable Diffusion 1 or 2, or prompt_mask=False"
        )
    for name in ("prompt", "prompt_mask", "vae_input", "noise_precision", "keep_latents"):
        setattr(denoiser, name, getattr(settings, name))
    denoiser.latents_folder = paths.CACHE / "latents" if settings.latents_on_disk else None
    if denoiser.scratch and settings.projector != "new":
        _load_stage_one(settings, denoiser.network, "network.")
    return denoiser


def _projector_file(settings: Settings) -> Path:
    """Where the settings' projector lies, if it is not a new one."""
    if settings.projector in SHIPPED_NAMES:
        return SHIPPED / SHIPPED_NAMES[settings.projector].format(settings.condition)
    path = Path(settings.projector)
    return path if path.suffix == ".safetensors" else path / "checkpoint" / "weights.safetensors"


def _load_stage_one(settings: Settings, module: nn.Module, part: str) -> None:
    """Load those weights of the settings' projector whose names begin with `part` into `module`."""
    path = _projector_file(settings)
    if not path.is_file():
        raise FileNotFoundError(
            f"projector={settings.projector!r}: no {path}; expected 'new', 'shipped', 'anchored' or 'unpaired' (tiny "
            "models only), or the folder of a finished run of align()"
        )
    run = Path(settings.projector)
    if (run / "settings.json").is_file() and not (run / "done").exists():
        raise ValueError(
            f"projector={settings.projector!r}: a run that is not finished; run the same again, it goes on"
        )
    weights = {n.removeprefix(part): w for n, w in read_weights(path).items() if n.startswith(part)}
    if isinstance(module, Conditioner) and "gap" in weights:
        module.gap = torch.zeros_like(weights["gap"])
    try:
        load_weights(module, weights, path)
    except ValueError as error:
        raise ValueError(
            f"projector {path} does not fit encoder {settings.encoder!r} and denoiser {settings.denoiser!r}; align() a "
            f"new one: {error}"
        ) from error


def build_conditioner(settings: Settings, encoder: Encoder, denoiser: Denoiser) -> Conditioner:
    """The condition with its projector: shipped, new, or of a run of stage 1.

    Raises:
        FileNotFoundError: where there is no such projector; says how to make one.
        ValueError: where it does not fit the encoder and the denoiser, or an unCLIP decoder does not fit the encoder.
    """
    if denoiser.labelled and denoiser.embedding_width != encoder.dim:
        raise ValueError(
            f"denoiser {settings.denoiser!r} draws from embeddings {denoiser.embedding_width} wide; those of encoder "
            f"{settings.encoder!r} are {encoder.dim}"
        )
    conditioner = Conditioner(
        settings.condition, encoder.dim, denoiser.widths or denoiser.width, settings.seed, settings.projection,
        settings.token_draws == "each",
    )  # fmt: skip
    if settings.projector != "new" and "projector" in settings.models:
        _load_stage_one(settings, conditioner, "conditioner.")
    return conditioner.to(denoiser.device)


def build_teacher(settings: Settings, device: torch.device | str = "cpu") -> Teacher:
    """The vision model that the settings name, and the encoder before it is tuned.

    Raises:
        FileNotFoundError, ValueError: as `load_vision`.
    """
    return Teacher(load_vision(settings.teacher, device), load_encoder(settings.encoder, device)).to(device)


def weight_hashes(settings: Settings) -> dict[str, dict[str, str]]:
    """The sha256 of each file of weights that a run starts from, by model and name of the file.

    A model that is not there has none: loading it says what is missing. A file is read once, until it changes.
    """
    files, read = {"encoder": lambda: encoder_files(settings.encoder)}, settings.models
    if settings.objective in CONTROLS:
        read = ()
    if "denoiser" in read or "decoder" in read:
        files["denoiser"] = lambda: denoiser_files(settings.denoiser)
    if "projector" in read:
        projector = _projector_file(settings)
        files["projector"] = lambda: {projector.name: projector} if projector.is_file() else {}
    if "teacher" in read:
        files["teacher"] = lambda: vision_files(settings.teacher)
    hashes = {}
    for model, find in files.items():
        with suppress(OSError, ValueError):
            if found := find():
                hashes[model] = {n: _hash_once(f, f.stat().st_size, f.stat().st_mtime_ns) for n, f in found.items()}
    return hashes


@cache
def _hash_once(file: Path, size: int, modified: int) -> str:
    return sha256(file)


def make_step(
    images: Tensor,
    encoder: Encoder,
    conditioner: Conditioner | None,
    denoiser: Denoiser | None,
    random: torch.Generator,
    settings: Settings,
    shift: Tensor | None = None,
    captions: Sequence[str] = (),
    teacher: Teacher | None = None,
) -> Step:
    """What an objective is given: images [b, 3, h, w] in [0, 1] and the models it reads, all draws from `random`.

    `shift` [b, d], zeros, is added to the global embedding of every view of an image: the gradient with respect to it
    is that with respect to the embeddings, without a backward pass through the encoder. With `settings.centre` the mean
    over the batch, of all processes, is taken out of the gradient in the embedding: no step moves all images alike.
    """

    pixels = Pixels(settings, encoder)

    def encode(views: Tensor) -> Features:
        features = encoder.read_pixels(pixels(views))
        if shift is not None:
            features = replace(features, embedding=features.embedding + shift)
        if settings.centre and features.embedding.requires_grad:
            features.embedding.register_hook(lambda gradient: gradient - reduce(gradient.mean(0), "mean"))
        return features

    return Step(
        images=images,
        encode=encode,
        condition=lambda features: conditioner(features, denoiser.empty, random),
        augment=lambda views: pixels.augment(views, random),
        denoiser=denoiser,
        generator=random,
        settings=settings,
        captions=captions,
        embed_text=lambda texts: encoder.encode_text(list(texts)),
        gap=conditioner and conditioner.gap,
        teacher=teacher,
        encode_before=teacher and (lambda views: teacher.original.read_pixels(pixels(views))),
    )


def split_mix(name: str | Path) -> tuple[Path, float]:
    """A run's folder and the mix of `RUN:MIX`, as `runs/ID:0.6`; of any other name it is 1."""
    folder, _, mix = str(name).rpartition(":")
    with suppress(ValueError):
        if (Path(folder) / "settings.json").is_file() and not Path(name).exists():
            return Path(folder), float(mix)
    return Path(name), 1.0


def tuned_encoder(run: Run, device: torch.device | str = "cpu", mix: float = 1.0) -> Encoder:
    """The encoder that a run of `tune`, `perturb` or `soup` made, frozen, its LoRA merged; `mix` as in `mix_weights`.

    Raises:
        ValueError: where the run's checkpoint lacks a weight that it trained, has another, or one that is not finite;
            for a run that trained a language model.
    """
    if (stage := run.settings["stage"]).startswith("llava"):
        raise ValueError(f"{run.folder}: a run of stage {stage}, which trains no encoder; expected one of tune()")
    settings = Settings.of(run)
    if stage == "tune" and settings.objective != "none":
        encoder = build_encoder(settings, device)
        names = [name for name, p in encoder.named_parameters() if p.requires_grad]
        weights = {n.removeprefix("encoder."): w for n, w in run.weights().items() if n.startswith("encoder.")}
    else:
        encoder = load_encoder(settings.encoder, device)
        names = list(visual_weights(encoder)) if stage in ("perturb", "soup") else []
        weights = run.weights() if names else {}
    load_weights(encoder, weights, f"checkpoint of run {run.id}", names)
    encoder = merge_lora(encoder).eval().requires_grad_(False)
    return encoder if mix == 1 else mix_weights(encoder, load_encoder(settings.encoder, device), mix)
