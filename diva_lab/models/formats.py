"""One CLIP, two homes: the same weights under open_clip's names and under transformers', text tower included.

`NAMES` pairs the parts of both for CLIP and for SigLIP, whose image tower is a timm model in open_clip; the two
directions are read from the same table. What open_clip packs (q, k and v in one matrix, a projection as a transposed
parameter) is unpacked first, so that a name stands for the same matrix in both.
"""

import json
import pickle
import re
import string
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, SimpleTokenizer
from open_clip.model import set_model_preprocess_cfg
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
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

State = dict[str, Tensor]
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
_PACKED = re.compile(r"(.*\battn\.)(?:in_proj_|qkv\.)(weight|bias)")  # q, k and v in one
_POOL = re.compile(r"(.*attn_pool\.)(q|kv)\.(weight|bias)")  # q apart from k and v
_TRANSPOSED = ("visual.proj", "text_projection")


def _unpack(state: State) -> State:
    """open_clip's weights with q, k and v apart, those of attention pooling together, and projections as matrices."""
    out: State = {}
    for name, value in state.items():
        if packed := _PACKED.fullmatch(name):
            out |= {f"{packed[1]}{part}_proj.{packed[2]}": x for part, x in zip("qkv", value.chunk(3), strict=True)}
        elif pool := _POOL.fullmatch(name):
            out[f"{pool[1]}in_proj_{pool[3]}"] = torch.cat(
                [state[f"{pool[1]}{part}.{pool[3]}"] for part in ("q", "kv")]
            )
        else:
            out[name] = value.T if name in _TRANSPOSED else value
    return out


def _pack(state: State, names: list[str]) -> State:
    """The inverse of `_unpack`: open_clip's weights under open_clip's `names`."""
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
    """`name` with the part that `table` knows replaced; block numbers stay.

    Raises:
        KeyError: where the table knows no part of it.
    """
    number = re.search(r"\.(\d+)\.", name)
    general = re.sub(r"\.\d+\.", ".#.", name, count=1)
    for part, other in table.items():
        if general == part or general.startswith(f"{part}."):
            return (other + general[len(part) :]).replace("#", number[1] if number else "#")
    raise KeyError(name)


def convert(state: State, kind: str, target: State) -> State:
    """Weights of one home under the names and in the shapes of the other.

    Args:
        state: of an open_clip model or of a transformers model.
        kind: a key of `PART_NAMES`.
        target: the state of the model to be filled, in the other home; only names and shapes are read.

    Raises:
        ValueError: where a weight has no counterpart or another size; names it.
    """
    table = PART_NAMES[kind]
    try:
        if "vision_model.embeddings.patch_embedding.weight" in state:
            inverse = {theirs: ours for ours, theirs in table.items()}
            named = {_rename(name, inverse): value for name, value in state.items()}
            known, found = _unpack(target), _pack(named, list(target))
        else:
            named = found = {_rename(name, table): value for name, value in _unpack(state).items()}
            known = target
        if unexpected := named.keys() - known.keys():
            raise KeyError(f"unexpected {min(unexpected)}")
        return {name: found[name].reshape(like.shape).contiguous() for name, like in target.items()}
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"these weights are not those of a {kind} of these sizes: {error}") from error


