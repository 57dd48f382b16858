"""LLaVA folders: an encoder's image tower, a projector of two layers and a causal language model, for transformers.

    folder/                 for `LlavaForConditionalGeneration` and `AutoProcessor`: weights, configuration, processor
    folder/diva-lab.json    which encoder and language model it was made of, and its rung: what was trained since

`assemble` makes one, `swap` replaces the tower of one. LLaVA-1.5 (arXiv 2310.03744) reads the patch tokens of the last
layer but one: all tokens of a SigLIP ("full"), those of a CLIP without its class token ("default").
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from diva_lab.evaluation.table import open_encoder
from diva_lab.models.encoders import Encoder
from diva_lab.models.formats import transformers_parts
from diva_lab.models.weights import check_finite, check_loading, read_json, reading
from diva_lab.provenance import environment
from diva_lab.training.export import new_folder

IMAGE = "<image>"
RECORD = "diva-lab.json"
LAYER = -2  # whose tokens the language model reads
SELECT = {"clip_vision_model": ("default", 1), "siglip_vision_model": ("full", 0)}  # strategy, class tokens
ASSEMBLED, SWAPPED, UNKNOWN = "assembled, nothing trained", "tower swapped, nothing trained", "as found"
# LLaVA-1.5's way of speaking, without its system prompt; END stands for the tokenizer's token of the end
CHAT = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ 'END' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SENTENCE = "What is shown in this photo of a red star?"


@dataclass(frozen=True)
class Llava:
    """A LLaVA in memory: the model, its processor, and what is known of how it was made."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    record: dict

    @property
    def image_tokens(self) -> int:
        """How many tokens an image is."""
        return self.model.config.image_seq_length

    def save(self, folder: Path) -> Path:
        """Write a new folder; what makes it a whole one for `load_llava`, the processor, is written last."""
        for config in (self.model.config, self.model.config.text_config, self.model.config.vision_config):
            config._name_or_path = ""  # transformers keeps the path of a part on this machine
        self.model.save_pretrained(folder)
        text = json.dumps({**self.record, **environment()}, indent=1)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")
        self.processor.save_pretrained(folder)
        return folder


def load_llava(folder: str | Path, dtype: torch.dtype | str = "auto") -> Llava:
    """Read a LLaVA folder, ours or another one such as `llava-hf/llava-1.5-7b-hf`, with nothing left to chance.

    Raises:
        ValueError: for another kind of model, for weights that are missing or not finite, and where the processor makes
            another number of tokens of an image than the model.
        FileNotFoundError: where there is no such folder, or no processor in it.
    """
    folder = Path(folder)
    kind = _model_type(folder)
    if kind != "llava":
        raise ValueError(f"{folder}/config.json: model_type = {kind!r}; expected 'llava', as LLaVA-1.5 has it")
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise FileNotFoundError(f"{folder} has no processor_config.json; copy the processor of the model beside it")
    model = _load(LlavaForConditionalGeneration, folder, dtype)
    with reading(folder):
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {"rung": UNKNOWN}
    llava = Llava(model, processor, record)
    with reading(folder):
        pixels = processor.image_processor([torch.zeros(3, 32, 48, dtype=torch.uint8)], return_tensors="pt")
        patches = pixels["pixel_values"][0, 0].numel() // processor.patch_size**2
    tokens = patches + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if tokens != llava.image_tokens:
        raise ValueError(
            f"{folder}: its processor makes {tokens} tokens of an image, config.json says image_seq_length = "
            f"{llava.image_tokens}; expected one number: mend patch_size, num_additional_image_tokens and "
            "vision_feature_select_strategy in processor_config.json"
        )
    return llava


def _model_type(folder: Path) -> object:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with config.json, weights and a tokenizer")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; expected a folder of a transformers model")
    return read_json(folder / "config.json").get("model_type")


