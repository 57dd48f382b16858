"""LLaVA folders are what plain transformers loads, and compute what their parts compute."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import write_language
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    LlavaForConditionalGeneration,
)

from diva_lab.cli import main
from diva_lab.evaluation.table import open_encoder
from diva_lab.llava.folders import IMAGE, assemble, load_llava, swap
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.training.stages import tune

SHAPES = {"clip": (48, "default", 16), "siglip": (48, "full", 16), "metaclip-h": (80, "default", 16)}


def photo(px: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(px, px + 8, 3), dtype=np.uint8))


def plain(folder):
    """The folder as a user of transformers loads it."""
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    return model.eval(), AutoProcessor.from_pretrained(folder)


def ask(folder, text="is the star red ?"):
    model, processor = plain(folder)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return model, processor, processor(images=photo(), text=prompt, return_tensors="pt")


@pytest.mark.parametrize("kind", SHAPES)
def test_a_tower_of_each_kind_assembles_and_plain_transformers_generates_with_it(kind, towers, language, tmp_path):
    folder = assemble(towers[kind], language, tmp_path / "llava")
    model, processor, inputs = ask(folder)
    width, strategy, tokens = SHAPES[kind]
    assert model.config.vision_config.hidden_size == width
    assert model.config.vision_feature_select_strategy == processor.vision_feature_select_strategy == strategy
    assert model.config.image_seq_length == tokens == (inputs.input_ids == model.config.image_token_id).sum()
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert said.shape[1] > inputs.input_ids.shape[1]
    assert said.max() < len(processor.tokenizer)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_tower_in_the_folder_gives_the_encoders_own_patch_tokens(kind, towers, language, tmp_path):
    model, _, inputs = ask(assemble(towers[kind], language, tmp_path / "llava"))
    encoder = open_encoder(towers[kind])
    last = {}
    blocks = getattr(encoder.model.visual, "trunk", None)
    blocks = blocks.blocks if blocks is not None else encoder.model.visual.transformer.resblocks
    blocks[-2].register_forward_hook(lambda module, given, out: last.update(tokens=out))
    encoder.read_pixels(inputs.pixel_values)
    own = last["tokens"][:, kind != "siglip" :]
    read = model.model.vision_tower(inputs.pixel_values, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(read[:, kind != "siglip" :], own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_text_alone_has_the_language_models_own_logits_and_no_new_word_is_ever_the_likeliest(kind, towers, tmp_path):
    language = write_language(tmp_path / "language", kind=kind)
    model, processor = plain(assemble(towers["clip"], language, tmp_path / "llava"))
    ids = AutoTokenizer.from_pretrained(language)("is the star red ?", return_tensors="pt").input_ids
    own = AutoModelForCausalLM.from_pretrained(language)(ids).logits
    logits = model(processor.tokenizer("is the star red ?", return_tensors="pt").input_ids).logits
    torch.testing.assert_close(logits[..., : own.shape[-1]], own)
    assert logits.argmax(-1).max() < own.shape[-1] < logits.shape[-1]
    assert processor.tokenizer.convert_tokens_to_ids(IMAGE) == model.config.image_token_id >= own.shape[-1]


def test_the_same_call_writes_the_same_weights(towers, language, tmp_path):
    first, second = (assemble(towers["clip"], language, tmp_path / name) for name in "ab")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def run(towers, tmp_path_factory) -> Run:
    root = tmp_path_factory.mktemp("runs")
    settings = Settings(encoder=str(towers["clip"]), objective="dcr", projector="new", batch=2, steps=1, lr=0.01)
    return tune(settings, root)


def test_a_run_and_its_mixes_are_towers(run, llava, tmp_path):
    moved = {}
    for mix in ("", ":0.5", ":0"):
        assert main(["llava", "swap", str(llava), "--encoder", f"{run.folder}{mix}", str(tmp_path / f"m{mix}")]) == 0
        weights = load_llava(tmp_path / f"m{mix}").model.model.vision_tower.state_dict()
        moved[mix] = torch.cat([w.flatten() for w in weights.values()])
    original = torch.cat([w.flatten() for w in load_llava(llava).model.model.vision_tower.state_dict().values()])
    torch.testing.assert_close(moved[":0"], original)
    assert (moved[""] - original).abs().max() > 1e-3
    torch.testing.assert_close(moved[":0.5"], (moved[""] + original) / 2, atol=1e-5, rtol=1e-4)


def test_a_siglip_takes_a_clips_place_and_the_whole_folder_follows(llava, towers, tmp_path):
    folder = swap(llava, towers["siglip"], tmp_path / "swapped")
    model, processor, inputs = ask(folder)
    before, _ = plain(llava)
    assert model.config.vision_feature_select_strategy == processor.vision_feature_select_strategy == "full"
    assert (processor.num_additional_image_tokens, processor.patch_size) == (0, 8)
    assert list(processor.image_processor.image_mean) == [0.5] * 3
    assert (inputs.input_ids == model.config.image_token_id).sum() == model.config.image_seq_length == 16
    model.generate(**inputs, max_new_tokens=2)
    for part in ("multi_modal_projector", "language_model"):
        for name, weight in getattr(before.model, part).state_dict().items():
            assert torch.equal(weight, getattr(model.model, part).state_dict()[name])
    back = swap(folder, towers["clip"], tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (llava / "model.safetensors").read_bytes()
    assert json.loads((back / "diva-lab.json").read_text())["rung"] == "tower swapped, nothing trained"


def test_lmms_evals_way_of_loading_and_asking_gives_the_same_prompt(llava):
    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype="auto", attn_implementation=None)
    processor = AutoProcessor.from_pretrained(llava)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    messages = [{"role": "user", "content": "<image>\nis the star red ?"}]  # texts, in which the image is a token
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=[photo()], text=text, return_tensors="pt").to("cpu", model.dtype)
    assert torch.equal(inputs.input_ids, ask(llava)[2].input_ids)
    assert tokenizer.decode([tokenizer.eos_token_id]) == "</s>"
    model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=tokenizer.pad_token_id, use_cache=True)


def test_a_processor_that_makes_another_number_of_tokens_is_told(llava, tmp_path):
    folder = shutil.copytree(llava, tmp_path / "llava")
    settings = json.loads((folder / "processor_config.json").read_text()) | {"num_additional_image_tokens": 0}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"makes 15 tokens of an image, .* image_seq_length = 16; expected one number"):
        load_llava(folder)


def one_line(capsys, *args) -> str:
    assert main(["llava", *map(str, args)]) == 2
    text = capsys.readouterr().err.strip()
    assert "\n" not in text and "Traceback" not in text
    return text


def test_another_width_is_refused_in_one_line(llava, towers, tmp_path, capsys):
    text = one_line(capsys, "swap", llava, "--encoder", towers["metaclip-h"], tmp_path / "out")
    assert "48 wide" in text and "80 wide" in text and "assemble" in text
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_a_llava_is_refused_in_one_line(llava, towers, language, tmp_path, capsys):
    out = tmp_path / "out"

    def refuses(expected, *args):
        assert expected in one_line(capsys, *args, out)
        assert not out.exists()

    swaps = ("--encoder", towers["clip"])
    refuses("no such folder", "assemble", *swaps, "--language", tmp_path / "none")
    refuses("no config.json", "assemble", *swaps, "--language", tmp_path)
    refuses("model_type = 'llama'; expected 'llava'", "swap", language, *swaps)
    short = write_language(tmp_path / "short", max_position_embeddings=16)
    refuses("an image takes 16 tokens", "assemble", *swaps, "--language", short)
    half = shutil.copytree(llava, tmp_path / "half")
    whole = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refuses("half", "swap", half, *swaps)
    bare = shutil.copytree(llava, tmp_path / "bare", ignore=shutil.ignore_patterns("processor_config.json"))
    refuses("no processor_config.json", "swap", bare, *swaps)
    wordless = shutil.copytree(language, tmp_path / "wordless", ignore=shutil.ignore_patterns("tokenizer*"))
    refuses("wordless", "assemble", *swaps, "--language", wordless)


def test_a_folder_that_is_not_new_is_left_as_it_is(llava, towers, capsys):
    text = one_line(capsys, "swap", llava, "--encoder", towers["clip"], llava)
    assert "name a new folder" in text


def test_a_model_that_scales_its_logits_is_refused(towers, tmp_path):
    language = write_language(tmp_path / "language")
    vocabulary = len(AutoTokenizer.from_pretrained(language))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    GraniteForCausalLM(GraniteConfig(vocab_size=vocabulary, logits_scaling=8.0, **sizes)).save_pretrained(language)
    with pytest.raises(ValueError, match="GraniteForCausalLM, whose logits are more than its output layer's"):
        assemble(towers["clip"], language, tmp_path / "llava")
