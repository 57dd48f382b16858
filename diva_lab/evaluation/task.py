"""What a benchmark is given, and the rows that it yields."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diva_lab.evaluation.features import FeatureStore
from diva_lab.evaluation.image_sets import ImageSet, read_set
from diva_lab.image_files import Place
from diva_lab.models.encoders import Encoder


@dataclass(frozen=True)
class Task:
    """What a benchmark is given: an encoder, its features, a set, and how."""

    encoder: Encoder
    store: FeatureStore
    folder: Path
    kind: str = "global"
    seed: int = 0
    strict: bool = False
    max_images: int = 0
    scores: list[pd.DataFrame] = field(default_factory=list)  # of pairs, for a comparison; mmvp-vlm leaves its here
    classes: list[int] = field(default_factory=list)  # how many each set read has

    def read(self, split: str = "test") -> ImageSet:
        return read_set(self.folder, split).draw(self.max_images, self.seed)

    def embed(self, places: Sequence[Place]) -> torch.Tensor:
        return self.store(places, self.kind)

    def embed_files(self, files: Sequence[Path]) -> torch.Tensor:
        return self.embed([Place(str(file)) for file in files])


def score_row(metric: str, value: float, n: int, low=np.nan, high=np.nan, chance=np.nan, category: str = "all") -> dict:
    note = "not above chance" if low <= chance else ""
    return {"metric": metric, "category": category, "n": n, "value": value, "low": low, "high": high, "chance": chance,
            "note": note}  # fmt: skip


def labelled(task: Task, split: str = "test") -> tuple[ImageSet, torch.Tensor]:
    found = task.read(split)
    if not len(found.labels):
        raise ValueError(f"{task.folder}: pictures without classes; expected a folder for each class, or .cls members")
    task.classes.append(len(found.classes))
    return found, task.embed(found.places)


def labelled_train(task: Task) -> tuple[ImageSet, torch.Tensor]:
    return labelled(task, "train")
