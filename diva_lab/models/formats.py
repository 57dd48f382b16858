"""The same CLIP in two formats, open_clip's and transformers': weights, configuration, tokenizer, image processor.

`PART_NAMES` pairs the names of the parts of a CLIP, and of a SigLIP, whose image tower is a timm model in open_clip.
Both directions use the same table. open_clip packs some matrices: q, k and v in one, projections transposed. They are
unpacked first, so that a name stands for the same matrix in both formats. `load_released` reads a third format, the
.pth files that others released.
"""

import json
import math
import re
import string
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import open_clip
import timm
import torch
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, SimpleTokenizer
from open_clip.model import convert_to_custom_text_state_dict, set_model_preprocess_cfg
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, normalizers
from torch import nn
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from diva_lab import messages
from diva_lab.models.weights import (
    State,
    check_known,
    check_tokenizer,
    load_transformers,
    load_weights,
    read_folder,
    read_json,
    read_weights,
    reading,
)

_QKV = {f"attn.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"}
_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_BLOCK |= _QKV | {"attn.out_proj": "self_attn.out_proj"}
_TIMM_BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp": "mlp", "attn.proj": "self_attn.out_proj"} | _QKV
_TEXT = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
    **{f"transformer.resblocks.#.{ours}": f"encoder.layers.#.{theirs}" for ours, theirs in _BLOCK.items()},
}
PART_NAMES: dict[str, dict[str, str]] = {  # transformers' model_type -> open_clip's part -> transformers' part
    "clip": {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.ln_pre": "vision_model.pre_layrnorm",  # sic
        "visual.ln_post": "vision_model.post_layernorm",
        **{f"visual.transformer.resblocks.#.{o}": f"vision_model.encoder.layers.#.{t}" for o, t in _BLOCK.items()},
        "visual.proj": "visual_projection.weight",
        **{ours: f"text_model.{theirs}" for ours, theirs in _TEXT.items()},
        "text_projection": "text_projection.weight",
        "logit_scale": "logit_scale",
    },
    "siglip": {
        "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
        **{f"visual.trunk.blocks.#.{o}": f"vision_model.encoder.layers.#.{t}" for o, t in _TIMM_BLOCK.items()},
        "visual.trunk.norm": "vision_model.post_layernorm",
        "visual.trunk.attn_pool.latent": "vision_model.head.probe",
        "visual.trunk.attn_pool.in_proj_weight": "vision_model.head.attention.in_proj_weight",
        "visual.trunk.attn_pool.in_proj_bias": "vision_model.head.attention.in_proj_bias",
        "visual.trunk.attn_pool.proj": "vision_model.head.attention.out_proj",
        "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
        "visual.trunk.attn_pool.mlp": "vision_model.head.mlp",
        **{f"text.{ours}": f"text_model.{theirs}" for ours, theirs in _TEXT.items()},
        "text.text_projection": "text_model.head",
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
    },
}
_PACKED = re.compile(r"(.*\battn\.)(?:in_proj_|qkv\.)(weight|bias)")  # q, k and v in one matrix
_POOL = re.compile(r"(.*attn_pool\.)(q|kv)\.(weight|bias)")  # q alone, k and v in one matrix
_TRANSPOSED = ("visual.proj", "text_projection")


def _unpack(state: State) -> State:
    """open_clip's weights with q, k and v apart, but in one for attention pooling, and projections as matrices."""
    out: State = {}
    for name, value in state.items():
        if packed := _PACKED.fullmatch(name):
            out |= {f"{packed[1]}{part}_proj.{packed[2]}": x for part, x in zip("qkv", value.chunk(3), strict=True)}
        elif pool := _POOL.fullmatch(name):
            parts = [state[f"{pool[1]}{part}.{pool[3]}"] for part in ("q", "kv")]
            out[f"{pool[1]}in_proj_{pool[3]}"] = torch.cat(parts)
        else:
            out[name] = value.T if name in _TRANSPOSED else value
    return out


