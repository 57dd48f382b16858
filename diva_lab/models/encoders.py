"""ENCODERS: CLIP encoders behind one interface: image -> global embedding and patch tokens, text -> embedding.

Every encoder becomes an open_clip model; to add a backbone, add one line to `ENCODERS`. Normalisation, size and resize
mode are the model's own. They are applied here, on the device, to images in [0, 1].
"""

import copy
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from open_clip.model import set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from diva_lab import messages
from diva_lab.machine import fetch_hint, fetch_repository
from diva_lab.models.formats import check_square, load_released, read_open_clip, read_transformers
from diva_lab.models.layers import fuse_attention, split_attention
from diva_lab.models.lora import merge_lora
from diva_lab.models.weights import check_finite, weight_files
from diva_lab.paths import DATA

ENCODERS = {  # name -> (open_clip model, pretrained tag); a `local-dir:` folder holds weights and tokenizer
    # the tiny world's, then the papers' eight backbones, for which there are presets
    "tiny": (f"local-dir:{DATA / 'tiny' / 'clip'}", None),
    "openai-l14": ("ViT-L-14-quickgelu", "openai"),
    "openai-l14-336": ("ViT-L-14-336-quickgelu", "openai"),
    "metaclip-l14": ("ViT-L-14-quickgelu", "metaclip_fullcc"),
    "metaclip-h14": ("ViT-H-14-quickgelu", "metaclip_fullcc"),
    "siglip-so400m": ("ViT-SO400M-14-SigLIP", "webli"),
    "siglip-so400m-384": ("ViT-SO400M-14-SigLIP-384", "webli"),
    "dfn-h14": ("ViT-H-14-quickgelu", "dfn5b"),
    "dfn-h14-378": ("ViT-H-14-378-quickgelu", "dfn5b"),
    # what they are compared with
    "openai-b32": ("ViT-B-32-quickgelu", "openai"),
    "openai-b16": ("ViT-B-16-quickgelu", "openai"),
    "dfn-l14": ("ViT-L-14-quickgelu", "dfn2b"),
    "eva02-l14": ("EVA02-L-14", "merged2b_s4b_b131k"),
    "eva02-l14-336": ("EVA02-L-14-336", "merged2b_s6b_b61k"),
    "siglip2-so400m": ("ViT-SO400M-14-SigLIP2", "webli"),
    "siglip2-so400m-378": ("ViT-SO400M-14-SigLIP2-378", "webli"),
    "metaclip2-h14": ("ViT-H-14-worldwide-quickgelu", "metaclip2_worldwide"),
    "pe-l14-336": ("PE-Core-L-14-336", "meta"),
}


@dataclass(frozen=True)
class Features:
    """An encoder's output for a batch; neither part is normalised to unit length."""

    embedding: Float[Tensor, "b d"]  # the global embedding
    patches: Float[Tensor, "b n d"]  # the patch tokens after the final norm and the projection, in the same space


def _has_projected_patches(visual: nn.Module) -> bool:
    """Whether the norm and the projection that make an image tower's embedding can be applied to its patch tokens."""
    if isinstance(visual, TimmModel):
        return hasattr(visual.trunk, "fc_norm")
    return isinstance(visual, VisionTransformer) and visual.attn_pool is None


