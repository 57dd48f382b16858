"""EmojiPairs: which minimal pairs of real drawings an encoder tells apart, with words and without.

Two sets of emoji draw the same minimal pairs (data/emoji_pairs). With words: MMVP-VLM's rule on each set alone.
Without: are the two members of a pair matched to themselves across the sets? That asks no text tower, so details that
the image tower has lost are told from details that the words never named.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diva_lab.evaluation.pairs import embed_files, pair_decisions, read_pairs, score_pairs, summarise
from diva_lab.evaluation.task import Task, benchmark, score_row
from diva_lab.paths import DATA
from diva_lab.statistics import bootstrap_mean

EMOJI = DATA / "emoji_pairs"
EMOJI_SETS = {"noto": "google", "twemoji": "twitter"}  # a folder of ours -> the name that the packages have for it


@torch.no_grad()
def match_pairs(
    encoder, first: str | Path, second: str | Path, features: Callable[[Sequence[Path]], Tensor] | None = None
) -> pd.DataFrame:
    """Match the members of each pair in the folder `first` to their counterparts in `second`, by images alone.

    With a_i and b_i the unit embeddings of member i in the two folders, a_1 chooses b_1 where a_1·b_1 > a_1·b_2, a_2
    chooses b_2 where a_2·b_2 >= a_2·b_1 (`pair_decisions`: a tie counts for member 2), and a pair is correct if both
    choose their own. Independent random similarities score .25; an encoder to which a_1 and a_2 look alike scores
    less, since both then choose the same image. `features` as in `score_pairs`.

    Returns one row a pair, to be summarised: pattern, id_1, id_2, the cosines a1b1, a1b2, a2b1, a2b2, correct, tie,
    image_to_text, here the same rule from `second` to `first`, and group, right both ways. Raises ValueError unless
    both folders (see `read_pairs`) hold the same ids, patterns and statements.
    """
    pairs, others = read_pairs(first), read_pairs(second)
    columns = ["pattern", "id_1", "id_2", "statement_1", "statement_2"]
    if not pairs[columns].equals(others[columns]):
        raise ValueError(f"{first} and {second} do not hold the same pairs")
    features = features or (lambda files: embed_files(encoder, files))
    a, b = (
        features([*table["image_1"], *table["image_2"]]).unflatten(0, (2, -1)).transpose(0, 1)  # [n, 2, D]
        for table in (pairs, others)
    )
    similarity = (a @ b.transpose(1, 2)).numpy()  # [n, members of first, members of second]
    decisions = pair_decisions(similarity)
    cosines = {f"a{i + 1}b{j + 1}": similarity[:, i, j] for i in (0, 1) for j in (0, 1)}
    chosen = {key: decisions[key] for key in ("correct", "tie", "image_to_text", "group")}
    return pairs[["pattern", "id_1", "id_2"]].assign(**cosines, **chosen)


def emoji_report(
    encoder,
    folder: str | Path = EMOJI,
    seed: int = 0,
    features: Callable[[Sequence[Path]], Tensor] | None = None,
) -> dict[str, float]:
    """Both scores of `encoder` on EmojiPairs, as one flat record of fractions in [0, 1].

    Args:
        encoder: anything that `models.encoders.embed` takes and that has `encode_text`.
        folder: holds both sets, `folder`/noto and `folder`/twemoji.
        seed: of the bootstrap.
        features: as in `score_pairs`; asked once for each set, whatever is scored.

    Returns:
        "emoji/<set>/<pattern>" and "emoji/<set>/mean" for the two sets: names to images, MMVP-VLM's rule;
        "emoji/<pattern>" and "emoji/mean": their average over the sets;
        "emoji-match/<pattern>" and "emoji-match/mean": images to images, from noto to twemoji (`match_pairs`).
        Each with "/low" and "/high" (95 %): Wilson's for a pattern of one set and of the match, otherwise bootstrap
        over the pairs, a pair's two drawings kept together.
    """
    features, known = features or (lambda files: embed_files(encoder, files)), {}

    def once(files: Sequence[Path]) -> Tensor:
        if new := [file for file in files if file not in known]:
            known.update(zip(new, features(new), strict=True))
        return torch.stack([known[file] for file in files])

    scores = {name: score_pairs(encoder, Path(folder) / name, once) for name in EMOJI_SETS}
    reports = {f"emoji/{name}": summarise(table, seed=seed) for name, table in scores.items()}
    reports["emoji-match"] = summarise(
        match_pairs(encoder, *(Path(folder) / name for name in EMOJI_SETS), once), seed=seed
    )

    patterns = next(iter(scores.values()))["pattern"]
    correct = pd.Series(np.mean([table["correct"] for table in scores.values()], axis=0))  # 0, 1/2 or 1
    groups = {name: [group.to_numpy()] for name, group in correct.groupby(patterns, sort=False)}
    groups["mean"] = [group for (group,) in groups.values()]
    reports["emoji"] = {}
    for name, members in groups.items():
        low, high = bootstrap_mean(members, seed=seed)
        mean = float(np.mean([group.mean() for group in members]))
        reports["emoji"] |= {name: mean, f"{name}/low": low, f"{name}/high": high}
    names = [f"{name}{end}" for name in groups for end in ("", "/low", "/high")]
    return {f"{prefix}/{name}": report[name] for prefix, report in reports.items() for name in names}


@benchmark(data="nothing")
def emoji_benchmark(task: Task) -> Iterator[dict]:
    """EmojiPairs, with names (`emoji`, on both sets and on each) and without (`emoji-match`)."""
    report = emoji_report(task.encoder, EMOJI, task.seed, task.embed_files)
    sizes = read_pairs(EMOJI / next(iter(EMOJI_SETS)))["pattern"].value_counts()
    for name, value in report.items():
        if not name.endswith(("/low", "/high")):
            metric, _, category = name.rpartition("/")
            n, category = (int(sizes.sum()), "all") if category == "mean" else (int(sizes[category]), category)
            yield score_row(metric, value, n, report[f"{name}/low"], report[f"{name}/high"], 0.25, category)