def _pack(state: State, names: list[str]) -> State:
    """The inverse of `_unpack`: weights under open_clip's `names`."""
    out: State = {}
    for name in names:
        if packed := _PACKED.fullmatch(name):
            out[name] = torch.cat([state[f"{packed[1]}{part}_proj.{packed[2]}"] for part in "qkv"])
        elif pool := _POOL.fullmatch(name):
            q, *kv = state[f"{pool[1]}in_proj_{pool[3]}"].chunk(3)
            out[name] = q if pool[2] == "q" else torch.cat(kv)
        else:
            out[name] = state[name].T if name in _TRANSPOSED else state[name]
    return out


def _rename(name: str, table: dict[str, str]) -> str:
    """`name` with its first part replaced as `table` says; the number of its block stays.

    Raises:
        KeyError: where the table has no such part.
    """
    number = re.search(r"\.(\d+)\.", name)
    general = re.sub(r"\.\d+\.", ".#.", name, count=1)
    for part, other in table.items():
        if general == part or general.startswith(f"{part}."):
            return (other + general[len(part) :]).replace("#", number[1] if number else "#")
    raise KeyError(name)


def convert(state: State, kind: str, target: State) -> State:
    """Convert weights from one format to the other.

    Args:
        state: of an open_clip model or of a transformers model.
        kind: a key of `PART_NAMES`.
        target: the state of a model in the other format; only its names and shapes are used.

    Raises:
        ValueError: where a weight has no counterpart or another size; names it.
    """
    table = PART_NAMES[kind]
    try:
        if "vision_model.embeddings.patch_embedding.weight" in state:  # transformers -> open_clip
            inverse = {theirs: ours for ours, theirs in table.items()}
            renamed = {_rename(name, inverse): value for name, value in state.items()}
            expected, converted = _unpack(target), _pack(renamed, list(target))
        else:
            renamed = converted = {_rename(name, table): value for name, value in _unpack(state).items()}
            expected = target
        if unexpected := renamed.keys() - expected.keys():
            raise KeyError(f"unexpected {min(unexpected)}")
        return {name: converted[name].reshape(like.shape).contiguous() for name, like in target.items()}
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"these weights are not those of a {kind} of these sizes: {error}") from error


def _split_by_prefix(state: State, names: set[str]) -> dict[str, State]:
    """Prefix -> weights without it, for each encoder in a released file.

    Args:
        names: of the open_clip model's weights.
    """
    anchor = next(name for name in ("visual.trunk.patch_embed.proj.weight", "visual.conv1.weight") if name in names)
    numbers = ("input_resolution", "context_length", "vocab_size")  # OpenAI's files hold them beside the weights
    prefixes = [name.removesuffix(anchor) for name in state if f".{name}".endswith(f".{anchor}")]
    parts: dict[str, State] = {prefix: {} for prefix in prefixes}
    for name, value in state.items():
        prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if prefix is not None and name.removeprefix(prefix) not in numbers:
            parts[prefix][name.removeprefix(prefix)] = value
    return parts


def load_released(model: nn.Module, path: str | Path, prefix: str | None = None) -> bool:
    """Load the weights of a released .pth, such as DIVA's, into an open_clip model, in place.

    The file holds the visual weights, with or without the text tower. Their names are OpenAI's, which open_clip shares
    (`visual.conv1...`), or those of a timm tower (`visual.trunk...`), behind any prefix: DIVA saves its whole trainer,
    where they begin with `class_model.model.`. Names without the prefix do not belong to the encoder. Keys of nested
    dicts are parts of the prefix, as `state_dict.`.

    Args:
        prefix: of the encoder to load, where the file holds several.

    Returns:
        Whether the file holds the text tower; if not, the model keeps its own.

    Raises:
        ValueError: for a file that holds no such encoder, several of them, or one of other sizes; names the first
            difference.
        FileNotFoundError: where there is no such file.
    """
    weights, whole = model.state_dict(), read_weights(path)
    encoders = _split_by_prefix(whole, set(weights))
    if not encoders:
        first = ", ".join(list(whole)[:3])
        raise ValueError(f"{path}: no image tower of this architecture behind any prefix; it holds {first} ...")
    chosen = [name for name in encoders if prefix in (None, name)]
    if len(chosen) != 1:
        known = " or ".join(f"NAME@{path}@{name}" for name in encoders)
        raise ValueError(f"{path}: holds {len(encoders)} encoders of this architecture; choose one by {known}")
    name, state = chosen[0], encoders[chosen[0]]
    text = any(not key.startswith(("visual.", "logit_")) for key in state)
    names = {key for key in weights if text or key.startswith("visual.") or key in state}
    load_weights(model, state, f"{path}@{name}" if name else path, names)
    return text


