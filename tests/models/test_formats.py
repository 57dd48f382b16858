import json
import re
import shutil
import string

import open_clip
import pytest
import torch
import torch.nn.functional as F
from one_step import open_lora, pictures
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from small_models import CLIPA, HUGE, on_meta, timm_tower, unlike, write_clip_of, write_transformers_clip
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    GemmaTokenizer,
    SiglipConfig,
    SiglipModel,
    T5Tokenizer,
)  # fmt: skip

from diva_lab.models.encoders import ENCODERS, load_encoder
from diva_lab.models.formats import (
    convert,
    load_released,
    read_transformers,
    transformers_kind,
    transformers_tokenizer,
)
from diva_lab.models.layers import fuse_attention
from diva_lab.models.lora import make_trainable
from diva_lab.training.export import save_encoder
from diva_lab.training.presets import BACKBONES

TEXTS = ["a photo of a disc", "a photo of a red star", ""]
KINDS = [("clip", "quick_gelu"), ("clip", "gelu"), ("siglip", "gelu_pytorch_tanh"), ("siglip", "gelu")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def folder(request, tmp_path_factory):
    return write_transformers_clip(tmp_path_factory.mktemp("models") / request.param[0], *request.param)


@pytest.fixture(scope="module")
def images():
    return pictures(5).float() / 255


def by_transformers(folder, images) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length embeddings of images and texts as transformers itself computes them from a folder."""
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    ids = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    pixels = processor((images * 255).byte(), return_tensors="pt").pixel_values
    with torch.no_grad():
        features = model.get_image_features(pixels), model.get_text_features(ids)
    return tuple(F.normalize(getattr(x, "pooler_output", x), dim=-1) for x in features)


def by_us(encoder, images) -> tuple[torch.Tensor, torch.Tensor]:
    return encoder.encode_image(images), encoder.encode_text(TEXTS)


def same(one, two, atol=1e-5) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


# --- transformers -> here -> both -------------------------------------------------------------------------------


def test_a_transformers_folder_embeds_images_and_texts_as_transformers_does(folder, images):
    same(by_us(load_encoder(folder), images), by_transformers(folder, images))


def test_what_is_saved_is_the_same_model_for_transformers_and_for_us(folder, images, tmp_path):
    encoder = load_encoder(folder)
    written = save_encoder(encoder, tmp_path / "out")
    same(by_transformers(written["transformers"], images), by_us(encoder, images))
    for path in written.values():
        same(by_us(load_encoder(path), images), by_us(encoder, images), atol=1e-6)


def test_open_clip_reads_what_is_saved_for_it(folder, images, tmp_path):
    encoder = load_encoder(folder)
    name = f"local-dir:{save_encoder(encoder, tmp_path / 'out')['open_clip']}"
    model = open_clip.create_model(name, require_pretrained=True).eval()
    with torch.no_grad():
        embeddings = (
            model.encode_image(encoder.preprocess(images), normalize=True),
            model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True),
        )
    tanh = encoder.config.get("timm_gelu") == "tanh"  # which open_clip computes by erf
    same(embeddings, by_us(encoder, images), atol=2e-3 if tanh else 1e-5)


def test_an_open_clip_model_goes_to_transformers_and_comes_back(small_clip, images, tmp_path):
    encoder = load_encoder(small_clip)
    written = save_encoder(encoder, tmp_path / "out")
    same(by_transformers(written["transformers"], images), by_us(encoder, images))
    same(by_us(load_encoder(written["transformers"]), images), by_us(encoder, images), atol=1e-6)


def test_the_layout_of_vit_h_goes_to_transformers_and_comes_back(images, tmp_path):
    encoder = load_encoder(write_clip_of(tmp_path / "huge", HUGE, resize_mode="squash"))
    written = save_encoder(encoder, tmp_path / "out")
    same(by_transformers(written["transformers"], images), by_us(encoder, images))
    again = load_encoder(written["transformers"])
    same(by_us(again, images), by_us(encoder, images), atol=1e-6)
    assert again.config["model_cfg"]["vision_cfg"]["head_width"] == 40 and again.squash


def hidden_states(folder, pixels) -> list[torch.Tensor]:
    """The hidden states of a transformers folder's image tower, without the class token of a CLIP."""
    model = AutoModel.from_pretrained(folder).vision_model
    first = 0 if "siglip" in model.config.model_type else 1
    with torch.no_grad():
        return [state[:, first:] for state in model(pixels, output_hidden_states=True).hidden_states]


@pytest.mark.parametrize("rank", [None, 0, 4], ids=["original", "split", "lora"])
def test_patch_tokens_of_a_layer_are_the_hidden_states_of_transformers(rank, folder, images, tmp_path):
    encoder = load_encoder(folder)
    if rank == 4:
        make_trainable(encoder, rank)
        open_lora(encoder)
        folder = save_encoder(encoder, tmp_path / "out")["transformers"]
    if rank is None:
        fuse_attention(encoder.model.visual)
    expected = hidden_states(folder, encoder.preprocess(images))
    with torch.no_grad():
        layers = {layer: encoder.tokens(images, layer) for layer in (1, -2)}
        torch.testing.assert_close(encoder.tokens(images), expected[-2], atol=1e-5, rtol=0)
        last = encoder.tokens(images, -1)
    assert torch.equal(layers[1], layers[-2]) and last.shape == expected[-1].shape  # of two blocks
    if transformers_kind(encoder.config) == "clip":  # of SigLIP transformers gives it after the final norm
        torch.testing.assert_close(last, expected[-1], atol=1e-5, rtol=0)


def test_a_folder_that_leaves_preprocessing_to_open_clip_is_saved_in_both_formats(images, tmp_path):
    folder = write_clip_of(tmp_path / "clip", HUGE)
    file = folder / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": json.loads(file.read_text())["model_cfg"]}))
    encoder = load_encoder(folder)
    written = save_encoder(encoder, tmp_path / "out")
    same(by_transformers(written["transformers"], images), by_us(encoder, images))


# --- how images are resized -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_transformers_resizes_as_the_encoder_does(mode, interpolation, tmp_path):
    folder = write_clip_of(tmp_path / "clip", HUGE, resize_mode=mode, interpolation=interpolation)
    encoder = load_encoder(folder)
    written = save_encoder(encoder, tmp_path / "out")["transformers"]
    wide = F.interpolate(pictures(3).float() / 255, (40, 90))
    processor = AutoImageProcessor.from_pretrained(written)
    pixels = processor(wide, do_rescale=False, return_tensors="pt").pixel_values * encoder.std + encoder.mean
    pixels = (pixels.clamp(0, 1) - encoder.mean) / encoder.std  # bicubic overshoots; as bytes, transformers clips too
    ours = [load_encoder(path).preprocess(wide) for path in (folder, written)]
    assert torch.equal(*ours)
    torch.testing.assert_close(pixels, ours[0], atol=1e-5, rtol=0)
    others = {"shortest": "squash", "squash": "shortest", "bilinear": "bicubic", "bicubic": "bilinear"}
    for name, value in (("resize_mode", mode), ("interpolation", interpolation)):
        other = write_clip_of(tmp_path / name, HUGE, **{"resize_mode": mode, "interpolation": interpolation} | {
            name: others[value]
        })  # fmt: skip
        assert (load_encoder(other).preprocess(wide) - pixels).abs().max() > 0.1


def test_an_old_image_processor_with_one_number_for_a_size_is_read_as_transformers_reads_it(images, tmp_path):
    folder = write_transformers_clip(tmp_path / "clip", "clip", "quick_gelu")
    old = {"crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 32}
    old |= {"feature_extractor_type": "CLIPFeatureExtractor"}  # as openai/clip-vit-large-patch14 had it
    old |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    encoder = load_encoder(folder)
    assert not encoder.squash and encoder.interpolation == "bicubic"
    same(by_us(encoder, images), by_transformers(folder, images))


def test_an_image_processor_inside_a_processors_file_is_read(tmp_path):
    folder = write_transformers_clip(tmp_path / "clip", "clip", "quick_gelu")
    parts = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = load_encoder(folder)
    (folder / "preprocessor_config.json").unlink()
    CLIPProcessor(*parts).save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    assert load_encoder(folder).config == expected.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 0}, r"resample = 0; expected 2 \(bilinear\) or 3"),
        ({"size": 40}, "makes 40 px of a side; expected the model's 32 px"),
        ({"size": {"height": 32, "width": 16}}, "makes 16 px of a side"),
        ({"crop_size": {"height": 24, "width": 32}}, "makes 24 px of a side"),
        ({"do_center_crop": False}, "expected height and width, or shortest_edge and a crop"),
        ({"size": {"longest_edge": 32}}, "expected height and width, or shortest_edge and a crop"),
    ],
    ids=str,
)
def test_a_way_to_resize_that_is_not_ours_is_refused_naming_it(change, message, tmp_path):
    folder = write_transformers_clip(tmp_path / "clip", "clip", "gelu")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(folder)
    assert str(folder) in str(caught.value)