def all_finite(embeddings: Float[Tensor, "n d"], items: Sequence, kind: str) -> Float[Tensor, "n d"]:
    """`embeddings`, if none of them is NaN or infinite: scores of such would look like any others.

    Args:
        items: what was embedded, n of them.
        kind: a word for them.

    Raises:
        ValueError: names the first item whose embedding is not finite.
    """
    if wrong := (~embeddings.isfinite().all(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"the embeddings of {len(wrong)} of {len(items)} {kind} are NaN or infinite, the first of "
            f"{str(items[wrong[0]])[:100]!r}; such an encoder cannot be scored"
        )
    return embeddings


def _attend_to_self(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook of a block of [b, n, width], or [n, b, width], that lets each token attend to itself alone."""
    batch_first = getattr(getattr(block, "attn", None), "batch_first", True)
    n = args[0].shape[1 if batch_first else 0]
    mask = torch.full((n, n), -torch.inf, dtype=args[0].dtype, device=args[0].device).fill_diagonal_(0)
    return args, kwargs | {"attn_mask": mask}


class Encoder(nn.Module):
    """A CLIP whose visual tower gives patch tokens and can be tuned; frozen until `make_trainable`.

    Args:
        model: an open_clip model. Its visual attention is split, and its `proj` matrix, if there is one, becomes an
            `nn.Linear`, so that LoRA can adapt every matrix. `open_clip_state` has the original layout.
        tokenizer: list of n strings -> token ids [n, context length].
        config: open_clip's complete configuration of the model, which is saved beside the weights.

    Attributes:
        px: side in pixels of the images that the visual tower takes.
        dim: width d of the embeddings.
        depth: number of blocks of the visual tower.

    Raises:
        ValueError: for an image tower that is not a plain ViT.
    """

    def __init__(self, model: nn.Module, tokenizer, config: dict | None = None):
        super().__init__()
        self.model, self.tokenizer, self.config = model, tokenizer, config
        if not _has_projected_patches(model.visual):
            kind = type(getattr(model.visual, "trunk", model.visual)).__name__
            raise ValueError(
                f"image tower {kind}: cannot project its patch tokens into the embedding's space; expected a plain ViT "
                "of open_clip or timm, not a convolutional tower or CoCa's"
            )
        visual = split_attention(model.visual)
        self.proj: nn.Module = nn.Identity()
        if isinstance(getattr(visual, "proj", None), nn.Parameter):
            self.proj = nn.Linear(*visual.proj.shape, bias=False, device="meta")
            self.proj.weight = nn.Parameter(visual.proj.detach().T.contiguous())
            visual.proj = None
        preprocess = open_clip.get_model_preprocess_cfg(model)
        size = preprocess["size"]
        self.px: int = size if isinstance(size, int) else size[0]
        self.resized = self.px  # the shorter side before images are cropped
        self.interpolation, self.squash = preprocess["interpolation"], preprocess.get("resize_mode") == "squash"
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocess[name]).view(1, 3, 1, 1), persistent=False)
        self.depth: int = len(self._blocks())
        self.eval().requires_grad_(False)
        with torch.no_grad():
            blank = torch.zeros(1, 3, self.px, self.px, device=self.mean.device)
            self.dim: int = self.features(blank).embedding.shape[1]

    def _blocks(self) -> nn.Module:
        visual = self.model.visual
        return visual.trunk.blocks if isinstance(visual, TimmModel) else visual.transformer.resblocks

    def resize(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 px px"]:
        """Resize images in [0, 1] of any size, and crop or squash them, as the model was trained."""
        if images.shape[-2:] == (self.px, self.px):
            return images
        mode = transforms.InterpolationMode(self.interpolation if self.interpolation != "random" else "bicubic")
        size = [self.px, self.px] if self.squash else [self.px]
        images = transforms.resize(images, size, mode, antialias=True).clamp(0, 1)
        return transforms.center_crop(images, [self.px, self.px])

    def preprocess(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 px px"]:
        """Resize images in [0, 1] of any size and normalise them, as the model was trained."""
        return (self.resize(images) - self.mean) / self.std

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Global embedding and patch tokens of images in [0, 1]; differentiable."""
        return self.read_pixels(self.preprocess(images))

    def read_pixels(self, pixels: Float[Tensor, "b 3 px px"]) -> Features:
        """Global embedding and patch tokens of what `preprocess` returns; differentiable."""
        out = self.model.visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, output_fmt="NLC", stop_early=False
        )
        embedding, patches = out["image_features"], out["image_intermediates"][-1]  # [b, d], [b, n, d]
        if not isinstance(self.model.visual, TimmModel):
            return Features(self.proj(embedding), self.proj(patches))
        trunk = self.model.visual.trunk  # patches pass what follows its pooling; EVA projects by the trunk's own head
        return Features(embedding, self.model.visual.head(trunk.head(trunk.fc_norm(patches))))

    def tokens(self, images: Float[Tensor, "b 3 h w"], layer: int = -2) -> Float[Tensor, "b n width"]:
        """Patch tokens of images in [0, 1] as they leave a block of the tower, before the last norm; differentiable.

        They are transformers' `hidden_states[layer]` without the class token: what LLaVA reads of layer -2.

        Args:
            layer: 1 is the first block's output; -1 the last one's, which is followed by the final norm.

        Raises:
            ValueError: for a layer that the tower does not have.
        """
        if not 1 <= abs(layer) <= self.depth:
            raise ValueError(
                f"layer {layer}: the image tower has {self.depth} blocks; expected 1 to {self.depth}, or -1 (the last) "
                f"to -{self.depth}"
            )
        out = self.model.visual.forward_intermediates(
            self.preprocess(images), indices=[layer - 1 if layer > 0 else self.depth + layer], stop_early=True,
            normalize_intermediates=False, intermediates_only=True, output_fmt="NLC",
        )  # fmt: skip
        return out["image_intermediates"][0]

    def patch_embeddings(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Unit-length embeddings of the patches of images in [0, 1], to be compared with texts; differentiable.

        After MaskCLIP (Zhou et al., arXiv 2112.01071): in the attention that gathers an image's embedding, every patch
        attends to itself alone, so that of this attention only the path through the values is left. It is the last
        block's, whose residual paths and MLP stay, before the final norm and the projection; where a tower pools by
        attention, as SigLIP's, it is the pooling, each patch as if there were no other.
        """
        trunk = getattr(self.model.visual, "trunk", None)
        if getattr(trunk, "attn_pool", None) is not None:
            tokens = trunk.norm(self.tokens(images, -1))  # [b, n, width]
            pooled = trunk.head(trunk.fc_norm(trunk.attn_pool(tokens.flatten(0, 1)[:, None])))  # [b n, width]
            return F.normalize(self.model.visual.head(pooled).unflatten(0, tokens.shape[:2]).float(), dim=-1)
        with self._blocks()[-1].register_forward_pre_hook(_attend_to_self, with_kwargs=True):
            return F.normalize(self.features(images).patches.float(), dim=-1)

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit-length global embeddings of images in [0, 1], in float32; differentiable."""
        return F.normalize(self.features(images).embedding.float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """Unit-length embeddings of texts, in float32; see `all_finite`."""
        embeddings = self.model.encode_text(self.tokenizer(texts).to(self.mean.device)).float()
        return all_finite(F.normalize(embeddings, dim=-1), texts, "texts")

    def open_clip_state(self) -> dict[str, Tensor]:
        """The weights under open_clip's names, with LoRA merged, as `open_clip.create_model` loads them."""
        merged = merge_lora(copy.deepcopy(self))
        fuse_attention(merged.model.visual)
        state = {name: value.detach().cpu() for name, value in merged.model.state_dict().items()}
        if isinstance(merged.proj, nn.Linear):
            state["visual.proj"] = merged.proj.weight.detach().T.contiguous().cpu()
        return state


def _open_clip_name(name: str) -> tuple[str, str | None]:
    """open_clip's model and tag for an encoder's name; the model is `local-dir:FOLDER` for a folder."""
    if name in ENCODERS:
        return ENCODERS[name]
    if Path(name, "open_clip_config.json").is_file():
        return f"local-dir:{name}", None
    if name.partition(":")[0] in open_clip.list_models():
        model, _, tag = name.partition(":")
        return model, tag
    raise ValueError(
        f"unknown encoder {name!r}; {messages.expected(name, ENCODERS)}, an open_clip name as 'ViT-B-32:openai', "
        "a folder that holds open_clip_config.json or config.json and its weights, or a hub id as 'owner/name'"
    )


def fetch_folder(name: str) -> tuple[str, str | None]:
    """The local folder of a hub id (`owner/name` or `hf-hub:owner/name`) and the id; (name, None) for any other name.

    Weights in .bin are downloaded only where there are none in .safetensors.
    """
    repository = name.removeprefix("hf-hub:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or Path(name).exists():
        return name, None
    try:
        folder = fetch_repository(repository, ["*.json", "*.txt", "*.model", "*.safetensors"])
        if not any(Path(folder).glob("*.safetensors")):
            folder = fetch_repository(repository, ["*.bin"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"encoder {name!r}: no such folder, and {error}") from error
    if not any(Path(folder, file).exists() for file in ("open_clip_config.json", "config.json")):
        raise FileNotFoundError(f"encoder {name!r}: no open_clip_config.json, no config.json; {fetch_hint(repository)}")
    return folder, repository


def encoder_hint(model_name: str, tag: str | None) -> str:
    """For error messages: what to do where open_clip finds no weights or no tokenizer for a model."""
    if model_name.startswith("local-dir:"):
        return "expected open_clip_config.json, open_clip_model.safetensors and the tokenizer's files"
    weights = open_clip.get_pretrained_cfg(model_name, tag or "").get("hf_hub", "").rpartition("/")[0]
    if not weights:
        return f'fetch with network: python -c "import open_clip; open_clip.create_model{model_name, tag}"'
    tokenizer = open_clip.get_model_config(model_name)["text_cfg"].get("hf_tokenizer_name")
    return fetch_hint(*dict.fromkeys(filter(None, (weights, tokenizer))))


def _create(label: str, model_name: str, tag: str | None, weights: bool) -> tuple[nn.Module, object, dict]:
    """open_clip's model by its name, with random weights unless `weights`, its tokenizer and its configuration."""
    config = {"model_cfg": open_clip.get_model_config(model_name)}
    check_square(config["model_cfg"]["vision_cfg"], f"encoder {label!r}")
    safe = {"trust_remote_code": False} if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name") else {}
    options = {"pretrained": tag, "require_pretrained": True} if weights else {"load_weights": False}
    try:
        logging.disable(logging.ERROR)  # open_clip logs every step of its search, and the errors that are raised here
        model = open_clip.create_model(model_name, **options, pretrained_text=False)
        if tag and not weights:  # open_clip sets these only where it loads the weights
            preprocess = open_clip.get_pretrained_cfg(model_name, tag)
            preprocess = {key: preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")}
            set_model_preprocess_cfg(model, open_clip.get_model_preprocess_cfg(model) | preprocess)
        tokenizer = open_clip.get_tokenizer(model_name, **safe)
    except (RuntimeError, OSError) as error:
        hint = encoder_hint(model_name, tag)
        raise FileNotFoundError(f"encoder {label!r}: no weights for open_clip model {model_name!r}; {hint}") from error
    finally:
        logging.disable(logging.NOTSET)
    config["preprocess_cfg"] = open_clip.get_model_preprocess_cfg(model)
    return model, tokenizer, config


def _read_folder(
    label: str, folder: str, repository: str | None, weights: bool = True
) -> tuple[nn.Module, object, dict]:
    """The same three from a folder in either format; `repository` is the hub id of which it is a copy."""
    ours = Path(folder, "open_clip_config.json").exists() or not Path(folder, "config.json").exists()
    try:
        return read_open_clip(folder, weights) if ours else read_transformers(folder)
    except OSError as error:
        hint = fetch_hint(repository) if repository else encoder_hint(f"local-dir:{folder}", None) if ours else ""
        raise FileNotFoundError(f"encoder {label!r}: {error}; {hint}".removesuffix("; ")) from error
    except ValueError as error:
        raise ValueError(f"encoder {label!r}: {error}") from error


def describe_activation(name: str, folder: bool, config: dict) -> str:
    """Which activation an encoder computes with, which a file of weights does not say, and how to have the other."""
    quick = bool(config["model_cfg"].get("quick_gelu"))
    used, other = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
    model = name.partition(":")[0]
    twin = model.removesuffix("-quickgelu") if quick else f"{model}-quickgelu"
    if config["model_cfg"].get("custom_text"):  # as SigLIP's and EVA's, whose image tower is a timm model
        how = "this architecture has no other"
    elif folder and Path(name, "open_clip_config.json").exists():
        how = f'"quick_gelu": {str(not quick).lower()} in model_cfg of {name}/open_clip_config.json'
    elif folder:
        how = f'"hidden_act": "{"gelu" if quick else "quick_gelu"}" for both towers in {name}/config.json'
    else:
        how = f"{twin}:TAG@FILE" if twin in open_clip.list_models() else "there is no such model in open_clip"
    return f"computes with {used}, as its name says and its file cannot; for {other}: {how}"


def _split_name(name: str) -> tuple[str, str, str | None]:
    """Encoder, file and prefix of NAME, NAME@FILE or NAME@FILE@PREFIX; a path that exists is taken as it is."""
    if Path(name).exists():
        return name, "", None
    cuts = [i for i, letter in enumerate(name) if letter == "@"]
    for cut in cuts:
        for end in (len(name), *reversed(cuts)):
            if end > cut and Path(name[cut + 1 : end]).is_file():
                return name[:cut], name[cut + 1 : end], None if end == len(name) else name[end + 1 :]
    label, _, released = name.partition("@")
    return label, released, None


def load_encoder(name: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """Load a frozen encoder.

    Args:
        name: a key of `ENCODERS`; open_clip's `model:tag`; a folder in open_clip's format (open_clip_config.json), or
            of a transformers CLIP or SigLIP (config.json); or a hub id, `owner/name` or `hf-hub:owner/name`, of such
            a folder. With `NAME@FILE` the weights come from a released .pth for that architecture, with
            `NAME@FILE@PREFIX` those of one of its encoders: see `formats.load_released`. A line says which activation
            is then used, because such a file does not.

    Raises:
        ValueError: for an unknown name, listing the known ones; for settings and weights that do not fit, naming the
            first; for an image tower that is not a plain ViT.
        FileNotFoundError: where the weights are not on this machine and cannot be downloaded.
    """
    label, released, prefix = _split_name(str(name))
    source, repository = fetch_folder(label)
    if Path(source, "config.json").exists() and not Path(source, "open_clip_config.json").exists():
        model_name, tag = f"local-dir:{source}", None
    else:
        model_name, tag = _open_clip_name(source)
    schema, _, folder = model_name.partition(":")
    local = schema == "local-dir"
    load = partial(_read_folder, label, folder, repository) if local else partial(_create, label, model_name, tag)
    model, tokenizer, config = load(weights=not released)
    if released and not load_released(model, released, prefix):  # without a text tower: use the original model's
        model, tokenizer, config = load(weights=True)
        load_released(model, released, prefix)
    check_finite(model.state_dict(), f"encoder {label!r}")
    if released:
        print(f"{name}: {describe_activation(folder if local else model_name, local, config)}", flush=True)
    return Encoder(model, tokenizer, config).to(device)


def encoder_files(name: str) -> dict[str, Path]:
    """The files of weights that `load_encoder` reads, by name.

    Raises:
        ValueError, FileNotFoundError: as `load_encoder`.
    """
    label, released, _ = _split_name(name)
    source, _ = fetch_folder(label)
    tag = None
    if source in ENCODERS or not Path(source).is_dir():
        source, tag = _open_clip_name(source)
    if tag is None:
        files = weight_files(Path(source.removeprefix("local-dir:")))
    else:
        file = Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(source, tag)))
        files = {file.name: file}
    return files | ({f"@{Path(released).name}": Path(released)} if released else {})


@torch.no_grad()
def embed(encoder: nn.Module, images: UInt8[Tensor, "n 3 h w"], batch: int = 256) -> Float[Tensor, "n d"]:
    """Unit-length global embeddings of uint8 images, `batch` at a time, in float32 on the CPU; without gradient.

    `encoder` is an `Encoder`, or a module that has its `encode_image`. Embeddings are refused as by `all_finite`.
    """
    device = next(encoder.parameters()).device
    parts = [encoder.encode_image(part.to(device).float() / 255).cpu() for part in images.split(batch)]
    return all_finite(torch.cat(parts), range(len(images)), "images")


@torch.no_grad()
def embed_patches(
    read: Callable[[Tensor], Float[Tensor, "b n d"]],
    images: UInt8[Tensor, "m 3 h w"],
    device: torch.device,
    batch: int = 256,
) -> Float[Tensor, "m n d"]:
    """Patch tokens of uint8 images, `batch` at a time, in float32 on the CPU; without gradient.

    Args:
        read: images in [0, 1] -> tokens, as `Encoder.patch_embeddings` or `partial(encoder.tokens, layer=-1)`.
        device: of the encoder.

    Raises:
        ValueError: as by `all_finite`.
    """
    tokens = torch.cat([read(part.to(device).float() / 255).float().cpu() for part in images.split(batch)])
    all_finite(tokens.flatten(1), range(len(images)), "images")
    return tokens