def _timm_name(vision: PretrainedConfig) -> str:
    """The name of the timm model that has the sizes of a SigLIP image tower.

    Raises:
        ValueError: where timm has none; names the sizes.
    """
    size, patch = vision.image_size, vision.patch_size
    names = [name for name in timm.list_models(f"*patch{patch}_siglip_{size}") if "gap" not in name]
    sizes = (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size)
    for name in names:
        with torch.device("meta"):
            trunk = timm.create_model(name)
        mlp = trunk.blocks[0].mlp.fc1
        if (trunk.embed_dim, len(trunk.blocks), trunk.blocks[0].attn.num_heads, mlp.out_features) == sizes:
            return name
    raise ValueError(
        f"timm has no SigLIP of {size} px, patch {patch} and (width, layers, heads, MLP) {sizes}; it has {names}"
    )


_COMPUTED = {  # model_type -> the hidden_act and layer_norm_eps that open_clip can compute with
    "clip": (("quick_gelu", "gelu"), (1e-5,)),
    "siglip": (("gelu", "gelu_pytorch_tanh"), (1e-6,)),
}


def open_clip_config(config: PretrainedConfig) -> dict:
    """open_clip's `model_cfg` for the configuration of a transformers CLIP or SigLIP.

    Raises:
        ValueError: for another kind of model, and for an activation or a norm that open_clip does not have.
    """
    if config.model_type not in PART_NAMES:
        raise ValueError(f"model_type {config.model_type!r}; expected {' or '.join(PART_NAMES)}")
    text, vision = config.text_config, config.vision_config
    acts, eps = _COMPUTED[config.model_type]
    for name, part in (("text_config", text), ("vision_config", vision)):
        for key, value, known in (("hidden_act", part.hidden_act, acts), ("layer_norm_eps", part.layer_norm_eps, eps)):
            if value not in known:
                raise ValueError(f"{name}.{key} = {value!r}; expected {' or '.join(map(str, known))}")
    if config.model_type == "clip" and text.hidden_act != vision.hidden_act:
        raise ValueError(f"hidden_act = {text.hidden_act!r} and {vision.hidden_act!r}; expected one for both towers")
    text_cfg = {
        "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
        "heads": text.num_attention_heads, "layers": text.num_hidden_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size, "hf_tokenizer_name": "tokenizer",
    }  # fmt: skip
    if config.model_type == "clip":
        vision_cfg = {
            "image_size": vision.image_size, "layers": vision.num_hidden_layers, "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads, "patch_size": vision.patch_size,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        }  # fmt: skip
        quick = vision.hidden_act == "quick_gelu"
        return {
            "embed_dim": config.projection_dim, "quick_gelu": quick, "vision_cfg": vision_cfg, "text_cfg": text_cfg,
        }  # fmt: skip
    text_cfg |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    text_cfg["tokenizer_kwargs"] = {"clean": "canonicalize"}
    if text.hidden_act == "gelu_pytorch_tanh":
        text_cfg["act_kwargs"] = {"approximate": "tanh"}
    vision_cfg = {"image_size": vision.image_size, "timm_model_name": _timm_name(vision)}
    vision_cfg |= {"timm_pool": "map", "timm_proj": "none"}
    return {
        "embed_dim": text.projection_size, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
    }  # fmt: skip


def build_model(config: dict) -> nn.Module:
    """An open_clip model with random weights, from its complete configuration, as its folders hold it."""
    model_cfg = {name: value for name, value in config["model_cfg"].items() if name != "custom_text"}
    model = (CustomTextCLIP if config["model_cfg"].get("custom_text") else CLIP)(**model_cfg).eval()
    return use_activation(model, config)


def use_activation(model: nn.Module, config: dict) -> nn.Module:
    """Make a timm tower approximate GELU by tanh where `config` has `timm_gelu: tanh`, in place.

    transformers' SigLIP does so. open_clip has no such setting: this entry is our own, and open_clip ignores it.
    """
    if config.get("timm_gelu") == "tanh":
        for module in model.visual.trunk.modules():
            if isinstance(module, nn.GELU):
                module.approximate = "tanh"
    return model


_ANY = {
    "embed_dim", "init_logit_scale", "vision_cfg.image_size", "vision_cfg.patch_dropout", "text_cfg.context_length",
    "text_cfg.vocab_size", "text_cfg.width", "text_cfg.heads", "text_cfg.layers", "text_cfg.mlp_ratio",
    "text_cfg.hf_tokenizer_name", "text_cfg.tokenizer_kwargs",
}  # fmt: skip
_FREE = {  # kind -> keys of open_clip's `model_cfg` that may have any value: sizes, and settings of training alone
    "clip": _ANY | {
        "quick_gelu", "vision_cfg.layers", "vision_cfg.width", "vision_cfg.head_width", "vision_cfg.patch_size",
        "vision_cfg.mlp_ratio",
    },
    "siglip": _ANY | {
        "init_logit_bias", "text_cfg.act_kwargs", "vision_cfg.timm_model_name", "vision_cfg.timm_model_pretrained",
        "vision_cfg.timm_drop", "vision_cfg.timm_drop_path",
    },
}  # fmt: skip
_REQUIRED = {  # kind -> the values of other keys, where they differ from open_clip's defaults
    "clip": {},
    "siglip": {
        "custom_text": True, "vision_cfg.timm_pool": "map", "vision_cfg.timm_proj": "none",
        "text_cfg.no_causal_mask": True, "text_cfg.proj_bias": True, "text_cfg.pool_type": "last",
        "text_cfg.norm_kwargs": {"eps": 1e-6},
    },
}  # fmt: skip


def _flatten(model_cfg: dict) -> dict:
    """open_clip's `model_cfg` with keys such as `text_cfg.width`, and with the defaults of its towers."""
    towers = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
    flat = {key: value for key, value in model_cfg.items() if key not in towers}
    for name, tower in towers.items():
        flat |= {f"{name}.{key}": value for key, value in asdict(tower(**model_cfg[name])).items()}
    return flat


def transformers_kind(config: dict) -> str:
    """The key of `PART_NAMES` whose transformers model computes the same as an open_clip model of this configuration.

    Raises:
        NotImplementedError: where there is none; names the first setting that transformers does not have.
    """
    settings = _flatten(config["model_cfg"])
    kind = "siglip" if "siglip" in (settings["vision_cfg.timm_model_name"] or "") else "clip"
    expected = _flatten({"vision_cfg": {}, "text_cfg": {}}) | _REQUIRED[kind]
    keys = (settings.keys() | expected.keys()) - _FREE[kind]
    unsupported = {key for key in keys if (settings.get(key) or None) != (expected.get(key) or None)}
    unsupported |= {key for key in ("vision_cfg.image_size", "vision_cfg.layers") if not isinstance(settings[key], int)}
    if kind == "siglip" and settings.get("init_logit_bias") is None:
        unsupported.add("init_logit_bias")
    if (settings["text_cfg.tokenizer_kwargs"] or {}) not in ({}, {"clean": "canonicalize"}):
        unsupported.add("text_cfg.tokenizer_kwargs")
    if unsupported:
        key = min(unsupported)
        raise NotImplementedError(f"transformers' {kind} does not support open_clip's {key} = {settings.get(key)!r}")
    return kind


def transformers_config(model: nn.Module, config: dict, tokenizer: object) -> PretrainedConfig:
    """transformers' configuration for an open_clip `model`, its complete configuration and its tokenizer.

    Raises:
        NotImplementedError: for an architecture that transformers does not have: see `transformers_kind`.
    """
    kind, model_cfg = transformers_kind(config), config["model_cfg"]
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    special = {"bos_token_id": getattr(inner, "bos_token_id", None) or getattr(inner, "sot_token_id", None)}
    special["eos_token_id"] = getattr(inner, "eos_token_id", None) or getattr(inner, "eot_token_id", None)
    special["pad_token_id"] = getattr(inner, "pad_token_id", None) or 0
    text_config = {
        "vocab_size": text["vocab_size"], "hidden_size": text["width"], "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"], "intermediate_size": int(text.get("mlp_ratio", 4.0) * text["width"]),
        "max_position_embeddings": text["context_length"], **special,
    }  # fmt: skip
    if kind == "clip":
        width = vision["width"]
        act = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
        vision_config = {
            "image_size": vision["image_size"], "patch_size": vision["patch_size"], "hidden_size": width,
            "num_hidden_layers": vision["layers"], "num_attention_heads": width // vision.get("head_width", 64),
            "intermediate_size": int(vision.get("mlp_ratio", 4.0) * width), "hidden_act": act,
            "projection_dim": model_cfg["embed_dim"],
        }  # fmt: skip
        text_config |= {"hidden_act": act, "projection_dim": model_cfg["embed_dim"]}
        return CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=model_cfg["embed_dim"])
    trunk = model.visual.trunk
    tanh = (text.get("act_kwargs") or {}).get("approximate") == "tanh"
    text_config |= {"hidden_act": "gelu_pytorch_tanh" if tanh else "gelu", "projection_size": model_cfg["embed_dim"]}
    vision_config = {
        "image_size": vision["image_size"], "patch_size": trunk.patch_embed.patch_size[0],
        "hidden_size": trunk.embed_dim, "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": trunk.blocks[0].attn.num_heads,
        "intermediate_size": trunk.blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu_pytorch_tanh" if config.get("timm_gelu") == "tanh" else "gelu",
    }  # fmt: skip
    return SiglipConfig(text_config=text_config, vision_config=vision_config)