# --- texts ------------------------------------------------------------------------------------------------------

MESSY = [
    "A Photo, of_a red-star!",
    "  TWO   dogs' (small) toys.\n",
    "cafe\u0301 & 7 \u201cstars\u201d\u00a0of a dog\u2019s",
    string.punctuation,
    "",
]


def test_transformers_reads_a_siglips_texts_as_open_clip_does_capitals_and_punctuation_included(tmp_path):
    """With a tokenizer of SigLIP's class in open_clip, T5's, that knows capitals and punctuation apart."""
    folder = write_transformers_clip(tmp_path / "siglip", "siglip", "gelu")
    encoder = load_encoder(folder)
    words = [(x, 0.0) for x in ("<pad>", "</s>", "<unk>")] + [(x, -2.0) for x in ("\u2581", *string.printable[:94])]
    T5Tokenizer(vocab=[*words, ("\u2581star", -1.0)], extra_ids=0, pad_token="</s>").save_pretrained(tmp_path / "t5")
    context = encoder.config["model_cfg"]["text_cfg"]["context_length"]
    encoder.tokenizer = HFTokenizer(str(tmp_path / "t5"), context, clean="canonicalize")
    written = save_encoder(encoder, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(written["transformers"])
    tokens = theirs(MESSY, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(tokens.input_ids, encoder.tokenizer(MESSY)) and list(tokens) == ["input_ids"]
    raw = encoder.tokenizer.tokenizer(MESSY, padding="max_length", max_length=context, truncation=True)
    assert raw["input_ids"] != tokens.input_ids.tolist()  # so that cleaning is seen
    limit = ["a &lt;star&gt;"]  # open_clip repairs it, the tokenizer alone cannot: see `export`
    ids = theirs(limit, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert not torch.equal(ids, encoder.tokenizer(limit))
    model = AutoModel.from_pretrained(written["transformers"]).eval()
    with torch.no_grad():
        text = model.get_text_features(**tokens)
    same((F.normalize(getattr(text, "pooler_output", text), dim=-1),), (encoder.encode_text(MESSY),))
    for path in written.values():
        assert torch.equal(load_encoder(path).tokenizer(MESSY), tokens.input_ids)


SIGLIP2 = {  # open_clip's layout of a SigLIP 2: exact GELU in the image tower, tanh in the text tower, 64 tokens
    "embed_dim": 48, "init_logit_bias": -10, "custom_text": True,
    "vision_cfg": {"timm_model_name": "vit_small_patch8_siglip_32", "timm_model_pretrained": False,
                   "timm_pool": "map", "timm_proj": "none", "patch_size": 16},  # the default, which timm does not read
    "text_cfg": {"width": 32, "heads": 2, "layers": 2, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
                 "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
                 "tokenizer_kwargs": {"clean": "canonicalize"}},
}  # fmt: skip


def gemma_tokenizer(folder):
    """A small tokenizer of SigLIP 2's class and settings, <eos> at the end, <pad> after it; how many words it has."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["\u2581", *sorted(set(string.printable) - set(string.whitespace)), "st", "ar", "star"]
    merges = [("s", "t"), ("a", "r"), ("st", "ar")]
    options = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, **options).save_pretrained(folder)
    return len(words)


def test_a_siglip_2_of_one_size_is_exported_and_loads_in_transformers(images, tmp_path):
    folder = write_clip_of(tmp_path / "siglip2", SIGLIP2, mean=[0.5] * 3, std=[0.5] * 3, resize_mode="squash")
    words = {"vocab_size": gemma_tokenizer(folder), "context_length": 64}
    change_json(folder / "open_clip_config.json", ("model_cfg", "text_cfg"), **words)
    torch.manual_seed(0)
    model = unlike(open_clip.create_model(f"local-dir:{folder}", load_weights=False))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    encoder = load_encoder(folder)
    ids = encoder.tokenizer(TEXTS)
    assert ids.shape == (3, 64) and (ids[:2] == 1).sum(1).tolist() == [1, 1] and ids[2].tolist()[:2] == [1, 0]
    written = save_encoder(encoder, tmp_path / "out")
    assert type(AutoModel.from_pretrained(written["transformers"])) is SiglipModel
    same(by_transformers(written["transformers"], images), by_us(encoder, images))
    tokens = AutoTokenizer.from_pretrained(written["transformers"])(MESSY, padding="max_length", max_length=64)
    assert tokens.input_ids == encoder.tokenizer(MESSY).tolist()
    for path in written.values():
        same(by_us(load_encoder(path), images), by_us(encoder, images), atol=1e-6)


# --- what transformers does not support -------------------------------------------------------------------------


def test_a_model_that_only_open_clip_can_hold_is_saved_for_open_clip_alone(images, tmp_path):
    encoder = load_encoder(write_clip_of(tmp_path / "clipa", CLIPA))
    written = save_encoder(encoder, tmp_path / "out")
    assert list(written) == ["open_clip"] and [path.name for path in (tmp_path / "out").iterdir()] == ["open_clip"]
    same(by_us(load_encoder(written["open_clip"]), images), by_us(encoder, images), atol=1e-6)


@pytest.mark.parametrize(
    ("tower", "change"),
    [
        ("vision_cfg", {"no_ln_pre": True}), ("vision_cfg", {"pool_type": "avg"}), ("vision_cfg", {"qk_norm": True}),
        ("vision_cfg", {"final_ln_after_pool": True}), ("vision_cfg", {"norm_kwargs": {"eps": 1e-6}}),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}), ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"pool_type": "last"}), ("text_cfg", {"act_kwargs": {"approximate": "tanh"}}),
        ("text_cfg", {"tokenizer_kwargs": {"strip_sep_token": True}}), ("text_cfg", {"hf_model_name": "some/bert"}),
        (None, {"custom_text": True}), (None, {"init_logit_bias": -10}), (None, {"multimodal_cfg": {"layers": 2}}),
    ],
    ids=str,
)  # fmt: skip
def test_a_clip_of_another_kind_is_refused_naming_what_is_other(tower, change):
    def config(**changes):
        return {"model_cfg": json.loads(json.dumps(HUGE)) | changes}

    assert transformers_kind(config()) == "clip"
    other = config(**{tower: HUGE[tower] | change} if tower else change)
    ((key, _),) = change.items()
    with pytest.raises(NotImplementedError, match=f"{f'{tower}.' if tower else ''}{key}"):
        transformers_kind(other)


def test_of_open_clips_models_plain_vits_and_siglips_have_a_kind():
    names: dict[str, set[str]] = {"clip": set(), "siglip": set(), "none": set()}
    for name in open_clip.list_models():
        try:
            names[transformers_kind({"model_cfg": open_clip.get_model_config(name)})].add(name)
        except NotImplementedError:
            names["none"].add(name)
    assert {ENCODERS[name][0] for name in REAL if "siglip" not in name} | {"ViT-B-32", "ViT-bigG-14"} <= names["clip"]
    assert all(name.startswith("ViT-") and "SigLIP" in name for name in names["siglip"])
    assert {"ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP-384", "ViT-SO400M-16-SigLIP2-384"} <= names["siglip"]
    assert {"RN50", "EVA02-L-14", "ViT-L-14-CLIPA", "coca_ViT-L-14", "roberta-ViT-B-32"} <= names["none"]


@pytest.mark.parametrize(("key", "value"), [("timm_pool", "avg"), ("timm_proj", "linear"), ("pool_type", "argmax")])
def test_a_siglip_of_another_kind_is_refused_naming_what_is_other(key, value):
    config = open_clip.get_model_config("ViT-SO400M-14-SigLIP")
    assert transformers_kind({"model_cfg": config}) == "siglip"
    config["vision_cfg" if "timm" in key else "text_cfg"][key] = value
    with pytest.raises(NotImplementedError, match=key):
        transformers_kind({"model_cfg": config})


def test_a_folder_that_holds_something_is_not_written_to(small_clip, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        save_encoder(load_encoder(small_clip), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_another_kind_of_transformers_model_is_refused_by_name(small_diffusion):
    with pytest.raises(ValueError, match="clip_text_model"):
        load_encoder(small_diffusion / "text_encoder")


def test_a_transformers_folder_without_weights_is_refused_naming_it(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_encoder(tmp_path)


@pytest.mark.parametrize("size", [[32, 16], [16, 32]])
def test_models_of_images_that_are_not_square_are_refused_by_name(size, tmp_path):
    ours, theirs = ("model_cfg", "vision_cfg"), ("vision_config",)
    changes = {
        write_clip_of(tmp_path / "clip", HUGE) / "open_clip_config.json": ours,
        write_clip_of(tmp_path / "eva", timm_tower("eva_small_patch8_32")) / "open_clip_config.json": ours,
        write_transformers_clip(tmp_path / "hf", "clip", "gelu") / "config.json": theirs,
        write_transformers_clip(tmp_path / "siglip", "siglip", "gelu") / "config.json": theirs,
    }
    for path, keys in changes.items():
        change_json(path, keys, image_size=size)
        with pytest.raises(ValueError, match=re.escape(f"{path}: image_size = {size} is not square")):
            load_encoder(path.parent)


def test_naflex_models_are_refused_by_name(tmp_path):
    ours = write_clip_of(tmp_path / "clip", timm_tower("eva_small_patch8_32")) / "open_clip_config.json"
    change_json(ours, ("model_cfg", "vision_cfg"), timm_model_name="naflexvit_base_patch16_siglip")
    with pytest.raises(ValueError, match=f"{ours}: 'naflexvit_base_patch16_siglip' is a NaFlex model"):
        load_encoder(ours.parent)
    theirs = write_transformers_clip(tmp_path / "hf", "siglip", "gelu") / "config.json"
    change_json(theirs, (), model_type="siglip2")
    with pytest.raises(ValueError, match=rf"{theirs}: model_type = 'siglip2' \(SigLIP 2 NaFlex; .* is a siglip\)"):
        load_encoder(theirs.parent)


def change_json(path, keys, **changes) -> None:
    """Change a part of a file, which `keys` lead to."""
    whole = part = json.loads(path.read_text())
    for key in keys:
        part = part[key]
    part.update(changes)
    path.write_text(json.dumps(whole))


# --- names and shapes at real size ------------------------------------------------------------------------------


def real(name: str, shape: tuple[int, int, int, int], px: int, text: tuple[int, int, int, int], length: int, dim: int):
    """transformers' model of these (width, layers, heads, MLP), without weights; sizes as the hub's config.json."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    vision = dict(zip(keys, shape, strict=True)) | {"image_size": px, "patch_size": 14}
    words = dict(zip(keys, text, strict=True)) | {"max_position_embeddings": length}
    with torch.device("meta"):
        if "siglip" in name:
            return SiglipModel(SiglipConfig(vision_config=vision, text_config=words | {"vocab_size": 32000}))
        vision |= {"projection_dim": dim}
        return CLIPModel(CLIPConfig(vision_config=vision, text_config=words, projection_dim=dim))


L14 = ((1024, 24, 16, 4096), (768, 12, 12, 3072), 77, 768)
H14 = ((1280, 32, 16, 5120), (1024, 24, 16, 4096), 77, 1024)
SO400M = ((1152, 27, 16, 4304), (1152, 27, 16, 4304))
REAL = {  # encoder -> image tower, px, text tower, context, dimension
    "openai-l14": (L14[0], 224, *L14[1:]), "openai-l14-336": (L14[0], 336, *L14[1:]),
    "metaclip-l14": (L14[0], 224, *L14[1:]), "metaclip-h14": (H14[0], 224, *H14[1:]),
    "siglip-so400m": (SO400M[0], 224, SO400M[1], 16, 1152), "siglip-so400m-384": (SO400M[0], 384, SO400M[1], 64, 1152),
    "dfn-h14": (H14[0], 224, *H14[1:]), "dfn-h14-378": (H14[0], 378, *H14[1:]),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_every_weight_of_a_real_backbone_has_its_counterpart(name):
    ours, theirs = on_meta(name).state_dict(), real(name, *REAL[name]).state_dict()
    kind = "siglip" if "siglip" in name else "clip"
    for one, two in ((ours, theirs), (theirs, ours)):
        converted = convert(one, kind, two)
        assert {key: value.shape for key, value in converted.items()} == {
            key: value.shape for key, value in two.items()
        }


def test_all_backbones_are_checked_at_real_size():
    assert set(REAL) == set(BACKBONES)


def test_a_weight_too_many_or_too_few_is_named():
    ours, theirs = on_meta("openai-l14").state_dict(), real("openai-l14", *REAL["openai-l14"]).state_dict()
    with pytest.raises(ValueError, match=r"visual\.lora"):
        convert(ours | {"visual.lora": torch.zeros(1)}, "clip", theirs)
    del theirs["vision_model.post_layernorm.bias"]
    with pytest.raises(ValueError, match=r"visual\.ln_post\.bias"):
        convert(theirs, "clip", ours)


# --- released weights -------------------------------------------------------------------------------------------


@pytest.fixture(params=["", "class_model.model.", "module.class_model.model."])
def prefix(request):
    return request.param


def released(path, state, prefix, **beside) -> str:
    """A .pth as DIVA's trainer saves it: all of it, the encoder behind `prefix`."""
    torch.save({f"{prefix}{name}": value for name, value in state.items()} | beside, path)
    return str(path)


@pytest.mark.parametrize("kind", [("clip", "quick_gelu"), ("siglip", "gelu")], ids="-".join)
def test_released_weights_fill_the_encoder_whatever_their_prefix(kind, prefix, images, tmp_path):
    base = write_transformers_clip(tmp_path / "base", *kind)
    tuned = load_encoder(write_transformers_clip(tmp_path / "tuned", *kind, seed=1))
    beside = {"class_model.final_fc.weight": torch.zeros(2, 2)} if prefix else {}
    file = released(tmp_path / "tuned.pth", tuned.open_clip_state(), prefix, **beside)
    same(by_us(load_encoder(f"{base}@{file}"), images), by_us(tuned, images), atol=1e-6)


def test_released_visual_weights_leave_the_text_tower_as_it_was(small_clip, images, tmp_path):
    base = load_encoder(small_clip)
    state = {n: w * 1.1 for n, w in base.open_clip_state().items() if n.startswith("visual.")}
    file = released(tmp_path / "visual.pth", state, "")
    tuned = load_encoder(f"{small_clip}@{file}")
    assert torch.equal(tuned.encode_text(TEXTS), base.encode_text(TEXTS))
    assert not torch.allclose(tuned.encode_image(images), base.encode_image(images))


def test_openais_own_layout_with_its_three_numbers_in_half_precision_is_read(small_clip, images, tmp_path):
    base = load_encoder(small_clip)
    state = {name: value.half() for name, value in base.open_clip_state().items()}
    facts = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(26), "vocab_size": torch.tensor(199)}
    file = released(tmp_path / "openai.pth", state, "", **facts)
    same(by_us(load_encoder(f"{small_clip}@{file}"), images), by_us(base, images), atol=2e-3)


def block(name: str, width: int, mlp: int, qkv: str, parts: tuple[str, str, str, str, str]) -> dict[str, tuple]:
    """Weights of one transformer block: q, k and v in one, out, two of the MLP, two norms; `qkv` as "in_proj_"."""
    out, first, second, norm1, norm2 = (f"{name}.{part}" for part in parts)
    attention = out.rpartition(".")[0]
    shapes = {f"{attention}.{qkv}weight": (3 * width, width), f"{attention}.{qkv}bias": (3 * width,)}
    for linear, shape in ((out, (width, width)), (first, (mlp, width)), (second, (width, mlp))):
        shapes |= {f"{linear}.weight": shape, f"{linear}.bias": shape[:1]}
    for norm in (norm1, norm2):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return shapes


OPENAI_BLOCK = ("attn.out_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")
TIMM_BLOCK = ("attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")


def layout(name: str) -> dict[str, tuple]:
    """Names and shapes of a released file's weights, written out; open_clip has no part in it.

    CLIP: the modules of `CLIP` and `VisionTransformer` in clip/model.py of openai/CLIP, which DIVA loads for OpenAI's
    backbones and whose names open_clip's files for MetaCLIP and DFN share. SigLIP: the parameters of
    vision_transformer.py in timm behind `visual.trunk.`, and open_clip's documented `text.`. Sizes: `REAL`.
    """
    (width, layers, _, mlp), px, (words, text_layers, _, text_mlp), length, dim = REAL[name]
    patches, siglip = (px // 14) ** 2, "siglip" in name
    text = {"token_embedding.weight": (32000 if siglip else 49408, words), "positional_embedding": (length, words)}
    text |= {"ln_final.weight": (words,), "ln_final.bias": (words,), "text_projection": (words, dim)}
    for i in range(text_layers):
        text |= block(f"transformer.resblocks.{i}", words, text_mlp, "in_proj_", OPENAI_BLOCK)
    if not siglip:
        shapes = text | {"logit_scale": (), "visual.class_embedding": (width,), "visual.proj": (width, dim)}
        shapes |= {"visual.positional_embedding": (patches + 1, width), "visual.conv1.weight": (width, 3, 14, 14)}
        for norm in ("visual.ln_pre", "visual.ln_post"):
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
        for i in range(layers):
            shapes |= block(f"visual.transformer.resblocks.{i}", width, mlp, "in_proj_", OPENAI_BLOCK)
        return shapes
    del text["text_projection"]
    text |= {"text_projection.weight": (dim, words), "text_projection.bias": (dim,)}
    trunk = {"pos_embed": (1, patches, width), "patch_embed.proj.weight": (width, 3, 14, 14)}
    trunk |= {"attn_pool.latent": (1, 1, width), "attn_pool.kv.weight": (2 * width, width)}
    trunk |= {"attn_pool.kv.bias": (2 * width,), "patch_embed.proj.bias": (width,)}
    for linear, shape in {"q": (width, width), "proj": (width, width), "mlp.fc1": (mlp, width)}.items():
        trunk |= {f"attn_pool.{linear}.weight": shape, f"attn_pool.{linear}.bias": shape[:1]}
    trunk |= {"attn_pool.mlp.fc2.weight": (width, mlp), "attn_pool.mlp.fc2.bias": (width,)}
    for norm in ("norm", "attn_pool.norm"):
        trunk |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(layers):
        trunk |= block(f"blocks.{i}", width, mlp, "qkv.", TIMM_BLOCK)
    shapes = {f"visual.trunk.{key}": shape for key, shape in trunk.items()}
    return shapes | {f"text.{key}": shape for key, shape in text.items()} | {"logit_scale": (), "logit_bias": ()}


@pytest.mark.parametrize("name", REAL)
def test_the_layout_of_every_released_file_of_diva_fits_at_real_size(name, tmp_path):
    """Format only: no released file was read. Prefix and what lies beside are those of DIVA's trainer, `SDModel`."""
    state = {key: torch.empty(shape, device="meta") for key, shape in layout(name).items()}
    beside = ("class_model.final_fc.weight", "visual_proj.weight", "unet.conv_in.weight", "vae.quant_conv.weight")
    beside = {key: torch.zeros(2, 2) for key in (*beside, "text_encoder.text_model.embeddings.token_embedding.weight")}
    file = released(tmp_path / "real.pth", state, "class_model.model.", **beside)
    assert load_released(on_meta(name), file)


@pytest.mark.parametrize("kind", [("clip", "quick_gelu"), ("siglip", "gelu_pytorch_tanh")], ids="-".join)
def test_a_folder_as_genhancers_and_dcrs_trainers_save_it_needs_only_its_base_models_files(kind, images, tmp_path):
    """Format only: no released folder was read.

    Both trainers call `save_pretrained(folder, safe_serialization=False)` of `CLIPModel` or `SiglipModel`, LoRA merged:
    config.json and pytorch_model.bin, neither image processor nor tokenizer. Read for DCR in boyuh/DCR (OpenAI's
    train_OpenAICLIP_stage2.py), for GenHancer in a fork of it, zhi-xuan-chen/GenHancer (train_SigLIP_stage2_only.py).
    """
    base = write_transformers_clip(tmp_path / "base", *kind)
    tuned = AutoModel.from_pretrained(write_transformers_clip(tmp_path / "tuned", *kind, seed=1))
    folder = tmp_path / "clip-vit-large-patch14-4600"
    tuned.config.save_pretrained(folder)
    torch.save(tuned.state_dict(), folder / "pytorch_model.bin")
    for part in ("image processor", "tokenizer"):
        with pytest.raises(FileNotFoundError, match=f"{folder} has no {part}.*copy it from the model") as caught:
            load_encoder(folder)
        assert repr(str(folder)) in str(caught.value)
        for file in base.glob("preprocessor*" if part == "image processor" else "tokenizer*"):
            shutil.copy(file, folder)
    same(by_us(load_encoder(folder), images), by_transformers(folder, images))
    same(by_us(load_encoder(folder), images), by_us(load_encoder(tmp_path / "tuned"), images), atol=1e-6)


def test_a_released_file_that_does_not_fit_is_refused_naming_the_first_difference(small_clip, tmp_path):
    state = load_encoder(small_clip).open_clip_state()
    changes = {
        "missing": {n: w for n, w in state.items() if n != "visual.ln_post.bias"},
        "unexpected": state | {"visual.extra": torch.zeros(1)},
        "expected": state | {"visual.ln_post.bias": torch.zeros(3)},
        "behind any prefix": {"a": torch.zeros(1)},
    }
    for word, changed in changes.items():
        with pytest.raises(ValueError, match=word):
            load_encoder(f"{small_clip}@{released(tmp_path / 'x.pth', changed, '')}")
    (tmp_path / "x.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="weights_only"):
        load_encoder(f"{small_clip}@{tmp_path / 'x.pth'}")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_encoder(f"{small_clip}@{tmp_path / 'nowhere.pth'}")


def test_a_tokenizer_of_openais_words_survives(tmp_path):
    theirs = open_clip.get_tokenizer("ViT-L-14-quickgelu")
    transformers_tokenizer(theirs).save_pretrained(tmp_path)
    texts = ["a photo of a dog's 12 toys!", "Déjà vu,  twice"]
    tokenized = AutoTokenizer.from_pretrained(tmp_path)(texts).input_ids
    for ids, wanted in zip(tokenized, theirs(texts), strict=True):
        assert ids == wanted[: len(ids)].tolist() and wanted[len(ids) :].eq(0).all()


def test_the_configuration_of_a_folder_is_kept(folder, tmp_path):
    encoder = load_encoder(folder)
    written = save_encoder(encoder, tmp_path / "out")
    kept = json.loads((written["open_clip"] / "open_clip_config.json").read_text())
    _, _, again = read_transformers(written["transformers"])
    assert kept["model_cfg"] == again["model_cfg"] and kept.get("timm_gelu") == again.get("timm_gelu")
