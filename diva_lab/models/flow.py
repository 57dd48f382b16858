"""Transformers that match a flow: Stable Diffusion 3, and a light one like GenHancer's, which stage 1 trains."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from diva_lab.models.denoiser import Denoiser, check_widths
from diva_lab.models.weights import load_diffusers, load_scheduler, load_tokenizer, load_transformers


class StableDiffusion3(Denoiser):
    """Stable Diffusion 3: a transformer that matches a flow, and reads two CLIP text encoders.

    The third text encoder, T5, is left out: it is larger than everything else, and the model is trained to work without
    it. None of `frozen.LEVERS` applies: in joint attention the prompt's tokens change with the image's tokens, so that
    none of their keys and values are constant.

    Args:
        pipeline: with all its parts, as diffusers loads it.
        px: side in pixels of the images that `latents` encodes; the model's own size if None.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, px: int | None = None):
        vae, network = pipeline.vae, pipeline.transformer
        px = px or network.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(vae, network, pipeline.scheduler, network.config.joint_attention_dim, px)
        self.text_encoders = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])
        self.text_encoders.requires_grad_(False).eval()
        self._diffusers = pipeline

    @classmethod
    def load(cls, folder: str, device: torch.device | str, px: int | None, levers: Iterable[str]) -> "StableDiffusion3":
        """Read a folder in Stable Diffusion 3's layout; `device` and `levers` are not used."""
        parts = {"text_encoder_3": None, "tokenizer_3": None}
        for kind, part in ((AutoencoderKL, "vae"), (SD3Transformer2DModel, "transformer")):
            parts[part] = load_diffusers(kind, f"{folder}/{part}")
        for end in ("", "_2"):
            encoder = load_transformers(CLIPTextModelWithProjection, f"{folder}/text_encoder{end}")
            parts[f"text_encoder{end}"] = encoder
            parts[f"tokenizer{end}"] = load_tokenizer(f"{folder}/tokenizer{end}", encoder.config)
        check_widths(folder, latent=(parts["vae"].config.latent_channels, parts["transformer"].config.in_channels))
        scheduler = load_scheduler(FlowMatchEulerDiscreteScheduler, f"{folder}/scheduler")
        return cls(StableDiffusion3Pipeline(scheduler=scheduler, **parts), px)

    def _run(self, x_t: Tensor, t: Tensor, context: Tensor, repeats: int) -> Tensor:
        pooled = self._pooled.to(context.dtype).expand(len(context), -1)  # [n, p]
        return self.network(x_t, context, pooled, 1000 * self.sigma[t]).sample

    @torch.no_grad()
    def _encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens [n, l, c] and pooled embeddings [n, p], in float32."""
        with torch.autocast(self.device.type, enabled=False):
            tokens, _, pooled, _ = self._diffusers.encode_prompt(
                prompts, None, None, device=self.device, do_classifier_free_guidance=False
            )
        return tokens.float(), pooled.float()

    def encode_text(self, prompts: list[str]) -> Float[Tensor, "n l c"]:
        return self._encode_prompts(prompts)[0]

    @cached_property
    def _pooled(self) -> Float[Tensor, "1 p"]:
        return self._encode_prompts([self.prompt])[1]

    def _pipeline(self) -> DiffusionPipeline:
        return self._diffusers


@dataclass(frozen=True)
class LightSizes:
    """Of a `Light` denoiser.

    Attributes:
        heads, head_width: number and width of its attention heads; the transformer is heads x head_width wide.
        channels: of the latents that its autoencoder gives.
        widths: of the parts of a context's token, a projector for each: `vec` modulates the blocks, `text` is the
            context. Without them one projector gives a token as wide as the transformer, which does both.
        guidance: the scale that is embedded with the timestep, the same for every image; None for none.
    """

    heads: int
    head_width: int = 64
    channels: int = 4
    widths: dict[str, int] = field(default_factory=dict)
    guidance: float | None = None


class Light(Denoiser):
    """A denoiser like GenHancer's: two joint and four single transformer blocks that match a flow, from random weights.

    The blocks are Flux's. The context is one token; it, or a part of it, also modulates every block. There is no text
    encoder: the empty prompt is one token of zeros.

    Args:
        vae: a frozen autoencoder; one token of the transformer is a patch of 2 x 2 of its latents.
        sizes: GenHancer's released ones, or ours: see `registry.LIGHT`.
        px: side in pixels of the images that `latents` encodes; the autoencoder's own size if None.
    """

    scratch = True

    def __init__(self, vae: AutoencoderKL, sizes: LightSizes, px: int | None = None):
        width, axis = sizes.heads * sizes.head_width, (sizes.head_width - 16) // 2
        vec, text = (sizes.widths.get(part, width) for part in ("vec", "text"))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = FluxTransformer2DModel(
                in_channels=4 * vae.config.latent_channels, num_layers=2, num_single_layers=4,
                attention_head_dim=sizes.head_width, num_attention_heads=sizes.heads, joint_attention_dim=text,
                pooled_projection_dim=vec, guidance_embeds=sizes.guidance is not None, axes_dims_rope=(16, axis, axis),
            )  # fmt: skip
        total = sum(sizes.widths.values()) or width
        super().__init__(vae, network, FlowMatchEulerDiscreteScheduler(), total, px or vae.config.sample_size)
        self.widths, self.guidance = sizes.widths, sizes.guidance

    @cached_property
    def empty(self) -> Float[Tensor, "l c"]:
        return torch.zeros(1, self.width, device=self.device)

    def _run(self, x_t: Tensor, t: Tensor, context: Tensor, repeats: int) -> Tensor:
        height, width = x_t.shape[-2:]
        x_t = F.pad(x_t, (0, width % 2, 0, height % 2))  # [n, c, 2 rows, 2 columns]
        rows, columns = (size // 2 for size in x_t.shape[-2:])
        places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).to(x_t)  # [r c, 3]
        vec, text = context.split([*self.widths.values()], -1) if self.widths else (context, context)  # [n, l, ...]
        guidance = None if self.guidance is None else x_t.new_full((len(x_t),), self.guidance)
        out = self.network(
            F.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2), text, vec.mean(1), self.sigma[t],
            img_ids=places, txt_ids=places.new_zeros(text.shape[1], 3), guidance=guidance,
        ).sample  # fmt: skip
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, columns)), 2)[..., :height, :width]
