"""The csv files that `evaluate` writes: results, and beside them the changed pairs and the speed."""

import csv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from diva_lab.provenance import environment

COLUMNS = ["encoder", "benchmark", "set", "metric", "category", "n", "value", "low", "high", "chance", "note"]
VERSIONS = ["torch", "open_clip_torch", "transformers", "scikit-learn", "numpy"]
# beside the columns in every row; `strict` and `max_images` where the benchmark heeds them, else False and 0
FACTS = ["seed", "features", "precision", "strict", "max_images", "weights", "git", *VERSIONS]
KEY = ["encoder", "benchmark", "set", "seed", "features", "precision", "strict", "max_images"]  # of a measurement
PAIRS = ["encoder", "against", "set", "pattern", "id_1", "id_2", "change", *FACTS]
PAIRS_KEY = ["encoder", "against", "set", "seed", "features", "precision", "strict"]
SPEED = ["encoder", "embedded", "seconds", "images_per_second", "waiting", "batch", "workers", "device"]
SPEED += ["features", "precision", "weights", "git", *VERSIONS]
SPEED_KEY = ["encoder", "features", "precision", "device"]


def versions_and_git() -> dict[str, str]:
    """The git sha and the versions of `VERSIONS`, by column."""
    return {"git": environment()["git"], **{name: version(name) for name in VERSIONS}}


class ResultFiles:
    """OUT.csv, OUT.pairs.csv and OUT.speed.csv; nothing is written where `out` is None.

    Raises:
        ValueError: for a file of that name with other columns.
    """

    def __init__(self, out: str | Path | None):
        self.out = None if out is None else Path(out)
        if self.out is not None:
            for path, columns in ((self.out, COLUMNS + FACTS), (self._beside("pairs"), PAIRS),
                                  (self._beside("speed"), SPEED)):  # fmt: skip
                check_columns(path, columns)

    def _beside(self, what: str) -> Path:
        return self.out.with_suffix(f".{what}.csv")

    def add_rows(self, rows: list[dict]) -> None:
        if self.out is not None and rows:
            update_csv(self.out, pd.DataFrame(rows, columns=COLUMNS + FACTS), KEY)

    def add_pairs(self, pairs: list[dict], facts: dict) -> None:
        """Add the changed pairs of one comparison, in the place of those of an earlier one with the same facts."""
        if self.out is not None:
            table = pd.DataFrame([facts | pair for pair in pairs], columns=PAIRS)
            update_csv(self._beside("pairs"), table, PAIRS_KEY, facts)

    def add_speed(self, row: dict) -> None:
        if self.out is not None:
            update_csv(self._beside("speed"), pd.DataFrame([row], columns=SPEED), SPEED_KEY)


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """Raise ValueError for a csv with other columns; a file that is not there is fine."""
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
    """Add rows to a csv, in the place of older ones with the same values of `key`.

    Older rows with the values of `same` go too, also where there is no new row of them.
    """
    check_columns(path, list(table.columns))
    if path.exists():
        numbers = {name: [""] for name in ("value", "low", "high", "chance")}  # elsewhere "NA" and "null" are names
        old = pd.read_csv(path, dtype={"weights": str, "git": str}, keep_default_na=False, na_values=numbers)
        new = pd.concat([table[key], pd.DataFrame([same])[key]]) if same else table[key]
        settled = set(new.astype(str).itertuples(index=False, name=None))
        kept = [row not in settled for row in old[key].astype(str).itertuples(index=False, name=None)]
        table = pd.concat([old[kept], table]) if any(kept) else table
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    write_csv(draft, table)
    draft.replace(path)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table as csv in UTF-8, floats with six digits; what UTF-8 cannot hold is written as its number."""
    returns = table.map(lambda cell: isinstance(cell, str) and "\r" in cell).any(axis=None)
    quoting = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL  # csv itself leaves a lone carriage return unquoted
    table.to_csv(path, index=False, float_format="%.6g", encoding="utf-8", errors="backslashreplace", quoting=quoting)
