"""Weights, settings and tokenizers from files of others: whole, finite, and read without running any code of theirs.

Pickled files are read by torch's restricted unpickler, settings by the names that are known here, and no `auto_map`,
`quantization_config` or custom class of a folder is followed. Whatever does not fit is refused in one line.
"""

import inspect
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from diffusers import SchedulerMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from diva_lab.image_files import open_regular

State = dict[str, Tensor]
SUFFIXES = (".safetensors", ".bin", ".pth")  # of files of weights in a folder, the first choice first
_SCALARS = [np.dtype, *{type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OVMmSU"}]
_SCALARS += [(np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Turn any error of a library that reads the files of `what` into a ValueError of one line that names it.

    Errors of the operating system and of memory stay, and so does a line that names `what` already.
    """
    logging.disable(logging.ERROR)  # the libraries log what is told here, weight by weight
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes of a library
        if isinstance(error, ValueError) and str(what) in str(error) and "\n" not in str(error):
            raise
        raise ValueError(f"{what}: cannot be read: {one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


def one_line(error: Exception) -> str:
    """The kind of an error and the beginning of its text, without line breaks."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{' ...' if len(text) > 300 else ''}"


# --- settings ---------------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: where the file holds anything else; names it.
    """
    try:
        with open_regular(path) as file:
            settings = json.loads(file.read().decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, and of a pipe
        raise ValueError(f"{path}: not a JSON file: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected an object with settings, found {type(settings).__name__}")
    return settings


def check_known(settings: object, known: Iterable[str], place: str) -> dict:
    """`settings`, if they are a dict that has no other keys than `known`; `place` says where they stand.

    Raises:
        ValueError: names the first other key and the known ones.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"{place}: expected an object with settings, found {settings!r}")
    if unknown := sorted(settings.keys() - set(known)):
        value = settings[unknown[0]]
        raise ValueError(f"{place}: unknown setting {unknown[0]} = {value!r}; expected only {', '.join(sorted(known))}")
    return settings


def _architecture(kind: type, settings: dict) -> dict:
    """Those of a config.json's settings that are the own arguments of the transformers configuration `kind`."""
    own, base = (set(inspect.signature(c).parameters) for c in (kind, kind.__mro__[1]))
    parts = {}
    for name, part in getattr(kind, "sub_configs", {}).items():  # old files have the values in NAME_dict
        values = (settings.get(name) or {}) | (settings.get(f"{name}_dict") or {})
        parts[name] = _architecture(part, values)
    own = own - base | {"pad_token_id", "bos_token_id", "eos_token_id"}
    return {name: value for name, value in settings.items() if name in own} | parts


# --- files of weights -------------------------------------------------------------------------------------------


def _flatten(value: object, name: str = "") -> State:
    """The tensors in nested dicts, under their keys joined by dots; whatever else lies beside them is left out."""
    if isinstance(value, Tensor):
        return {name: value}
    parts = value.items() if isinstance(value, Mapping) else ()
    return {n: w for key, part in parts for n, w in _flatten(part, f"{name}.{key}" if name else str(key)).items()}


def read_weights(path: str | Path) -> State:
    """The tensors of a file in safetensors' or torch's format; those in nested dicts under names joined by dots.

    Raises:
        ValueError: where torch.load(weights_only=True) refuses the file, where it holds no dict, and no tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        with reading(path):
            return load_file(path)
    try:
        with torch.serialization.safe_globals(_SCALARS):  # trainers save their best score beside the weights
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises whatever a damaged file leads to
        reason = one_line(error).partition(" Please file an issue")[0]
        raise ValueError(f"{path}: not a file of weights for torch.load(weights_only=True): {reason[:200]}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a dict of names and tensors")
    if not (state := _flatten(content)):
        raise ValueError(f"{path}: holds no weights; its keys are {', '.join(map(str, list(content)[:3])) or 'none'}")
    return state


def read_folder(folder: str | Path, stems: Iterable[str]) -> State:
    """The weights of a folder, in one file or in shards that an index lists.

    Args:
        stems: names of files without their endings, the first choice first.

    Raises:
        FileNotFoundError: where there is no such file; names what was expected.
    """
    names = [stem + suffix for stem in stems for suffix in SUFFIXES]
    for path in (Path(folder, name) for name in names):
        if path.is_file():
            return read_weights(path)
        index = path.with_name(f"{path.name}.index.json")
        if index.is_file():
            with reading(index):
                shards = sorted({Path(shard).name for shard in read_json(index)["weight_map"].values()})
            return {name: w for shard in shards for name, w in read_weights(path.with_name(shard)).items()}
    raise FileNotFoundError(f"{folder} has no weights: none of {', '.join(names)}")


# --- what is there, against what is expected --------------------------------------------------------------------


def weight_files(folder: Path) -> dict[str, Path]:
    """The files of weights in a folder by name, of the first of `SUFFIXES` that there is; no variants (`.fp16.`)."""
    files = next((files for suffix in SUFFIXES if (files := sorted(folder.glob(f"*{suffix}")))), [])
    return {file.name: file for file in files if "." not in file.stem and file.is_file()}


def _refuse(source: object, kind: str, names: Iterable[str], expected: int) -> None:
    """Raise ValueError where there are any names (those of transformers' buffers of positions do not count)."""
    if names := sorted(name for name in names if not name.endswith("position_ids")):
        raise ValueError(
            f"{source}: {len(names)} weights {kind}, as {names[0]}, of {expected} expected; an incomplete file, or "
            "weights of another architecture?"
        )


def _strip(state: State, names: Iterable[str]) -> State:
    """`state` without the first parts of its names that all of them share and none of `names` has, as `module.`."""
    first = {name.partition(".")[0] for name in names}
    while len(shared := {name.partition(".")[0] for name in state}) == 1 and not shared & first:
        if not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: w for name, w in state.items()}
    return state


def digest_weights(state: Mapping[str, Tensor], start: bytes = b"") -> str:
    """A hash of weights and their names, in any order; `start` stands for what else it shall depend on."""
    whole = blake2b(start, digest_size=16)
    for name, value in sorted(state.items()):
        whole.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def check_finite(state: Mapping[str, Tensor], source: object) -> None:
    """Raise ValueError where a weight is NaN or infinite; names the first."""
    for name, w in state.items():
        if w.is_floating_point() and not w.is_meta and not w.isfinite().all():
            wrong = int((~w.isfinite()).sum())
            raise ValueError(f"{source}: {wrong} of {w.numel()} numbers of {name} are NaN or infinite; damaged weights")


def fit(state: State, expected: Mapping[str, Tensor], source: object) -> State:
    """The weights of `state` under the names and in the shapes of `expected`.

    A prefix that all names share is taken off where `expected` has it not; one number is taken in any shape, as [1].

    Args:
        source: the name of the file or folder, for error messages.

    Raises:
        ValueError: where a weight is missing, unexpected, of another shape, NaN or infinite; names the first.
    """
    if not state.keys() & expected.keys():
        state = _strip(state, expected)
    _refuse(source, "missing", expected.keys() - state.keys(), len(expected))
    _refuse(source, "unexpected", state.keys() - expected.keys(), len(expected))
    state = {name: state[name] for name in expected if name in state}
    for name, w in state.items():
        shape = expected[name].shape
        if w.shape != shape and w.numel() == shape.numel() == 1:
            state[name] = w.reshape(shape)
        elif w.shape != shape:
            raise ValueError(f"{source}: {name} is {[*w.shape]}, expected {[*shape]}; weights of another architecture?")
    check_finite(state, source)
    return state


def load_weights(module: nn.Module, state: State, source: object, names: Iterable[str] | None = None) -> None:
    """Load weights into a module, in place: exactly those of `names`, and all of the module's if None; see `fit`."""
    own = module.state_dict()
    module.load_state_dict(fit(state, own if names is None else {name: own[name] for name in names}, source), False)


def check_loading(info: dict, source: object, expected: int) -> None:
    """Raise ValueError for what transformers or diffusers say that they filled in or left out."""
    for kind in ("missing", "unexpected"):
        _refuse(source, kind, info[f"{kind}_keys"], expected)
    _refuse(source, "of another shape", [key[0] for key in info["mismatched_keys"]], expected)


# --- parts of models --------------------------------------------------------------------------------------------


def load_transformers(kind: type, folder: str | Path) -> nn.Module:
    """A transformers model of the class `kind` in float32, from a folder that holds config.json and weights.

    Raises:
        ValueError, FileNotFoundError: as `read_folder` and `fit`.
    """
    settings, state = read_json(Path(folder, "config.json")), read_folder(folder, ("model", "pytorch_model"))
    with reading(folder):
        config = kind.config_class(**_architecture(kind.config_class, settings))
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        for weights in (state, _strip(state, ())):  # transformers converts old names, so that it has to look first
            model, info = kind.from_pretrained(None, state_dict=dict(weights), ignore_mismatched_sizes=True, **options)
            if not info["missing_keys"]:
                break
        check_loading(info, folder, len(model.state_dict()))
        check_finite(model.state_dict(), folder)
    return model


def load_diffusers(kind: type, folder: str | Path) -> nn.Module:
    """A diffusers model of the class `kind` in float32, from a folder that holds config.json and weights.

    Raises:
        ValueError: as `fit`, and for quantised weights.
        OSError: for an incomplete folder.
    """
    if read_json(Path(folder, "config.json")).get("quantization_config"):
        raise ValueError(f"{folder}/config.json: quantization_config is set; expected weights that are not quantised")
    with reading(folder):
        model, info = kind.from_pretrained(
            folder, torch_dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        if info["missing_keys"] and info["unexpected_keys"]:  # because of a prefix?
            state = fit(read_folder(folder, ("diffusion_pytorch_model",)), model.state_dict(), folder)
            model.load_state_dict(state, assign=True)
            return model.float()
        check_loading(info, folder, len(model.state_dict()))
        check_finite(model.state_dict(), folder)
    return model


def check_tokenizer(tokenize, words: int, source: object) -> None:
    """Raise ValueError for a tokenizer that gives every text the same ids, or ids that a text tower does not have.

    Args:
        tokenize: list of n strings -> ids [n, l].
        words: the size of the text tower's vocabulary.
        source: the folder, for error messages.
    """
    with reading(source):
        ids = tokenize(["a photo of a dog", "two red stars on", "", "q"])
    if len(ids.unique(dim=0)) == 1:
        raise ValueError(
            f"{source}: the tokenizer gives every text the same ids; tokenizer.json or vocab.json missing?"
        )
    if ids.max() >= words:
        raise ValueError(f"{source}: the tokenizer gives id {ids.max()}, but the text tower has {words} words")


def load_tokenizer(folder: str | Path, text_config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a text encoder, which cuts and pads texts to the length that the encoder has positions for.

    Raises:
        ValueError: as `check_tokenizer`.
        OSError: for an incomplete folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    with reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    length = tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    check_tokenizer(lambda texts: tokenizer(texts, **options).input_ids, text_config.vocab_size, folder)
    return tokenizer


def load_scheduler(kind: type, folder: str | Path) -> SchedulerMixin:
    """A diffusers scheduler of the class `kind`, from the settings of any that it can take the place of.

    Raises:
        ValueError: for the settings of a scheduler of another family, or of none.
    """
    path = Path(folder, "scheduler_config.json")
    name = read_json(path).get("_class_name")
    with reading(path):
        scheduler = kind.from_pretrained(folder)
    known = {kind.__name__, *(other.__name__ for other in scheduler.compatibles)}
    if name not in tuple(known):
        raise ValueError(f"{path}: _class_name = {name!r} does not fit this model; expected {', '.join(sorted(known))}")
    return scheduler
