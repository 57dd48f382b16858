"""Shards on object storage or a web server: found by their names, fetched whole, read as local files.

Only the schemes of `SCHEMES` are opened, by fsspec. A fetched shard is deleted once it is read, unless the environment
variable DIVA_LAB_SHARDS names a folder in which shards are kept. How many images a shard holds is remembered in the
cache, so that a resumed run need not fetch what it only has to count.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from diva_lab import messages, paths

SCHEMES = {  # scheme -> the package that reads it
    "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "https": "aiohttp",
}  # fmt: skip
TRIES, PAUSE = 5, 1.0  # of a transfer; seconds before the second one, doubled each time


def scheme_of(source: str) -> str:
    """`s3` of `s3://bucket/0.tar`; "" of a path.

    Raises:
        FileNotFoundError: for a scheme that is not one of `SCHEMES`.
    """
    scheme, separator, _ = source.partition("://")
    if not separator:
        return ""
    if scheme not in SCHEMES:
        raise FileNotFoundError(
            f"images={source!r}: no such tar: scheme {scheme!r}; {messages.expected(scheme, SCHEMES)}, or a path"
        )
    return scheme


def open_storage(url: str):
    """fsspec's file system of a URL.

    Raises:
        ModuleNotFoundError: where the package of its scheme is not installed; says how to install it.
    """
    import fsspec

    scheme = scheme_of(url)
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        package = SCHEMES[scheme]
        raise ModuleNotFoundError(f"{url}: {scheme}:// is read by {package}; pip install {package}") from error


def list_shards(pattern: str) -> list[str]:
    """The URLs that a pattern without braces names: itself, or with `*`, `?` or `[` what is there, in order.

    Raises:
        ValueError: for a pattern on a web server, which lists no files.
    """
    if not any(letter in pattern for letter in "*?["):
        return [pattern]
    scheme = scheme_of(pattern)
    if scheme == "https":
        raise ValueError(f"images={pattern!r}: a web server lists no files; expected a range such as {{0000..0575}}")
    storage = open_storage(pattern)
    names = _try_often(pattern, lambda: storage.glob(pattern))
    return [f"{scheme}://{name}" for name in sorted(map(str, names))]


@contextmanager
def fetch(url: str) -> Iterator[Path]:
    """A context with a local copy of a shard.

    Raises:
        FileNotFoundError: where it is not there.
        ConnectionError: where it cannot be fetched in `TRIES` tries; names the last fault.
    """
    if (kept := paths.named_folder("DIVA_LAB_SHARDS")) is None:
        with tempfile.TemporaryDirectory(prefix="diva-lab-") as folder:
            yield _download(url, Path(folder) / "shard.tar")
        return
    path = kept / _key(url) / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _download(url, Path(folder) / path.name).replace(path)
    yield path


def _download(url: str, path: Path) -> Path:
    storage = open_storage(url)

    def copy() -> Path:
        with storage.open(url, "rb") as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        size = storage.size(url)
        if size is not None and size != path.stat().st_size:
            raise ConnectionError(f"{path.stat().st_size} of {size} bytes came")
        return path

    return _try_often(url, copy)


def _try_often(url: str, work):
    """What `work()` returns, which is tried `TRIES` times; a file that is not there, or may not be read, once."""
    for k in range(TRIES):
        try:
            return work()
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)(f"{url}: {error or 'not there'}") from error
        except Exception as error:  # each scheme's client raises its own
            fault = error
        if k < TRIES - 1:
            time.sleep(PAUSE * 2**k)
    raise ConnectionError(
        f"{url}: not fetched in {TRIES} tries, at last {type(fault).__name__}: {fault}; start again when it can be "
        "reached: a stopped run goes on from its last checkpoint"
    ) from fault


# --- how many images a shard holds ------------------------------------------------------------------------------


def _key(url: str) -> str:
    return blake2b(url.encode(), digest_size=8).hexdigest()


def _length_file(url: str) -> Path:
    return paths.CACHE / "shards" / _key(url)


def remember_length(url: str, images: int) -> None:
    """Keep how many images a shard holds."""
    if not (path := _length_file(url)).exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(images), encoding="ascii")


def known_length(url: str) -> int | None:
    """How many images a shard holds, where it was read before; else None."""
    path = _length_file(url)
    return int(path.read_text(encoding="ascii")) if path.is_file() else None