_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"}
_MODEL_KEYS |= {"nonscalar_logit_scale", "custom_text"}
_OPEN_CLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")


def _open_clip_config(folder: str | Path) -> dict:
    """The configuration of an open_clip folder, if it has only settings that are known and run no code.

    Raises:
        ValueError: names the first other one.
    """
    path = Path(folder, "open_clip_config.json")
    config = read_json(path)
    model_cfg = check_known(config.get("model_cfg"), _MODEL_KEYS, f"{path}, model_cfg")
    towers = {}
    for name, tower in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        known = [field.name for field in fields(tower)]
        towers[name] = check_known(model_cfg.get(name), known, f"{path}, model_cfg.{name}")
    options = towers["text_cfg"].get("tokenizer_kwargs") or {}
    check_known(options, ("clean", "strip_sep_token", "language"), f"{path}, text_cfg.tokenizer_kwargs")
    configs = map(open_clip.get_model_config, open_clip.list_models())
    texts = ["", *sorted({known["text_cfg"].get("hf_model_name") or "" for known in configs} - {""})]
    trunk, text = towers["vision_cfg"].get("timm_model_name"), towers["text_cfg"].get("hf_model_name") or ""
    if trunk and not timm.is_model(str(trunk)):  # timm would fetch what a name as hf-hub:owner/name says
        raise ValueError(f"{path}: timm_model_name = {trunk!r}; expected a name that timm.list_models() has")
    if text not in texts:
        raise ValueError(f"{path}: hf_model_name = {text!r}; {messages.expected(text, texts[1:])}")
    preprocess = config.get("preprocess_cfg") or {}
    _check_colours(preprocess.get("mean", [0] * 3), preprocess.get("std", [1] * 3), path)
    check_square(towers["vision_cfg"], path)
    return config


