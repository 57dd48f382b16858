"""Any encoder on any benchmark, one command, one tidy table.

    python -m diva_lab.evaluate --encoder openai-l14 --encoder runs/ID \\
        --benchmarks mmvp-vlm,clustering,zero-shot --root data_root --out results.csv

or from a notebook

    from diva_lab.evaluate import evaluate
    evaluate(["openai-l14", "runs/ID"], ["mmvp-vlm", "clustering", "zero-shot"], "data_root")

A benchmark runs on every folder of the root that it can read (`zero-shot:cifar10` names one); features are computed
once for each encoder and set. What fails is told at the end, all of it, and has no row. Of two or more encoders, the
later ones are compared with the first, pair by pair. An average stands only where all sets of a list are there: the 27
of zero-shot, the six of clustering.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diva_lab.emoji import EMOJI
from diva_lab.emoji import SETS as DRAWINGS
from diva_lab.encoders import Encoder, load_encoder
from diva_lab.evaluation.clustering import agreement, agreement_by_chance, agreement_intervals, find_clusters
from diva_lab.evaluation.emoji import emoji_report
from diva_lab.evaluation.features import FEATURES, PRECISIONS, FeatureStore
from diva_lab.evaluation.image_sets import CLUSTERED, SETS, ImageSet, Place, canonical, has_captions, is_set, read_set
from diva_lab.evaluation.intervals import bootstrap_mean, wilson
from diva_lab.evaluation.knn import knn_accuracy
from diva_lab.evaluation.pairs import (
    compare_pairs,
    is_pairs,
    read_pairs,
    score_pairs,
    strict_differences,
    summarise,
)
from diva_lab.evaluation.probes import linear_probes
from diva_lab.evaluation.retrieval import recall_at, recall_by_chance
from diva_lab.evaluation.world import SCENES, SPLITS, world_report
from diva_lab.evaluation.zeroshot import class_embeddings
from diva_lab.machine import default_device
from diva_lab.runs import CACHE, Run, environment
from diva_lab.training import tuned_encoder
from diva_lab.world import CLASSES, DETAILS

COLUMNS = ["encoder", "benchmark", "set", "metric", "category", "n", "value", "low", "high", "chance", "note"]
VERSIONS = ["torch", "open_clip_torch", "transformers", "scikit-learn", "numpy"]
# of every row, beside them; `strict` and `pictures` where the benchmark knows them, else False and 0
FACTS = ["seed", "features", "precision", "strict", "pictures", "weights", "git", *VERSIONS]
KEY = ["encoder", "benchmark", "set", "seed", "features", "precision", "strict", "pictures"]  # of what was measured
PAIRS = ["encoder", "against", "set", "pattern", "id_1", "id_2", "change", *FACTS]
PAIRS_KEY = ["encoder", "against", "set", "seed", "features", "precision", "strict"]
SPEED = ["encoder", "embedded", "seconds", "pictures_per_second", "waiting", "batch", "workers", "device"]
SPEED += ["features", "precision", "weights", "git", *VERSIONS]
AVERAGES = {"zero-shot": (tuple(SETS), ("score",)), "clustering": (CLUSTERED, ("nmi", "acc", "ari"))}


@dataclass(frozen=True)
class Task:
    """What a benchmark is given: an encoder, its features, a set, and how."""

    encoder: Encoder
    store: FeatureStore
    folder: Path
    kind: str = "global"
    seed: int = 0
    strict: bool = False
    pictures: int = 0
    scores: list[pd.DataFrame] = field(default_factory=list)  # of pairs, for a comparison; mmvp-vlm leaves its here
    classes: list[int] = field(default_factory=list)  # how many each set read has

    def read(self, split: str = "test") -> ImageSet:
        return read_set(self.folder, split).draw(self.pictures, self.seed)

    def embed(self, places: Sequence[Place]) -> torch.Tensor:
        return self.store(places, self.kind)

    def embed_files(self, files: Sequence[Path]) -> torch.Tensor:
        return self.embed([Place(str(file)) for file in files])


def _row(metric: str, value: float, n: int, low=np.nan, high=np.nan, chance=np.nan, category: str = "all") -> dict:
    note = "not above chance" if low <= chance else ""
    return {"metric": metric, "category": category, "n": n, "value": value, "low": low, "high": high, "chance": chance,
            "note": note}  # fmt: skip


def _labelled(task: Task, split: str = "test") -> tuple[ImageSet, torch.Tensor]:
    found = task.read(split)
    if not len(found.labels):
        raise ValueError(f"{task.folder}: pictures without classes; expected a folder for each class, or .cls members")
    task.classes.append(len(found.classes))
    return found, task.embed(found.places)


def _train(task: Task) -> tuple[ImageSet, torch.Tensor]:
    return _labelled(task, "train")


def mmvp_vlm(task: Task) -> Iterator[dict]:
    """The official score and each pattern's; beside it image to text, the group score, and ties."""
    scores = score_pairs(task.encoder, task.folder, task.embed_files, task.strict)
    task.scores.append(scores)
    report = summarise(scores, seed=task.seed)
    for name, group in [("all", scores), *scores.groupby("pattern", sort=False)]:
        key = "mean" if name == "all" else name
        yield _row("pairs", report[key], len(group), report[f"{key}/low"], report[f"{key}/high"], 0.25, name)
    for key, chance in (("image_to_text", 0.25), ("group", 1 / 6), ("ties", np.nan)):
        yield _row(key, report[key], len(scores), report[f"{key}/low"], report[f"{key}/high"], chance)
    if task.strict:
        try:
            own = score_pairs(task.encoder, task.folder, task.embed_files)
            said = strict_differences(task.folder, own, scores)
        except (ValueError, OSError) as error:
            said = [f"only as the scripts count can it be read: {error}"]
        print("\n- ".join([f"{task.folder.name}, strictly:", *said]))


