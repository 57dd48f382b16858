import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from one_step import pictures
from small_models import on_meta, write_transformers_clip
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from diva_lab.encoders import ENCODERS, load_encoder
from diva_lab.export import save_encoder
from diva_lab.formats import convert, load_released, read_transformers

TEXTS = ["a photo of a disc", "a photo of a red star", ""]
KINDS = [("clip", "quick_gelu"), ("clip", "gelu"), ("siglip", "gelu_pytorch_tanh"), ("siglip", "gelu")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def folder(request, tmp_path_factory):
    return write_transformers_clip(tmp_path_factory.mktemp("models") / request.param[0], *request.param)


@pytest.fixture(scope="module")
def images():
    return pictures(5).float() / 255


def by_transformers(folder, images) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length embeddings of pictures and texts as transformers itself computes them from a folder."""
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    ids = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    pixels = processor((images * 255).byte(), return_tensors="pt").pixel_values
    with torch.no_grad():
        found = model.get_image_features(pixels), model.get_text_features(ids)
    return tuple(F.normalize(getattr(x, "pooler_output", x), dim=-1) for x in found)


def by_us(encoder, images) -> tuple[torch.Tensor, torch.Tensor]:
    return encoder.encode_image(images), encoder.encode_text(TEXTS)


def same(one, two, atol=1e-5) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


# --- transformers -> here -> both -------------------------------------------------------------------------------


def test_a_transformers_folder_embeds_pictures_and_texts_as_transformers_does(folder, images):
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
        found = (
            model.encode_image(encoder.preprocess(images), normalize=True),
            model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True),
        )
    tanh = encoder.config.get("timm_gelu") == "tanh"  # which open_clip computes by erf
    same(found, by_us(encoder, images), atol=2e-3 if tanh else 1e-5)


def test_an_open_clip_model_goes_to_transformers_and_comes_back(small_clip, images, tmp_path):
    encoder = load_encoder(small_clip)
    written = save_encoder(encoder, tmp_path / "out")
    same(by_transformers(written["transformers"], images), by_us(encoder, images))
    same(by_us(load_encoder(written["transformers"]), images), by_us(encoder, images), atol=1e-6)


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
        found = convert(one, kind, two)
        assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in two.items()}


def test_all_backbones_are_checked_at_real_size():
    assert REAL.keys() == ENCODERS.keys() - {"tiny"}


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
    found = load_encoder(f"{small_clip}@{file}")
    assert torch.equal(found.encode_text(TEXTS), base.encode_text(TEXTS))
    assert not torch.allclose(found.encode_image(images), base.encode_image(images))


def test_openais_own_layout_with_its_three_numbers_in_half_precision_is_read(small_clip, images, tmp_path):
    base = load_encoder(small_clip)
    state = {name: value.half() for name, value in base.open_clip_state().items()}
    facts = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(26), "vocab_size": torch.tensor(199)}
    file = released(tmp_path / "openai.pth", state, "", **facts)
    same(by_us(load_encoder(f"{small_clip}@{file}"), images), by_us(base, images), atol=2e-3)


@pytest.mark.parametrize("name", REAL)
def test_released_weights_of_every_backbone_fit_at_real_size(name, tmp_path):
    model = on_meta(name)  # format only: names and shapes of open_clip's own model behind DIVA's prefix
    assert load_released(model, released(tmp_path / "real.pth", model.state_dict(), "class_model.model."))


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
    from diva_lab.formats import _save_tokenizer

    theirs = open_clip.get_tokenizer("ViT-L-14-quickgelu")
    _save_tokenizer(theirs, tmp_path)
    texts = ["a photo of a dog's 12 toys!", "Déjà vu,  twice"]
    found = AutoTokenizer.from_pretrained(tmp_path)(texts).input_ids
    for ids, wanted in zip(found, theirs(texts), strict=True):
        assert ids == wanted[: len(ids)].tolist() and wanted[len(ids) :].eq(0).all()


def test_the_configuration_of_a_folder_is_kept(folder, tmp_path):
    encoder = load_encoder(folder)
    written = save_encoder(encoder, tmp_path / "out")
    kept = json.loads((written["open_clip"] / "open_clip_config.json").read_text())
    _, _, again = read_transformers(written["transformers"])
    assert kept["model_cfg"] == again["model_cfg"] and kept.get("timm_gelu") == again.get("timm_gelu")
