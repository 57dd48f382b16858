"""Any encoder on any benchmark, one table with a row for each encoder, benchmark, set, metric and category.

    >>> from diva_lab import evaluate
    >>> evaluate(["openai-l14", "runs/ID"], ["mmvp-vlm", "clustering", "zero-shot"], "data_root")

A benchmark runs on every folder of the root that it can read (`zero-shot:cifar10` names one); features are computed
once for each encoder and set. Features that draw patches at random (`DRAWS`) are measured 20 times: the usual rows are
of the first draw, and beside each stands `METRIC, 20 draws`: the mean, and as low and high the lowest and the highest
draw. All that fails is listed at the end and has no row. Of two or more encoders, the later
ones are compared with the first, pair by pair. An average stands only where all of a list are there: the 27 sets of
zero-shot, the six of clustering, the eight benchmarks of perception (`PERCEPTION`), each with one set.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diva_lab import messages
from diva_lab.evaluation.aro import aro
from diva_lab.evaluation.clustering import cluster_benchmark
from diva_lab.evaluation.colorswap import colorswap
from diva_lab.evaluation.correspondence import correspondence
from diva_lab.evaluation.countbench import countbench
from diva_lab.evaluation.emoji import emoji_benchmark
from diva_lab.evaluation.features import DRAWS, FEATURES, PRECISIONS, FeatureStore, features_for
from diva_lab.evaluation.feedback import readability_benchmark, world_readability
from diva_lab.evaluation.image_sets import (
    CLASSIFICATION_SETS,
    CLUSTERED,
    IMAGE_FOLDERS,
    canonical_name,
    has_captions,
    is_set,
)
from diva_lab.evaluation.knn import knn_benchmark
from diva_lab.evaluation.mask_sets import is_masks
from diva_lab.evaluation.pairs import is_pairs, mmvp_vlm, read_corrections
from diva_lab.evaluation.patch_probe import patch_probe
from diva_lab.evaluation.probes import linear_probe
from diva_lab.evaluation.results import COLUMNS, FACTS, ResultFiles, versions_and_git
from diva_lab.evaluation.retrieval import retrieval_benchmark
from diva_lab.evaluation.segmentation import segmentation, world_segmentation
from diva_lab.evaluation.sugarcrepe import sugarcrepe
from diva_lab.evaluation.task import Reads, Task, reads_of, score_row, spread_rows
from diva_lab.evaluation.valse import valse
from diva_lab.evaluation.whatsup import whatsup
from diva_lab.evaluation.winoground import winoground
from diva_lab.evaluation.world import world_benchmark
from diva_lab.evaluation.zeroshot import zero_shot
from diva_lab.image_files import visible
from diva_lab.machine import default_device
from diva_lab.models.encoders import Encoder, load_encoder
from diva_lab.paths import CACHE
from diva_lab.statistics import percent
from diva_lab.training.build import split_mix, tuned_encoder
from diva_lab.training.runs import Run

BENCHMARKS: dict[str, Callable[[Task], Iterator[dict]]] = {
    "mmvp-vlm": mmvp_vlm,
    "sugarcrepe": sugarcrepe,
    "winoground": winoground,
    "colorswap": colorswap,
    "whatsup": whatsup,
    "aro": aro,
    "countbench": countbench,
    "valse": valse,
    "zero-shot": zero_shot,
    "clustering": cluster_benchmark,
    "probe": linear_probe,
    "knn": knn_benchmark,
    "retrieval": retrieval_benchmark,
    "world": world_benchmark,
    "emoji": emoji_benchmark,
    "readability": readability_benchmark,
    "world-readability": world_readability,
    "patch-probe": patch_probe,
    "segmentation": segmentation,
    "world-segmentation": world_segmentation,
    "correspondence": correspondence,
}
# benchmark -> the sets of its average, and the metrics that are averaged
AVERAGES = {"zero-shot": (tuple(CLASSIFICATION_SETS), ("score",)), "clustering": (CLUSTERED, ("nmi", "acc", "ari"))}
PERCEPTION = {  # benchmark of `p average` -> its score, a metric of the category `all`
    "mmvp-vlm": "pairs",
    "sugarcrepe": "accuracy",
    "winoground": "group",
    "colorswap": "group",
    "whatsup": "accuracy",
    "aro": "macro accuracy",
    "countbench": "accuracy",
    "valse": "accuracy",
}


def evaluate(
    encoders: Sequence[str | Path],
    benchmarks: Sequence[str],
    root: str | Path = ".",
    out: str | Path | None = None,
    seed: int = 0,
    features: str = "global",
    precision: str = "auto",
    strict: bool = False,
    max_images: int = 0,
    cache: Path | None = CACHE / "features",
    workers: int | None = None,
    projector: str = "shipped",
    denoiser: str = "tiny",
    corrections: str | Path | None = None,
    layer: int = -2,
    resume: bool = False,
) -> pd.DataFrame:
    """One row for each encoder, benchmark, set, metric and category: `COLUMNS` and `FACTS`.

    Of a second encoder on, mmvp-vlm and the benchmarks of captions have rows of paired differences, of the category
    `against FIRST` or `against FIRST, PART`: METRIC and `METRIC, p`; where every item is a unit also `METRIC, gained`
    and `METRIC, lost` (shares of the items), and p is McNemar's exact one. Averages are rows of the set `27 sets` or
    `6 sets`, where this call measured all of them; n is their number. A set of `CLASSIFICATION_SETS` that lacks classes
    says so in `set`, and does not count.

    Args:
        encoders: see `open_encoder`.
        benchmarks: keys of `BENCHMARKS`, each as `NAME` or `NAME:SET`.
        root: folder of the data; `image_sets` and `pairs` in diva_lab.evaluation say in what layouts.
        out: a csv that grows by each finished set; rows of the same measurement are replaced. Beside it OUT.pairs.csv
            lists the pairs gained and lost, OUT.speed.csv how many images were embedded and how fast.
        seed: of k-means, bootstraps and patches that are drawn.
        features: a key of `FEATURES`; texts are compared with them. `class+patches` is `class+unit-patches`, and is
            called so in the rows, for MetaCLIP and DFN@378, known by the name of the encoder or of the one that a run
            tuned. The tiny world's rows are always `global`.
        precision, cache, workers: see `FeatureStore`. A row says what `auto` was; the tiny world's is always `no`.
        strict: MMVP-VLM as the official script counts it.
        max_images: so many images of a set's split, drawn by the seed, where it has more; 0 for all.
        projector, denoiser: of `readability`, as in `Settings`; its rows name the projector in `set`. A projector that
            is a run of stage 1 brings its denoiser.
        corrections: a csv of corrected labels, see `pairs.read_corrections`. For each set that it names, mmvp-vlm has
            one more row of `pairs` beside the official one, of the category `corrected by FILE`.
        layer: whose patch tokens are read, as in `Encoder.tokens`, where a benchmark reads them; named in `set`.
        resume: whether to take the rows of a cell (an encoder's weights on a set of a benchmark) from `out` where they
            stand there, measured with the same options. A set with `corrections` is always measured.

    Raises:
        ValueError: before anything is computed, where no data is there for a benchmark; else at the end, listing
            everything that failed. Finished rows are in `out`, and in the error's `table`.
    """
    for name, value, known in (("features", features, FEATURES), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; {messages.expected(value, known)}")
    options = {"kind": features, "seed": seed, "strict": strict, "max_images": max_images, "layer": layer}
    work = _work(Path(root), benchmarks)
    labels = {} if corrections is None else _corrections(Path(corrections), work)
    files = ResultFiles(out, resume)
    session = _Session(files, work, options | {"projector": str(projector), "denoiser": denoiser}, labels)
    return session.run(encoders, partial(FeatureStore, cache=cache, precision=precision, workers=workers))


class _Session:
    """One call of `evaluate`: the rows so far, what failed, and the first encoder's answers.

    Args:
        files: where rows go as they come.
        work: benchmark, folder and label of the set, for each task.
        options: of every `Task`.
        corrections: of the tasks on the folders that they name.
    """

    def __init__(
        self, files: ResultFiles, work: list[tuple[str, Path, str]], options: dict, corrections: dict[Path, tuple]
    ):
        self.files, self.work, self.options, self.corrections = files, work, options, corrections
        self.rows: list[dict] = []
        self.failures: list[str] = []
        self.failed_tasks = 0
        self.first: dict[tuple[str, Path], tuple[str, pd.DataFrame]] = {}  # benchmark, folder -> encoder, its answers
        self.provenance = versions_and_git()

    def run(self, encoders: Sequence[str | Path], open_store: Callable[[Encoder], FeatureStore]) -> pd.DataFrame:
        """The table of all encoders; raises ValueError at the end where something failed."""
        for name in map(str, encoders):
            try:
                encoder = open_encoder(name, default_device())
            except (ValueError, OSError) as error:
                self.failed(len(self.work), f"{name}: {error}")
                continue
            self.measure(name, open_store(encoder))
        table = pd.DataFrame(self.rows, columns=COLUMNS + FACTS)
        if self.failures:
            total = f"{self.failed_tasks} of {len(self.work) * len(encoders)} failed"
            error = ValueError("\n- ".join([f"{total}:", *self.failures]))
            error.table = table
            raise error
        return table

    def failed(self, tasks: int, message: str) -> None:
        self.failures.append(message)
        self.failed_tasks += tasks

    def measure(self, name: str, store: FeatureStore) -> None:
        """Run every task on one encoder, add its averages, and report the speed."""
        own: list[dict] = []
        options = self.options | {"kind": features_for(self.options["kind"], _original_name(name))}
        for benchmark, folder, label in self.work:
            task = Task(store.encoder, store, folder, **options, corrections=self.corrections.get(folder))
            reads = reads_of(BENCHMARKS[benchmark])
            facts = self._facts(store, task.kind, reads)
            how = f" through {task.projector}" if reads.feedback else f", layer {task.layer}" if reads.layer else ""
            rows, answers = self._find_finished(name, benchmark, folder, label, how, facts)
            if rows and not reads.compare:
                self.rows += rows
                own += rows
                continue
            try:
                if answers is None:
                    measured = _measure_draws(benchmark, task)
                    place = {"encoder": name, "benchmark": benchmark, "set": _label(label, task.classes) + how}
                    rows = [{**place, **row, **facts} for row in measured]
                for answers in task.answers:
                    self.files.add_answers(answers, rows[0])
                if answers is not None:
                    rows += self._compare_with_first(rows[0], folder, label, answers, facts)
            except (ValueError, OSError) as error:
                self.failed(1, f"{name}, {benchmark}, {label}: {error}")
                continue
            own += self._add(rows)
        self._add(average_rows(own) + perception_row(own))
        self._report_speed(name, store, options["kind"])

    def _find_finished(
        self, name: str, benchmark: str, folder: Path, label: str, how: str, facts: dict
    ) -> tuple[list[dict], pd.DataFrame | None]:
        """The rows and answers of a cell that the files hold from an earlier call; none where it is to be measured."""
        if not self.files.resume or folder in self.corrections:
            return [], None
        sets = rf"{re.escape(label)}( \(\d+ of \d+ classes\))?{re.escape(how)}"
        return self.files.find_cell(name, benchmark, sets, facts)

    def _facts(self, store: FeatureStore, kind: str, reads: Reads | None = None) -> dict:
        """What a row says of how it was measured; options that its benchmark does not heed are at their default."""
        facts = {"seed": self.options["seed"], "features": kind, "precision": store.precision}
        facts |= {"strict": False, "max_images": 0, "weights": store.fingerprint[:12], **self.provenance}
        if reads is None:
            return facts
        return facts | {name: self.options[name] for name in reads.heeds} | reads.fixed

    def _add(self, rows: list[dict]) -> list[dict]:
        self.rows += rows
        self.files.add_rows(rows)
        return rows

    def _compare_with_first(
        self, row: dict, folder: Path, label: str, answers: pd.DataFrame, facts: dict
    ) -> list[dict]:
        """Rows of what changed against the first encoder on the same items, else as `row`; the first has none."""
        name, benchmark = row["encoder"], row["benchmark"]
        first, before = self.first.setdefault((benchmark, folder), (name, answers))
        if first == name:
            return []
        changes, pairs = reads_of(BENCHMARKS[benchmark]).compare(before, answers, self.options["seed"])
        if pairs is not None:
            self.files.add_pairs(pairs, {"encoder": name, "against": first, "set": label} | facts)
        parts = ("" if one["category"] == "all" else f", {one['category']}" for one in changes)
        return [row | one | {"category": f"against {first}{part}"} for one, part in zip(changes, parts, strict=True)]

    def _report_speed(self, name: str, store: FeatureStore, kind: str) -> None:
        if not store.images:
            return
        speed, waiting = store.images / store.seconds, store.waited / store.seconds
        idle = f"{percent(waiting, digits=0)} of the time without data"
        print(f"{Path(name).name}: {store.images} images, {speed:.0f} a second, {idle}")
        row = {"encoder": name, "embedded": store.images, "seconds": store.seconds, "images_per_second": speed}
        row |= {"waiting": waiting, "batch": store.batch, "workers": store.workers, "device": store.device.type}
        self.files.add_speed(self._facts(store, kind) | row)


def _measure_draws(benchmark: str, task: Task) -> list[dict]:
    """A benchmark's rows, and those of the spread where the features of its images are drawn at random."""
    function = BENCHMARKS[benchmark]
    rows = list(function(task))
    count = 0 if "features" in reads_of(function).fixed else DRAWS.get(task.kind, 0)
    others = [list(function(replace(task, draw=k, answers=[], classes=[]))) for k in range(1, count)]
    return rows + (spread_rows([rows, *others]) if others else [])


def _corrections(file: Path, work: list[tuple[str, Path, str]]) -> dict[Path, tuple[Path, dict[int, int]]]:
    """Folder -> the file and its labels, for the sets of mmvp-vlm that it names.

    Raises:
        ValueError: where it names none of them.
    """
    by_set = read_corrections(file)
    sets = {folder: label for benchmark, folder, label in work if benchmark == "mmvp-vlm"}
    if not by_set.keys() & set(sets.values()):
        here = ", ".join(sets.values()) or "none"
        raise ValueError(
            f"{file}: corrects {', '.join(by_set)}; expected a set that mmvp-vlm reads in this call: {here}"
        )
    return {folder: (file, by_set[label]) for folder, label in sets.items() if label in by_set}


def _label(label: str, classes: list[int]) -> str:
    """A set's label; one of `CLASSIFICATION_SETS` that lacks classes says how many it has."""
    whole = CLASSIFICATION_SETS[label].classes if label in CLASSIFICATION_SETS else 0
    return f"{label} ({min(classes)} of {whole} classes)" if classes and min(classes) < whole else label


def open_encoder(name: str | Path, device: torch.device | str = "cpu") -> Encoder:
    """An encoder by a registry name, an open_clip name, a folder, `NAME@FILE` of released weights, or a run.

    A run is its folder, or the folder `checkpoint` in it; `RUN:MIX` lies so far between the original and the run's
    encoder, as in `mix_weights`.
    """
    run, mix = _run_and_mix(name)
    return load_encoder(str(name), device) if run is None else tuned_encoder(run, device, mix).to(device)


def _run_and_mix(name: str | Path) -> tuple[Run | None, float]:
    folder, mix = split_mix(name)
    if folder.name == "checkpoint" and (folder.parent / "settings.json").is_file():
        folder = folder.parent
    return (Run(folder) if (folder / "settings.json").is_file() else None), mix


def _original_name(name: str) -> str:
    """The last part of the name of an encoder, of the one that a run tuned, or of the architecture of `NAME@FILE`."""
    run, _ = _run_and_mix(name)
    original = str(run.settings["encoder"]) if run else name
    return Path(original if Path(original).exists() else original.partition("@")[0]).name


def benchmark_folders(root: Path, benchmark: str) -> list[Path]:
    """The folders under a root that a benchmark reads; `root` itself where it is one.

    Raises:
        FileNotFoundError: where there is none; says what was expected.
    """
    name, _, only = benchmark.partition(":")
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; {messages.expected(name, BENCHMARKS)}")
    reads = reads_of(BENCHMARKS[name])
    if reads.data == "nothing":
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root}: no such folder")
    inside = sorted(path for path in visible(root) if path.is_dir())
    tables = sorted(path for path in visible(root) if path.suffix == ".csv")
    if only:
        found = [path for path in inside + tables if only in (path.name, path.stem, canonical_name(path.stem))]
    elif reads.data == "pairs":
        found = [path for path in (root, *inside, *tables) if is_pairs(path)]
    elif reads.data == "masks":
        found = [path for path in (root, *inside) if is_masks(path)]
    elif reads.data == "own":
        found = [root] if reads.is_here(root) else [path for path in inside if reads.is_here(path)]
    else:
        others = [path for path in (root, *inside) if _is_read_otherwise(path)]
        others += [path for path in inside if path.name in IMAGE_FOLDERS]  # where the root itself is pairs
        sets = [path for path in ([root] if is_set(root) else inside) if path not in others]
        captioned = {path: has_captions(path) for path in sets}  # None: a broken tar, which each benchmark reports
        found = [path for path in sets if captioned[path] in (None, reads.data == "captions")]
    if not found:
        layout = BENCHMARKS[name].__module__ if reads.data == "own" else "diva_lab.evaluation.image_sets"
        raise FileNotFoundError(f"{root}: no folder {only or 'here'} for {name}; see {layout}")
    return found