def zero_shot(task: Task) -> Iterator[dict]:
    """Top-1, top-5, the mean of the classes' accuracies, and `score`: whichever of them is the set's convention."""
    found, embeddings = _labelled(task)
    prompts = [template.replace("{c}", "{}") for template in found.templates]
    logits = embeddings @ class_embeddings(task.encoder, found.classes, prompts).T
    labels, n, c = torch.from_numpy(found.labels), len(found), len(found.classes)
    right = (logits.argmax(1) == labels).numpy()
    top1 = _row("top-1", float(right.mean()), n, *wilson(int(right.sum()), n), 1 / c)
    groups = [right[found.labels == k].astype(float) for k in np.unique(found.labels)]
    mean = float(np.mean([group.mean() for group in groups]))
    per_class = _row("mean per class", mean, n, *bootstrap_mean(groups, seed=task.seed), 1 / c)
    yield top1
    yield per_class
    if c > 5:
        five = (logits.topk(5, dim=1).indices == labels[:, None]).any(1).sum().item()
        yield _row("top-5", five / n, n, *wilson(five, n), 5 / c)
    by_class = found.name in SETS and SETS[found.name].score == "mean per class"
    yield (per_class if by_class else top1) | {"metric": "score"}


def clustering(task: Task) -> Iterator[dict]:
    """k-means with as many clusters as classes: NMI, ACC, ARI."""
    found, embeddings = _labelled(task)
    clusters = find_clusters(embeddings, len(np.unique(found.labels)), task.seed)
    intervals = agreement_intervals(found.labels, clusters, seed=task.seed)
    chances = agreement_by_chance(found.labels, clusters, task.seed)
    for name, value in agreement(found.labels, clusters).items():
        yield _row(name, value, len(found), *intervals[name], chances[name])


def probe(task: Task) -> Iterator[dict]:
    """Logistic regression on the train split's features."""
    (known, train), (found, test) = _train(task), _labelled(task)
    accuracy = linear_probes(train, {"class": known.labels}, test, {"class": found.labels})["class"]
    n = len(found)
    yield _row("top-1", accuracy, n, *wilson(round(accuracy * n), n), 1 / len(found.classes))


def knn(task: Task) -> Iterator[dict]:
    """The vote of the nearest pictures of the train split."""
    (known, train), (found, test) = _train(task), _labelled(task)
    accuracy = knn_accuracy(train, torch.from_numpy(known.labels), test, torch.from_numpy(found.labels))
    n = len(found)
    yield _row("top-1", accuracy, n, *wilson(round(accuracy * n), n), 1 / len(found.classes))


