"""What a referee's table says: differences to the original, tests, and a ruling on each published claim.

Where answers to the same items were compared (pairs and captions), the difference is paired: of shares, with McNemar's
exact p, where every item is a unit, else by resampling units. Where no answers are kept, both scores have their own
intervals, and the difference is taken as of independent samples, which is wider than need be. All tests of the table
are corrected together, by Holm; each set of a benchmark is one test of each encoder.
"""

import re

import numpy as np
import pandas as pd

from diva_lab.evaluation.referee import OPTIONAL, OWN, PUBLISHED
from diva_lab.evaluation.table import BENCHMARKS, PERCEPTION
from diva_lab.statistics import holm, independent_difference, mcnemar_pairs, paired_shares, percent

LEVEL, POWER = 0.05, 0.8
HEADLINES = {"zero-shot": ("score",), "world": ("pairs", "probe", "zeroshot", "nmi")}  # others: the first metric
HEADLINES |= {benchmark: (metric,) for benchmark, metric in PERCEPTION.items()}
CLASSES = ("zero-shot", "clustering", "probe", "knn", "retrieval")  # benchmarks of D-Ability
CLASS_METRICS = ("zeroshot", "nmi", "acc", "ari")  # of the tiny world
PATCHES = ("patch-probe", "segmentation", "world-segmentation", "correspondence")  # of patch tokens: neither P nor D
SAME_SET = {"averageofsixsets": "6sets"}  # in the papers' tables -> in ours
CELL = ["benchmark", "set", "metric"]
DIFFERENCES = ["method", *CELL, "ability", "before", "after", "difference", "low", "high", "p", "holm", "n", "gained",
               "lost", "how"]  # fmt: skip
CLAIMS = ["method", *CELL, "published_before", "published_after", "published", *DIFFERENCES[5:], "verdict", "pairs",
          "elsewhere"]  # fmt: skip


def ability_of(benchmark: str, metric: str) -> str:
    """P for fine details, D for classes, "" for what patch tokens hold."""
    if benchmark in PATCHES:
        return ""
    return "D" if benchmark in CLASSES or metric in CLASS_METRICS else "P"


def measured(results: pd.DataFrame, backbone: str) -> pd.DataFrame:
    """The rows of a referee's table that this project measured for an original, without categories."""
    own = (results["source"] == OWN) & (results["backbone"] == backbone) & (results["category"] == "all")
    return results[own]


def is_headline(rows: pd.DataFrame) -> pd.Series:
    """Whether a row's metric is one by which its benchmark is tested: those of `HEADLINES`, else the first."""
    first = rows.groupby(["benchmark", "set"], sort=False)["metric"].transform("first")
    cells = zip(rows["benchmark"], rows["metric"], first, strict=True)
    chosen = [metric in HEADLINES.get(benchmark, (one,)) for benchmark, metric, one in cells]
    return pd.Series(chosen, rows.index, dtype=bool)


def differences(results: pd.DataFrame, backbone: str) -> pd.DataFrame:
    """A row for each method, benchmark, set and metric: what changed against the original, in points.

    Returns:
        `DIFFERENCES`: scores before and after in percent, their difference with its 95 % interval in points, p, Holm's
        adjusted p over all headline metrics of the table (NaN for other metrics), and `how`: `paired`, `independent`,
        or "" where the scores have no interval, as averages over sets. Of pairs the difference is that of the share
        of all pairs, which is the score's where all patterns have as many.
    """
    own = measured(results, backbone)
    before = own[own["method"] == "none"].drop_duplicates(CELL, keep="last").set_index(CELL)
    rows = []
    for row in own[own["method"] != "none"].drop_duplicates([*CELL, "method"], keep="last").to_dict("records"):
        if (cell := tuple(row[name] for name in CELL)) in before.index:
            rows.append({name: row[name] for name in ("method", *CELL)} | _difference(before.loc[cell].to_dict(), row))
    table = pd.DataFrame(rows, columns=DIFFERENCES)
    table["holm"] = holm(table["p"].where(is_headline(table)).to_numpy(float))
    return table


def _difference(before: dict, after: dict) -> dict:
    """The difference of two rows of one cell, in points."""
    ability = ability_of(after["benchmark"], after["metric"])
    ends = [[one[name] / 100 for name in ("percent", "low", "high")] for one in (before, after)]
    found = {"ability": ability, "before": before["percent"], "after": after["percent"], "n": after["n"]}
    found |= {"gained": after["gained"], "lost": after["lost"], "how": "", "p": np.nan}
    if np.isfinite(after["p"]) and np.isfinite([after["gained"], after["lost"]]).all():
        change = paired_shares(int(after["gained"]), int(after["lost"]), int(after["n"]))
        found |= {"how": "paired", "p": after["p"]}
    elif np.isfinite(paired := [after[name] for name in (*OPTIONAL, "p")]).all():
        change = ends[1][0] - ends[0][0], paired[0] / 100, paired[1] / 100
        found |= {"how": "paired", "p": after["p"]}
    elif np.isfinite(ends).all():
        *change, found["p"] = independent_difference(*map(tuple, ends))
        found["how"] = "independent"
    else:
        change = ends[1][0] - ends[0][0], np.nan, np.nan
    return found | dict(zip(("difference", "low", "high"), (100 * value for value in change), strict=True))


def rule(published: float, difference: float, low: float, high: float, adjusted: float) -> str:
    """The ruling on a published difference, from the measured one with its 95 % interval and adjusted p.

    `confirmed`: it differs from zero (adjusted p below .05) to the published side. `contradicted`: it differs from zero
    to the other side, or, where it does not differ from zero, its interval excludes the published difference. Of a
    claim that nothing changes: `contradicted` where something did. Else, and without an interval, `undecided`.
    """
    if not np.isfinite([difference, low, high]).all():
        return "undecided"
    differs, side = bool(adjusted < LEVEL), np.sign(published)
    if differs:
        return "confirmed" if side * difference > 0 else "contradicted"
    short = high < published if side > 0 else low > published
    return "contradicted" if side and short else "undecided"


