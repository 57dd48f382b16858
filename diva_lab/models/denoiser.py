"""The interface of a frozen latent denoiser: latents, noise, predictions and prompts.

The families are in `diffusion` and `flow`. Whatever a network predicts, `predict` returns the noise.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, Int
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from diva_lab import messages
from diva_lab.models.latents import InMemory, OnDisk, encode_once
from diva_lab.models.weights import digest_weights

TARGETS = ("noise", "velocity")
LEAST_SIGNAL = 0.02  # from which on clean latents can be told from a prediction


def check_widths(folder: str, **widths: tuple[int, int]) -> None:
    """Raise ValueError where parts of a folder do not fit: name -> the width that one gives, and that another takes."""
    for name, (given, taken) in widths.items():
        if given != taken:
            raise ValueError(f"{folder}: its network takes a {name} {taken} wide, found {given}; parts of two models?")


class Denoiser(nn.Module):
    """A frozen latent denoiser. A family defines `_run`, which calls its network, and how it reads prompts.

    Args:
        vae, network, scheduler: as diffusers loads them.
        width: c2, of a context's tokens.
        px: side in pixels of the images that `latents` encodes.

    Attributes:
        timesteps: their number; t runs from 0 (nearly clean) to timesteps - 1 (nearly noise).
        signal, sigma: the coefficients of x_t = signal_t x0 + sigma_t eps, [timesteps] each.
        flow: whether the network matches a flow: sigma = 1 - signal.
        native: what the network itself predicts, `noise` or `velocity`.
        widths: those of the parts of a context's token, by name, where each part has a projector of its own.
        scratch: whether the network has random weights until stage 1 trains it.
        labelled: whether the network reads class labels beside its context: an image's embedding (unCLIP).
        prompt: the text that `empty` encodes; set it before `empty` is first used.
        prompt_mask: whether the prompt is encoded with the attention mask, as DCR's released code has it: every token
            behind its end is then another one. Stable Diffusion 1 and 2 only.
        vae_input: `image`, or `imagenet` for DIVA's released code: normalised with OpenAI's mean and deviation, taken
            back with ImageNet's, so that black to white becomes .064 to .927.
        noise_precision: `float32`, or `bf16` for DCR's released code: latents, noise and their coefficients are rounded
            before they are added, and sigma of the first two timesteps of 1000 is 0.
        keep_latents: the number of images whose latents are kept; see `latents`.
        latents_folder: where they are kept on disk; None for this process's memory.

    Raises:
        ValueError: for a scheduler that declares another `prediction_type` than epsilon or v_prediction, or whose
            signal does not fall with the timestep; for a `scaling_factor` of 0.
    """

    scratch = labelled = False
    widths: dict[str, int] = {}  # noqa: RUF012 (a family sets its own)

    def __init__(self, vae, network, scheduler, width: int, px: int):
        super().__init__()
        self.vae, self.network, self.scheduler, self.width, self.px = vae, network, scheduler, width, px
        if not (scale := vae.config.scaling_factor) or not math.isfinite(scale):
            raise ValueError(f"vae: scaling_factor = {scale}; expected a number other than 0, as 0.18215")
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
            signal[scheduler.betas > 1] = torch.nan  # where the product before is 0, its root is a number
            self.native = "noise" if kind == "epsilon" else "velocity"
        wrong = not signal.is_meta and (not (signal + sigma).isfinite().all() or (signal.diff() > 0).any())
        if wrong or len(signal) < 2:
            names = "num_train_timesteps", "beta_start", "beta_end", "beta_schedule"
            settings = ", ".join(f"{name} = {scheduler.config.get(name)}" for name in names)
            raise ValueError(
                f"scheduler: the signal does not fall with the timestep at {settings}; expected betas in [0, 1), as "
                "beta_start = 0.00085, beta_end = 0.012"
            )
        self.register_buffer("signal", signal, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)
        self.prompt, self.prompt_mask = "", False
        self.vae_input, self.noise_precision = "image", "float32"
        self.keep_latents = 0
        self.latents_folder: Path | None = None
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Denoiser":
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.sigma.device

    @torch.no_grad()
    def latents(
        self, images: Float[Tensor, "b 3 h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c hl wl"]:
        """Latents of images, shifted and scaled as the network expects them, without gradient.

        Args:
            images: in [0, 1], of any size; they are resized to px x px.
            generator: draws a sample of the posterior (DCR's code); without one it is the posterior's mean (DIVA).
        """
        if images.shape[-2:] != (self.px, self.px):
            images = transforms.resize(images, [self.px, self.px], antialias=True)  # [b, 3, px, px]
        mean, std = self._posterior(images).unbind(1)  # [b, c, hl, wl] each
        if generator is not None:
            mean = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
        return (mean - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c hl wl"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [0, 1] of latents as `latents` gives them, by the autoencoder."""
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        return (self.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    def _encode_images(self, images: Tensor) -> Tensor:
        if self.vae_input == "imagenet":
            images = transforms.normalize(images, list(OPENAI_DATASET_MEAN), list(OPENAI_DATASET_STD))
            mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
            images = images * std + mean
        posterior = self.vae.encode(images * 2 - 1).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1).float()  # [b, 2, c, hl, wl]

    @cached_property
    def _kept(self) -> InMemory | OnDisk:
        """Where mean and deviation of the images' latents are kept."""
        if self.latents_folder is None:
            return InMemory()
        return OnDisk(self.latents_folder / f"{digest_weights(self.vae.state_dict())}.sqlite")

    def _posterior(self, images: Tensor) -> Tensor:
        """`_encode_images`, each of the first `keep_latents` different images once."""
        if not self.keep_latents:
            return self._encode_images(images)
        kind = images.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.vae.dtype
        return encode_once(
            images, self._encode_images, self._kept, self.keep_latents, f"{self.vae_input} {kind} {cast}"
        )

    def _coefficients(self, t: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        """signal_t and sigma_t, [b, 1, 1, 1] each."""
        t = t.to(self.device)
        return self.signal[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def add_noise(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """x_t = signal_t x0 + sigma_t eps, for timesteps t in [0, timesteps).

        Diffusion: signal_t^2 = abar_t = 1 - sigma_t^2. Flow: sigma_t = (t + 1) / timesteps = 1 - signal_t.
        """
        signal, sigma, x0, noise = self._rounded(t, x0, noise)
        return (signal * x0 + sigma * noise).float()

    def _rounded(self, t: Tensor, x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """signal_t, sigma_t, x0 and noise in `noise_precision`."""
        signal, sigma = self._coefficients(t)
        if self.noise_precision == "float32":
            return signal, sigma, x0, noise
        if self.flow:
            return signal.bfloat16(), sigma.bfloat16(), x0.bfloat16(), noise.bfloat16()
        kept = signal.square().bfloat16()  # abar, which diffusers' schedulers round before they take roots
        return kept.sqrt(), (1 - kept).sqrt(), x0.bfloat16(), noise.bfloat16()

    def target(
        self, kind: str, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """The target of a prediction: eps for `noise` (DCR's paper), v for `velocity`.

        Diffusion: v = signal_t eps - sigma_t x0. Flow: v = eps - x0. DCR's released code compares the *noise* that an
        epsilon model predicts with the velocity; `velocity` is offered for that comparison.

        Raises:
            ValueError: for another kind.
        """
        if kind not in TARGETS:
            raise ValueError(f"unknown target {kind!r}; {messages.expected(kind, TARGETS)}")
        if kind == "noise":
            return noise
        signal, sigma, x0, noise = self._rounded(t, x0, noise)
        return (noise - x0 if self.flow else signal * noise - sigma * x0).float()

    def predict(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        context: Float[Tensor, "n l c2"],
        kind: str = "noise",
        labels: Float[Tensor, "n k"] | None = None,
    ) -> Float[Tensor, "n c h w"]:
        """The noise in x_t as the network predicts it under `context`, in float32; differentiable in all of them.

        Args:
            x_t, t: noisy latents and their timesteps.
            context: one per prediction, n being b or a multiple of it: the first n / b contexts belong to the first
                latent, the next n / b to the second, and so on. A context of one token is added to every token of the
                empty prompt.
            kind: `noise`, or `native` for the network's own prediction.
            labels: class labels, one per prediction, of a network that is `labelled`.
        """
        n = len(context) // len(x_t)
        x_t, t = (part.repeat_interleave(n, 0) for part in (x_t, t.to(x_t.device)))  # [n, c, h, w], [n]
        dtype = self.network.dtype
        cast = torch.is_autocast_enabled(x_t.device.type) and dtype.itemsize > 2
        with torch.autocast(x_t.device.type, enabled=cast):
            read = {} if labels is None else {"labels": labels.to(dtype)}
            out = self._run(x_t.to(dtype), t, self._tokens(context).to(dtype), n, **read).float()  # [n, c, h, w]
        if kind == "native" or self.native == "noise":
            return out
        signal, sigma = self._coefficients(t)  # solve the definitions of v and x_t for eps
        return x_t + signal * out if self.flow else signal * out + sigma * x_t

    def clean(
        self, x_t: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """x0 = (x_t - sigma_t eps) / signal_t: the clean latents, if `noise` is the noise in x_t.

        Where nearly no signal is left, `LEAST_SIGNAL` stands for it.
        """
        signal, sigma = self._coefficients(t)
        return (x_t - sigma * noise) / signal.clamp_min(LEAST_SIGNAL)

    @torch.no_grad()
    def draw(
        self, noise: Float[Tensor, "n c h w"], read: Mapping[str, Tensor], guidance: float = 3.0, steps: int = 30
    ) -> Float[Tensor, "n c h w"]:
        """Clean latents drawn from `noise` by DDIM's deterministic steps, which of a flow are Euler's.

        `sample` draws from prompts by diffusers' pipelines; this draws from anything that `predict` reads.

        Args:
            read: what `predict` reads beside noisy latents, n rows each.
            guidance: the scale of classifier-free guidance away from the empty prompt, 1 for none.
            steps: of the sampler.
        """
        blank = self.blank(read)
        last = int((self.signal > LEAST_SIGNAL).sum()) - 1
        times = torch.linspace(last, 0, steps + 1).round().long()[:, None].expand(-1, len(noise))  # [steps + 1, n]
        x = noise
        for t, following in pairwise(times):
            eps = self.predict(x, t, **read)
            if guidance != 1:
                plain = self.predict(x, t, **blank)
                eps = plain + guidance * (eps - plain)
            x0 = self.clean(x, eps, t)
            x = self.add_noise(x0, eps, following)
        return x0

    def empty_context(self, n: int) -> Float[Tensor, "n 1 c2"]:
        """n contexts of the empty prompt: one token of zeros each, which `predict` adds to the prompt's own."""
        return torch.zeros(n, 1, self.width, device=self.device)

    def blank(self, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `predict` reads under the empty prompt in the place of `read`: its context, and labels of zeros."""
        zeros = {name: torch.zeros_like(value) for name, value in read.items()}
        return zeros | {"context": self.empty_context(len(read["context"]))}

    def _tokens(self, context: Tensor) -> Tensor:
        """The tokens that the network reads: one token stands for the empty prompt with this token added to each."""
        return self.empty + context if context.shape[1] == 1 else context

    def _run(self, x_t: Tensor, t: Tensor, context: Tensor, repeats: int) -> Tensor:
        """The network's own prediction, in which `repeats` consecutive rows of x_t and t are equal."""
        raise NotImplementedError

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n l c"]:
        """The context of each prompt, truncated or padded to the tokenizer's length, in float32; not for `Light`."""
        raise ValueError(f"a {type(self).__name__} denoiser has no text encoder, so it reads no prompts")

    @cached_property
    def empty(self) -> Float[Tensor, "l c"]:
        """The context of the empty prompt, encoded once."""
        return self.encode_text([self.prompt])[0].clone()

    def sample(
        self, prompts: list[str], guidance: float = 3.0, steps: int = 30, seed: int = 0
    ) -> Float[Tensor, "n 3 px px"]:
        """Images in [0, 1] for `prompts`, by diffusers' own pipeline with classifier-free guidance; not for `Light`.

        Args:
            guidance: its scale, 1 for none.
            steps: of the sampler.
            seed: of the initial noise.
        """
        pipeline = self._pipeline()
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        out = pipeline(
            prompts, height=self.px, width=self.px, num_inference_steps=steps, guidance_scale=guidance,
            generator=generator, output_type="pt",
        )  # fmt: skip
        return out.images.cpu()

    def _pipeline(self) -> DiffusionPipeline:
        raise ValueError(f"a {type(self).__name__} denoiser has no text encoder, so it reads no prompts")
