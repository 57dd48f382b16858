"""Labelled or captioned pictures on disk: class folders, or webdataset tars as CLIP_benchmark has them.

A set is a folder under the data root, and its kind is read from what lies in it:

    NAME/[test/]CLASS/*.jpg                   any pictures, a folder for each class
    NAME/test/*.tar, NAME/classnames.txt      CLIP_benchmark's wds_NAME; .cls or .txt beside each picture

Pictures are read when they are needed, by place, so that workers can share them.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diva_lab.images import SUFFIXES

TEMPLATES = ("a photo of a {c}.",)  # for sets that CLIP_benchmark does not know
PREFIXES = ("wds_", "wds_vtab-", "vtab-")  # what CLIP_benchmark's folders carry before a set's name


class Place(NamedTuple):
    """Where a picture's bytes lie: a whole file, or `size` bytes of one from `offset` on."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return self.path if self.size < 0 else f"{self.path} (byte {self.offset})"


@dataclass(frozen=True)
class ImageSet:
    """Pictures with classes, captions, or neither.

    Attributes:
        name: of the set, as CLIP_benchmark calls it where it knows it.
        places: of the n pictures.
        labels: [n], indices into `classes`; empty where there are none.
        classes, templates: names, and prompts with `{c}` for a name.
        captions: of each picture, for retrieval.
    """

    name: str
    places: Sequence[Place]
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = TEMPLATES
    captions: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    def draw(self, n: int, seed: int) -> "ImageSet":
        """`n` of the pictures without replacement, in their order; all where n is 0 or there are no more."""
        if not 0 < n < len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))
        labels = self.labels[chosen] if len(self.labels) else self.labels
        captions = tuple(self.captions[i] for i in chosen) if self.captions else ()
        return replace(self, places=[self.places[i] for i in chosen], labels=labels, captions=captions)


def content_hash(places: Sequence[Place]) -> str:
    """A hash of all pictures' bytes, in their order."""
    whole = blake2b(digest_size=16)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(lambda place: blake2b(place.read(), digest_size=16).digest(), places):
            whole.update(part)
    return whole.hexdigest()


def decode(place: Place, prepare: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """A picture as RGB, prepared.

    Raises:
        ValueError: where it cannot be read; names it.
    """
    try:
        with Image.open(io.BytesIO(place.read())) as image:
            return prepare(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{place}: not a picture that can be read ({error})") from error


# --- what CLIP_benchmark knows ----------------------------------------------------------------------------------


def _known(kind: str, name: str) -> tuple[str, ...]:
    """CLIP_benchmark's class names or templates of a set; empty where it has none."""
    table = json.loads((files("clip_benchmark") / "datasets" / f"en_{kind}.json").read_text())
    return tuple(table.get(name, ()))


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()


def canonical(folder: str) -> str:
    """CLIP_benchmark's name of a set, from a folder's."""
    name = folder.lower()
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


# --- the two kinds ----------------------------------------------------------------------------------------------


def _from_folders(name: str, folder: Path, templates: tuple[str, ...]) -> ImageSet:
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    places, labels = [], []
    for label, kind in enumerate(classes):
        found = sorted(path for path in (folder / kind).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{folder / kind}: no picture in this class; expected {', '.join(SUFFIXES)} files")
        places += [Place(str(path)) for path in found]
        labels += [label] * len(found)
    named = _lines(folder / "classnames.txt") or _lines(folder.parent / "classnames.txt")
    if named and len(named) != len(classes):
        raise ValueError(f"{folder}: {len(classes)} class folders, but {len(named)} lines in classnames.txt")
    names = named or tuple(kind.replace("_", " ") for kind in classes)
    return ImageSet(name, places, np.array(labels), names, templates)


def _from_tars(name: str, tars: list[Path], root: Path, templates: tuple[str, ...]) -> ImageSet:
    members: dict[str, dict[str, Place]] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile():
                    key, _, end = Path(member.name).name.partition(".")
                    members.setdefault(f"{path}/{Path(member.name).parent}/{key}", {})[end.lower()] = Place(
                        str(path), member.offset_data, member.size
                    )
    places, labels, captions = [], [], []
    for key, parts in members.items():
        picture = next((place for end, place in parts.items() if f".{end}" in SUFFIXES), None)
        if picture is None or not ("cls" in parts or "txt" in parts):
            raise ValueError(f"{key}: expected a picture and .cls or .txt beside it; found {', '.join(parts)}")
        places.append(picture)
        if "cls" in parts:
            labels.append(int(parts["cls"].read()))
        else:
            captions.append(tuple(line for line in parts["txt"].read().decode().splitlines() if line.strip()))
    if labels and captions:
        raise ValueError(f"{root}: some pictures have a class (.cls), others captions (.txt)")
    if not labels:
        return ImageSet(name, places, templates=templates, captions=tuple(captions))
    names = _lines(root / "classnames.txt") or _known("classnames", name)
    if not names or not 0 <= min(labels) <= max(labels) < len(names):
        raise ValueError(
            f"{root}: classes up to number {max(labels)}, but {len(names)} class names; expected one a line in "
            f"{root / 'classnames.txt'}"
        )
    return ImageSet(name, places, np.array(labels), names, templates)


def read_set(folder: str | Path, split: str = "test") -> ImageSet:
    """The set in a folder, its classes and prompts.

    Templates are those of `zeroshot_classification_templates.txt` beside the pictures, else CLIP_benchmark's for a set
    of this name, else `TEMPLATES`. Class names are those of `classnames.txt` (in the order of the sorted class folders,
    or of the numbers in .cls), else the folders' own with `_` as a space, else CLIP_benchmark's.

    Raises:
        FileNotFoundError: where there is no such folder, or nothing in it is a set; says what was expected.
        ValueError: for a set whose parts do not agree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a set of pictures")
    name, where = canonical(folder.name), folder / split if (folder / split).is_dir() else folder
    templates = _lines(folder / "zeroshot_classification_templates.txt")
    templates = templates or _known("zeroshot_classification_templates", name) or TEMPLATES
    if tars := sorted(where.glob("*.tar")):
        return _from_tars(name, tars, folder, templates)
    if any(path.is_dir() and not path.name.startswith(".") for path in where.iterdir()):
        return _from_folders(name, where, templates)
    raise FileNotFoundError(
        f"{folder}: no set of pictures; expected a folder for each class, or {split}/*.tar with classnames.txt as "
        "CLIP_benchmark has them"
    )
