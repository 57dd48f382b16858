"""Any encoder on any benchmark, one command, one tidy table.

    python -m diva_lab.evaluate --encoder openai-l14 --encoder runs/ID \\
        --benchmarks mmvp-vlm,clustering,zero-shot --root data_root --out results.csv

or from a notebook

    from diva_lab.evaluate import evaluate
    evaluate(["openai-l14", "runs/ID"], ["mmvp-vlm", "clustering", "zero-shot"], "data_root")

A benchmark runs on every folder of the root that it can read (`zero-shot:cifar10` names one); features are computed
once for each encoder and set. What fails is told at the end, all of it, and has no row.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from diva_lab.emoji import EMOJI, SETS
from diva_lab.encoders import Encoder, load_encoder
from diva_lab.evaluation.clustering import cluster_scores
from diva_lab.evaluation.emoji import emoji_report
from diva_lab.evaluation.features import FEATURES, FeatureStore
from diva_lab.evaluation.image_sets import ImageSet, Place, canonical, read_set
from diva_lab.evaluation.intervals import bootstrap_mean, wilson
from diva_lab.evaluation.knn import knn_accuracy
from diva_lab.evaluation.pairs import TABLE, read_pairs, score_pairs, summarise
from diva_lab.evaluation.probes import linear_probes
from diva_lab.evaluation.retrieval import recall_at
from diva_lab.evaluation.world import world_report
from diva_lab.evaluation.zeroshot import class_embeddings
from diva_lab.machine import default_device
from diva_lab.runs import CACHE, Run, environment
from diva_lab.training import tuned_encoder

COLUMNS = ["encoder", "benchmark", "set", "metric", "category", "n", "value", "low", "high", "chance", "note"]
FACTS = ["seed", "features", "precision", "weights", "git", "torch"]  # of every row, beside them
# sets whose convention is the mean of the classes' accuracies (CLIP's paper); of all others it is top-1
PER_CLASS = ("caltech101", "caltech101_vtab", "fgvc_aircraft", "flowers", "pets")


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

    def read(self, split: str = "test") -> ImageSet:
        return read_set(self.folder, split).draw(self.pictures, self.seed)

    def embed(self, places: Sequence[Place]) -> torch.Tensor:
        return self.store(places, self.kind)


def _row(metric: str, value: float, n: int, low=np.nan, high=np.nan, chance=np.nan, category: str = "all") -> dict:
    note = "not above chance" if low <= chance else ""
    return {"metric": metric, "category": category, "n": n, "value": value, "low": low, "high": high, "chance": chance,
            "note": note}  # fmt: skip


def _labelled(task: Task, split: str = "test") -> tuple[ImageSet, torch.Tensor]:
    found = task.read(split)
    if not len(found.labels):
        raise ValueError(f"{task.folder}: pictures without classes; expected a folder for each class, or .cls members")
    return found, task.embed(found.places)


def _train(task: Task) -> tuple[ImageSet, torch.Tensor]:
    if not (task.folder / "train").is_dir():
        raise FileNotFoundError(f"{task.folder}: no train split; expected {task.folder / 'train'} beside test")
    return _labelled(task, "train")


def mmvp_vlm(task: Task) -> Iterator[dict]:
    """The official score and each pattern's; beside it image to text, the group score, and ties."""
    scores = score_pairs(
        task.encoder, task.folder, lambda files: task.embed([Place(str(file)) for file in files]), task.strict
    )
    report = summarise(scores, seed=task.seed)
    for name, group in [("all", scores), *scores.groupby("pattern", sort=False)]:
        key = "mean" if name == "all" else name
        yield _row("pairs", report[key], len(group), report[f"{key}/low"], report[f"{key}/high"], 0.25, name)
    for key, chance in (("image_to_text", 0.25), ("group", 1 / 6), ("ties", np.nan)):
        yield _row(key, report[key], len(scores), chance=chance)
    if task.strict:
        own = score_pairs(task.encoder, task.folder, lambda files: task.embed([Place(str(file)) for file in files]))
        moved = own["id_1"][own["pattern"].to_numpy() != scores["pattern"].to_numpy()].tolist()
        print(f"{task.folder.name}: by position {len(moved)} pairs are of another category than the CSV says: {moved}")


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
    yield (per_class if found.name in PER_CLASS else top1) | {"metric": "score"}


def clustering(task: Task) -> Iterator[dict]:
    """k-means with as many clusters as classes: NMI, ACC, ARI."""
    found, embeddings = _labelled(task)
    for name, value in cluster_scores(embeddings, found.labels, task.seed).items():
        yield _row(name, value, len(found))


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
    for name, value in recall_at(task.embed(found.places), encoded, owner).items():
        n = len(found) if name.startswith("image") else len(texts)
        yield _row(name, value, n, *wilson(round(value * n), n))


def world(task: Task) -> Iterator[dict]:
    """The tiny world's pairs, probes, zero-shot and clustering."""
    report = world_report(task.encoder, seed=task.seed)
    for name, value in report.items():
        if not name.endswith(("/low", "/high")):
            metric, _, category = name.partition("/")
            ends = (report.get(f"{name}/{end}", np.nan) for end in ("low", "high"))
            yield _row(metric, value, 3000, *ends, category=category if category not in ("", "mean") else "all")