def load_released(model: nn.Module, path: str | Path) -> bool:
    """Fill an open_clip model, in place, from a .pth that somebody released, as DIVA's: visual weights, text if there.

    The names are OpenAI's or open_clip's (`visual.conv1...`, the same in both) or those of a timm tower
    (`visual.trunk...`), behind any prefix: DIVA saves its whole trainer, so they carry `class_model.model.`, and what
    has no such prefix is not the encoder's.

    Returns:
        Whether the text tower was there too; if not, it is left as it is.

    Raises:
        ValueError: for a file that holds no such encoder, or one of other sizes; names the first difference.
        FileNotFoundError: where there is no such file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a file of weights that torch.load(weights_only=True) takes: {error}") from error
    state = state.get("state_dict", state)
    own = model.state_dict()
    anchor = next(name for name in ("visual.trunk.patch_embed.proj.weight", "visual.conv1.weight") if name in own)
    prefix = next((name.removesuffix(anchor) for name in state if name.endswith(anchor)), None)
    if prefix is None:
        raise ValueError(f"{path}: no {anchor} behind any prefix; it holds {', '.join(list(state)[:3])} ...")
    facts = ("input_resolution", "context_length", "vocab_size")  # OpenAI's files hold them beside the weights
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    state = {name: value for name, value in state.items() if name not in facts}
    text = any("token_embedding" in name for name in state)
    wanted = {name for name in own if text or name.startswith("visual.")}
    for kind, names in (("missing", wanted - state.keys()), ("unexpected", state.keys() - own.keys())):
        if names:
            raise ValueError(f"{path}: {len(names)} weights {kind}, as {prefix}{min(names)}; of another backbone?")
    for name in sorted(wanted):
        if state[name].shape != own[name].shape:
            raise ValueError(f"{path}: {prefix}{name} is {[*state[name].shape]}, expected {[*own[name].shape]}")
    model.load_state_dict(state, strict=False)
    return text


def _timm_name(vision: PretrainedConfig) -> str:
    """The timm model that has the sizes of a SigLIP image tower.

    Raises:
        ValueError: where timm has none; says what was sought.
    """
    size, patch = vision.image_size, vision.patch_size
    names = [name for name in timm.list_models(f"*patch{patch}_siglip_{size}") if "gap" not in name]
    wanted = (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size)
    for name in names:
        with torch.device("meta"):
            trunk = timm.create_model(name)
        mlp = trunk.blocks[0].mlp.fc1
        if (trunk.embed_dim, len(trunk.blocks), trunk.blocks[0].attn.num_heads, mlp.out_features) == wanted:
            return name
    raise ValueError(
        f"timm has no SigLIP of {size} px, patch {patch} and (width, layers, heads, MLP) {wanted}: {names}"
    )


def open_clip_config(config: PretrainedConfig) -> dict:
    """open_clip's `model_cfg` for a transformers CLIP or SigLIP.

    Raises:
        ValueError: for another kind of model.
    """
    if config.model_type not in PART_NAMES:
        raise ValueError(f"model_type {config.model_type!r}; expected {' or '.join(PART_NAMES)}")
    text, vision = config.text_config, config.vision_config
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
    """An open_clip model by its whole configuration, of random weights."""
    model_cfg = {name: value for name, value in config["model_cfg"].items() if name != "custom_text"}
    model = (CustomTextCLIP if config["model_cfg"].get("custom_text") else CLIP)(**model_cfg).eval()
    return use_activation(model, config)


def use_activation(model: nn.Module, config: dict) -> nn.Module:
    """Let a timm tower approximate GELU by tanh where `config` has `timm_gelu: tanh`, in place.

    transformers' SigLIP does so, and open_clip has no word for it: only what is read by diva_lab heeds the entry.
    """
    if config.get("timm_gelu") == "tanh":
        for module in model.visual.trunk.modules():
            if isinstance(module, nn.GELU):
                module.approximate = "tanh"
    return model


_BOTH = {
    "embed_dim", "init_logit_scale", "vision_cfg.image_size", "vision_cfg.patch_dropout", "text_cfg.context_length",
    "text_cfg.vocab_size", "text_cfg.width", "text_cfg.heads", "text_cfg.layers", "text_cfg.mlp_ratio",
    "text_cfg.hf_tokenizer_name", "text_cfg.tokenizer_kwargs",
}  # fmt: skip
_FREE = {  # kind -> keys of open_clip's `model_cfg` that may say anything: sizes, or what only training heeds
    "clip": _BOTH | {
        "quick_gelu", "vision_cfg.layers", "vision_cfg.width", "vision_cfg.head_width", "vision_cfg.patch_size",
        "vision_cfg.mlp_ratio",
    },
    "siglip": _BOTH | {
        "init_logit_bias", "text_cfg.act_kwargs", "vision_cfg.timm_model_name", "vision_cfg.timm_model_pretrained",
        "vision_cfg.timm_drop", "vision_cfg.timm_drop_path",
    },
}  # fmt: skip
_HELD = {  # kind -> what the others have to say, where it is not open_clip's default
    "clip": {},
    "siglip": {
        "custom_text": True, "vision_cfg.timm_pool": "map", "vision_cfg.timm_proj": "none",
        "text_cfg.no_causal_mask": True, "text_cfg.proj_bias": True, "text_cfg.pool_type": "last",
        "text_cfg.norm_kwargs": {"eps": 1e-6},
    },
}  # fmt: skip


def _flat(model_cfg: dict) -> dict:
    """open_clip's `model_cfg` as one level, its towers' defaults filled in."""
    towers = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
    flat = {key: value for key, value in model_cfg.items() if key not in towers}
    for name, tower in towers.items():
        flat |= {f"{name}.{key}": value for key, value in asdict(tower(**model_cfg[name])).items()}
    return flat


def transformers_kind(config: dict) -> str:
    """The key of `NAMES` whose transformers model computes what an open_clip model of this configuration computes.

    Raises:
        NotImplementedError: where there is none; names the first key that says why.
    """
    given = _flat(config["model_cfg"])
    kind = "siglip" if "siglip" in (given["vision_cfg.timm_model_name"] or "") else "clip"
    wanted = _flat({"vision_cfg": {}, "text_cfg": {}}) | _HELD[kind]
    odd = [key for key in given.keys() | wanted.keys() if (given.get(key) or None) != (wanted.get(key) or None)]
    odd = set(odd) - _FREE[kind]
    odd |= {key for key in ("vision_cfg.image_size", "vision_cfg.layers") if not isinstance(given[key], int)}
    if kind == "siglip" and given.get("init_logit_bias") is None:
        odd.add("init_logit_bias")
    if (given["text_cfg.tokenizer_kwargs"] or {}) not in ({}, {"clean": "canonicalize"}):
        odd.add("text_cfg.tokenizer_kwargs")
    if odd:
        key = min(odd)
        raise NotImplementedError(f"transformers' {kind} has no word for open_clip's {key} = {given.get(key)!r}")
    return kind


def transformers_config(model: nn.Module, config: dict, tokenizer: object) -> PretrainedConfig:
    """transformers' configuration for an open_clip CLIP, or SigLIP with a timm tower, built as `config` says.

    Raises:
        NotImplementedError: for another architecture, which only open_clip can hold; see `transformers_kind`.
    """
    kind, model_cfg = transformers_kind(config), config["model_cfg"]
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    ends = {"bos_token_id": getattr(inner, "bos_token_id", None) or getattr(inner, "sot_token_id", None)}
    ends["eos_token_id"] = getattr(inner, "eos_token_id", None) or getattr(inner, "eot_token_id", None)
    ends["pad_token_id"] = getattr(inner, "pad_token_id", None) or 0
    text_config = {
        "vocab_size": text["vocab_size"], "hidden_size": text["width"], "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"], "intermediate_size": int(text.get("mlp_ratio", 4.0) * text["width"]),
        "max_position_embeddings": text["context_length"], **ends,
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


_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as image processors hold them
_BESIDE = {  # what has to lie beside the weights; one file of each line
    "image processor": ("preprocessor_config.json", "processor_config.json"),
    "tokenizer": ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model"),
}


def _preprocessing(folder: str | Path, px: int) -> dict:
    """open_clip's `preprocess_cfg` for the image processor of a transformers folder whose model takes `px` pixels.

    Raises:
        ValueError: for a way to resize that has no counterpart here.
    """
    shown = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    if shown.resample not in _RESAMPLE:
        known = " or ".join(f"{number} ({name})" for number, name in _RESAMPLE.items())
        raise ValueError(f"{folder}: image processor with resample = {shown.resample}; expected {known}")
    edge = shown.size.get("shortest_edge") or shown.size.get("height")
    if edge != px:
        raise ValueError(f"{folder}: image processor that resizes to {edge} px; expected the model's {px} px")
    return {
        "size": px, "mean": tuple(shown.image_mean), "std": tuple(shown.image_std),
        "interpolation": _RESAMPLE[shown.resample],
        "resize_mode": "shortest" if shown.size.get("shortest_edge") else "squash",
    }  # fmt: skip


def read_transformers(folder: str | Path) -> tuple[nn.Module, HFTokenizer, dict]:
    """A transformers CLIP or SigLIP folder as an open_clip model, its tokenizer, and open_clip's configuration.

    Raises:
        ValueError, OSError: for another kind of model, or a folder that is not whole. Trainers that save the model
            alone, as DCR's, leave out the image processor and the tokenizer, which are those of the model they tuned.
    """
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    kind = theirs.config.model_type
    model_cfg = open_clip_config(theirs.config)
    for part, files in _BESIDE.items():
        if not any(Path(folder, file).exists() for file in files):
            raise FileNotFoundError(
                f"{folder} has no {part}: none of {', '.join(files)}; copy it from the model that it was tuned from"
            )
    preprocess = _preprocessing(folder, model_cfg["vision_cfg"]["image_size"])
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    if kind == "siglip" and theirs.config.vision_config.hidden_act == "gelu_pytorch_tanh":
        config["timm_gelu"] = "tanh"
    model = build_model(config)
    model.load_state_dict(convert(theirs.state_dict(), kind, model.state_dict()))
    set_model_preprocess_cfg(model, preprocess)
    text_cfg = model_cfg["text_cfg"]
    tokenizer = HFTokenizer(str(folder), text_cfg["context_length"], **text_cfg.get("tokenizer_kwargs", {}))
    return model, tokenizer, config


def _inner(tokenizer: HFTokenizer | SimpleTokenizer) -> PreTrainedTokenizerBase:
    """transformers' tokenizer that an open_clip tokenizer wraps, or has as its counterpart."""
    if isinstance(tokenizer, SimpleTokenizer):  # OpenAI's, which open_clip carries in a format of its own
        special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        vocabulary = {special.get(word, word): number for word, number in tokenizer.encoder.items()}
        return CLIPTokenizer(vocabulary, list(tokenizer.bpe_ranks), model_max_length=tokenizer.context_length)
    return tokenizer.tokenizer