def retrieval(task: Task) -> Iterator[dict]:
    """R@1, 5, 10 both ways."""
    found = task.read()
    if not found.captions:
        raise ValueError(
            f"{task.folder}: pictures without captions; expected .txt members beside them, a caption a line"
        )
    owner = torch.tensor([i for i, texts in enumerate(found.captions) for _ in texts])
    texts = [text for own in found.captions for text in own]
    encoded = torch.cat([task.encoder.encode_text(texts[i : i + 256]).cpu() for i in range(0, len(texts), 256)])
    chances = recall_by_chance(owner, len(found))
    for name, value in recall_at(task.embed(found.places), encoded, owner).items():
        n = len(found) if name.startswith("image") else len(texts)
        yield _row(name, value, n, *wilson(round(value * n), n), chances[name])


def world(task: Task) -> Iterator[dict]:
    """The tiny world's pairs, probes, zero-shot and clustering, always by the global feature in float32."""
    report = world_report(task.encoder, seed=task.seed)
    values = {detail: 1 / len(own) for detail, own in DETAILS.items()}
    chances = {"zeroshot": 1 / len(CLASSES), "ari": 0.0, "probe/mean": float(np.mean(list(values.values())))}
    chances |= {f"probe/{detail}": chance for detail, chance in values.items()}
    each = SPLITS["measure"][0]
    for name, value in report.items():
        if name.endswith(("/low", "/high")):
            continue
        metric, _, category = name.partition("/")
        n, ends = SCENES, (report.get(f"{name}/low", np.nan), report.get(f"{name}/high", np.nan))
        if metric == "pairs":
            n = each * len(DETAILS) if category == "mean" else each
        elif metric == "zeroshot" or (metric == "probe" and category != "mean"):
            ends = wilson(round(value * n), n)
        chance = 0.25 if metric == "pairs" else chances.get(name, np.nan)
        yield _row(metric, value, n, *ends, chance, category if category not in ("", "mean") else "all")


def emoji(task: Task) -> Iterator[dict]:
    """EmojiPairs, with names (`emoji`, on both sets and on each) and without (`emoji-match`)."""
    report = emoji_report(task.encoder, EMOJI, task.seed, task.embed_files)
    sizes = read_pairs(EMOJI / next(iter(DRAWINGS)))["pattern"].value_counts()
    for name, value in report.items():
        if not name.endswith(("/low", "/high")):
            metric, _, category = name.rpartition("/")
            n, category = (int(sizes.sum()), "all") if category == "mean" else (int(sizes[category]), category)
            yield _row(metric, value, n, report[f"{name}/low"], report[f"{name}/high"], 0.25, category)


