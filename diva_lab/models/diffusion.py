"""Stable Diffusion 1 and 2: a UNet that predicts noise or velocity, as its scheduler's configuration says."""

from collections.abc import Iterable
from functools import cached_property

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel

from diva_lab.models.denoiser import Denoiser, check_widths
from diva_lab.models.frozen import LEVERS
from diva_lab.models.weights import load_diffusers, load_scheduler, load_tokenizer, load_transformers


class StableDiffusion(Denoiser):
    """Stable Diffusion 1 or 2: a UNet whose cross-attention reads one text encoder.

    Args:
        vae, network, text_encoder, tokenizer, scheduler: the parts of its folder.
        px: side in pixels of the images that `latents` encodes; the model's own size if None.
        levers: names in `frozen.LEVERS`, applied for the device that the UNet is on; they save time and memory and
            leave predictions and gradients as they are.
    """

    def __init__(
        self, vae, network, text_encoder, tokenizer, scheduler, px: int | None = None, levers: Iterable[str] = LEVERS
    ):
        px = px or network.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(vae, network, scheduler, network.config.cross_attention_dim, px)
        self.text_encoder, self.tokenizer = text_encoder.requires_grad_(False).eval(), tokenizer
        self.repeats = 1  # consecutive rows of the current prediction that share a noisy latent
        self.levers = frozenset(levers)
        for name, use in LEVERS.items():
            if name in self.levers:
                use(network, lambda: self.empty, lambda: self.repeats)

    @classmethod
    def load(cls, folder: str, device: torch.device | str, px: int | None, levers: Iterable[str]) -> "StableDiffusion":
        """Read a folder in Stable Diffusion's layout; the UNet goes to `device` before the levers are applied."""
        vae, unet = (
            load_diffusers(kind, f"{folder}/{part}")
            for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
        )
        text_encoder = load_transformers(CLIPTextModel, f"{folder}/text_encoder")
        tokenizer = load_tokenizer(f"{folder}/tokenizer", text_encoder.config)
        scheduler = load_scheduler(DDPMScheduler, f"{folder}/scheduler")
        text = text_encoder.config.hidden_size, unet.config.cross_attention_dim
        check_widths(folder, latent=(vae.config.latent_channels, unet.config.in_channels), context=text)
        return cls(vae, unet.to(device), text_encoder, tokenizer, scheduler, px, levers)

    def _tokens(self, context: Tensor) -> Tensor:
        return context if "bias" in self.levers else super()._tokens(context)

    def _run(self, x_t: Tensor, t: Tensor, context: Tensor, repeats: int, labels: Tensor | None = None) -> Tensor:
        self.repeats = repeats
        try:
            return self.network(x_t, t, context, class_labels=labels).sample
        finally:
            self.repeats = 1  # after an error too; in `sample` no rows share a latent

    @cached_property
    def empty(self) -> Float[Tensor, "l c"]:
        return self.encode_text([self.prompt], self.prompt_mask)[0].clone()

    @torch.no_grad()
    def encode_text(self, prompts: list[str], masked: bool = False) -> Float[Tensor, "n l c"]:
        """As `Denoiser.encode_text`; `masked` hides the padding from the text encoder."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)  # ids and mask, [n, l] each
        mask = tokens.attention_mask if masked else None
        with torch.autocast(self.device.type, enabled=False):  # else `empty` would depend on where it is first used
            return self.text_encoder(tokens.input_ids, attention_mask=mask)[0].float()

    def _pipeline(self) -> DiffusionPipeline:
        return StableDiffusionPipeline(
            self.vae, self.text_encoder, self.tokenizer, self.network, DDIMScheduler.from_config(self.scheduler.config),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
