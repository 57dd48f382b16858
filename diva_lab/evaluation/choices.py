"""Captions against an image: is the right one nearer than the wrong ones? And two captions against two images.

What published benchmarks of perception share. Captions are read as they are, without a prompt around them. Images lie
anywhere below the benchmark's folder and are found by their names.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diva_lab.evaluation.row_files import image_of, read_parts
from diva_lab.evaluation.task import Task, score_row
from diva_lab.image_files import Place, find_images
from diva_lab.statistics import bootstrap_counts, wilson


@dataclass(frozen=True)
class Choice:
    """An image with captions, of which the first is right.

    Attributes:
        image: its bytes, or the name of its file, with or without a suffix.
        captions: two or more.
        part: of the benchmark; a score of its own.
        unit: choices of one unit are no independent samples; "" where the image is the unit.
        box: the part of the image that is meant, as in `Place`.
        tie: whether it counts as right where a wrong caption is exactly as near as the right one.
    """

    image: str | bytes
    captions: tuple[str, ...]
    part: str = "all"
    unit: str = ""
    box: tuple[int, ...] = ()
    tie: bool = False


def caption_cells(row: dict, columns: Sequence[str], where: str) -> tuple[str, ...]:
    """The captions in some columns of a row. Raises ValueError for a cell that holds no text."""
    if wrong := [name for name in columns if not isinstance(row[name], str) or not row[name].strip()]:
        raise ValueError(f"{where}: {wrong[0]} is {str(row[wrong[0]])[:40]!r}; expected a caption")
    return tuple(row[name] for name in columns)


def image_cell(row: dict, column: str, where: str) -> str | bytes:
    """The image in a column of a row: bytes, or a file's name. Raises ValueError for anything else."""
    try:
        image = image_of(row[column], Path())
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return image.path if isinstance(image, Place) else image


def read_choices(
    parts: Sequence[Path], image: str, captions: Sequence[str], more: Sequence[str] = (), **fields: object
) -> list[tuple[dict, Choice]]:
    """The rows of a file (or of all its parts), and the choice in each.

    Args:
        image, captions: columns of the image, and of the captions, the right one first.
        more: further columns that must be there.
        fields: of every `Choice`.
    """
    found = []
    for number, row in enumerate(read_parts(parts, [image, *captions, *more]), 1):
        where = f"{parts[0]}, row {number}"
        found.append((row, Choice(image_cell(row, image, where), caption_cells(row, captions, where), **fields)))
    return found


def find_places(folder: Path, images: Sequence[str | bytes]) -> list[Place]:
    """Where images lie: those that are named are files of that name anywhere below a folder.

    Raises:
        FileNotFoundError: where some are not there; says how many, and the first.
        ValueError: where several files have a name.
    """
    names = list(dict.fromkeys(image for image in images if isinstance(image, str)))
    files = defaultdict(list)
    for path in find_images(folder)[0] if names else ():
        files[path.name].append(path)
        files[path.stem].append(path)
    here = {name: [folder / name] if (folder / name).is_file() else files.get(Path(name).name, []) for name in names}
    if missing := [name for name in names if not here[name]]:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(names)} images are not there, as {missing[0]!r}; expected files of "
            "these names in it, at any depth"
        )
    if twice := [name for name in names if len(here[name]) > 1]:
        one, other = here[twice[0]][:2]
        raise ValueError(f"{folder}: the image {twice[0]!r} is two files, {one} and {other}; expected one of a name")
    return [Place(str(here[x][0])) if isinstance(x, str) else Place(str(folder), data=x) for x in images]


@torch.no_grad()
def embed_once(task: Task, places: Sequence[Place], texts: Sequence[str]) -> tuple[dict, dict]:
    """Place -> its image's embedding, and text -> its embedding; unit vectors, each computed once."""
    places, texts = list(dict.fromkeys(places)), list(dict.fromkeys(texts))
    encoded = [task.encoder.encode_text(texts[i : i + 256]).float().cpu() for i in range(0, len(texts), 256)]
    return dict(zip(places, task.embed(places), strict=True)), dict(zip(texts, torch.cat(encoded), strict=True))


def cosines(image: Float[Tensor, " d"], texts: Float[Tensor, "m d"]) -> Float[np.ndarray, " m"]:
    """The cosine of an image and each text; equal texts have equal cosines, to the bit."""
    return (texts * image).sum(1).numpy()