def _is_read_otherwise(folder: Path) -> bool:
    """Whether a folder holds pairs, masks or a benchmark's own layout, and no set of images."""
    own = any(reads_of(function).is_here(folder) for function in BENCHMARKS.values())
    return own or is_pairs(folder) or (is_masks(folder) and not _is_classified(folder))


def _is_classified(folder: Path) -> bool:
    """Whether a folder is called as one of `CLASSIFICATION_SETS`: VOC2007 has masks too."""
    return canonical_name(folder.name) in CLASSIFICATION_SETS


def _work(root: Path, benchmarks: Sequence[str]) -> list[tuple[str, Path, str]]:
    """(benchmark, folder, label of the set) for each task; one error that lists every benchmark that cannot start."""
    found, errors = {}, []
    for name in benchmarks:
        try:
            found |= {(name.partition(":")[0], folder): None for folder in benchmark_folders(root, name)}
        except (ValueError, OSError) as error:
            errors.append(error)
    if errors:
        many = ValueError(f"{len(errors)} benchmarks cannot start:\n- " + "\n- ".join(map(str, errors)))
        raise errors[0] if len(errors) == 1 else many
    work, taken = [], set()
    for benchmark, folder in found:
        whole = folder.resolve()
        label = canonical_name(whole.name if whole.is_dir() else whole.stem)
        if reads_of(BENCHMARKS[benchmark]).data == "nothing":
            label = benchmark
        label = whole.name if (benchmark, label) in taken else label  # wds_mnist beside mnist
        taken.add((benchmark, label))
        work.append((benchmark, folder, label))
    return work


