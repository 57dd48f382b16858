"""LLaVA's own format of conversations about images, and batches of them.

    [{"id": "1", "image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                       {"from": "gpt", "value": "A red star."}]}, ...]

A record without `image` is about text alone. Each epoch has an order of its own, drawn from the seed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diva_lab.image_files import LeftOut, open_picture
from diva_lab.llava.folders import IMAGE, Llava
from diva_lab.llava.prompts import read_images, render, render_plain, tokenize
from diva_lab.machine import generator
from diva_lab.models.weights import one_line

SPEAKERS = ("human", "gpt")
EXPECTED = (
    'expected {"id", "image", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}, '
    "human and gpt by turns"
)


class Record(NamedTuple):
    """A conversation: its image, if it has one, and what is said by turns, the human first."""

    image: Path | None
    turns: tuple[str, ...]


def read_conversations(path: str | Path, images: str | Path) -> list[Record]:
    """The records of a JSON file.

    Args:
        images: the folder that images are named in.

    Raises:
        ValueError: for a file that is no such list, cut off, or without any image; names the first wrong record.
        FileNotFoundError: for a file, or images, that are not there; says how many.
    """
    path, images = Path(path), Path(images)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file in UTF-8, cut off? {one_line(error)}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a list of records, found {type(rows).__name__} of {len(rows)}")
    records = [_record(row, images, f"{path}, record {number}") for number, row in enumerate(rows, 1)]
    files = {record.image for record in records if record.image is not None}
    if not files:
        raise ValueError(f"{path}: none of its {len(records)} records has an image; {EXPECTED}")
    if missing := sorted(file for file in files if not file.is_file()):
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(files)} images are not there, as {missing[0]}")
    return records


def _record(row: object, images: Path, where: str) -> Record:
    said = row.get("conversations") if isinstance(row, dict) else None
    whole = isinstance(said, list) and len(said) > 1 and len(said) % 2 == 0
    whole = whole and all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in said)
    if not whole or any(turn.get("from") != SPEAKERS[k % 2] for k, turn in enumerate(said)):
        raise ValueError(f"{where}: {str(row)[:80]!r}; {EXPECTED}")
    name = row.get("image")
    marks = sum(turn["value"].count(IMAGE) for turn in said)
    if not isinstance(name, str | None) or marks > 1 or (marks and not name):
        raise ValueError(f"{where}: image {str(name)[:80]!r} and {marks} times {IMAGE}; expected one image at most")
    turns = tuple(turn["value"].replace(IMAGE, "").strip() for turn in said)
    return Record(images / name if name else None, turns)


class Dialogues:
    """Endless micro-batches of conversations, each what a LLaVA takes; every process has records of its own.

    Args:
        llava: on the device that it is trained on.
        records: see `read_conversations`.
        plain: only image and first answer, as LLaVA-1.5 trains the projector; else the chat template.
        batch: records of a micro-batch.
        longest: tokens of a conversation; later ones are cut off.
        seed: of the order.
        position: records that this process has drawn before.
        rank, processes: which of how many processes this is.
    """

    def __init__(
        self, llava: Llava, records: Sequence[Record], plain: bool, batch: int, longest: int, seed: int,
        position: int = 0, rank: int = 0, processes: int = 1,
    ):  # fmt: skip
        self.llava, self.records, self.plain = llava, records, plain
        self.batch, self.longest, self.seed = batch, longest, seed
        self.position, self.rank, self.processes = position, rank, processes
        self.skipped: list[LeftOut] = []  # none: an image that cannot be read stops the run
        self.epoch, self.order = -1, torch.empty(0)

    def __iter__(self) -> "Dialogues":
        return self

    def __next__(self) -> dict[str, Tensor]:
        number = self.position // self.batch * self.processes + self.rank
        group = [self._record(number * self.batch + k) for k in range(self.batch)]
        self.position += self.batch
        images = [image for record in group if record.image is not None for image in [_decode(record.image)]]
        prompts = [
            render_plain(self.llava, record.turns[1])
            if self.plain
            else render(self.llava, record.turns, record.image is not None)
            for record in group
        ]
        pixels = {"pixel_values": read_images(self.llava, images)} if images else {}
        return tokenize(self.llava, prompts, self.longest) | pixels

    def _record(self, draw: int) -> Record:
        epoch, place = divmod(draw, len(self.records))
        if epoch != self.epoch:
            random = generator("records", self.seed, epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.records), generator=random)
        return self.records[self.order[place]]


def _decode(path: Path) -> object:
    try:
        with open_picture(path) as image:
            return image.copy()
    except ValueError as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error
