"""Captions against an image: is the right one nearer than the wrong ones? And two captions against two images.

What published benchmarks of perception share. Captions are read as they are, without a prompt around them. Images lie
anywhere below the benchmark's folder and are found by their names.

A benchmark is a table of one encoder's answers (`ITEM`, right, chance) and the scores that are counted of it. So the
paired difference of two encoders is counted as the scores are, of the same items, where right is after - before.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diva_lab.evaluation.row_files import image_of, read_parts
from diva_lab.evaluation.task import Task, benchmark, paired_rows, score_row
from diva_lab.image_files import Place, byte_hashes, find_images
from diva_lab.statistics import bootstrap_counts, interval_p, wilson

ITEM = ["item", "metric", "part", "group", "unit"]  # of an answer, the same for every encoder; item is a hash


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
        group: of a mean over groups within a part.
    """

    image: str | bytes
    captions: tuple[str, ...]
    part: str = "all"
    unit: str = ""
    box: tuple[int, ...] = ()
    tie: bool = False
    group: str = ""


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


def hash_items(items: Sequence[tuple[Sequence[Place], Sequence[str]]]) -> list[str]:
    """A hash of each item: of the bytes and boxes of its images, and of its captions."""
    whole = list(dict.fromkeys(place._replace(box=()) for places, _ in items for place in places))
    contents = dict(zip(whole, byte_hashes(whole), strict=True))
    facts = (([(contents[p._replace(box=())], p.box) for p in places], *captions) for places, captions in items)
    return [blake2b(repr(one).encode(), digest_size=8).hexdigest() for one in facts]


def answer(task: Task, choices: Sequence[Choice]) -> pd.DataFrame:
    """A row each choice: `ITEM` (unit is a number), right, and chance, the share of right answers among random ones."""
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
        "item": hash_items([([place], choice.captions) for place, choice in zip(meant, choices, strict=True)]),
        "metric": "accuracy",
        "part": [choice.part for choice in choices],
        "group": [choice.group for choice in choices],
        "unit": [units[choice.unit or place] for choice, place in zip(choices, places, strict=True)],
        "right": np.array(right, dtype=bool),
        "chance": [1 / len(choice.captions) for choice in choices],
    })  # fmt: skip


class Score(NamedTuple):
    """The share of right answers, or the mean of the shares in groups.

    Attributes:
        answers: columns right, unit, chance and `by`, as of `answer`.
        metric, category: of the row.
        by: a column that makes the groups; of two columns the groups of the second are averaged within the first's.
    """

    answers: pd.DataFrame
    metric: str = "accuracy"
    category: str = "all"
    by: Sequence[str] = ()

    def each_is_a_unit(self) -> bool:
        return not self.by and self.answers["unit"].is_unique

    def resample(self, seed: int) -> tuple[tuple[float, float, float], float]:
        """(value, low, high) and chance: units are resampled with all of their answers.

        A group that a sample lacks does not count in it.
        """
        n, answers = len(self.answers), self.answers
        columns = answers[list(self.by)] if self.by else pd.DataFrame({"all": np.zeros(n)}, answers.index)
        group = columns.groupby(list(columns)).ngroup().to_numpy()
        outer = columns.iloc[:, 0].groupby(group).first()
        weights = (1 / outer.map(outer.value_counts()) / outer.nunique()).to_numpy(float)  # [groups]
        units = pd.factorize(answers["unit"])[0]
        counts = np.zeros((units.max() + 1, len(weights), 2))
        np.add.at(counts, (units, group), np.stack([answers["right"].to_numpy(), np.ones(n)], 1))

        def rate(sums: np.ndarray) -> np.ndarray:
            shares, there = sums[..., 0] / np.maximum(sums[..., 1], 1), sums[..., 1] > 0
            return (shares * weights).sum(-1) / (there * weights).sum(-1)

        chance = float((answers["chance"].groupby(group).mean() * weights).sum())
        return bootstrap_counts(counts, rate, seed=seed), chance


def accuracy_row(score: Score, seed: int = 0) -> dict:
    """A score; its interval is Wilson's where every answer is a unit of its own and there are no groups."""
    n, right = len(score.answers), score.answers["right"].to_numpy()
    if score.each_is_a_unit():
        interval, chance = wilson(int(right.sum()), n), float(score.answers["chance"].mean())
        return score_row(score.metric, float(right.mean()), n, *interval, chance, score.category)
    (value, low, high), chance = score.resample(seed)
    return score_row(score.metric, value, n, low, high, chance, score.category)


