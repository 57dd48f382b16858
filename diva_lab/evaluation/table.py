"""Any encoder on any benchmark, one table with a row for each encoder, benchmark, set, metric and category.

    from diva_lab import evaluate
    evaluate(["openai-l14", "runs/ID"], ["mmvp-vlm", "clustering", "zero-shot"], "data_root")

A benchmark runs on every folder of the root that it can read (`zero-shot:cifar10` names one); features are computed
once for each encoder and set. All that fails is listed at the end and has no row. Of two or more encoders, the later
ones are compared with the first, pair by pair. An average stands only where all sets of a list are there: the 27 of
zero-shot, the six of clustering.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diva_lab.evaluation.clustering import cluster_benchmark
from diva_lab.evaluation.emoji import emoji_benchmark
from diva_lab.evaluation.features import FEATURES, PRECISIONS, FeatureStore
from diva_lab.evaluation.image_sets import CLASSIFICATION_SETS, CLUSTERED, canonical_name, has_captions, is_set
from diva_lab.evaluation.knn import knn_benchmark
from diva_lab.evaluation.pairs import compare_pairs, is_pairs, mmvp_vlm
from diva_lab.evaluation.probes import linear_probe
from diva_lab.evaluation.retrieval import retrieval_benchmark
from diva_lab.evaluation.task import Task, score_row
from diva_lab.evaluation.world import world_benchmark
from diva_lab.evaluation.zeroshot import zero_shot
from diva_lab.machine import default_device
from diva_lab.models.encoders import Encoder, load_encoder
from diva_lab.paths import CACHE
from diva_lab.provenance import environment
from diva_lab.training.build import tuned_encoder
from diva_lab.training.runs import Run

COLUMNS = ["encoder", "benchmark", "set", "metric", "category", "n", "value", "low", "high", "chance", "note"]
VERSIONS = ["torch", "open_clip_torch", "transformers", "scikit-learn", "numpy"]
# of every row, beside them; `strict` and `pictures` where the benchmark knows them, else False and 0
FACTS = ["seed", "features", "precision", "strict", "max_images", "weights", "git", *VERSIONS]
KEY = ["encoder", "benchmark", "set", "seed", "features", "precision", "strict", "max_images"]  # of what was measured
PAIRS = ["encoder", "against", "set", "pattern", "id_1", "id_2", "change", *FACTS]
PAIRS_KEY = ["encoder", "against", "set", "seed", "features", "precision", "strict"]
SPEED = ["encoder", "embedded", "seconds", "images_per_second", "waiting", "batch", "workers", "device"]
SPEED += ["features", "precision", "weights", "git", *VERSIONS]
AVERAGES = {"zero-shot": (tuple(CLASSIFICATION_SETS), ("score",)), "clustering": (CLUSTERED, ("nmi", "acc", "ari"))}
ANYWHERE = ("world", "emoji")  # they ship with the workbook and need no root
BENCHMARKS: dict[str, Callable[[Task], Iterator[dict]]] = {
    "mmvp-vlm": mmvp_vlm,
    "zero-shot": zero_shot,
    "clustering": cluster_benchmark,
    "probe": linear_probe,
    "knn": knn_benchmark,
    "retrieval": retrieval_benchmark,
    "world": world_benchmark,
    "emoji": emoji_benchmark,
}


def open_encoder(name: str | Path, device: torch.device | str = "cpu") -> Encoder:
    """An encoder by a registry name, an open_clip name, a folder, `NAME@FILE` of released weights, or a run.

    A run is its folder, or the folder `checkpoint` in it.
    """
    folder = Path(name)
    if folder.name == "checkpoint" and (folder.parent / "settings.json").is_file():
        folder = folder.parent
    if (folder / "settings.json").is_file():
        return tuned_encoder(Run(folder), device).to(device)
    return load_encoder(str(name), device)


def benchmark_folders(root: Path, benchmark: str) -> list[Path]:
    """The folders under a root that a benchmark is meant for; `root` itself where it is one.

    Raises:
        FileNotFoundError: where there is none; says what was expected.
    """
    name, _, only = benchmark.partition(":")
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}")
    if name in ANYWHERE:
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root}: no such folder")
    inside = sorted(path for path in root.iterdir() if not path.name.startswith(".") and path.is_dir())
    tables = sorted(root.glob("*.csv"))
    if only:
        found = [path for path in inside + tables if only in (path.name, path.stem, canonical_name(path.stem))]
    elif name == "mmvp-vlm":
        found = [path for path in (root, *inside, *tables) if is_pairs(path)]
    else:
        sets = [root] if is_set(root) else [path for path in inside if not is_pairs(path)]
        captioned = {path: has_captions(path) for path in sets}  # None: cannot be told, and each benchmark will say so
        found = [path for path in sets if captioned[path] in (None, name == "retrieval")]
    if not found:
        raise FileNotFoundError(f"{root}: no folder {only or 'here'} for {name}; see diva_lab.evaluation.image_sets")
    return found


def _work(root: Path, benchmarks: Sequence[str]) -> list[tuple[str, Path, str]]:
    """(benchmark, folder, label of the set) of all that is asked for; one error with all that cannot start."""
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
        label = benchmark if benchmark in ANYWHERE else canonical_name(whole.name if whole.is_dir() else whole.stem)
        label = whole.name if (benchmark, label) in taken else label  # wds_mnist beside mnist
        taken.add((benchmark, label))
        work.append((benchmark, folder, label))
    return work


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
) -> pd.DataFrame:
    """One row for each encoder, benchmark, set, metric and category: `COLUMNS` and `FACTS`.

    Of a second encoder on, mmvp-vlm has rows `gained`, `lost` (shares of the pairs) and `mcnemar p` (exact, two-sided)
    of the category `against FIRST`. Averages have rows of the set `27 sets` or `6 sets`, n being their number, where
    this call measured all of them; of a set of `image_sets.SETS` that lacks classes, `set` says so: it does not count.

    Args:
        encoders: see `open_encoder`.
        benchmarks: keys of `BENCHMARKS`, each as `NAME` or `NAME:SET`.
        root: of the data; see `diva_lab.evaluation.image_sets`, and `diva_lab.evaluation.pairs` for MMVP-VLM.
        out: a csv that grows by each finished set; rows of the same `KEY` are replaced. Beside it OUT.pairs.csv lists
            the pairs gained and lost, OUT.speed.csv what was embedded, how fast, and its share of waiting for data.
        seed: of k-means and bootstraps.
        features: a key of `FEATURES`; texts are compared with them. The tiny world's rows are always `global`.
        precision, cache, workers: see `FeatureStore`; a row says what `auto` was, the tiny world's always `no`.
        strict: MMVP-VLM as the circulating scripts count it.
        max_images: of a set's split, so many drawn by the seed where it has more; 0 for all. `n` tells.

    Raises:
        ValueError: before anything is computed, where no data is there for a benchmark; else at the end, listing
            everything that failed; what did not is in `out`, and in the error's `table`.
    """
    if features not in FEATURES:
        raise ValueError(f"unknown features {features!r}; expected one of {', '.join(FEATURES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    out = None if out is None else Path(out)
    if out is not None:
        _same_columns(out, COLUMNS + FACTS)
        _same_columns(_beside(out, "pairs"), PAIRS)
        _same_columns(_beside(out, "speed"), SPEED)
    work = _work(Path(root), benchmarks)
    git, device = environment()["git"], default_device()
    versions = {name: version(name) for name in VERSIONS}
    rows, failures, failed, firsts = [], [], 0, {}

    def add(new: list[dict]) -> None:
        rows.extend(new)
        if out is not None and new:
            update_csv(out, pd.DataFrame(new, columns=COLUMNS + FACTS), KEY)

    for name in map(str, encoders):
        try:
            encoder = open_encoder(name, device)
        except (ValueError, OSError) as error:
            failures, failed = [*failures, f"{name}: {error}"], failed + len(work)
            continue
        store = FeatureStore(encoder, cache, precision, workers=workers)
        plain = {"seed": seed, "features": features, "precision": store.precision, "strict": False, "max_images": 0}
        plain |= {"weights": store.fingerprint[:12], "git": git, **versions}
        own = []
        for benchmark, folder, label in work:
            facts = plain | {
                "mmvp-vlm": {"strict": strict},
                "world": {"features": "global", "precision": "no"},
                "emoji": {},
            }.get(benchmark, {"max_images": max_images})
            task = Task(encoder, store, folder, features, seed, strict, max_images)
            try:
                measured = list(BENCHMARKS[benchmark](task))
            except (ValueError, OSError) as error:
                failures, failed = [*failures, f"{name}, {benchmark}, {label}: {error}"], failed + 1
                continue
            for scores in task.scores:
                first, before = firsts.setdefault(folder, (name, scores))
                if first != name:
                    compared, pairs = _compare(before, scores, first)
                    measured += compared
                    if out is not None:
                        same = {"encoder": name, "against": first, "set": label} | facts
                        listed = pd.DataFrame([same | pair for pair in pairs], columns=PAIRS)
                        update_csv(_beside(out, "pairs"), listed, PAIRS_KEY, same)
            if label in CLASSIFICATION_SETS and task.classes and min(task.classes) < CLASSIFICATION_SETS[label].classes:
                label = f"{label} ({min(task.classes)} of {CLASSIFICATION_SETS[label].classes} classes)"
            new = [{"encoder": name, "benchmark": benchmark, "set": label, **row, **facts} for row in measured]
            own += new
            add(new)
        add(average_rows(own))
        if store.images:
            rate, waited = store.images / store.seconds, store.waited / store.seconds
            print(
                f"{Path(name).name}: {store.images} pictures, {rate:.0f} a second, "
                f"{waited:.0%} of the time waiting for data"
            )
            speed = {"encoder": name, "embedded": store.images, "seconds": store.seconds, "waiting": waited}
            speed |= {
                "images_per_second": rate,
                "batch": store.batch,
                "workers": store.workers,
                "device": device.type,
            }
            if out is not None:
                speed = pd.DataFrame([{**plain, **speed}], columns=SPEED)
                update_csv(_beside(out, "speed"), speed, ["encoder", "features", "precision", "device"])
    table = pd.DataFrame(rows, columns=COLUMNS + FACTS)
    if failures:
        error = ValueError(f"{failed} of {len(work) * len(encoders)} failed:\n- " + "\n- ".join(failures))
        error.table = table
        raise error
    return table


def _compare(before: pd.DataFrame, after: pd.DataFrame, first: str) -> tuple[list[dict], list[dict]]:
    """Rows of gains, losses and McNemar's p, and the pairs that were gained or lost."""
    found, n = compare_pairs(before, after), len(after)
    values = {"gained": len(found["gained"]) / n, "lost": len(found["lost"]) / n, "mcnemar p": found["p"]}
    rows = [score_row(metric, value, n, category=f"against {first}") for metric, value in values.items()]
    listed = after[["pattern", "id_1", "id_2"]].to_dict("records")
    changes = [(pair, change) for change in ("gained", "lost") for pair in listed if pair["id_1"] in found[change]]
    return rows, [pair | {"change": change} for pair, change in changes]


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