def _canonical(tokenizer: HFTokenizer | SimpleTokenizer) -> PreTrainedTokenizerBase:
    """transformers' tokenizer that does to texts itself what open_clip does before it calls one: `clean: canonicalize`.

    Characters are composed, an underscore becomes a space, punctuation and curly quotes go, capitals become small,
    white space shrinks. Left out is what else open_clip repairs before that (ftfy, HTML's entities): no tokenizer's
    file has a word for it. The class is the general one: T5's, which SigLIP has, would build its normaliser anew.
    """
    inner = _inner(tokenizer)
    if not hasattr(inner, "backend_tokenizer"):  # SentencePiece as transformers' SigLIP has it, which cleans as well
        return inner
    backend = Tokenizer.from_str(inner.backend_tokenizer.to_str())
    marks = Regex(f"[{re.escape(string.punctuation)}\u02bc\u2018-\u201f]")  # ftfy makes quotes of these straight
    steps = [normalizers.NFC(), normalizers.Replace("_", " "), normalizers.Replace(marks, ""), normalizers.Lowercase()]
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=tokenizer.context_length, padding_side=inner.padding_side,
        model_input_names=["input_ids"], **inner.special_tokens_map,
    )  # fmt: skip


def write_open_clip(folder: Path, state: State, config: dict, tokenizer: object) -> Path:
    """An open_clip folder, as `local-dir:` and `load_encoder` read it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    text_cfg = {**config["model_cfg"]["text_cfg"], "hf_tokenizer_name": "tokenizer"}
    config = config | {"model_cfg": {**config["model_cfg"], "text_cfg": text_cfg}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    _inner(tokenizer).save_pretrained(folder)
    return folder


def _processor(kind: str, config: dict) -> CLIPImageProcessor | SiglipImageProcessor:
    """transformers' image processor that resizes and normalises as `config` says.

    Raises:
        NotImplementedError: for a SigLIP whose pictures are cut, not squashed.
    """
    px, shown = config["model_cfg"]["vision_cfg"]["image_size"], config["preprocess_cfg"]
    facts = {"image_mean": list(shown["mean"]), "image_std": list(shown["std"])}
    facts["resample"] = 2 if shown.get("interpolation") == "bilinear" else 3
    squash = shown.get("resize_mode") == "squash"
    size = {"height": px, "width": px} if squash else {"shortest_edge": px}
    if kind == "clip":
        return CLIPImageProcessor(size=size, crop_size=px, do_center_crop=not squash, **facts)
    if not squash:
        raise NotImplementedError("transformers' siglip squashes pictures; it has no word for open_clip's resize_mode")
    return SiglipImageProcessor(size=size, **facts)


def write_transformers(folder: Path, state: State, config: dict, tokenizer: object) -> Path:
    """A transformers folder: weights, configuration, image processor and tokenizer.

    Args:
        state: under open_clip's names.

    Raises:
        NotImplementedError: for an architecture that transformers' CLIP and SigLIP do not hold. Nothing is written.
    """
    kind = transformers_kind(config)
    processor = _processor(kind, config)
    with torch.device("meta"):
        found = transformers_config(build_model(config), config, tokenizer)
        model = (CLIPModel if kind == "clip" else SiglipModel)(found)
    model.load_state_dict(convert(state, kind, model.state_dict()), assign=True)
    cleaned = (config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}).get("clean") == "canonicalize"
    folder.mkdir(parents=True, exist_ok=True)
    for part in (model, processor, _canonical(tokenizer) if cleaned else _inner(tokenizer)):
        part.save_pretrained(folder)
    return folder
