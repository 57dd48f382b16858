"""Latents that are kept: encoded once, the same in memory and on disk, of one autoencoder only."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diva_lab import paths
from diva_lab.models.latents import InMemory, OnDisk, encode_once
from diva_lab.models.registry import load_denoiser
from diva_lab.training.build import build_denoiser
from diva_lab.training.settings import Settings


def images_of(denoiser, n: int = 5) -> torch.Tensor:
    return torch.rand(n, 3, denoiser.px, denoiser.px, generator=torch.Generator().manual_seed(0))


def count_encodings(denoiser, monkeypatch) -> list[int]:
    """From now on takes the number of images of each call of the autoencoder."""
    encoded, encode = [], denoiser.vae.encode
    monkeypatch.setattr(denoiser.vae, "encode", lambda x: encoded.append(len(x)) or encode(x))
    return encoded


def open_kept(small_diffusion, folder, keep: int = 10, **changes):
    denoiser = load_denoiser(small_diffusion)
    denoiser.keep_latents, denoiser.latents_folder = keep, folder
    for name, value in changes.items():
        setattr(denoiser, name, value)
    return denoiser


@pytest.mark.parametrize("on_disk", [False, True])
def test_kept_latents_are_encoded_once_and_the_same(small_diffusion, monkeypatch, tmp_path, on_disk):
    denoiser = load_denoiser(small_diffusion)
    images = images_of(denoiser)
    parts = images[[0, 1, 1]], images[[4, 2, 0]], images[[4, 2, 0]]
    wanted = [denoiser.latents(part, torch.Generator().manual_seed(1)) for part in parts]
    encoded = count_encodings(denoiser, monkeypatch)
    denoiser.keep_latents, denoiser.latents_folder = 3, tmp_path / "new" / "folder" if on_disk else None
    for part, latents in zip(parts, wanted, strict=True):
        torch.testing.assert_close(denoiser.latents(part, torch.Generator().manual_seed(1)), latents)
    assert encoded == [2, 2, 1]  # there is room for the third image, none for the fourth


def test_on_disk_another_run_finds_them_to_the_bit(small_diffusion, monkeypatch, tmp_path):
    first = open_kept(small_diffusion, tmp_path)
    latents = first.latents(images_of(first))
    second = open_kept(small_diffusion, tmp_path)
    encoded = count_encodings(second, monkeypatch)
    assert torch.equal(second.latents(images_of(first).flip(0)), latents.flip(0)) and encoded == []


@pytest.mark.parametrize("change", ["weights", "vae_input", "autocast"])
def test_other_weights_input_or_precision_are_encoded_anew(small_diffusion, monkeypatch, tmp_path, change):
    first = open_kept(small_diffusion, tmp_path)
    images, autocast = images_of(first), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast")
    first.latents(images)
    other = open_kept(small_diffusion, tmp_path, **{"vae_input": "imagenet"} if change == "vae_input" else {})
    if change == "weights":
        next(other.vae.encoder.parameters()).data *= 1.01
    plain = load_denoiser(small_diffusion)
    plain.load_state_dict(other.state_dict())
    plain.vae_input = other.vae_input
    encoded = count_encodings(other, monkeypatch)
    with autocast:
        torch.testing.assert_close(other.latents(images), plain.latents(images))
    assert encoded == [5]


def test_two_writers_may_write_to_one_file(tmp_path):
    def add_rows(number: int) -> None:  # through connections of its own, as another process would
        store = OnDisk(tmp_path / "one.sqlite")
        for k in range(number, 40, 2):
            store.add({bytes([k, n]): torch.full((2,), float(k)) for n in range(3)}, 1000)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(add_rows, range(2)))
    keys = {bytes([k, n]) for k in range(40) for n in range(3)}
    rows = OnDisk(tmp_path / "one.sqlite").read(keys | {b"none"})
    assert rows.keys() == keys and all(row.tolist() == [key[0]] * 2 for key, row in rows.items())


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_no_more_than_there_is_room_for_are_kept(tmp_path, store):
    store = InMemory() if store == "memory" else OnDisk(tmp_path / "one.sqlite")
    images = torch.rand(6, 3, 2, 2)
    for part in images.split(2):
        torch.testing.assert_close(encode_once(part, lambda x: 2 * x, store, 3, ""), 2 * part)
    calls = []
    encode_once(images, lambda x: calls.append(len(x)) or x, store, 3, "")
    assert calls == [3]


@pytest.mark.parametrize("what", ["text", "folder", "table"])
def test_a_file_that_cannot_be_read_is_told_with_what_to_do(small_diffusion, tmp_path, what):
    denoiser = open_kept(small_diffusion, tmp_path)
    denoiser.latents(images_of(denoiser))
    (path,) = tmp_path.iterdir()
    path.unlink()
    if what == "text":
        path.write_text("no database" * 100)
    elif what == "folder":
        path.mkdir()
    else:
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE latents (other)")
    with pytest.raises(OSError, match=rf"latents kept in {path}: .*; free some space, delete the file .* or set"):
        denoiser.latents(images_of(denoiser))


def test_the_settings_say_where_and_how_many():
    denoiser = build_denoiser(Settings(keep_latents=7, latents_on_disk=True))
    assert (denoiser.keep_latents, denoiser.latents_folder) == (7, paths.CACHE / "latents")
    assert build_denoiser(Settings(keep_latents=7)).latents_folder is None
    with pytest.raises(ValueError, match="latents_on_disk=True, keep_latents=0: none would be kept; expected keep_lat"):
        Settings(latents_on_disk=True)