def check_square(vision_cfg: dict, where: str | Path) -> None:
    """Raise ValueError for an image tower whose images have many sizes (NaFlex) or are not square."""
    name, size = vision_cfg.get("timm_model_name") or "", vision_cfg.get("image_size")
    if "naflex" in name:
        raise ValueError(f"{where}: {name!r} is a NaFlex model, of images of many sizes; expected one square size")
    if isinstance(size, Sequence) and len(set(size)) != 1:
        raise ValueError(f"{where}: image_size = {size!r} is not square; expected one number of pixels for both sides")


def _check_colours(mean: object, std: object, path: str | Path) -> None:
    """Raise ValueError unless both are three finite numbers, those of `std` above 0."""
    for name, values, least in (("mean", mean, -math.inf), ("std", std, 0)):
        numbers = values if isinstance(values, Sequence) and len(values) == 3 else [None]
        if not all(isinstance(x, int | float) and least < x < math.inf for x in numbers):
            raise ValueError(f"{path}: {name} = {values!r}; expected a number for red, green and blue, std above 0")


def read_open_clip(folder: str | Path, weights: bool = True) -> tuple[nn.Module, object, dict]:
    """Read an open_clip folder.

    Args:
        weights: whether to read them; else the model has random ones.

    Returns:
        An open_clip model, its tokenizer, and its complete configuration.

    Raises:
        ValueError: for settings and weights that do not belong to such a model; names the first.
        OSError: for an incomplete folder.
    """
    config = _open_clip_config(folder)
    text_cfg = config["model_cfg"]["text_cfg"]
    name = f"local-dir:{folder}"
    with reading(folder):
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
    if weights:
        state = read_folder(folder, _OPEN_CLIP_STEMS)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)  # the text tower's names as they were at first
        load_weights(model, state, folder)
    safe = {}
    if text_cfg.get("hf_tokenizer_name"):  # else OpenAI's, which open_clip brings
        _check_beside(folder, "tokenizer")
        safe["trust_remote_code"] = False
    with reading(folder):
        tokenizer = open_clip.get_tokenizer(name, **safe)
    check_tokenizer(tokenizer, text_cfg.get("vocab_size", CLIPTextCfg.vocab_size), folder)
    config.setdefault("preprocess_cfg", open_clip.get_model_preprocess_cfg(model))  # open_clip's defaults
    return use_activation(model, config), tokenizer, config


