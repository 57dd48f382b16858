"""One rule for everybody: an encoder, its published improved versions and any run, on every benchmark under a root.

    diva-lab referee openai-l14 --root data_root --out referee

All go through `evaluate`: the same code, decision rule and preprocessing for each. A cell (an encoder's weights on a
set of a benchmark) that is finished is not measured again after a kill. OUT/evaluate.csv and the files beside it are
what `evaluate` wrote; OUT/results.csv has a row for each cell and metric, in the schema `CHECKS`, which is open for
numbers from elsewhere. `verdicts` makes differences, tests and rulings of it.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd

from diva_lab.evaluation.image_sets import SPLIT_FOLDERS
from diva_lab.evaluation.pairs import read_csv
from diva_lab.evaluation.results import check_columns, update_csv
from diva_lab.evaluation.table import BENCHMARKS, benchmark_folders, evaluate, open_encoder
from diva_lab.evaluation.task import reads_of
from diva_lab.models.released import find_weights, missing_weights, released_of
from diva_lab.paths import CACHE, DATA

OWN = "diva-lab referee"  # the source of the rows that this command measured
TRAIN_NEEDED = ("probe", "knn")
PUBLISHED = pd.read_csv(DATA / "published" / "results.csv")
KNOWN = (*BENCHMARKS, "p average", *sorted(set(PUBLISHED["benchmark"]) - BENCHMARKS.keys()))

# --- the table that is open for numbers from elsewhere ------------------------------------------------------------


def _number(least: Real, most: Real, whole: bool = False) -> tuple[Callable[[str], bool], str]:
    """A check of a cell that may be empty, and what it expects."""

    def check(text: str) -> bool:
        try:
            return not text or (least <= float(text) <= most and not (whole and float(text) % 1))
        except ValueError:
            return False

    kind = "a whole number" if whole else "a number"
    return check, f"{kind} " + (
        f"from {least:g} to {most:g}" if most < 1e6 else f"of at least {least:g}"
    ) + ", or nothing"


_WORD = (bool, "a word or more")
_ANY = (lambda text: True, "")
_PERCENT = _number(-100, 100)
CHECKS: dict[str, tuple[Callable[[str], bool], str]] = {  # column -> check of a cell, what it expects
    "benchmark": (lambda text: text in KNOWN, f"one of {', '.join(KNOWN)}"),
    "set": _WORD,
    "metric": _WORD,
    "category": _WORD,  # all, or a pattern
    "backbone": _WORD,  # the original encoder
    "method": _WORD,  # none for the original
    "percent": _PERCENT,
    "low": _PERCENT,
    "high": _PERCENT,
    "chance": _PERCENT,
    "n": _number(1, 1e9, whole=True),
    "gained": _number(0, 1e9, whole=True),  # items, against the original
    "lost": _number(0, 1e9, whole=True),
    "difference_low": _PERCENT,  # 95 % interval of the paired difference to the original, in points
    "difference_high": _PERCENT,
    "p": _number(0, 1),  # of the paired difference
    "seed": _number(0, 2**32 - 1, whole=True),
    "weights": _ANY,  # a hash
    "finding": _ANY,  # in words
    "source": _WORD,
    "commit": _ANY,
    "command": _ANY,
}
OPTIONAL = ("difference_low", "difference_high")  # columns that older tables lack
FRACTIONS = ("percent", "low", "high", "chance", *OPTIONAL, "p")
NUMBERS = (*FRACTIONS, "n", "gained", "lost", "seed")
KEY = ["benchmark", "set", "metric", "category", "backbone", "method", "seed", "source"]  # of one measurement


def read_results(path: str | Path) -> pd.DataFrame:
    """The rows of a table in the schema `CHECKS`, numbers as floats, where NaN is unknown.

    Raises:
        ValueError: for other columns; else lists each row that is wrong: file, row, column, what was expected.
    """
    path = Path(path)
    rows = read_csv(path, [name for name in CHECKS if name not in OPTIONAL])
    if extra := [name for name in rows if name not in CHECKS]:
        raise ValueError(f"{path}: column {extra[0]!r}; expected {', '.join(CHECKS)} alone")
    rows = rows.reindex(columns=list(CHECKS), fill_value="")
    texts = enumerate(rows.to_dict("records"), 1)
    if wrong := [f"{path}, row {k}, {message}" for k, row in texts if (message := _wrong_cell(row))]:
        raise ValueError(wrong[0] if len(wrong) == 1 else "\n- ".join([f"{len(wrong)} rows are wrong:", *wrong]))
    numbers = {name: pd.to_numeric(rows[name].replace("", np.nan)).astype(float) for name in NUMBERS}
    return rows.assign(**numbers)


def _wrong_cell(row: dict[str, str]) -> str:
    """What is wrong with a row: its first wrong column, the cell, and what was expected; "" where nothing is."""
    for name, (check, expected) in CHECKS.items():
        if not check(row[name]):
            return f"column {name}: {row[name]!r}; expected {expected}"
    if not row["percent"] and not row["finding"]:
        return "column percent: ''; expected a number, or what was found in words under finding"
    for low, high in (("low", "high"), OPTIONAL):
        if bool(row[low]) != bool(row[high]) or (row[low] and float(row[low]) > float(row[high])):
            ends = f"{low} and {high} ({row[high]!r})"
            return f"column {low}: {row[low]!r}; expected both ends of an interval, {ends}, or none"
    changed, n = sum(float(row[name] or 0) for name in ("gained", "lost")), row["n"]
    if changed > float(n or 0):
        return f"column n: {n!r}; expected at least gained + lost, {changed:g}"
    return ""


def write_results(path: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Add rows to a table in the schema, in the place of older ones of the same measurement. Returns all of it."""
    table = rows.reindex(columns=list(CHECKS))
    for name in NUMBERS:
        table[name] = [f"{value:.6g}" if name in FRACTIONS else f"{value:.0f}" for value in table[name]]
    update_csv(path, table.replace("nan", ""), KEY, optional=OPTIONAL)
    return read_results(path)