def answer(task: Task, choices: Sequence[Choice]) -> pd.DataFrame:
    """A row each choice: right, part, unit (a number) and chance, the share of right answers among random ones."""
    if not choices:
        raise ValueError(f"{task.folder}: no question in it that counts; expected some")
    places = find_places(task.folder, [choice.image for choice in choices])
    meant = [place._replace(box=choice.box) for place, choice in zip(places, choices, strict=True)]
    images, texts = embed_once(task, meant, [text for choice in choices for text in choice.captions])
    right = []
    for place, choice in zip(meant, choices, strict=True):
        first, *others = cosines(images[place], torch.stack([texts[text] for text in choice.captions]))
        right.append(first >= max(others) if choice.tie else first > max(others))
    units = {unit: k for k, unit in enumerate(dict.fromkeys(c.unit or p for c, p in zip(choices, places, strict=True)))}
    return pd.DataFrame({
        "right": np.array(right, dtype=bool),
        "part": [choice.part for choice in choices],
        "unit": [units[choice.unit or place] for choice, place in zip(choices, places, strict=True)],
        "chance": [1 / len(choice.captions) for choice in choices],
    })  # fmt: skip


def accuracy_row(
    answers: pd.DataFrame, metric: str = "accuracy", category: str = "all", by: Sequence[str] = (), seed: int = 0
) -> dict:
    """The share of right answers, or the mean of the shares in groups.

    The interval is Wilson's where every answer is a unit of its own and there are no groups. Else units are resampled
    with all of their answers; a group that a sample lacks does not count in it.

    Args:
        answers: columns right, unit, chance and `by`, as of `answer`.
        by: a column that makes the groups; of two columns the groups of the second are averaged within the first's.
    """
    n, right = len(answers), answers["right"].to_numpy()
    if not by and answers["unit"].is_unique:
        interval = wilson(int(right.sum()), n)
        return score_row(metric, float(right.mean()), n, *interval, float(answers["chance"].mean()), category)
    columns = answers[list(by)] if by else pd.DataFrame({"all": np.zeros(n)}, answers.index)
    group = columns.groupby(list(columns)).ngroup().to_numpy()
    outer = columns.iloc[:, 0].groupby(group).first()
    weights = (1 / outer.map(outer.value_counts()) / outer.nunique()).to_numpy(float)  # [groups]
    units = pd.factorize(answers["unit"])[0]
    counts = np.zeros((units.max() + 1, len(weights), 2))
    np.add.at(counts, (units, group), np.stack([right, np.ones(n)], 1))

    def rate(sums: np.ndarray) -> np.ndarray:
        shares, there = sums[..., 0] / np.maximum(sums[..., 1], 1), sums[..., 1] > 0
        return (shares * weights).sum(-1) / (there * weights).sum(-1)

    value, low, high = bootstrap_counts(counts, rate, seed=seed)
    chance = float((answers["chance"].groupby(group).mean() * weights).sum())
    return score_row(metric, value, n, low, high, chance, category)


def part_rows(answers: pd.DataFrame, parts: Sequence[str], seed: int, metric: str = "accuracy") -> Iterator[dict]:
    """The accuracy of each part, and where all of `parts` are there, their mean as the category `all`."""
    for part, own in answers.groupby("part", sort=False):
        yield accuracy_row(own, metric, part, seed=seed)
    if set(parts) <= set(answers["part"]):
        yield accuracy_row(answers[answers["part"].isin(parts)], metric, by=["part"], seed=seed)


def square_decisions(similarity: Float[np.ndarray, "n 2 2"]) -> dict[str, Bool[np.ndarray, " n"]]:
    """Winoground's decisions from `similarity` [n, captions, images]; a tie is wrong.

    `text`: each image is nearer to its own caption than to the other; `image`: each caption is nearer to its own image
    than to the other; `group`: both.
    """
    own = similarity[:, [0, 1], [0, 1]]  # [n, 2]: caption k and image k
    other_caption, other_image = similarity[:, [1, 0], [0, 1]], similarity[:, [0, 1], [1, 0]]
    text, image = (own > other_caption).all(1), (own > other_image).all(1)
    return {"text": text, "image": image, "group": text & image}


def square_rows(task: Task, parts: Sequence[Path], images: Sequence[str], captions: Sequence[str]) -> Iterator[dict]:
    """Rows of the text, image and group score. `images`, `captions`: two columns each, those of one number belong."""
    rows = list(enumerate(read_parts(parts, [*images, *captions]), 1))
    texts = [caption_cells(row, captions, f"{parts[0]}, row {k}") for k, row in rows]
    named = [image_cell(row, column, f"{parts[0]}, row {k}") for k, row in rows for column in images]
    places = find_places(task.folder, named)
    by_place, by_text = embed_once(task, places, [text for pair in texts for text in pair])
    similarity = np.stack(
        [
            np.stack([cosines(by_place[place], torch.stack([by_text[text] for text in pair])) for place in two], 1)
            for two, pair in zip(zip(places[::2], places[1::2], strict=True), texts, strict=True)
        ]
    )  # fmt: skip  [n, captions, images]
    for name, right in square_decisions(similarity).items():
        yield score_row(name, float(right.mean()), len(right), *wilson(int(right.sum()), len(right)),
                        1 / 6 if name == "group" else 1 / 4)  # fmt: skip