_KINDS = {"clip": CLIPModel, "siglip": SiglipModel}  # model_type of a config.json -> class
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, which image processors use
_BESIDE = {  # what a transformers folder must hold beside the weights -> the files, any of which will do
    "image processor": ("preprocessor_config.json", "processor_config.json"),
    "tokenizer": (
        "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    ),
}  # fmt: skip


def _check_beside(folder: str | Path, part: str) -> None:
    """Raise FileNotFoundError where a folder has none of the files of a part in `_BESIDE`."""
    if not any(Path(folder, file).exists() for file in _BESIDE[part]):
        raise FileNotFoundError(
            f"{folder} has no {part}: none of {', '.join(_BESIDE[part])}; copy it from the model that was tuned"
        )


def _preprocessing(folder: str | Path, px: int) -> dict:
    """open_clip's `preprocess_cfg` for the image processor of a transformers folder whose model takes px x px pixels.

    Raises:
        ValueError: for a way to resize that open_clip does not have, and for another size.
    """
    with reading(folder):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if processor.resample not in _RESAMPLE:
        numbers = " or ".join(f"{number} ({name})" for number, name in _RESAMPLE.items())
        raise ValueError(f"{folder}: image processor with resample = {processor.resample}; expected {numbers}")
    size = dict(processor.size)
    squash, crop = size.keys() == {"height", "width"}, dict(processor.crop_size) if processor.do_center_crop else {}
    if not squash and (size.keys() != {"shortest_edge"} or not crop):
        raise ValueError(
            f"{folder}: image processor with size = {size} and crop_size = {crop}; expected height and width, or "
            "shortest_edge and a crop"
        )
    if wrong := {*size.values(), *crop.values()} - {px}:
        raise ValueError(
            f"{folder}: image processor that makes {min(wrong)} px of a side; expected the model's {px} px"
        )
    _check_colours(processor.image_mean, processor.image_std, folder)
    return {
        "size": px, "mean": tuple(processor.image_mean), "std": tuple(processor.image_std),
        "interpolation": _RESAMPLE[processor.resample],
        "resize_mode": "squash" if squash else "shortest",
    }  # fmt: skip


def read_transformers(folder: str | Path) -> tuple[nn.Module, HFTokenizer, dict]:
    """Read a transformers folder of a CLIP or SigLIP.

    Returns:
        An open_clip model, its tokenizer, and open_clip's complete configuration.

    Raises:
        ValueError: for another kind of model.
        OSError: for an incomplete folder. Trainers that save the model alone, such as DCR's, leave out the image
            processor and the tokenizer; both are those of the model that was tuned.
    """
    config, path = read_json(Path(folder, "config.json")), f"{folder}/config.json"
    kind, vision = config.get("model_type"), config.get("vision_config")
    if kind not in tuple(_KINDS):  # a list has no hash
        naflex = " (SigLIP 2 NaFlex; a SigLIP 2 of one size is a siglip)" if kind == "siglip2" else ""
        raise ValueError(f"{path}: model_type = {kind!r}{naflex}; expected {' or '.join(_KINDS)}")
    check_square(vision if isinstance(vision, dict) else {}, path)
    for part in _BESIDE:
        _check_beside(folder, part)
    source = load_transformers(_KINDS[kind], folder)
    with reading(path):
        model_cfg = open_clip_config(source.config)
    preprocess = _preprocessing(folder, model_cfg["vision_cfg"]["image_size"])
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    if kind == "siglip" and source.config.vision_config.hidden_act == "gelu_pytorch_tanh":
        config["timm_gelu"] = "tanh"
    model = build_model(config)
    model.load_state_dict(convert(source.state_dict(), kind, model.state_dict()))
    set_model_preprocess_cfg(model, preprocess)
    text_cfg = model_cfg["text_cfg"]
    options = text_cfg.get("tokenizer_kwargs", {}) | {"trust_remote_code": False}
    with reading(folder):
        tokenizer = HFTokenizer(str(folder), text_cfg["context_length"], **options)
    check_tokenizer(tokenizer, text_cfg["vocab_size"], folder)
    return model, tokenizer, config


def transformers_tokenizer(tokenizer: HFTokenizer | SimpleTokenizer) -> PreTrainedTokenizerBase:
    """The transformers tokenizer that an open_clip tokenizer wraps, or that equals OpenAI's `SimpleTokenizer`."""
    if isinstance(tokenizer, SimpleTokenizer):
        special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        vocabulary = {special.get(word, word): number for word, number in tokenizer.encoder.items()}
        return CLIPTokenizer(vocabulary, list(tokenizer.bpe_ranks), model_max_length=tokenizer.context_length)
    return tokenizer.tokenizer


def _cleaning_tokenizer(tokenizer: HFTokenizer | SimpleTokenizer) -> PreTrainedTokenizerBase:
    """A transformers tokenizer that cleans texts as open_clip does with `clean: canonicalize` before it tokenizes them.

    Characters are composed (NFC), an underscore becomes a space, punctuation and curly quotes are removed, letters
    become lower case, white space is collapsed. open_clip also repairs broken Unicode (ftfy) and HTML entities, which
    no tokenizer file can express. The class is the general one: T5's, which SigLIP uses, would rebuild its normaliser.
    """
    inner = transformers_tokenizer(tokenizer)
    if not hasattr(inner, "backend_tokenizer"):  # the SentencePiece class of transformers' SigLIP cleans texts itself
        return inner
    backend = Tokenizer.from_str(inner.backend_tokenizer.to_str())
    marks = Regex(f"[{re.escape(string.punctuation)}\u02bc\u2018-\u201f]")  # ftfy makes straight quotes of the last
    steps = [normalizers.NFC(), normalizers.Replace("_", " "), normalizers.Replace(marks, ""), normalizers.Lowercase()]
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=tokenizer.context_length, padding_side=inner.padding_side,
        model_input_names=["input_ids"], **inner.special_tokens_map,
    )  # fmt: skip