def _plain(label: str) -> str:
    """A set's name without case, marks and brackets, to compare names of papers with those of folders."""
    plain = re.sub(r"[^a-z0-9]", "", re.sub(r"\(.*?\)", "", label).lower())
    return SAME_SET.get(plain, plain)


def claims(results: pd.DataFrame, backbone: str, published: pd.DataFrame = PUBLISHED) -> pd.DataFrame:
    """A row for each published score of an improved version of `backbone` whose original's is published too.

    Returns:
        `CLAIMS`: what was published, in percent and points; what was measured, as `differences`, NaN where it was not;
        the `verdict`; `pairs`: how many would decide, at the published difference and the share of pairs that were
        seen to change, with a power of 80 % (NaN where pairs were not counted); and `elsewhere`: rows of the table from
        other sources, in words.
    """
    theirs = published[(published["backbone"] == backbone) & published["benchmark"].isin(list(BENCHMARKS))]
    before = theirs[theirs["method"] == "none"].set_index(CELL)["percent"]
    changes = differences(results, backbone)
    rows = []
    for row in theirs[theirs["method"] != "none"].to_dict("records"):
        if (cell := tuple(row[name] for name in CELL)) not in before.index:
            continue
        first, last = float(before[cell]), float(row["percent"])
        found = {"published_before": first, "published_after": last, "published": last - first}
        found |= {name: row[name] for name in ("method", *CELL)} | _measured_change(changes, row)
        found["verdict"] = rule(*(found[name] for name in ("published", "difference", "low", "high", "holm")))
        found["pairs"] = _deciding_pairs(found)
        rows.append(found | {"elsewhere": _elsewhere(results, row)})
    return pd.DataFrame(rows, columns=CLAIMS)


def _same_cell(table: pd.DataFrame, row: dict) -> pd.Series:
    same = (table["benchmark"] == row["benchmark"]) & (table["metric"] == row["metric"])
    return same & (table["method"] == row["method"]) & (table["set"].map(_plain) == _plain(row["set"]))


def _measured_change(changes: pd.DataFrame, row: dict) -> dict:
    """What was measured of a published row; sets that lack classes are not the published ones."""
    same = changes[_same_cell(changes, row) & ~changes["set"].str.contains(" classes)", regex=False)]
    blank = dict.fromkeys(DIFFERENCES[5:], np.nan) | {"how": ""}
    return blank if same.empty else same.iloc[-1][DIFFERENCES[5:]].to_dict()


def _deciding_pairs(claim: dict) -> float:
    if not np.isfinite(claim["gained"]) or round(claim["published"], 6) == 0:
        return np.nan
    return float(mcnemar_pairs(claim["published"] / 100, (claim["gained"] + claim["lost"]) / claim["n"], POWER, LEVEL))


def _elsewhere(results: pd.DataFrame, row: dict) -> str:
    """What rows from other sources say of a published score: percent or finding, and the source."""
    others = results[(results["source"] != OWN) & (results["backbone"] == row["backbone"])]
    others = others[_same_cell(others, row) & (others["category"] == "all")]
    said = [
        percent(one.percent / 100, digits=None) if np.isfinite(one.percent) else one.finding
        for one in others.itertuples()
    ]
    return "; ".join(f"{text} ({source})" for text, source in zip(said, others["source"], strict=True))


# --- tables for figures -------------------------------------------------------------------------------------------


def score_table(results: pd.DataFrame, backbone: str) -> pd.DataFrame:
    """The headline scores as `figures.benchmark_scores` takes them: fractions, the method as encoder."""
    own = measured(results, backbone)
    own = own[is_headline(own)]
    shares = {name: own[column] / 100 for name, column in (("value", "percent"), ("low", "low"), ("high", "high"),
                                                           ("chance", "chance"))}  # fmt: skip
    note = np.where(own["low"] <= own["chance"], "not above chance", "")
    return own.assign(encoder=own["method"], note=note, **shares)


def difference_table(changes: pd.DataFrame) -> pd.DataFrame:
    """Tested differences as `figures.claims` takes them: fractions, the method as objective, a panel for each set."""
    tested = changes[is_headline(changes)]
    shares = {name: tested[name] / 100 for name in ("difference", "low", "high")}
    measure = tested["benchmark"] + ", " + tested["set"] + ": " + tested["metric"]
    return tested.assign(objective=tested["method"], measure=measure, **shares)


def balance_table(results: pd.DataFrame, backbone: str) -> pd.DataFrame:
    """P and D as `figures.trade_off` takes them: a step from the original (0) to each method (1), fractions.

    Each is the mean over the headline scores of single sets that the method and the original both have; a method
    without any of P or D has no row.

    Returns:
        Columns objective, seed, step, `P` and `D`.
    """
    changes = differences(results, backbone)
    changes = changes[is_headline(changes) & (changes["ability"] != "")]
    changes = changes[~changes["set"].str.fullmatch(r"\d+ (sets|benchmarks)")]  # averages of others
    rows = []
    for method, own in changes.groupby("method", sort=False):
        means = own.groupby("ability")[["before", "after"]].mean() / 100
        if {"P", "D"} <= set(means.index):
            for step, column in enumerate(("before", "after")):
                rows.append({"objective": method, "seed": 0, "step": step} | means[column].to_dict())
    return pd.DataFrame(rows, columns=["objective", "seed", "step", "P", "D"])