def measured_rows(table: pd.DataFrame, encoders: dict[str, str], command: str) -> pd.DataFrame:
    """Rows in the schema of what `evaluate` measured: one for each encoder, benchmark, set and metric.

    Beside a score that was compared with the original's on the same items stand the interval of the paired difference,
    its p, and the items gained and lost where each is a unit.

    Args:
        table: of `evaluate`.
        encoders: method -> the encoder's name in the table; the original first, as `none`.
    """
    methods = {source: method for method, source in encoders.items()}
    original = encoders["none"]
    rows = []
    for (encoder, benchmark, label), cell in table.groupby(["encoder", "benchmark", "set"], sort=False):
        against = cell[cell["category"] == f"against {original}"].set_index("metric")
        for row in cell[cell["category"] == "all"].to_dict("records"):
            found = {name: 100 * row[name] for name in ("low", "high", "chance")} | {"percent": 100 * row["value"]}
            found |= {"benchmark": benchmark, "set": label, "metric": row["metric"], "category": "all"}
            found |= {"backbone": original, "method": methods[encoder], "n": row["n"], "seed": row["seed"]}
            found |= {"weights": row["weights"], "source": OWN, "commit": row["git"], "command": command}
            rows.append(found | _paired_columns(against, row["metric"]))
    return pd.DataFrame(rows, columns=list(CHECKS))


def _paired_columns(against: pd.DataFrame, metric: str) -> dict[str, float]:
    """The columns of a paired difference, from the rows of its comparison; none where there was no comparison."""
    if metric not in against.index:
        return {}
    difference, values = against.loc[metric], against["value"]
    columns = {f"difference_{end}": 100 * difference[end] for end in ("low", "high")} | {"p": values[f"{metric}, p"]}
    shares = {name: values.get(f"{metric}, {name}") for name in ("gained", "lost")}
    return columns | {name: round(share * difference["n"]) for name, share in shares.items() if share is not None}


# --- what is measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Referee:
    """What one call found.

    Attributes:
        original: the encoder that all others are compared with.
        encoders: method -> what `open_encoder` takes; the original first, as `none`.
        missing: published encoders whose weights are not on this machine, and how to get them.
        results: the table OUT/results.csv, with rows from elsewhere.
        failures: what could not be measured; "" where all was.
    """

    original: str
    encoders: dict[str, str]
    missing: dict[str, str]
    results: pd.DataFrame = field(repr=False)
    failures: str = ""