def _load(kind: type, folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """A model of a folder, of which no weight was filled in or left out."""
    with reading(folder):
        options = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
        model, info = kind.from_pretrained(folder, dtype=dtype, **options)
    check_loading(info, folder, len(model.state_dict()))
    check_finite(model.state_dict(), folder)
    return model.eval()


# --- a tower ----------------------------------------------------------------------------------------------------


def _tower(encoder: Encoder, name: str) -> tuple[PreTrainedModel, object]:
    """An encoder's image tower as transformers has it, and its image processor.

    Raises:
        ValueError: for an encoder that transformers' CLIP and SigLIP cannot compute.
    """
    try:
        model, processor = transformers_parts(encoder.open_clip_state(), encoder.config, encoder.tokenizer)
    except NotImplementedError as error:
        raise ValueError(f"encoder {name}: LLaVA takes a CLIP or a SigLIP of transformers, and {error}") from error
    return model.vision_model.eval(), processor


def _vision_settings(vision: PretrainedConfig) -> dict:
    """What follows from a tower in LLaVA's configuration."""
    strategy, _ = SELECT[vision.model_type]
    return {
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,  # without a class token
        "vision_feature_select_strategy": strategy,
    }


def _processor(
    image_processor: object, vision: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, template: str
) -> LlavaProcessor:
    strategy, class_tokens = SELECT[vision.model_type]
    return LlavaProcessor(
        image_processor, tokenizer, patch_size=vision.patch_size, vision_feature_select_strategy=strategy,
        chat_template=template, image_token=IMAGE, num_additional_image_tokens=class_tokens,
    )  # fmt: skip


# --- assemble ---------------------------------------------------------------------------------------------------


def assemble(encoder: str | Path, language: str | Path, out: str | Path, seed: int = 0) -> Path:
    """Write a LLaVA folder from an encoder and a causal language model, with a projector of random weights.

    Args:
        encoder: as `evaluation.table.open_encoder` takes it: a name, a folder, a run, or RUN:MIX.
        language: folder of a causal language model that transformers knows, with its tokenizer.
        out: a new folder. The weights are of the language model's precision.
        seed: of the projector.

    Raises:
        ValueError: for an encoder or a language model that LLaVA cannot hold; says what was found.
        FileNotFoundError, FileExistsError: for a folder that is not there, or not new.
    """
    out, language = new_folder(Path(out)), Path(language)
    _model_type(language)
    causal = _load(AutoModelForCausalLM, language, "auto")
    with reading(language):
        tokenizer = AutoTokenizer.from_pretrained(language, local_files_only=True, trust_remote_code=False)
    tower, image_processor = _tower(open_encoder(encoder), str(encoder))
    end = _add_tokens(tokenizer, language)
    model = _join(tower, causal, tokenizer.convert_tokens_to_ids(IMAGE), language, seed)
    _check_length(model.config, language)
    _check_text(model, causal, tokenizer, language)
    _grow(model, len(tokenizer))
    model.config.text_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = causal.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = _processor(image_processor, tower.config, tokenizer, CHAT.replace("END", end))
    record = {"rung": ASSEMBLED, "encoder": str(encoder), "language": str(language), "seed": seed}
    return Llava(model, processor, record).save(out)


def _add_tokens(tokenizer: PreTrainedTokenizerBase, language: Path) -> str:
    """Give a tokenizer the tokens of an image and of padding, where it has none; returns that of the end."""
    if tokenizer.eos_token is None:
        raise ValueError(f"{language}: its tokenizer has no eos_token; expected one, which ends an answer")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer.eos_token


def _join(tower: PreTrainedModel, causal: PreTrainedModel, image: int, language: Path, seed: int) -> nn.Module:
    """LLaVA with these modules themselves, no copies, and a new projector."""
    base, head = causal.base_model, causal.get_output_embeddings()
    width = causal.get_input_embeddings().embedding_dim
    if getattr(causal.config, "hidden_size", None) != width:
        raise ValueError(f"{language}: embeddings {width} wide and hidden_size = {causal.config.hidden_size}")
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{language}: its output layer has a bias, for which LLaVA has no place; expected none")
    if causal.config.tie_word_embeddings and not hasattr(base, "embed_tokens"):  # by that name alone LLaVA ties them
        causal.config.tie_word_embeddings, head = False, copy.deepcopy(head)
    config = LlavaConfig(
        vision_config=tower.config, text_config=causal.config, image_token_index=image, vision_feature_layer=LAYER,
        **_vision_settings(tower.config),
    )  # fmt: skip
    with reading(language), torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    if type(model.model.language_model) is not type(base):
        kinds = [type(module).__name__ for module in (base, model.model.language_model)]
        raise ValueError(f"{language}: a {kinds[0]}, for which LLaVA would take a {kinds[1]}; expected a plain one")
    dtype = causal.dtype
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        projector = type(model.model.multi_modal_projector)(config)
    model.model.vision_tower = tower.to(dtype)
    model.model.multi_modal_projector = projector.to(dtype)
    model.model.language_model, model.lm_head = base, head
    model.config.dtype = dtype
    return model.eval()


def _check_length(config: LlavaConfig, language: Path) -> None:
    length = getattr(config.text_config, "max_position_embeddings", None)
    if length is not None and length <= config.image_seq_length:
        raise ValueError(
            f"{language}: max_position_embeddings = {length}, and an image takes {config.image_seq_length} tokens; "
            "expected room for the text too"
        )


@torch.no_grad()
def _check_text(model: nn.Module, causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, language: Path) -> None:
    """Refuse a language model whose logits LLaVA does not compute, such as scaled or capped ones."""
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    ours, theirs = (m(input_ids=ids).logits.float() for m in (model, causal))
    if (ours - theirs).abs().max() > 1e-3 * theirs.abs().max():
        raise ValueError(
            f"{language}: a {type(causal).__name__}, whose logits are more than its output layer's; LLaVA would "
            "compute others of the same text"
        )


@torch.no_grad()
def _grow(model: nn.Module, words: int) -> None:
    """Make room for so many words; the logit of a new one is the mean of the old ones', so that it is never said."""
    before = model.get_input_embeddings().num_embeddings
    if words <= before:
        return
    model.resize_token_embeddings(words, pad_to_multiple_of=64, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[before:] = layer.weight[:before].mean(0)


# --- swap -------------------------------------------------------------------------------------------------------


def swap(llava: str | Path, encoder: str | Path, out: str | Path) -> Path:
    """Write a LLaVA folder again, with another image tower under the same projector and language model.

    The image processor, the size of patches, the number of an image's tokens and which of them are read follow in
    configuration and processor.

    Args:
        llava: a folder as `load_llava` reads it.
        encoder: as `evaluation.table.open_encoder` takes it.
        out: a new folder; the weights are of the same precision.

    Raises:
        ValueError: for a tower of another width than the projector reads; as `load_llava`.
    """
    out, source = new_folder(Path(out)), load_llava(llava)
    tower, image_processor = _tower(open_encoder(encoder), str(encoder))
    model, config = source.model, source.model.config
    width, before = tower.config.hidden_size, config.vision_config.hidden_size
    if width != before:
        raise ValueError(
            f"{llava}: its projector reads patch tokens {before} wide, and those of encoder {encoder} are {width} "
            f"wide; swap in a tower {before} wide, or make a new projector by diva-lab llava assemble"
        )
    layers = config.vision_feature_layer
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -tower.config.num_hidden_layers - 1 <= layer <= tower.config.num_hidden_layers:
            raise ValueError(
                f"{llava}: reads layer {layer}, and encoder {encoder} has {tower.config.num_hidden_layers}; swap in a "
                "tower with that layer"
            )
    model.model.vision_tower = tower.to(model.dtype)
    config.vision_config = tower.config
    for name, value in _vision_settings(tower.config).items():
        setattr(config, name, value)
    _check_length(config, Path(llava))
    tokenizer, template = source.processor.tokenizer, source.processor.chat_template
    end = tokenizer.eos_token or ""
    processor = _processor(image_processor, tower.config, tokenizer, template or CHAT.replace("END", end))
    record = source.record | {"rung": SWAPPED, "encoder": str(encoder), "llava": str(llava)}
    return Llava(model, processor, record).save(out)
