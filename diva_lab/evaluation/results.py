"""The csv files that `evaluate` writes: results, and beside them the changed pairs, the speed and the answers."""

import csv
from collections.abc import Sequence
from hashlib import blake2b
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
ANSWER_NAMES = ("item", "metric", "part", "group", "pattern")  # columns of answers that hold text
SAME = ("seed", "features", "precision", "strict", "max_images", "weights")  # facts of a cell that is finished
SPEED = ["encoder", "embedded", "seconds", "images_per_second", "waiting", "batch", "workers", "device"]
SPEED += ["features", "precision", "weights", "git", *VERSIONS]
SPEED_KEY = ["encoder", "features", "precision", "device"]


def versions_and_git() -> dict[str, str]:
    """The git sha and the versions of `VERSIONS`, by column."""
    return {"git": environment()["git"], **{name: version(name) for name in VERSIONS}}


class ResultFiles:
    """OUT.csv, OUT.pairs.csv and OUT.speed.csv; nothing is written where `out` is None.

    With `resume`, OUT.answers/ too, a csv for each cell (an encoder's weights on a set of a benchmark) whose benchmark
    compares answers: so a finished cell is compared with others without being measured again.

    Raises:
        ValueError: for a file of that name with other columns.
    """

    def __init__(self, out: str | Path | None, resume: bool = False):
        self.out = None if out is None else Path(out)
        self.old_rows = pd.DataFrame(columns=COLUMNS + FACTS)
        self.resume = resume and self.out is not None
        if self.out is not None:
            for path, columns in ((self.out, COLUMNS + FACTS), (self._beside("pairs"), PAIRS),
                                  (self._beside("speed"), SPEED)):  # fmt: skip
                check_columns(path, columns)
        if self.resume and self.out.exists():
            self.old_rows = read_written(self.out)

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

    def _answer_file(self, row: dict) -> Path:
        facts = [str(row[name]) for name in ("encoder", "benchmark", "set", *SAME)]
        digest = blake2b(repr(facts).encode(), digest_size=8).hexdigest()
        return self.out.with_suffix(".answers") / f"{row['benchmark']}-{digest}.csv"

    def add_answers(self, answers: pd.DataFrame, row: dict) -> None:
        """Keep the answers of one encoder to a set, before the rows (one is `row`) that say the set is finished."""
        if self.resume:
            replace_csv(self._answer_file(row), answers)

    def find_cell(self, encoder: str, benchmark: str, sets: str, facts: dict) -> tuple[list[dict], pd.DataFrame | None]:
        """The rows of a cell that was finished before, with the same weights and options, and its answers; else none.

        Rows of comparisons with another encoder are left out, because that one may have changed since.

        Args:
            sets: a regular expression of the cell's set, which its rows may say more of than its folder.
        """
        old = self.old_rows
        same = (old["encoder"] == encoder) & (old["benchmark"] == benchmark)
        same &= old["set"].astype(str).str.fullmatch(sets)
        for name in SAME:
            same &= old[name].astype(str) == str(facts[name])
        against = tuple({f"against {name}" for name in old["encoder"]})
        rows = old[same.astype(bool)].to_dict("records")
        rows = [row for row in rows if not str(row["category"]).startswith(against)]
        path = self._answer_file(rows[0] | facts) if rows else None
        return rows, read_written(path) if path and path.exists() else None

    def add_speed(self, row: dict) -> None:
        if self.out is not None:
            update_csv(self._beside("speed"), pd.DataFrame([row], columns=SPEED), SPEED_KEY)


def check_columns(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raise ValueError for a csv with other columns; one without `optional` ones, and none at all, is fine."""
    if not path.exists():
        return
    try:
        old = list(pd.read_csv(path, nrows=0).columns)
    except ValueError:
        old = ["none that can be read"]
    if old != [name for name in columns if name in old or name not in optional]:
        raise ValueError(
            f"{path}: columns {', '.join(old)}; expected a table that this version of evaluate wrote: move it away, or "
            "choose another name"
        )


def update_csv(
    path: Path, table: pd.DataFrame, key: Sequence[str], same: dict | None = None, optional: Sequence[str] = ()
) -> None:
    """Add rows to a csv, in the place of older ones with the same values of `key`.

    Older rows with the values of `same` go too, also where there is no new row of them. A file that lacks `optional`
    columns gets them, empty.
    """
    check_columns(path, list(table.columns), optional)
    if path.exists():
        old = read_written(path).reindex(columns=table.columns, fill_value="")
        new = pd.concat([table[key], pd.DataFrame([same])[key]]) if same else table[key]
        settled = set(new.astype(str).itertuples(index=False, name=None))
        kept = [row not in settled for row in old[key].astype(str).itertuples(index=False, name=None)]
        table = pd.concat([old[kept], table]) if any(kept) else table
    replace_csv(path, table)


def replace_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a csv and its folder, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    write_csv(draft, table)
    draft.replace(path)


def read_written(path: Path) -> pd.DataFrame:
    """The rows of a csv that `update_csv` wrote."""
    numbers = {name: [""] for name in ("value", "low", "high", "chance")}  # elsewhere "NA" and "null" are names
    names = dict.fromkeys(("weights", "git", "commit", *ANSWER_NAMES), str)
    return pd.read_csv(path, dtype=names, keep_default_na=False, na_values=numbers)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table as csv in UTF-8, floats with six digits; what UTF-8 cannot hold is written as its number."""
    returns = table.map(lambda cell: isinstance(cell, str) and "\r" in cell).any(axis=None)
    quoting = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL  # csv itself leaves a lone carriage return unquoted
    table.to_csv(path, index=False, float_format="%.6g", encoding="utf-8", errors="backslashreplace", quoting=quoting)