def emoji(task: Task) -> Iterator[dict]:
    """EmojiPairs, with names (`emoji`, on both sets and on each) and without (`emoji-match`)."""
    report = emoji_report(task.encoder, seed=task.seed)
    sizes = read_pairs(EMOJI / next(iter(SETS)))["pattern"].value_counts()
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
    """An encoder by a registry name, an open_clip name, a folder, `NAME@FILE` of released weights, or a run."""
    folder = Path(name)
    if (folder / "settings.json").is_file():
        return tuned_encoder(Run(folder), device).to(device)
    return load_encoder(str(name), device)


def _header(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline().strip().split(",")


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

    def pairs(path: Path) -> bool:
        return (path / "Questions.csv").is_file() or path.suffix == ".csv"

    def captioned(path: Path) -> bool:
        return any(word in canonical(path.name) for word in ("flickr", "coco"))

    tables = [path for path in root.glob("*.csv") if set(TABLE) <= set(_header(path))]
    inside = sorted([path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")] + tables)
    if name == "mmvp-vlm":
        found = [path for path in (root, *inside) if pairs(path)]
    else:
        found = [path for path in inside if not pairs(path) and captioned(path) == (name == "retrieval")]
    if only:
        found = [path for path in inside if only in (path.name, path.stem, canonical(path.stem))]
    if not found:
        raise FileNotFoundError(f"{root}: no folder {only or 'here'} for {name}; see diva_lab.evaluation.image_sets")
    return found


def evaluate(
    encoders: Sequence[str | Path],
    benchmarks: Sequence[str],
    root: str | Path = ".",
    out: str | Path | None = None,
    seed: int = 0,
    features: str = "global",
    precision: str = "no",
    strict: bool = False,
    pictures: int = 0,
    cache: Path | None = CACHE / "features",
    workers: int | None = None,
) -> pd.DataFrame:
    """One row for each encoder, benchmark, set, metric and category: `COLUMNS` and `FACTS`.

    Args:
        encoders: see `open_encoder`.
        benchmarks: keys of `BENCHMARKS`, each as `NAME` or `NAME:SET`.
        root: of the data; see `diva_lab.evaluation.image_sets`, and `diva_lab.evaluation.pairs` for MMVP-VLM.
        out: a csv that grows by each finished set; a row of the same encoder, benchmark and set is replaced.
        seed: of k-means and bootstraps.
        features: a key of `FEATURES`; texts are compared with them.
        precision, cache, workers: see `FeatureStore`.
        strict: MMVP-VLM as the circulating scripts count it.
        pictures: of a set's split, so many drawn by the seed where it has more; 0 for all. `n` tells.

    Raises:
        ValueError: at the end, listing everything that failed; what did not is in `out`, and in the error's `table`.
    """
    if features not in FEATURES:
        raise ValueError(f"unknown features {features!r}; expected one of {', '.join(FEATURES)}")
    work = [(name, folder) for name in benchmarks for folder in folders(Path(root), name)]
    facts, device = environment(), default_device()
    rows, failures = [], []
    for name in encoders:
        encoder = open_encoder(name, device)
        store = FeatureStore(encoder, cache, precision, workers=workers)
        same = {"encoder": str(name), "seed": seed, "features": features, "precision": precision}
        same |= {"weights": store.fingerprint[:12], "git": facts["git"], "torch": facts["versions"]["torch"]}
        for benchmark, folder in work:
            benchmark = benchmark.partition(":")[0]
            label = benchmark if benchmark in ANYWHERE else canonical(folder.stem)
            try:
                found = list(BENCHMARKS[benchmark](Task(encoder, store, folder, features, seed, strict, pictures)))
            except (ValueError, OSError) as error:
                failures.append(f"{name}, {benchmark}, {label}: {error}")
                continue
            rows += [{**same, "benchmark": benchmark, "set": label, **row} for row in found]
            if out is not None:
                write(pd.DataFrame(rows, columns=COLUMNS + FACTS), Path(out))
        if store.pictures:
            print(
                f"{Path(name).name}: {store.pictures} pictures, {store.pictures / store.seconds:.0f} a second, "
                f"{store.waited / store.seconds:.0%} of the time waiting for data"
            )
    table = pd.DataFrame(rows, columns=COLUMNS + FACTS)
    if failures:
        error = ValueError(f"{len(failures)} of {len(work) * len(encoders)} failed:\n- " + "\n- ".join(failures))
        error.table = table
        raise error
    return table


def write(table: pd.DataFrame, path: Path) -> None:
    """Add rows to a csv; those of the same encoder, benchmark, set and settings take the place of older ones."""
    key = ["encoder", "benchmark", "set", "seed", "features", "precision"]
    if path.exists():
        old = pd.read_csv(path, keep_default_na=True)
        if list(old.columns) != list(table.columns):
            raise ValueError(f"{path}: columns {', '.join(old.columns)}; expected a table that evaluate wrote")
        new = set(table[key].astype(str).itertuples(index=False, name=None))
        kept = [k not in new for k in old[key].astype(str).itertuples(index=False, name=None)]
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
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
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
    shown = table[table["category"] == "all"]
    print(shown[["encoder", "benchmark", "set", "metric", "n", "value", "low", "high", "note"]].to_string(index=False))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
