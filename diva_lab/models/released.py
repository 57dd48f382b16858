"""RELEASED: the improved encoders that others published, by name, and where their weights lie on this machine.

The table is data/published/released.csv, a row an encoder; its scores are the rows of data/published/results.csv with
the same backbone and method. An empty cell is unknown to us. Nothing is downloaded: weights are looked for in a folder
and in the hub's cache.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
from huggingface_hub import try_to_load_from_cache

from diva_lab.machine import fetch_command
from diva_lab.paths import DATA

CONFIGS = ("open_clip_config.json", "config.json")  # by one of which a folder is known to hold an encoder


@dataclass(frozen=True)
class Released:
    """A published improved encoder; "" where a cell is unknown.

    Attributes:
        original: a key of `ENCODERS`.
        method: as in data/published/results.csv.
        repository: its hub id.
        file: in the repository, or the folder there of an encoder in transformers' format.
        format: `pth`, which is loaded as NAME@FILE, or `transformers` or `open_clip`, a folder.
        licence: of the weights, unless it says otherwise.
        source: where these facts stand.
    """

    original: str
    method: str
    repository: str
    file: str
    format: str
    licence: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.original}-{self.method}".removeprefix("-")

    @property
    def unknown(self) -> list[str]:
        """The names of the empty cells."""
        return [field.name for field in fields(self) if not getattr(self, field.name)]


def _read_released(path: Path) -> dict[str, Released]:
    rows = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    return {one.name: one for one in (Released(**row) for row in rows)}


RELEASED = _read_released(DATA / "published" / "released.csv")


def released_of(original: str) -> list[Released]:
    """The improved versions of an encoder."""
    return [one for one in RELEASED.values() if original and one.original == original]


def find_weights(one: Released, folder: Path | None = None) -> str | None:
    """What `load_encoder` takes for a released encoder, if its weights are on this machine; else None.

    Args:
        folder: where the weights may lie as `NAME` (a folder in transformers' or open_clip's format), as `NAME.pth`, or
            as the hub has them, with the folders above the file or without. It is searched before the hub's cache.
    """
    places = []
    if folder is not None:
        places = [folder / one.name, folder / f"{one.name}.pth"]
        places += [folder / one.file, folder / Path(one.file).name] if one.file else []
    for place in places:
        if place.is_file() or any((place / config).is_file() for config in CONFIGS):
            return _encoder_name(one, place)
    if one.repository and one.file:
        for file in (one.file, *(f"{one.file}/{config}" for config in CONFIGS)):
            cached = try_to_load_from_cache(one.repository, file)
            if isinstance(cached, str):
                return _encoder_name(one, Path(cached) if file == one.file else Path(cached).parent)
    return None


def _encoder_name(one: Released, place: Path) -> str:
    return f"{one.original}@{place}" if place.is_file() else str(place)


def missing_weights(one: Released) -> str:
    """For a report: where the weights of a released encoder were looked for, and how to get them."""
    name = f"{one.name}.pth" if one.format == "pth" else f"the folder {one.name}"
    name += "" if one.format else f" or as {one.name}.pth"
    if one.repository and one.file:
        return f"not on this machine; fetch with network: {fetch_command(one.repository)} {one.file}"
    where = f"{one.repository} on the hub" if one.repository else one.source
    return f"not on this machine; see {where}, and put it as {name} into the folder that --released names"