def write_open_clip(folder: Path, state: State, config: dict, tokenizer: object) -> Path:
    """Write an open_clip folder, for open_clip's `local-dir:` and for `load_encoder`; return it.

    Args:
        state, config, tokenizer: open_clip's weights, complete configuration and tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    text_cfg = {**config["model_cfg"]["text_cfg"], "hf_tokenizer_name": "tokenizer"}
    config = config | {"model_cfg": {**config["model_cfg"], "text_cfg": text_cfg}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    transformers_tokenizer(tokenizer).save_pretrained(folder)
    return folder


def _image_processor(kind: str, config: dict) -> CLIPImageProcessor | SiglipImageProcessor:
    """The transformers image processor that resizes and normalises as `config` says.

    Raises:
        NotImplementedError: for a SigLIP that crops images instead of squashing them.
    """
    px, preprocess = config["model_cfg"]["vision_cfg"]["image_size"], config["preprocess_cfg"]
    options = {"image_mean": list(preprocess["mean"]), "image_std": list(preprocess["std"])}
    options["resample"] = 2 if preprocess.get("interpolation") == "bilinear" else 3
    squash = preprocess.get("resize_mode") == "squash"
    size = {"height": px, "width": px} if squash else {"shortest_edge": px}
    if kind == "clip":
        return CLIPImageProcessor(size=size, crop_size=px, do_center_crop=not squash, **options)
    if not squash:
        mode = preprocess.get("resize_mode")
        raise NotImplementedError(f"transformers' siglip squashes images; open_clip's resize_mode is {mode!r}")
    return SiglipImageProcessor(size=size, **options)


def transformers_parts(
    state: State, config: dict, tokenizer: object
) -> tuple[CLIPModel | SiglipModel, CLIPImageProcessor | SiglipImageProcessor]:
    """A transformers model and its image processor, from open_clip's weights, complete configuration and tokenizer.

    Raises:
        NotImplementedError: for an architecture that transformers' CLIP and SigLIP do not have.
    """
    kind = transformers_kind(config)
    processor = _image_processor(kind, config)
    with torch.device("meta"):
        architecture = transformers_config(build_model(config), config, tokenizer)
        model = (CLIPModel if kind == "clip" else SiglipModel)(architecture)
    model.load_state_dict(convert(state, kind, model.state_dict()), assign=True)
    return model, processor


def write_transformers(folder: Path, state: State, config: dict, tokenizer: object) -> Path:
    """Write a transformers folder from the same arguments: weights, configuration, image processor and tokenizer.

    Raises:
        NotImplementedError: as `transformers_parts`. Nothing is written.
    """
    model, processor = transformers_parts(state, config, tokenizer)
    clean = (config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}).get("clean") == "canonicalize"
    folder.mkdir(parents=True, exist_ok=True)
    for part in (model, processor, (_cleaning_tokenizer if clean else transformers_tokenizer)(tokenizer)):
        part.save_pretrained(folder)
    return folder
