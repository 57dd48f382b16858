"""Shards by URL: the same images as of files, in the same order; fetched again where a transfer fails."""

import tempfile
from itertools import islice
from pathlib import Path

import fsspec
import pytest
from image_writers import png, write_tar

from diva_lab import image_files, paths, remote
from diva_lab.image_files import find_tars
from diva_lab.images import open_images


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Three tars as files, and the same on a storage that counts how often each is opened."""
    storage = fsspec.filesystem("memory")
    storage.store.clear()
    monkeypatch.setattr(remote, "SCHEMES", {"memory": "fsspec", "https": "aiohttp"})
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache", raising=False)
    monkeypatch.delenv("DIVA_LAB_SHARDS", raising=False)
    image_files._length.cache_clear()
    for k in range(3):
        write_tar(tmp_path / f"{k}.tar", {f"{k}-{i}.png": png(4 * k + i) for i in range(4)})
        storage.pipe(f"/cc3m/{k}.tar", (tmp_path / f"{k}.tar").read_bytes())
    opened = []
    monkeypatch.setattr(storage, "open", lambda url, mode, own=storage.open: (opened.append(url), own(url, mode))[1])
    return tmp_path, opened


def shown(source: str, batches: int, first: int = 0, **more) -> list[bytes]:
    found = islice(open_images(source, 8, 2, 0, first, **more), batches)
    return [image.numpy().tobytes() for batch in found for image in batch]


@pytest.mark.parametrize("pattern", ["*.tar", "{0..2}.tar"])
def test_a_url_shows_what_the_files_show(shards, pattern):
    folder, _ = shards
    assert shown(f"memory://cc3m/{pattern}", 9) == shown(str(folder / pattern), 9)


def test_a_resumed_run_fetches_nothing_that_it_only_has_to_count(shards):
    _, opened = shards
    whole = shown("memory://cc3m/*.tar", 8)
    image_files._length.cache_clear()  # another process
    opened.clear()
    assert shown("memory://cc3m/*.tar", 2, first=12) == whole[12:]
    assert len(opened) <= 3  # of the second epoch; the first one is only counted


def test_shards_are_kept_where_asked_and_deleted_elsewhere(shards, monkeypatch, tmp_path):
    _, opened = shards
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    shown("memory://cc3m/*.tar", 12)
    assert len(opened) >= 6 and not list((tmp_path / "temporary").iterdir())  # two epochs, and what is read ahead
    monkeypatch.setenv("DIVA_LAB_SHARDS", str(tmp_path / "kept"))
    opened.clear()
    shown("memory://cc3m/*.tar", 12)
    assert len(opened) == 3 and len(list((tmp_path / "kept").rglob("*"))) == 6


def test_a_transfer_that_fails_is_tried_again_and_at_last_told(shards, monkeypatch):
    whole = shown("memory://cc3m/1.tar", 2)
    storage = fsspec.filesystem("memory")
    faults = [OSError("reset"), TimeoutError("slow"), None]

    def fail(url: str, mode: str, own=storage.open):
        if fault := faults[0] if len(faults) == 1 else faults.pop(0):
            raise fault
        return own(url, mode)

    monkeypatch.setattr(storage, "open", fail)
    assert shown("memory://cc3m/1.tar", 2) == whole
    faults[:] = [OSError("reset")]
    with pytest.raises(ConnectionError, match=r"cc3m/1.tar: not fetched in 5 tries, at last OSError: reset"):
        shown("memory://cc3m/1.tar", 2)


def test_a_transfer_that_is_cut_off_is_no_shard(shards, monkeypatch):
    monkeypatch.setattr(fsspec.filesystem("memory"), "size", lambda url: 10**6)
    with pytest.raises(ConnectionError, match="of 1000000 bytes came"):
        shown("memory://cc3m/0.tar", 1)


@pytest.mark.parametrize(
    "source, words",
    [
        ("memory://cc3m/9.tar", "cc3m/9.tar: "),
        ("memory://cc3m/x*.tar", "no such tar"),
        ("memory://cc3m", "expected one that ends in .tar"),
        ("ftp://host/0.tar", "scheme 'ftp'; expected one of memory, https"),
        ("https://host/*.tar", "a web server lists no files"),
    ],
)
def test_what_is_no_shard_is_refused_by_name(shards, source, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        shown(source, 1)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_package_that_is_missing_is_named(scheme, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, {"s3": "s3fs", "gs": "gcsfs"}[scheme], None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {remote.SCHEMES[scheme]}"):
        find_tars(f"{scheme}://bucket/*.tar")


def test_processes_decode_the_same_images_in_the_same_order(shards):
    folder, _ = shards
    Path(folder / "9.tar").write_bytes(b"no tar")  # one that cannot be read is told, not lost
    source = str(folder / "*.tar")
    one, two = open_images(source, 8, 2, 0), open_images(source, 8, 2, 0, workers=2)
    for _ in range(7):
        assert next(one).equal(next(two))
    assert one.skipped == two.skipped and one.position == two.position and one.skipped