def average_rows(rows: Sequence[dict]) -> list[dict]:
    """Rows of the mean of each metric over a list of sets (`AVERAGES`), from one encoder's rows of all of them."""
    found = []
    for benchmark, (names, metrics) in AVERAGES.items():
        for metric in metrics:
            own = {row["set"]: row for row in rows if (row["benchmark"], row["metric"]) == (benchmark, metric)}
            if not set(names) <= set(own):
                continue
            value, chance = (float(np.mean([own[name][key] for name in names])) for key in ("value", "chance"))
            label = f"{len(names)} sets"
            found.append(own[names[0]] | score_row(metric, value, len(names), chance=chance) | {"set": label})
    return found


def _scores_of_perception(rows: Sequence[dict]) -> dict[str, dict]:
    """Benchmark -> its row of one encoder, for those of `PERCEPTION` that one set was measured of."""
    found = {name: [] for name in PERCEPTION}
    for row in rows:
        if row["category"] == "all" and PERCEPTION.get(row["benchmark"]) == row["metric"]:
            found[row["benchmark"]].append(row)
    return {name: own[0] for name, own in found.items() if len(own) == 1}


def perception_row(rows: Sequence[dict]) -> list[dict]:
    """The row of `p average`, the mean over `PERCEPTION`, from one encoder's rows of all of them; else none.

    Its interval follows from those of the scores, which are taken as independent, by the sum of the squared distances
    from each score to its ends (Zou and Donner, Statistics in Medicine 27, 2008).
    """
    own = list(_scores_of_perception(rows).values())
    if len(own) < len(PERCEPTION):
        return []
    values, low, high, chance = (np.array([row[key] for row in own]) for key in ("value", "low", "high", "chance"))
    value, n = float(values.mean()), len(own)
    ends = value - np.hypot.reduce(values - low) / n, value + np.hypot.reduce(high - values) / n
    facts = own[0] | {"benchmark": "p average", "set": f"{n} benchmarks"}
    return [facts | score_row("mean", value, n, *map(float, ends), float(chance.mean()))]


def count_sets(table: pd.DataFrame) -> list[str]:
    """A line for each encoder and list of sets: how many of them were measured, and which are missing.

    So of the benchmarks of `PERCEPTION`, where there is one beside mmvp-vlm.
    """
    lines = []
    for (encoder, benchmark), rows in table.groupby(["encoder", "benchmark"], sort=False):
        names = AVERAGES.get(benchmark, ((), ()))[0]
        if missing := [name for name in names if name not in set(rows["set"])]:
            here = len(names) - len(missing)
            lines.append(
                f"{encoder}, {benchmark}: {here} of {len(names)} sets, no average without {', '.join(missing)}"
            )
        elif names:
            lines.append(f"{encoder}, {benchmark}: {len(names)} of {len(names)} sets, averaged")
    for encoder, rows in table.groupby("encoder", sort=False):
        here = _scores_of_perception(rows.to_dict("records"))
        missing = [name for name in PERCEPTION if name not in here]
        end = f"no p average without one set of {', '.join(missing)}" if missing else "averaged"
        if set(here) - {"mmvp-vlm"}:
            lines.append(f"{encoder}, perception: {len(here)} of {len(PERCEPTION)} benchmarks, {end}")
    return lines
