"""Image encoders without text: features as transformers and timm compute them, from folders."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import write_dinov2
from timm.models import save_for_hf
from transformers import AutoImageProcessor, Dinov2Model

from diva_lab.evaluation.features import FeatureStore
from diva_lab.image_files import Place
from diva_lab.models.encoders import Encoder
from diva_lab.models.vision import load_vision


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def dinov2(tmp_path):
    return write_dinov2(tmp_path / "dinov2", mean=(0.5, 0.4, 0.3))


def test_a_dinov2_gives_what_transformers_gives(dinov2, image):
    encoder = load_vision(dinov2)
    assert (encoder.px, encoder.resized, encoder.interpolation) == (28, 32, "bicubic")
    with Image.open(image) as picture:
        pixels = AutoImageProcessor.from_pretrained(dinov2)(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    theirs = Dinov2Model.from_pretrained(dinov2)(pixel_values=pixels).pooler_output
    ours = FeatureStore(encoder, cache=None)([Place(str(image))])
    assert torch.cosine_similarity(ours, theirs).item() > 0.999


def test_a_timm_folder_gives_what_timm_gives_and_is_told_apart_by_its_weights(tmp_path, image):
    kept = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=2).eval()
        args = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 2}
        save_for_hf(model, tmp_path / str(seed), model_config={"num_classes": 1000}, model_args=args)
        encoder = load_vision(tmp_path / str(seed))
        pixels = torch.rand(2, 3, encoder.px, encoder.px)
        model.reset_classifier(0)
        torch.testing.assert_close(encoder.features(pixels).embedding, model((pixels - encoder.mean) / encoder.std))
        kept.append(FeatureStore(encoder, tmp_path / "cache")([Place(str(image))]))
        assert kept[-1].norm().item() == pytest.approx(1, abs=1e-5)
    assert not torch.allclose(*kept) and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_clip_is_taken_as_it_is():
    assert isinstance(load_vision("tiny"), Encoder)


def test_damaged_and_other_models_are_refused_by_name(dinov2, tmp_path):
    settings = json.loads((dinov2 / "config.json").read_text())
    (dinov2 / "config.json").write_text(json.dumps(settings | {"hidden_size": 32}))
    with pytest.raises(ValueError, match=r"dinov2: .*of another shape"):
        load_vision(dinov2)
    (dinov2 / "config.json").write_text(json.dumps(settings))
    (dinov2 / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"with preprocessor_config\.json, which says size"):
        load_vision(dinov2)
    with pytest.raises(ValueError, match="timm:no_such_model"):
        load_vision("timm:no_such_model")