def difference_rows(score: Score, seed: int = 0) -> list[dict]:
    """Rows of the difference of two scores, as `paired_rows`, from answers whose right is after - before: -1, 0 or 1.

    Where not every answer is a unit of its own, units are resampled as for the scores, p is `interval_p`, and there
    are no `gained` and `lost`.
    """
    n, right = len(score.answers), score.answers["right"].to_numpy()
    if score.each_is_a_unit():
        return paired_rows(score.metric, int((right > 0).sum()), int((right < 0).sum()), n, score.category)
    interval, _ = score.resample(seed)
    p = score_row(f"{score.metric}, p", interval_p(*interval), n, category=score.category)
    return [score_row(score.metric, interval[0], n, *interval[1:], category=score.category), p]


def choice_benchmark(is_here: Callable[[Path], bool], scores: Callable[[pd.DataFrame], Iterator[Score]]) -> Callable:
    """A decorator for a function from a `Task` to answers: a benchmark whose rows are those of `scores`."""

    def compare(before: pd.DataFrame, after: pd.DataFrame, seed: int) -> tuple[list[dict], None]:
        if not np.array_equal(before[ITEM].astype(str), after[ITEM].astype(str)):
            raise ValueError(
                "its items are not those that the first encoder answered; expected the same folder for both: where it "
                "was changed since, measure all encoders anew, with another --out"
            )
        changes = after.assign(right=after["right"].astype(int) - before["right"].astype(int))
        return [row for score in scores(changes) for row in difference_rows(score, seed)], None

    def mark(function: Callable[[Task], pd.DataFrame]) -> Callable[[Task], Iterator[dict]]:
        @benchmark(data="own", is_here=is_here, compare=compare)
        @functools.wraps(function)
        def rows(task: Task):
            task.answers.append(function(task))
            for score in scores(task.answers[-1]):
                yield accuracy_row(score, task.seed)

        return rows

    return mark


def part_scores(answers: pd.DataFrame, means: Mapping[str, Sequence[str]] | None = None) -> Iterator[Score]:
    """Each metric of each part, and of `means` (name -> parts) the mean accuracy of those whose parts are all there."""
    for (metric, part), own in answers.groupby(["metric", "part"], sort=False):
        yield Score(own, metric, part)
    single = answers[answers["metric"] == "accuracy"]
    for name, parts in (means or {}).items():
        if set(parts) <= set(single["part"]):
            yield Score(single[single["part"].isin(parts)], category=name, by=("part",))


def square_decisions(similarity: Float[np.ndarray, "n 2 2"]) -> dict[str, Bool[np.ndarray, " n"]]:
    """Winoground's decisions from `similarity` [n, captions, images]; a tie is wrong.

    `text`: each image is nearer to its own caption than to the other; `image`: each caption is nearer to its own image
    than to the other; `group`: both.
    """
    own = similarity[:, [0, 1], [0, 1]]  # [n, 2]: caption k and image k
    other_caption, other_image = similarity[:, [1, 0], [0, 1]], similarity[:, [0, 1], [1, 0]]
    text, image = (own > other_caption).all(1), (own > other_image).all(1)
    return {"text": text, "image": image, "group": text & image}


def answer_squares(task: Task, parts: Sequence[Path], images: Sequence[str], captions: Sequence[str]) -> pd.DataFrame:
    """The text, the image and the group answers. `images`, `captions`: two columns, those of one number belong."""
    rows = list(enumerate(read_parts(parts, [*images, *captions]), 1))
    texts = [caption_cells(row, captions, f"{parts[0]}, row {k}") for k, row in rows]
    named = [image_cell(row, column, f"{parts[0]}, row {k}") for k, row in rows for column in images]
    places = find_places(task.folder, named)
    by_place, by_text = embed_once(task, places, [text for pair in texts for text in pair])
    squares = list(zip(zip(places[::2], places[1::2], strict=True), texts, strict=True))
    similarity = np.stack(
        [
            np.stack([cosines(by_place[place], torch.stack([by_text[text] for text in pair])) for place in two], 1)
            for two, pair in squares
        ]
    )  # fmt: skip  [n, captions, images]
    items = {"item": hash_items(squares), "part": "all", "group": "", "unit": range(len(squares))}
    tables = [
        pd.DataFrame(items | {"metric": name, "right": right, "chance": 1 / 6 if name == "group" else 1 / 4})
        for name, right in square_decisions(similarity).items()
    ]
    return pd.concat(tables, ignore_index=True)
