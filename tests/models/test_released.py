"""The table of published encoders, and where their weights are found; look-alikes of the hub's cache."""

import pandas as pd
import pytest
from huggingface_hub import constants

from diva_lab.models.encoders import ENCODERS
from diva_lab.models.released import RELEASED, find_weights, missing_weights, released_of
from diva_lab.paths import DATA
from diva_lab.training.presets import BACKBONES


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache_file(hub, repository, file):
    """A file as the hub's client keeps it."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("c0ffee")
    path = folder / "snapshots" / "c0ffee" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def test_every_released_encoder_has_an_original_a_method_with_published_scores_and_a_source():
    scores = pd.read_csv(DATA / "published" / "results.csv")
    published = set(zip(scores["backbone"], scores["method"], strict=True))
    for name, one in RELEASED.items():
        assert one.format in ("pth", "transformers", "open_clip", "") and one.method and one.source and name == one.name
        assert one.original in ENCODERS or "original" in one.unknown
        assert not one.original or (one.original, one.method) in published
        assert not one.file or (one.repository and one.format)


def test_divas_and_dcrs_encoders_of_all_the_papers_backbones_are_known():
    methods = {backbone: {one.method for one in released_of(backbone)} for backbone in BACKBONES}
    assert all("diva" in methods[backbone] for backbone in BACKBONES)
    assert {backbone for backbone in BACKBONES if "dcr" in methods[backbone]} == {
        name for name in BACKBONES if not name.startswith("dfn")
    }
    assert released_of("tiny") == released_of("") == []


def test_what_is_not_known_is_named():
    assert RELEASED["openai-l14-diva"].unknown == ["licence"]
    assert RELEASED["openai-l14-un2clip"].unknown == ["repository", "file", "format", "licence"]
    assert RELEASED["kuea"].unknown == ["original", "repository", "file", "format", "licence"]


@pytest.mark.parametrize(
    "place", ["openai-l14-diva.pth", "OpenAICLIP/OpenAI-ViT-L-14-224.pth", "OpenAI-ViT-L-14-224.pth"]
)
def test_a_released_file_is_found_by_its_name_here_or_on_the_hub(place, tmp_path):
    one, path = RELEASED["openai-l14-diva"], tmp_path / "weights" / place
    path.parent.mkdir(parents=True)
    assert find_weights(one, tmp_path / "weights") is None
    path.write_text("")
    assert find_weights(one, tmp_path / "weights") == f"openai-l14@{path}"
    assert find_weights(RELEASED["openai-l14-336-diva"], tmp_path / "weights") is None


@pytest.mark.parametrize("config", ["config.json", "open_clip_config.json"])
def test_a_released_folder_is_found_by_its_name(config, tmp_path):
    folder = tmp_path / "openai-l14-genhancer"
    folder.mkdir()
    assert find_weights(RELEASED["openai-l14-genhancer"], tmp_path) is None, "an empty folder holds no encoder"
    (folder / config).write_text("{}")
    assert find_weights(RELEASED["openai-l14-genhancer"], tmp_path) == str(folder)


def test_the_hubs_cache_is_searched_without_a_network_and_after_the_folder(hub, tmp_path):
    one = RELEASED["metaclip-h14-diva"]
    assert find_weights(one) is None
    cached = cache_file(hub, one.repository, one.file)
    assert find_weights(one) == f"metaclip-h14@{cached}" == find_weights(one, tmp_path)
    (tmp_path / f"{one.name}.pth").write_text("")
    assert find_weights(one, tmp_path) == f"metaclip-h14@{tmp_path / one.name}.pth"


def test_a_folder_in_the_hubs_cache_is_found_by_its_configuration(hub):
    known = RELEASED["openai-l14-genhancer"].__dict__ | {"file": "L14"}
    one = type(RELEASED["openai-l14-genhancer"])(**known)
    cached = cache_file(hub, one.repository, "L14/config.json")
    assert find_weights(one) == str(cached.parent)


def test_missing_weights_say_how_to_get_them():
    text = missing_weights(RELEASED["openai-l14-diva"])
    assert text.endswith("fetch with network: hf download BAAI/DIVA OpenAICLIP/OpenAI-ViT-L-14-224.pth")
    assert "msj9817/GenHancer on the hub, and put it as the folder openai-l14-genhancer" in missing_weights(
        RELEASED["openai-l14-genhancer"]
    )
    assert "Google Drive" in missing_weights(RELEASED["openai-l14-dcr"])
    assert "or as openai-l14-un2clip.pth" in missing_weights(RELEASED["openai-l14-un2clip"])
