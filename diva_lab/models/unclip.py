"""Stable unCLIP: a UNet that reads CLIP's image embedding itself, with no projector between the two."""

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel

from diva_lab.models.denoiser import check_widths
from diva_lab.models.diffusion import StableDiffusion
from diva_lab.models.frozen import LEVERS
from diva_lab.models.weights import load_diffusers, load_scheduler, load_tokenizer, load_transformers


def embedding_labels(
    embedding: Float[Tensor, "n d"],
    level: int,
    noise: Float[Tensor, "n d"],
    normalizer: StableUnCLIPImageNormalizer,
    noising: DDPMScheduler,
) -> Float[Tensor, "n 2*d"]:
    """What an unCLIP UNet reads of image embeddings, as diffusers' pipeline makes it; differentiable.

    An embedding is standardised, noised as the scheduler `noising` does at timestep `level`, taken back to its own
    scale, and joined to the level's sinusoidal embedding.
    """
    levels = torch.full((len(embedding),), level, device=embedding.device)
    noised = normalizer.unscale(noising.add_noise(normalizer.scale(embedding), noise, levels))
    place = get_timestep_embedding(levels, embedding.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([noised, place.to(noised)], dim=1)


class StableUnCLIP(StableDiffusion):
    """Stable Diffusion whose UNet reads a class label beside its prompt: CLIP's image embedding, not of unit length.

    `embedding_labels` says what a label is. The lever `share` is left out: here what runs before the first
    cross-attention depends on the condition.

    Args:
        normalizer: mean and deviation of the embeddings.
        noising: scheduler of the noise on an embedding.

    Attributes:
        embedding_width: d, of the embeddings that it reads.
    """

    labelled = True

    def __init__(
        self, vae, network, text_encoder, tokenizer, scheduler, normalizer, noising, px: int | None = None,
        levers: Iterable[str] = LEVERS,
    ):  # fmt: skip
        super().__init__(vae, network, text_encoder, tokenizer, scheduler, px, set(levers) - {"share"})
        self.normalizer, self.noising = normalizer.requires_grad_(False), noising
        self.embedding_width: int = normalizer.config.embedding_dim

    @classmethod
    def load(cls, folder: str, device: torch.device | str, px: int | None, levers: Iterable[str]) -> "StableUnCLIP":
        """Read a folder in the layout of diffusers' StableUnCLIPImg2ImgPipeline; its image encoder is not needed."""
        parts = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "image_normalizer": StableUnCLIPImageNormalizer}
        vae, unet, normalizer = (load_diffusers(kind, f"{folder}/{part}") for part, kind in parts.items())
        if (kind := unet.config.class_embed_type) != "projection":
            raise ValueError(f"{folder}/unet: class_embed_type = {kind!r}; an unCLIP decoder has 'projection'")
        if not (normalizer.std > 0).all():
            raise ValueError(f"{folder}/image_normalizer: deviations of the embeddings of 0 or less")
        text_encoder = load_transformers(CLIPTextModel, f"{folder}/text_encoder")
        tokenizer = load_tokenizer(f"{folder}/tokenizer", text_encoder.config)
        scheduler, noising = (
            load_scheduler(DDPMScheduler, f"{folder}/{part}") for part in ("scheduler", "image_noising_scheduler")
        )
        check_widths(
            folder,
            latent=(vae.config.latent_channels, unet.config.in_channels),
            context=(text_encoder.config.hidden_size, unet.config.cross_attention_dim),
            label=(2 * normalizer.config.embedding_dim, unet.config.projection_class_embeddings_input_dim),
        )
        return cls(vae, unet.to(device), text_encoder, tokenizer, scheduler, normalizer, noising, px, levers)

    def labels(
        self, embedding: Float[Tensor, "n d"], level: int, noise: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n 2*d"]:
        """The class labels of image embeddings, in float32; `level` from 0 to 999 is how much noise is added."""
        with torch.autocast(embedding.device.type, enabled=False):
            return embedding_labels(embedding.float(), level, noise, self.normalizer, self.noising)

    def _pipeline(self) -> DiffusionPipeline:
        raise ValueError("an unCLIP decoder draws images from embeddings, not from prompts")
