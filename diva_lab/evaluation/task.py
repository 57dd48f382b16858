"""What a benchmark is given, and the rows that it yields."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diva_lab.evaluation.features import FeatureStore
from diva_lab.evaluation.image_sets import ImageSet, read_set
from diva_lab.image_files import LeftOut, Place
from diva_lab.models.encoders import Encoder
from diva_lab.statistics import mcnemar_p, paired_shares


@dataclass(frozen=True)
class Reads:
    """What a benchmark needs, and which options it heeds.

    Attributes:
        data: `pairs` (MMVP-VLM's layout), `classes`, `captions`, `masks`, `own` (a layout that no other benchmark
            reads), or `nothing`: it brings its own images.
        is_here: whether a folder is in its `own` layout.
        heeds: of the options `strict` and `max_images` those that change its rows.
        fixed: what its rows say of `features` and `precision` whatever the options are.
        feedback: whether it reads a projector and a denoiser.
        layer: whether it reads the patch tokens of a layer.
        compare: two encoders' answers (those of `Task.answers`, the first encoder's first) and the seed -> rows of what
            changed, and the changed pairs where it is of pairs; ValueError where the items are not the same. None where
            no answers are kept.
    """

    data: str = "classes"
    is_here: Callable[[Path], bool] = lambda folder: False
    heeds: tuple[str, ...] = ()
    fixed: dict[str, str] = field(default_factory=dict)
    feedback: bool = False
    layer: bool = False
    compare: Callable[[pd.DataFrame, pd.DataFrame, int], tuple[list[dict], list[dict] | None]] | None = None


def benchmark(**reads: object) -> Callable:
    """A decorator for a function from a `Task` to rows of `score_row`, with the fields of `Reads`."""

    def mark(function: Callable) -> Callable:
        function.reads = Reads(**reads)
        return function

    return mark


def reads_of(function: Callable) -> Reads:
    """What a benchmark declared; a plain function, such as one of a notebook, reads classes or a set by its name."""
    return getattr(function, "reads", Reads(heeds=("max_images",)))


@dataclass(frozen=True)
class Task:
    """What a benchmark is given.

    Attributes:
        encoder: frozen.
        store: computes the encoder's features of image files, once for each content.
        folder: of the set.
        kind: of the features, a key of `FEATURES`.
        seed: of k-means, bootstraps, of the images that `max_images` leaves and of the patches that `kind` draws.
        draw: which draw of the patches it is, from 0, for a kind in `DRAWS`.
        strict: MMVP-VLM as the official script counts it.
        max_images: of a split; 0 for all.
        layer: whose patch tokens are read, as in `Encoder.tokens`.
        projector, denoiser: through which feedback reaches the encoder, as in `Settings`.
        corrections: file of labels and what it says of this set: id -> label; see `pairs.read_corrections`.
        answers: to each item; a benchmark with `compare` leaves a table of them here.
        classes: how many classes each set has that was read.
    """

    encoder: Encoder
    store: FeatureStore
    folder: Path
    kind: str = "global"
    seed: int = 0
    draw: int = 0
    strict: bool = False
    max_images: int = 0
    layer: int = -2
    projector: str = "shipped"
    denoiser: str = "tiny"
    corrections: tuple[Path, dict[int, int]] | None = None
    answers: list[pd.DataFrame] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)

    def read(self, split: str = "test") -> ImageSet:
        images = read_set(self.folder, split)
        self.tell_left_out(images.left_out)
        return images.draw(self.max_images, self.seed)

    def tell_left_out(self, left_out: Sequence[LeftOut]) -> None:
        """Print once how many files of the set were left out, and why the first was."""
        if left_out:
            print_once(f"{self.folder}: {len(left_out)} left out, the first: {': '.join(left_out[0])}")

    def embed(self, places: Sequence[Place]) -> torch.Tensor:
        return self.store(places, self.kind, self.seed, self.draw)

    def embed_files(self, files: Sequence[Path]) -> torch.Tensor:
        return self.embed([Place(str(file)) for file in files])


@functools.cache
def print_once(line: str) -> None:
    """Print a line that many encoders and benchmarks would repeat."""
    print(line)


def score_row(metric: str, value: float, n: int, low=np.nan, high=np.nan, chance=np.nan, category: str = "all") -> dict:
    """A row of the table: a value with its interval and chance level, and a note where it is not above chance."""
    note = "not above chance" if low <= chance else ""
    return {"metric": metric, "category": category, "n": n, "value": value, "low": low, "high": high, "chance": chance,
            "note": note}  # fmt: skip


def paired_rows(metric: str, gained: int, lost: int, n: int, category: str = "all") -> list[dict]:
    """Rows of a difference of paired shares: METRIC, and `METRIC, gained`, `METRIC, lost` (shares), `METRIC, p`.

    The interval is `paired_shares`', p is McNemar's exact one.
    """
    difference, *interval = paired_shares(gained, lost, n)
    beside = {"gained": gained / n, "lost": lost / n, "p": mcnemar_p(gained, lost)}
    rows = [score_row(f"{metric}, {name}", value, n, category=category) for name, value in beside.items()]
    return [score_row(metric, difference, n, *interval, category=category), *rows]


def spread_rows(draws: Sequence[Sequence[dict]]) -> list[dict]:
    """For each row of a benchmark the mean over the draws, whose low and high are the lowest and the highest draw.

    Args:
        draws: the rows of each draw, in the same order.
    """
    rows = []
    for same in zip(*draws, strict=True):
        values, first = [row["value"] for row in same], same[0]
        spread = float(np.mean(values)), first["n"], min(values), max(values), first["chance"], first["category"]
        rows.append(score_row(f"{first['metric']}, {len(values)} draws", *spread))
    return rows


def labelled(task: Task, split: str = "test") -> tuple[ImageSet, torch.Tensor]:
    """A split's images with classes, and their features [n, d]."""
    images = task.read(split)
    if not len(images.labels):
        raise ValueError(f"{task.folder}: images without classes; expected a folder for each class, or .cls members")
    task.classes.append(len(images.classes))
    return images, task.embed(images.places)
