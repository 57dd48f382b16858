"""The interface of a frozen latent denoiser: latents, noise, prediction, prompts. Every prediction is of the noise."""

import hashlib
from collections import ChainMap
from functools import cached_property
from itertools import islice

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

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
