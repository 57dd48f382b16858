"""Every benchmark on the tiny world, as one flat record: what the encoder sees, and what it still tells apart."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diva_lab import messages
from diva_lab.evaluation.clustering import cluster_scores
from diva_lab.evaluation.image_sets import decode_image
from diva_lab.evaluation.pairs import score_pairs, summarise
from diva_lab.evaluation.probes import linear_probes
from diva_lab.evaluation.task import Task, benchmark, score_row
from diva_lab.evaluation.zeroshot import zeroshot_accuracy
from diva_lab.image_files import Place
from diva_lab.models.encoders import embed
from diva_lab.paths import CACHE
from diva_lab.statistics import wilson
from diva_lab.world import CLASSES, DETAILS, PATTERNS, World, draw_scenes, write_pairs

WORLD = World()
SCENES = 3000  # of a test set, and of the probes' training set
# split -> (pairs a pattern, seed of the pairs, seed of the test scenes). Training draws from (world.seed, 1) and
# (world.seed, 40, ...); numpy takes (a, b) and (a, b, 0, 0) for the same seed, so the second number has to differ.
WORLD_SPLITS = {"measure": (300, 1000, 2), "choose": (100, 2000, 9)}
PROBE_TRAIN = 3
WORLD_MEASURES = [f"{kind}/{name}" for kind in ("pairs", "probe") for name in (*DETAILS, "mean")] + [
    "zeroshot", "nmi", "acc", "ari",
]  # of a report, intervals left out  # fmt: skip


def world_pairs(world: World = WORLD, split: str = "measure", cache: Path = CACHE) -> Path:
    """The folder of a split's minimal pairs, in MMVP-VLM's layout; written on first use, whole or not at all."""
    if split not in WORLD_SPLITS:
        raise ValueError(f"unknown split {split!r}; {messages.expected(split, WORLD_SPLITS)}")
    per_pattern, seed, _ = WORLD_SPLITS[split]
    folder = Path(cache) / f"world-{world.seed}-{world.px}" / f"pairs-{split}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="writing-") as draft:
            pairs = write_pairs(Path(draft) / "pairs", world, per_pattern, seed + world.seed)
            _move_unless_there(pairs, folder)
    return folder


def _move_unless_there(folder: Path, target: Path) -> None:
    """Rename a folder; another process may have been faster."""
    try:
        os.rename(folder, target)
    except OSError:
        if not target.exists():
            raise


@functools.lru_cache(maxsize=4)
def world_scenes(world: World, key: int) -> tuple[np.ndarray, Tensor]:
    """`SCENES` scenes [n] and their images, uint8 [n, 3, px, px]."""
    scenes = draw_scenes(SCENES, (world.seed, key))
    return scenes, torch.from_numpy(world.render(scenes)).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=4)
def _images_of(files: tuple[Path, ...]) -> Tensor:
    """The images of pairs that `world_pairs` wrote, uint8 [n, 3, px, px]; kept, since every report shows them."""
    images = [decode_image(Place(str(file)), np.array) for file in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def world_report(
    encoder, world: World = WORLD, split: str = "measure", seed: int = 0, cache: Path = CACHE
) -> dict[str, float]:
    """P- and D-Ability of `encoder` on `world`, all fractions in [0, 1] (but ARI, whose chance level is 0).

    Args:
        encoder: anything that `models.encoders.embed` takes and that has `encode_text`.
        world: whose images are shown.
        split: "measure" (300 pairs a pattern) for results, "choose" (100 other pairs, other scenes) for settings.
        seed: of k-means and of the bootstrap; the images do not depend on it.
        cache: folder under which pairs are kept.

    Returns:
        "pairs/<detail>" and "pairs/mean", each with "/low" and "/high" (95 %); "probe/<detail>" and "probe/mean";
        "zeroshot"; "nmi", "acc", "ari".
    """
    folder = world_pairs(world, split, cache)
    pairs = score_pairs(encoder, folder, lambda files: embed(encoder, _images_of(tuple(files))))
    detail_of = {pattern: detail for detail, pattern in PATTERNS.items()}
    summary = summarise(pairs.assign(pattern=pairs["pattern"].map(detail_of)), seed=seed)
    names = [f"{name}{end}" for name in (*DETAILS, "mean") for end in ("", "/low", "/high")]

    scenes, images = world_scenes(world, WORLD_SPLITS[split][2])
    train_scenes, train_images = world_scenes(world, PROBE_TRAIN)
    embeddings, train = embed(encoder, images), embed(encoder, train_images)
    probes = linear_probes(train, {d: train_scenes[d] for d in DETAILS}, embeddings, {d: scenes[d] for d in DETAILS})
    labels = scenes["class"].astype(int)
    return {
        **{f"pairs/{name}": summary[name] for name in names},
        **{f"probe/{detail}": accuracy for detail, accuracy in probes.items()},
        "probe/mean": float(np.mean(list(probes.values()))),
        "zeroshot": zeroshot_accuracy(encoder, embeddings, torch.from_numpy(labels), CLASSES),
        **cluster_scores(embeddings, labels, seed),
    }


def cache_report(report: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """Cache `report` by the embeddings of 64 fixed images: runs that start from one encoder evaluate it once."""
    reports: dict[bytes, dict[str, float]] = {}
    images = torch.from_numpy(WORLD.render(draw_scenes(64, 0))).permute(0, 3, 1, 2)

    def cached(encoder) -> dict[str, float]:
        key = embed(encoder, images).numpy().tobytes()
        if key not in reports:
            reports[key] = report(encoder)
        return reports[key]

    return cached


def report_rows(report: Mapping[str, float]) -> Iterator[dict]:
    """A `world_report` of the split `measure` as rows, with intervals and chance levels; other keys are left out."""
    values = {detail: 1 / len(names) for detail, names in DETAILS.items()}
    chances = {"zeroshot": 1 / len(CLASSES), "ari": 0.0, "probe/mean": float(np.mean(list(values.values())))}
    chances |= {f"probe/{detail}": chance for detail, chance in values.items()}
    each = WORLD_SPLITS["measure"][0]
    for name in [name for name in WORLD_MEASURES if name in report]:
        metric, _, category = name.partition("/")
        value, chance = report[name], 0.25 if metric == "pairs" else chances.get(name, np.nan)
        n, ends = SCENES, (report.get(f"{name}/low", np.nan), report.get(f"{name}/high", np.nan))
        if metric == "pairs":
            n = each * len(DETAILS) if category == "mean" else each
        elif metric == "zeroshot" or (metric == "probe" and category != "mean"):
            ends = wilson(round(value * n), n)
        yield score_row(metric, value, n, *ends, chance, "all" if category in ("", "mean") else category)


@benchmark(data="nothing", fixed={"features": "global", "precision": "no"})
def world_benchmark(task: Task) -> Iterator[dict]:
    """The tiny world's pairs, probes, zero-shot and clustering, always by the global feature in float32."""
    yield from report_rows(world_report(task.encoder, seed=task.seed))
