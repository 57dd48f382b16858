"""What choosing on the test set adds: the best of some checkpoints or seeds, against one that was fixed before.

Choosing the best of several models on the pairs that are then reported has two effects. It may find a better model, and
it certainly picks luck: on other pairs of the same kind the chosen model falls back. Here the pairs that were measured
are taken as the population. A test set is drawn from them, a model is chosen on it, and its gain is counted twice: on
the drawn set, as it would be reported, and in the population, as it holds.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest

from diva_lab.statistics import mcnemar_pairs, percentiles
from diva_lab.world import PATTERNS

PAIRS = 135  # of MMVP-VLM


def pack(correct: Bool[np.ndarray, " n"]) -> str:
    """A bit for each pair, in hexadecimal digits."""
    return np.packbits(correct).tobytes().hex()


def unpack(text: str, n: int) -> Bool[np.ndarray, " n"]:
    """What `pack` wrote of n pairs."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:n].astype(bool)


def read_checkpoints(path: str | Path, each: int = 300) -> tuple[Bool[np.ndarray, "s k n"], list[str]]:
    """Whether each checkpoint of each seed gets each pair right, the untrained one first; and the pairs' patterns.

    Args:
        path: a csv with `seed`, `step` and `correct`, packed.
        each: pairs of a pattern.
    """
    patterns = np.repeat(list(PATTERNS.values()), each).tolist()
    table = pd.read_csv(path).sort_values(["seed", "step"])
    runs = [[unpack(text, len(patterns)) for text in run] for _, run in table.groupby("seed")["correct"]]
    return np.array(runs), patterns


def draw_sets(patterns: Sequence[str], size: int, draws: int, seed: int) -> Int[np.ndarray, "draws n"]:
    """How often each of n pairs is in a test set of `size` pairs, as many of each pattern, drawn with replacement.

    Raises:
        ValueError: where `size` is no multiple of the number of patterns.
    """
    names, rng = np.asarray(patterns), np.random.default_rng(seed)
    kinds = list(dict.fromkeys(patterns))
    each, rest = divmod(size, len(kinds))
    if rest or not each:
        raise ValueError(f"{size} pairs of {len(kinds)} patterns; expected as many of each pattern")
    counts = np.zeros((draws, len(names)), int)
    for kind in kinds:
        members = np.flatnonzero(names == kind)
        counts[:, members] = rng.multinomial(each, np.full(len(members), 1 / len(members)), draws)
    return counts


def selection_gain(
    correct: Bool[np.ndarray, "m n"], fixed: Float[np.ndarray, " n"], sets: Int[np.ndarray, "draws n"]
) -> dict[str, float]:
    """The gain of the best of m models on a test set over what was fixed before.

    Args:
        correct: whether each model gets each of n pairs right.
        fixed: the same of what it is compared with: one model, or the mean of several.
        sets: as `draw_sets` returns them.

    Returns:
        "reported", the mean gain on the set that the choice was made on; "reported/low" and "reported/high", between
        which 95 % of the sets lie; "held", the mean gain of the chosen model in the population. In fractions.
    """
    gains = sets @ (correct - fixed).T / sets[0].sum()  # [draws, m]
    chosen = gains.argmax(1)
    reported = gains[np.arange(len(sets)), chosen]
    low, high = percentiles(reported)
    held = (correct - fixed).mean(1)[chosen].mean()
    return {"reported": reported.mean(), "reported/low": low, "reported/high": high, "held": held}


def selection_table(
    correct: Bool[np.ndarray, "s k n"],
    patterns: Sequence[str],
    sizes: Sequence[int] = (PAIRS, 2700),
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """`selection_gain` of the best of 1 to k checkpoints of a seed, and of the last checkpoint of 1 to s seeds.

    Args:
        correct: of s seeds and their k checkpoints, in the order of their steps; those that are chosen among are spread
            evenly over the run and end with the last.

    Returns:
        Columns `of` ("checkpoints", mean over the seeds, or "seeds", mean over all choices of so many), `choices`,
        `size`, and those of `selection_gain`. Checkpoints are compared with the last one of their run, seeds with the
        mean of all seeds.
    """
    seeds, checkpoints, _ = correct.shape
    last, rows = correct[:, -1], []
    for size in sizes:
        sets = draw_sets(patterns, size, draws, seed)
        for k in range(1, checkpoints + 1):
            places = checkpoints - 1 - np.linspace(0, checkpoints - 1, k).round().astype(int)
            gains = [selection_gain(run[places], run[-1].astype(float), sets) for run in correct]
            rows.append({"of": "checkpoints", "choices": k, "size": size, **pd.DataFrame(gains).mean()})
        for s in range(1, seeds + 1):
            some = map(list, combinations(range(seeds), s))
            gains = [selection_gain(last[chosen], last.mean(0), sets) for chosen in some]
            rows.append({"of": "seeds", "choices": s, "size": size, **pd.DataFrame(gains).mean()})
    return pd.DataFrame(rows)


def published_power(published: pd.DataFrame, discordance: float) -> pd.DataFrame:
    """What published gains on MMVP-VLM would need to be told from zero.

    Papers give no answers to single pairs, so that McNemar's test cannot be done. Two cases bound it: no pair was lost,
    and as large a share of the pairs changed as `discordance` says.

    Args:
        published: rows of data/published/results.csv; those of mmvp-vlm's score over all pairs are used.

    Returns:
        Columns backbone, method, pairs (gained less lost, of 135), "p, none lost", "p, some lost", and "pairs needed":
        how many find the difference with a power of 80 % at that discordance; NaN where nothing was gained.
    """
    rows = published[(published["benchmark"] == "mmvp-vlm") & (published["metric"] == "pairs")]
    table = rows.pivot_table(index="backbone", columns="method", values="percent", sort=False)
    found = []
    for backbone, scores in table.iterrows():
        for method, percent in scores.drop("none").dropna().items():
            net = round((percent - scores["none"]) / 100 * PAIRS)
            changed = max(abs(net), round(discordance * PAIRS))
            changed += (changed - net) % 2  # gained - lost = net, gained + lost = changed
            tests = [binomtest((n + net) // 2, n).pvalue if n else 1.0 for n in (abs(net), changed)]
            needed = mcnemar_pairs(net / PAIRS, discordance) if net else np.nan
            found.append((backbone, method, net, *tests, needed))
    return pd.DataFrame(found, columns=["backbone", "method", "pairs", "p, none lost", "p, some lost", "pairs needed"])
