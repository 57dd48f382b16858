"""Readability as a benchmark: can feedback through a projector help this encoder on these pairs, before it is tried?"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diva_lab.analysis.readability import (
    DRAWS,
    Instrument,
    MinimalPairs,
    pair_rows,
    readability,
    world_pair_scenes,
    world_pairs_in_memory,
)
from diva_lab.evaluation.pairs import PREFIX, read_pairs
from diva_lab.evaluation.probes import fit_probe
from diva_lab.evaluation.task import Task, benchmark, score_row
from diva_lab.evaluation.world import PROBE_TRAIN, WORLD, WORLD_SPLITS, world_scenes
from diva_lab.image_files import decode_square
from diva_lab.models.encoders import embed
from diva_lab.models.registry import reads_embeddings
from diva_lab.training.build import build_conditioner, build_denoiser
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings

PAIRS = 32  # of a pattern at most: the first ones


def open_instrument(task: Task) -> Instrument:
    """The instrument of a task: its encoder, `task.projector` and `task.denoiser`.

    A projector that is a run of stage 1 brings its denoiser, and how the denoiser is used. An unCLIP decoder needs
    none, and is read by un2clip.

    Raises:
        FileNotFoundError, ValueError: as `build_conditioner`.
    """
    objective = "un2clip" if reads_embeddings(task.denoiser) else "diva"
    settings = Settings(objective=objective, denoiser=task.denoiser, projector=task.projector, draws=DRAWS)
    if (Path(task.projector) / "settings.json").is_file():
        own = Settings.of(Run(Path(task.projector)))
        settings = replace(own, objective="diva", projector=task.projector, draws=DRAWS, anchor="none")
    device = task.encoder.mean.device
    denoiser = build_denoiser(settings, device)
    conditioner = build_conditioner(settings, task.encoder, denoiser).eval().requires_grad_(False)
    return Instrument(task.encoder, conditioner, denoiser, settings, (settings.objective,))


def read_minimal_pairs(folder: Path, px: int) -> MinimalPairs:
    """The first `PAIRS` pairs of each pattern of a folder in MMVP-VLM's layout, as training sees them: px x px."""
    table = read_pairs(folder).groupby("pattern", sort=False).head(PAIRS)
    images = [
        [decode_square(path, px) for path in both] for both in zip(table["image_1"], table["image_2"], strict=True)
    ]
    statements = [
        (PREFIX + one, PREFIX + two) for one, two in zip(table["statement_1"], table["statement_2"], strict=True)
    ]
    pixels = torch.from_numpy(np.array(images)).permute(0, 1, 4, 2, 3)  # [n, 2, 3, px, px]
    return MinimalPairs(list(table["pattern"]), pixels, statements)


def instrument_rows(pairs: MinimalPairs, instrument: Instrument) -> Iterator[dict]:
    """A row a measure and pattern; those of one timestep bin are named `MEASURE, bin K of N`."""
    start = time.perf_counter()
    table = readability(pairs, instrument)
    seconds = time.perf_counter() - start
    print(f"readability: {len(pairs)} pairs, {instrument.bins * instrument.settings.draws} draws each, {seconds:.0f} s")
    for row in table.to_dict("records"):
        place = "" if row["bin"] == "all" else f", bin {int(row['bin']) + 1} of {instrument.bins}"
        yield _score(row, row["measure"] + place)


def _score(row: dict, metric: str) -> dict:
    """A row of `readability` as one of the table."""
    chance = np.nan if metric.startswith(("norm", "distance")) else 0.5
    category = "all" if row["pattern"] == "mean" else row["pattern"]
    return score_row(metric, row["value"], row["n"], row["low"], row["high"], chance, category)


@benchmark(data="pairs", fixed={"features": "global", "precision": "no"}, feedback=True)
def readability_benchmark(task: Task) -> Iterator[dict]:
    """Known, readable, said and seen on a folder of minimal pairs; see `analysis.readability`."""
    instrument = open_instrument(task)
    px = max(task.encoder.px, instrument.denoiser.px)
    yield from instrument_rows(read_minimal_pairs(task.folder, px), instrument)


@benchmark(data="nothing", fixed={"features": "global", "precision": "no"}, feedback=True)
def world_readability(task: Task) -> Iterator[dict]:
    """The same on pairs of the tiny world, with `class`, and with `probe` beside `seen`: does a linear probe of the
    detail give an image's own value more than its partner's?"""
    seed = WORLD_SPLITS["measure"][1]
    pairs = world_pairs_in_memory(PAIRS, seed)
    yield from instrument_rows(pairs, open_instrument(task))
    for row in pair_rows("probe", "all", probe_pairs(task.encoder, pairs, seed), pairs.patterns):
        yield _score(row, "probe")


def probe_pairs(encoder, pairs: MinimalPairs, seed: int) -> np.ndarray:
    """The share of each pair's two images [n] whose own value a probe of the pair's detail prefers to the partner's."""
    scenes, images = world_scenes(WORLD, PROBE_TRAIN)
    train = embed(encoder, images)
    embeddings = embed(encoder, pairs.images.flatten(0, 1)).unflatten(0, (-1, 2))  # [n, 2, d]
    own, details = world_pair_scenes(PAIRS, seed)
    right = np.zeros(len(pairs))
    for detail in dict.fromkeys(details):
        members = np.flatnonzero(details == detail)
        probe = fit_probe(train, scenes[detail])
        score = probe.predict_log_proba(embeddings[members].flatten(0, 1).numpy()).reshape(len(members), 2, -1)
        values = own[members][detail]  # [m, 2]
        mine = np.take_along_axis(score, values[..., None].astype(int), 2)[..., 0]
        other = np.take_along_axis(score, values[:, ::-1, None].astype(int), 2)[..., 0]
        right[members] = ((mine > other) + (mine == other) / 2).mean(1)
    return right