def count_sets(table: pd.DataFrame) -> list[str]:
    """A line for each encoder and list of sets: how many of them were measured, and which are missing."""
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
    return lines


def _beside(out: Path, what: str) -> Path:
    return out.with_suffix(f".{what}.csv")


def _same_columns(path: Path, columns: Sequence[str]) -> None:
    if not path.exists():
        return
    try:
        old = list(pd.read_csv(path, nrows=0).columns)
    except ValueError:
        old = ["none that can be read"]
    if old != list(columns):
        raise ValueError(
            f"{path}: columns {', '.join(old)}; expected a table that this version of evaluate wrote: move it away, or "
            "choose another name"
        )


def update_csv(path: Path, table: pd.DataFrame, key: Sequence[str], same: dict | None = None) -> None:
    """Add rows to a csv, in the place of older ones with the same values of `key`; of `same` too, had it no new row."""
    _same_columns(path, list(table.columns))
    if path.exists():
        old = pd.read_csv(path, dtype={"weights": str, "git": str})
        new = pd.concat([table[key], pd.DataFrame([same])[key]]) if same else table[key]
        settled = set(new.astype(str).itertuples(index=False, name=None))
        kept = [row not in settled for row in old[key].astype(str).itertuples(index=False, name=None)]
        table = pd.concat([old[kept], table]) if any(kept) else table
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    table.to_csv(draft, index=False, float_format="%.6g")
    draft.replace(path)