ANYWHERE = ("world", "emoji")  # they ship with the workbook and need no root
BENCHMARKS: dict[str, Callable[[Task], Iterator[dict]]] = {
    "mmvp-vlm": mmvp_vlm,
    "zero-shot": zero_shot,
    "clustering": clustering,
    "probe": probe,
    "knn": knn,
    "retrieval": retrieval,
    "world": world,
    "emoji": emoji,
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


def folders(root: Path, benchmark: str) -> list[Path]:
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
        found = [path for path in inside + tables if only in (path.name, path.stem, canonical(path.stem))]
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
            found |= {(name.partition(":")[0], folder): None for folder in folders(root, name)}
        except (ValueError, OSError) as error:
            errors.append(error)
    if errors:
        many = ValueError(f"{len(errors)} benchmarks cannot start:\n- " + "\n- ".join(map(str, errors)))
        raise errors[0] if len(errors) == 1 else many
    work, taken = [], set()
    for benchmark, folder in found:
        whole = folder.resolve()
        label = benchmark if benchmark in ANYWHERE else canonical(whole.name if whole.is_dir() else whole.stem)
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
    pictures: int = 0,
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
        pictures: of a set's split, so many drawn by the seed where it has more; 0 for all. `n` tells.

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
            grow(out, pd.DataFrame(new, columns=COLUMNS + FACTS), KEY)

    for name in map(str, encoders):
        try:
            encoder = open_encoder(name, device)
        except (ValueError, OSError) as error:
            failures, failed = [*failures, f"{name}: {error}"], failed + len(work)
            continue
        store = FeatureStore(encoder, cache, precision, workers=workers)
        plain = {"seed": seed, "features": features, "precision": store.precision, "strict": False, "pictures": 0}
        plain |= {"weights": store.fingerprint[:12], "git": git, **versions}
        own = []
        for benchmark, folder, label in work:
            facts = plain | {
                "mmvp-vlm": {"strict": strict},
                "world": {"features": "global", "precision": "no"},
                "emoji": {},
            }.get(benchmark, {"pictures": pictures})
            task = Task(encoder, store, folder, features, seed, strict, pictures)
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
                        grow(_beside(out, "pairs"), listed, PAIRS_KEY, same)
            if label in SETS and task.classes and min(task.classes) < SETS[label].classes:
                label = f"{label} ({min(task.classes)} of {SETS[label].classes} classes)"
            new = [{"encoder": name, "benchmark": benchmark, "set": label, **row, **facts} for row in measured]
            own += new
            add(new)
        add(averages(own))
        if store.pictures:
            rate, waited = store.pictures / store.seconds, store.waited / store.seconds
            print(
                f"{Path(name).name}: {store.pictures} pictures, {rate:.0f} a second, "
                f"{waited:.0%} of the time waiting for data"
            )
            speed = {"encoder": name, "embedded": store.pictures, "seconds": store.seconds, "waiting": waited}
            speed |= {
                "pictures_per_second": rate,
                "batch": store.batch,
                "workers": store.workers,
                "device": device.type,
            }
            if out is not None:
                speed = pd.DataFrame([{**plain, **speed}], columns=SPEED)
                grow(_beside(out, "speed"), speed, ["encoder", "features", "precision", "device"])
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
    rows = [_row(metric, value, n, category=f"against {first}") for metric, value in values.items()]
    listed = after[["pattern", "id_1", "id_2"]].to_dict("records")
    changes = [(pair, change) for change in ("gained", "lost") for pair in listed if pair["id_1"] in found[change]]
    return rows, [pair | {"change": change} for pair, change in changes]


def averages(rows: Sequence[dict]) -> list[dict]:
    """Rows of the mean of each metric over a list of sets (`AVERAGES`), from one encoder's rows of all of them."""
    found = []
    for benchmark, (names, metrics) in AVERAGES.items():
        for metric in metrics:
            own = {row["set"]: row for row in rows if (row["benchmark"], row["metric"]) == (benchmark, metric)}
            if not set(names) <= set(own):
                continue
            value, chance = (float(np.mean([own[name][key] for name in names])) for key in ("value", "chance"))
            label = f"{len(names)} sets"
            found.append(own[names[0]] | _row(metric, value, len(names), chance=chance) | {"set": label})
    return found


def how_many(table: pd.DataFrame) -> list[str]:
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


def grow(path: Path, table: pd.DataFrame, key: Sequence[str], same: dict | None = None) -> None:
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m diva_lab.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", action="append", required=True, help="name, folder, NAME@FILE, or run; repeatable")
    parser.add_argument("--benchmarks", required=True, help=f"of {', '.join(BENCHMARKS)}; NAME:SET for one set")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the data")
    parser.add_argument("--out", type=Path, default=Path("results.csv"))
    parser.add_argument("--seed", type=int, default=0, help="of k-means and bootstraps")
    parser.add_argument("--features", choices=tuple(FEATURES), default="global")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--strict-official", action="store_true", help="MMVP-VLM as circulating scripts count it")
    parser.add_argument("--pictures", type=int, default=0, help="of a set's split at most so many, drawn by the seed")
    parser.add_argument("--workers", type=int, help="processes that decode pictures")
    args = parser.parse_args(argv)
    try:
        table = evaluate(
            args.encoder, args.benchmarks.split(","), args.root, args.out, args.seed, args.features, args.precision,
            args.strict_official, args.pictures, workers=args.workers,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shown = table[(table["category"] == "all") | table["category"].str.startswith("against ")]
    columns = ["encoder", "benchmark", "set", "metric", "category", "n", "value", "low", "high", "chance", "note"]
    print(shown[columns].to_string(index=False))
    print("\n".join(how_many(table)))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