def find_benchmarks(root: Path) -> list[str]:
    """The benchmarks that find data under a root, as `evaluate` takes them; those that bring their own are left out.

    Raises:
        FileNotFoundError: where there is none, and where there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root}: no such folder")
    names = []
    for name, function in BENCHMARKS.items():
        reads = reads_of(function)
        if reads.data == "nothing" or reads.feedback:
            continue
        try:
            folders = benchmark_folders(root, name)
        except FileNotFoundError:
            continue
        able = [folder for folder in folders if name not in TRAIN_NEEDED or _has_train(folder)]
        names += [name] if len(able) == len(folders) else [f"{name}:{folder.name}" for folder in able]
    if not names:
        raise FileNotFoundError(
            f"--root {root}: no data of any benchmark; expected folders as diva_lab.evaluation.image_sets and pairs say"
        )
    return names


def _has_train(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in SPLIT_FOLDERS["train"])


def gather_encoders(
    original: str, also: Sequence[str | Path] = (), released: Path | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """What is compared: method -> encoder, the original first as `none`; and the published ones that are missing.

    Args:
        also: runs and other encoders, as `open_encoder` takes them.
        released: a folder of published weights, see `find_weights`.

    Raises:
        FileNotFoundError: for a folder `released` that is not there.
        ValueError: for two encoders of one name.
    """
    if released is not None and not released.is_dir():
        raise FileNotFoundError(f"--released {released}: no such folder; expected a folder of published weights")
    places = {one: find_weights(one, released) for one in released_of(original)}
    encoders = {"none": original} | {one.method: place for one, place in places.items() if place}
    for name in map(str, also):
        label = Path(name).name if Path(name.partition(":")[0]).exists() else name
        label = name if label in encoders else label
        if label in encoders or name in encoders.values():
            raise ValueError(f"--also {name}: this encoder is compared already; expected each once")
        encoders[label] = name
    return encoders, {one.name: missing_weights(one) for one, place in places.items() if not place}


def _open_table(path: Path, original: str) -> None:
    """Check the table of an earlier call, or start it with the replications of `original` that are known.

    Raises:
        ValueError: for a table with wrong rows, or one that was measured for another original.
    """
    check_columns(path, list(CHECKS), OPTIONAL)
    if not path.exists():
        known = read_results(DATA / "published" / "replications.csv")
        if len(known := known[known["backbone"] == original]):
            write_results(path, known)
        return
    rows = read_results(path)
    if others := set(rows.loc[rows["source"] == OWN, "backbone"]) - {original}:
        raise ValueError(f"{path}: measured for {min(others)}; expected {original}: choose another folder by --out")


def run_referee(
    original: str,
    root: str | Path,
    out: str | Path,
    also: Sequence[str | Path] = (),
    released: str | Path | None = None,
    benchmarks: Sequence[str] | None = None,
    seed: int = 0,
    max_images: int = 0,
    workers: int | None = None,
    cache: Path | None = CACHE / "features",
) -> Referee:
    """Measure what is not measured yet, and write OUT/results.csv.

    Args:
        original: the encoder that all are compared with, as `open_encoder` takes it; its published improved versions
            are those of `RELEASED`.
        root, seed, max_images, workers, cache: see `evaluate`.
        out: a folder.
        also, released: see `gather_encoders`.
        benchmarks: as `evaluate` takes them; None for all that find data under the root.

    Raises:
        ValueError: before anything is measured: for a table that cannot be read, and as `evaluate`.
        FileNotFoundError: where there is no data, or the original is not on this machine.
    """
    out, original = Path(out), str(original)
    _open_table(out / "results.csv", original)
    encoders, missing = gather_encoders(original, also, None if released is None else Path(released))
    names = list(benchmarks) if benchmarks is not None else find_benchmarks(Path(root))
    open_encoder(original)  # without it nothing could be compared
    failures = ""
    try:
        table = evaluate(
            list(encoders.values()), names, root, out / "evaluate.csv", seed, max_images=max_images, workers=workers,
            cache=cache, resume=True,
        )  # fmt: skip
    except ValueError as error:
        if not len(table := getattr(error, "table", ())):
            raise
        failures = str(error)
    words = ["diva-lab", "referee", original, "--root", str(root), "--out", str(out)]
    words += [word for name in also for word in ("--also", str(name))]
    words += ["--released", str(released)] if released else []
    words += ["--benchmarks", ",".join(benchmarks)] if benchmarks is not None else []
    words += ["--seed", str(seed)] if seed else []
    words += ["--max-images", str(max_images)] if max_images else []
    results = write_results(out / "results.csv", measured_rows(table, encoders, shlex.join(words)))
    return Referee(original, encoders, missing, results, failures)
