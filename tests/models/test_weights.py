"""Folders and files of others, damaged and hostile: refused in one line, or read right; no code of theirs runs."""

import contextlib
import json
import os
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import DAMAGE, change_json, change_weights
from one_step import pictures
from safetensors.torch import load_file, save_file
from small_models import write_diffusion3, write_transformers_clip
from transformers import AutoTokenizer, dynamic_module_utils

from diva_lab.models import encoders, registry
from diva_lab.models.encoders import load_encoder
from diva_lab.models.registry import load_denoiser
from diva_lab.training.build import build_conditioner, tuned_encoder
from diva_lab.training.runs import Run

IMAGES, TEXTS = pictures(3).float() / 255, ["a photo of a disc", "two red stars"]


def refusal(load, *arguments) -> str:
    """The one line with which a folder or file is refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value), caught.value
    return str(caught.value)


def embeddings(encoder) -> torch.Tensor:
    return torch.cat([encoder.encode_image(IMAGES), encoder.encode_text(TEXTS)])


def prefixed(state):
    return {f"module.{name}": w for name, w in state.items()}


# --- weights of folders -----------------------------------------------------------------------------------------


@pytest.fixture
def ours(small_clip, tmp_path) -> Path:
    return shutil.copytree(small_clip, tmp_path / "clip")


@pytest.fixture
def theirs(request, tmp_path) -> Path:
    """A transformers folder of a CLIP, or of the kind that a test names."""
    return write_transformers_clip(tmp_path / "theirs", getattr(request, "param", "clip"), "gelu")


@pytest.fixture
def diffusion(small_diffusion, tmp_path) -> Path:
    return shutil.copytree(small_diffusion, tmp_path / "diffusion")


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_open_clip_folder_whose_weights_do_not_fit_is_refused_naming_the_first(damage, ours):
    change, message = DAMAGE[damage]
    change_weights(ours / "open_clip_model.safetensors", change)
    text = refusal(load_encoder, ours)
    assert any(part in text for part in message.split("|")) and str(ours) in text


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_transformers_folder_whose_weights_do_not_fit_is_refused_naming_the_first(damage, theirs):
    change, message = DAMAGE[damage]
    change_weights(theirs / "model.safetensors", change)
    text = refusal(load_encoder, theirs)
    assert any(part in text for part in message.split("|")) and str(theirs) in text


@pytest.mark.parametrize("kept", ["vision_model.", "text_model.", "without block 1"])
def test_a_transformers_folder_with_a_part_of_the_model_alone_is_refused(kept, theirs):
    file = theirs / "model.safetensors"
    part = (lambda n: "layers.1." not in n) if kept == "without block 1" else (lambda n: n.startswith(kept))
    change_weights(file, lambda state: {n: w for n, w in state.items() if part(n)})
    assert "weights missing, as" in refusal(load_encoder, theirs)


@pytest.mark.parametrize("theirs", ["clip", "siglip"], indirect=True)
@pytest.mark.parametrize("prefix", ["module.", "module.model."])
def test_a_prefix_that_all_names_share_is_taken_off(prefix, ours, theirs, diffusion):
    files = {ours: "open_clip_model.safetensors", theirs: "model.safetensors"}
    for folder, file in files.items():
        expected = embeddings(load_encoder(folder))
        change_weights(folder / file, lambda state: {f"{prefix}{n}": w for n, w in state.items()})
        assert torch.equal(embeddings(load_encoder(folder)), expected)
    expected = load_denoiser(diffusion)
    for file in diffusion.glob("*/*.safetensors"):
        change_weights(file, lambda state: {f"{prefix}{n}": w for n, w in state.items()})
    denoiser = load_denoiser(diffusion)
    assert torch.equal(denoiser.latents(IMAGES), expected.latents(IMAGES))
    assert torch.equal(denoiser.encode_text(TEXTS), expected.encode_text(TEXTS))


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_a_stable_diffusion_folder_whose_weights_do_not_fit_is_refused_naming_part_and_weight(
    part, small_diffusion, tmp_path
):
    for damage, (change, message) in DAMAGE.items():
        folder = shutil.copytree(small_diffusion, tmp_path / damage)
        (file,) = (folder / part).glob("*.safetensors")
        change_weights(file, change)
        text = refusal(load_denoiser, folder)
        assert any(words in text for words in message.split("|")) and f"{folder}/{part}" in text, (damage, text)


@pytest.mark.parametrize("part", ["vae", "transformer", "text_encoder", "text_encoder_2"])
def test_a_stable_diffusion_3_folder_without_the_weights_of_a_part_is_refused(part, tmp_path):
    folder = write_diffusion3(tmp_path / "sd3")
    (file,) = (folder / part).glob("*.safetensors")
    change_weights(file, DAMAGE["no weights"][0])
    assert f"{folder}/{part}" in refusal(load_denoiser, folder)


def test_shards_are_read_by_their_index(theirs):
    expected, state = embeddings(load_encoder(theirs)), load_file(theirs / "model.safetensors")
    (theirs / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({name: w for name, w in state.items() if shards[name] == shard}, theirs / shard)
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert torch.equal(embeddings(load_encoder(theirs)), expected)
    (theirs / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002" in refusal(load_encoder, theirs)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04.", b"{}"])
def test_files_that_are_no_weights_are_refused_by_name(content, ours, theirs, diffusion, small_clip, tmp_path):
    for load, folder in ((load_encoder, ours), (load_encoder, theirs), (load_denoiser, diffusion)):
        for file in folder.rglob("*.safetensors"):
            file.write_bytes(content)
        assert str(folder) in refusal(load, folder)
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert name in refusal(load_encoder, f"{small_clip}@{tmp_path / name}")


# --- settings and tokenizers of folders -------------------------------------------------------------------------


def test_a_folder_without_its_tokenizers_words_is_refused(ours, theirs, diffusion):
    for folder in (ours, theirs, diffusion / "tokenizer"):
        (folder / "tokenizer.json").unlink()
        load = (load_denoiser, diffusion) if folder.name == "tokenizer" else (load_encoder, folder)
        assert "tokenizer" in refusal(*load)
    (ours / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (ours / "merges.txt").write_text("#version: 0.2\n")
    assert "every text the same ids" in refusal(load_encoder, ours)


def test_a_tokenizer_with_more_words_than_the_text_tower_is_refused(ours):
    config = json.loads((ours / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["vocab_size"] = 50
    (ours / "open_clip_config.json").write_text(json.dumps(config))
    file = ours / "open_clip_model.safetensors"
    change_weights(file, lambda state: state | {"token_embedding.weight": state["token_embedding.weight"][:50]})
    assert "the text tower has 50 words" in refusal(load_encoder, ours)


def test_a_stable_diffusion_tokenizer_without_a_length_takes_the_text_encoders(diffusion, small_diffusion):
    file = diffusion / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["model_max_length"]
    file.write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(file.parent).model_max_length > 1e9
    one, two = (load_denoiser(folder).encode_text(TEXTS) for folder in (diffusion, small_diffusion))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_start": 5}, "beta_start"), ({"beta_end": -1.0}, "scheduler_config.json"),
        ({"beta_start": "small"}, "scheduler"),
        ({"prediction_type": "sample"}, "prediction_type 'sample'; expected epsilon or v_prediction"),
        ({"prediction_type": None}, "prediction_type None"), ({"num_train_timesteps": 0}, "scheduler"),
        ({"beta_schedule": "steep"}, "steep"), ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "does not fit"),
        ({"_class_name": ["evil", "Scheduler"]}, "does not fit"), ({"trained_betas": [0.1, float("nan")]}, "betas in"),
    ],
    ids=str,
)  # fmt: skip
def test_a_scheduler_that_does_not_fit_its_model_is_refused(changes, message, diffusion):
    change_json(diffusion / "scheduler" / "scheduler_config.json", **changes)
    assert message in refusal(load_denoiser, diffusion)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "", "{", '{"_class_name": "EvilPipeline"}', '{"_class_name": ["a", "B"]}']
)
def test_a_model_index_that_names_no_known_pipeline_is_refused(text, diffusion):
    (diffusion / "model_index.json").write_text(text)
    assert "model_index.json" in refusal(load_denoiser, diffusion)


def test_parts_of_two_models_are_refused(diffusion, tmp_path):
    other = write_diffusion3(tmp_path / "sd3")
    shutil.rmtree(diffusion / "text_encoder")
    shutil.copytree(other / "text_encoder", diffusion / "text_encoder")
    change_weights(diffusion / "text_encoder" / "model.safetensors", lambda state: {
        name: w for name, w in state.items() if name != "text_projection.weight"
    })  # fmt: skip
    assert "context 24 wide, found 16" in refusal(load_denoiser, diffusion)


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("model_cfg", {"multimodal_cfg": {}}), ("vision_cfg", {"pretrained_path": "x"}), ("text_cfg", {"width": "x"}),
        ("text_cfg", {"tokenizer_kwargs": {"trust_remote_code": True}}), ("text_cfg", {"tokenizer_kwargs": [1]}),
        ("text_cfg", {"hf_model_name": "evil/model"}), ("text_cfg", {"hf_model_name": ["a"]}),
        ("vision_cfg", {"timm_model_name": "hf-hub:evil/model"}),
        ("vision_cfg", {"layers": None}), ("vision_cfg", {"width": -1}), ("model_cfg", {"text_cfg": None}),
    ],
    ids=str,
)  # fmt: skip
def test_an_unknown_or_odd_setting_of_an_open_clip_folder_is_refused(place, changes, ours):
    config = json.loads((ours / "open_clip_config.json").read_text())
    (config["model_cfg"] if place == "model_cfg" else config["model_cfg"][place]).update(changes)
    (ours / "open_clip_config.json").write_text(json.dumps(config))
    assert str(ours) in refusal(load_encoder, ours)


@pytest.mark.parametrize("text", ["{}", "[]", "null", "{", '{"model_type": ["clip"]}'])
def test_a_configuration_of_another_kind_is_refused_by_name(text, ours, theirs):
    for folder, file in ((ours, "open_clip_config.json"), (theirs, "config.json")):
        (folder / file).write_text(text)
        assert str(folder) in refusal(load_encoder, folder)


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "relu"), ("hidden_act", "gelu"), ("layer_norm_eps", 1e-3)])
def test_a_text_tower_that_open_clip_would_compute_otherwise_is_refused(key, value, tmp_path):
    folder = write_transformers_clip(tmp_path / "clip", "clip", "quick_gelu")
    settings = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", text_config=settings["text_config"] | {key: value})
    text = refusal(load_encoder, folder)
    assert key in text and str(value) in text and f"{folder}/config.json" in text


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in ("other names", "no weights")])
def test_a_projector_whose_weights_do_not_fit_is_refused(damage, small_clip, small_settings, tmp_path):
    encoder, denoiser = load_encoder(small_clip), load_denoiser(small_settings.denoiser)
    projector = build_conditioner(small_settings, encoder, denoiser).state_dict()
    change, message = DAMAGE[damage]
    save_file({f"conditioner.{n}": w for n, w in change(projector).items()}, tmp_path / "p.safetensors")
    settings = replace(small_settings, projector=str(tmp_path / "p.safetensors"))
    text = refusal(build_conditioner, settings, encoder, denoiser)
    assert any(part in text for part in message.split("|")) and "p.safetensors" in text


# --- NAME@FILE --------------------------------------------------------------------------------------------------


@pytest.fixture
def state(small_clip) -> dict[str, torch.Tensor]:
    return {name: w * 1.1 for name, w in load_encoder(small_clip).open_clip_state().items()}


@pytest.fixture
def tuned(small_clip, state, tmp_path) -> torch.Tensor:
    """Embeddings with the weights of `state`."""
    folder = shutil.copytree(small_clip, tmp_path / "tuned")
    save_file(state, folder / "open_clip_model.safetensors")
    return embeddings(load_encoder(folder))


LAYOUTS = {
    "model": lambda state: {"model": state, "epoch": 3},
    "module": lambda state: {"module": state},
    "state_dict": lambda state: {"state_dict": prefixed(state), "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "nested twice": lambda state: {"state_dict": {"model": state}},
    "logit_scale of shape [1]": lambda state: state | {"logit_scale": state["logit_scale"].reshape(1)},
    "a numpy scalar beside": lambda state: {"model": state, "best": np.float64(0.7), "step": np.int64(3)},
    "several, one of this architecture": lambda state: {
        "teacher": {"visual.conv.weight": torch.ones(2)},
        "model": state,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_released_file_is_read_whatever_its_layout(layout, small_clip, state, tuned, tmp_path):
    torch.save(LAYOUTS[layout](state), tmp_path / "file.pth")
    assert torch.equal(embeddings(load_encoder(f"{small_clip}@{tmp_path / 'file.pth'}")), tuned)


def test_released_weights_in_safetensors_are_read(small_clip, state, tuned, tmp_path):
    save_file(state, tmp_path / "file.safetensors")
    assert torch.equal(embeddings(load_encoder(f"{small_clip}@{tmp_path / 'file.safetensors'}")), tuned)


@pytest.mark.parametrize("beside", ["ema.", "", "model.average."])
def test_of_several_encoders_in_one_file_one_is_chosen_by_its_prefix(beside, small_clip, state, tuned, tmp_path):
    file = tmp_path / "both.pth"
    torch.save({f"{beside}{n}": w * 2 for n, w in state.items()} | {f"model.{n}": w for n, w in state.items()}, file)
    text = refusal(load_encoder, f"{small_clip}@{file}")
    assert "2 encoders" in text and f"NAME@{file}@model." in text and f"NAME@{file}@{beside}" in text
    assert torch.equal(embeddings(load_encoder(f"{small_clip}@{file}@model.")), tuned)
    assert not torch.equal(embeddings(load_encoder(f"{small_clip}@{file}@{beside}")), tuned)
    assert "choose one" in refusal(load_encoder, f"{small_clip}@{file}@teacher.")


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), None, {}, {"epoch": 3}, 7, {"a": [torch.ones(1)]}])
def test_a_released_file_that_holds_no_names_and_tensors_is_refused(content, small_clip, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    assert "file.pth" in refusal(load_encoder, f"{small_clip}@{tmp_path / 'file.pth'}")


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "no weights"])
def test_released_weights_that_do_not_fit_are_refused(damage, small_clip, state, tmp_path):
    torch.save(DAMAGE[damage][0](state), tmp_path / "file.pth")
    assert "file.pth" in refusal(load_encoder, f"{small_clip}@{tmp_path / 'file.pth'}")


def test_a_text_tower_that_lacks_a_weight_is_not_mixed_with_the_original(small_clip, state, tmp_path):
    torch.save({n: w for n, w in state.items() if n != "token_embedding.weight"}, tmp_path / "file.pth")
    assert "missing, as token_embedding.weight" in refusal(load_encoder, f"{small_clip}@{tmp_path / 'file.pth'}")


def test_an_existing_path_with_an_at_in_it_is_a_path(small_clip, state, tuned, tmp_path):
    folder = shutil.copytree(small_clip, tmp_path / "clip@step100")
    assert torch.equal(embeddings(load_encoder(folder)), embeddings(load_encoder(small_clip)))
    file = tmp_path / "a@b.pth"
    torch.save(state, file)
    assert torch.equal(embeddings(load_encoder(f"{folder}@{file}")), tuned)
    assert "c@d.pth" in refusal(load_encoder, f"{small_clip}@{tmp_path / 'c@d.pth'}")


def test_a_load_of_a_file_says_which_activation_it_uses_and_how_to_have_the_other(
    ours, theirs, state, capsys, tmp_path
):
    torch.save(state, tmp_path / "file.pth")
    torch.save(load_encoder(theirs).open_clip_state(), tmp_path / "theirs.pth")
    capsys.readouterr()
    load_encoder(ours)
    assert capsys.readouterr().out == ""
    load_encoder(f"{ours}@{tmp_path / 'file.pth'}")
    (line,) = capsys.readouterr().out.splitlines()
    assert "computes with GELU" in line and f'for QuickGELU: "quick_gelu": true in model_cfg of {ours}' in line
    load_encoder(f"{theirs}@{tmp_path / 'theirs.pth'}")
    assert f'"hidden_act": "quick_gelu" for both towers in {theirs}' in capsys.readouterr().out
    for name, other in (("ViT-L-14-quickgelu", "ViT-L-14:TAG@FILE"), ("ViT-L-14", "ViT-L-14-quickgelu:TAG@FILE")):
        quick = {"model_cfg": {"quick_gelu": "quick" in name}}
        assert encoders.describe_activation(f"{name}", False, quick).endswith(other)


# --- no code of others runs -------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


AUTO = ("Config", "Model", "Tokenizer", "ImageProcessor", "Processor", "FeatureExtractor")
EVIL = """
import os
os.makedirs({marker!r}, exist_ok=True)
from transformers import CLIPTokenizer
class Evil(CLIPTokenizer): pass
"""


def plant_scripts(folder: Path, marker: Path, **settings: object) -> None:
    """Put a script beside every JSON file of a folder, and name it, and `settings`, in the file."""
    for path in list(folder.rglob("*.json")):
        for name in ("evil", "pipeline", "hf_hook", "modeling_clip", "tokenization_clip", path.parent.name):
            path.with_name(f"{name}.py").write_text(EVIL.format(marker=str(marker)))
        if "config" in path.name:
            auto = {f"Auto{kind}": "evil.Evil" for kind in AUTO} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
            change_json(path, auto_map=auto, trust_remote_code=True, hf_hook="evil.Evil", **settings)


def plant_pickles(folder: Path, marker: Path) -> None:
    """Replace every file of weights under a folder by pickles that make `marker`, with every ending that is read."""
    for file in list(folder.rglob("*.safetensors")):
        stems = [file.stem, "pytorch_model", "open_clip_pytorch_model"]
        for path in (file.with_name(stem + end) for stem in stems for end in (".bin", ".pth", ".pt", ".ckpt")):
            torch.save(load_file(file) | {"zz": Bomb(marker)}, path)
        file.unlink()


def change_tower(folder: Path, tower: str, **changes: object) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"][tower] |= changes
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def plant_model_index(folder: Path) -> None:
    index = {"_class_name": ["pipeline", "Evil"], "unet": ["evil", "Evil"], "scheduler": ["hf_hook", "Evil"]}
    (folder / "model_index.json").write_text(json.dumps(index))


PLANTS = {  # where -> (kind of folder, how, which needs the folder and the marker)
    "trust_remote_code": (
        "ours", lambda f, m: change_tower(f, "text_cfg", tokenizer_kwargs={"trust_remote_code": True}),
    ),
    "a tokenizer's name": ("ours", lambda f, m: change_tower(f, "text_cfg", hf_tokenizer_name=str(f))),
    "a text tower's name": ("ours", lambda f, m: change_tower(f, "text_cfg", hf_model_name=str(f))),
    "a timm tower's name": ("ours", lambda f, m: change_tower(f, "vision_cfg", timm_model_name=f"local-dir:{f}")),
    "open_clip pickles": ("ours", plant_pickles),
    "transformers configs": ("theirs", lambda f, m: None),
    "other classes": ("theirs", lambda f, m: [
        change_json(f / "config.json", architectures=["Evil"], attn_implementation="evil/kernel"),
        change_json(f / "tokenizer_config.json", tokenizer_class="Evil"),
        change_json(f / "preprocessor_config.json", image_processor_type="Evil"),
    ]),
    "another type of model": ("theirs", lambda f, m: change_json(f / "config.json", model_type="evil")),
    "an adapter": ("theirs", lambda f, m: (f / "adapter_config.json").write_text(json.dumps(
        {"base_model_name_or_path": str(f), "peft_type": "LORA", "auto_mapping": {"parent_library": "evil"}}
    ))),
    "transformers pickles": ("theirs", plant_pickles),
    "diffusers configs": ("diffusion", lambda f, m: None),
    "a custom pipeline": ("diffusion", lambda f, m: plant_model_index(f)),
    "custom parts": ("diffusion", lambda f, m: [
        change_json(f / part / name, _class_name=["evil", "Evil"], model_type="evil", tokenizer_class="Evil")
        for part, name in (("vae", "config.json"), ("unet", "config.json"), ("text_encoder", "config.json"),
                           ("scheduler", "scheduler_config.json"), ("tokenizer", "tokenizer_config.json"))
    ]),
    "diffusers pickles": ("diffusion", plant_pickles),
    "Stable Diffusion 3": ("sd3", lambda f, m: change_json(f / "model_index.json", transformer=["evil", "Evil"])),
    "Stable Diffusion 3 pickles": ("sd3", plant_pickles),
}  # fmt: skip


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """What any planted code makes. Nothing is asked at the keyboard, where a reader could agree."""
    monkeypatch.setattr("builtins.input", lambda prompt="": (tmp_path / "ran").mkdir())
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ran"


@pytest.mark.parametrize("place", PLANTS)
def test_no_code_that_a_model_brings_is_run(place, request, marker, monkeypatch, tmp_path):
    kind, plant = PLANTS[place]
    folder = write_diffusion3(tmp_path / "sd3") if kind == "sd3" else request.getfixturevalue(kind)
    load = load_denoiser if kind in ("diffusion", "sd3") else load_encoder
    monkeypatch.syspath_prepend(folder)  # as where a notebook is run inside the folder
    plant_scripts(folder, marker)
    plant(folder, marker)
    for room in (encoders, registry):
        monkeypatch.setattr(room, "fetch_repository", lambda name, files: str(folder))
    for name in (str(folder), "some/model"):
        with contextlib.suppress(ValueError, OSError):
            load(name)
    assert not marker.exists()


def test_no_code_that_a_checkpoint_or_a_projector_brings_is_run(small_clip, small_settings, marker, tmp_path):
    run = Run.open({**asdict(small_settings), "stage": "tune"}, tmp_path)
    (run.folder / "checkpoint").mkdir()
    for name in ("weights.safetensors", "optimizer.pt", "a.pth", "a.pt", "a.ckpt", "a.bin", "a.safetensors"):
        torch.save({"step": Bomb(marker)}, run.folder / "checkpoint" / name)
    files = sorted((run.folder / "checkpoint").glob("a.*"))
    encoder, denoiser = load_encoder(small_clip), load_denoiser(small_settings.denoiser)
    projectors = [replace(small_settings, projector=str(path)) for path in (run.folder, files[-1])]
    loads = [partial(build_conditioner, settings, encoder, denoiser) for settings in projectors]
    loads += [partial(load_encoder, f"{small_clip}@{file}") for file in files]
    loads += [run.resume, partial(tuned_encoder, run)]
    for load in loads:
        with pytest.raises(Exception):  # noqa: B017, of any kind
            load()
    assert not marker.exists()


def test_what_is_planted_would_run_if_it_were_trusted(ours, marker):
    """So that the tests above can fail."""
    plant_scripts(ours, marker)
    AutoTokenizer.from_pretrained(ours, trust_remote_code=True)
    assert marker.exists()
    marker.rmdir()
    plant_pickles(ours, marker)
    torch.load(ours / "open_clip_pytorch_model.bin", weights_only=False)
    assert marker.exists()
