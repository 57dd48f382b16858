"""Sentences from records: a record in, Markdown out, with the interval and what it means for the expectation.

A sentence says where a result goes against expectation and where its interval contains zero (undecided).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from diva_lab.evaluation.pairs import compare_pairs
from diva_lab.figures.feedback import ROWS
from diva_lab.figures.style import CHANCE, label_of
from diva_lab.statistics import conflict_rate, nested_changes, nested_t, paired_t, percent, rank_correlation

SOUP = "soup of "  # before the objective of a row that is the mean of its runs, as in feedback_matched.csv

# --- numbers with their interval --------------------------------------------------------------------------------


def points(value: float, low: float, high: float, digits: int = 1) -> str:
    """A difference of fractions with its interval: "+3.1 points (95 % interval +1.0 to +5.2)"; NaN: no interval."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"{100 * value:+.{digits}f} points (one seed, no interval)"
    return f"{100 * value:+.{digits}f} points (95 % interval {100 * low:+.{digits}f} to {100 * high:+.{digits}f})"


def number(value: float, low: float, high: float, digits: int = 4) -> str:
    """A number with its interval: "+0.0011 (95 % interval -0.0067 to +0.0088)"; NaN: no interval."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"{value:+.{digits}f} (no interval)"
    return f"{value:+.{digits}f} (95 % interval {low:+.{digits}f} to {high:+.{digits}f})"


def brackets(value: float, low: float, high: float) -> str:
    """A fraction in percent as a table has it, with its interval if there is one: "54.2 [45.1, 63.0]"; NaN: a dash."""
    if not np.isfinite(value):
        return "–"
    return f"{100 * value:.1f}" + (f" [{100 * low:.1f}, {100 * high:.1f}]" if np.isfinite([low, high]).all() else "")


def verdict(low: float, high: float, expected: int = 1) -> str:
    """Compare the interval (low, high) of a difference with an expected rise (`expected` = 1) or fall (-1)."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return "undecided: one seed has no interval"
    if low <= 0 <= high:
        return "undecided: the interval contains zero"
    return "as expected" if (low > 0) == (expected > 0) else "against expectation"


# --- rows of the study ------------------------------------------------------------------------------------------


def state_difference(differences: pd.DataFrame, objective: str, measure: str, expected: int = 0) -> str:
    """A difference with its interval and, if a sign is `expected` (1 or -1), the verdict; "not run" if it is missing.

    `differences`: as `statistics.paired_differences` returns them.
    """
    rows = differences[(differences["objective"] == objective) & (differences["measure"] == measure)]
    if rows.empty:
        return "not run"
    row = rows.iloc[0]
    text = points(row["difference"], row["low"], row["high"])
    return text + (f", {verdict(row['low'], row['high'], expected)}" if expected else "")


def state_row(differences: pd.DataFrame, objective: str, expected: Mapping[str, int]) -> str:
    """What one objective changed in each measure of `expected`: measure -> sign of the expected change, 0 for none."""
    changes = {name: state_difference(differences, objective, name, sign) for name, sign in expected.items()}
    return f"{label_of(objective)}: {'; '.join(f'{label_of(name)} **{text}**' for name, text in changes.items())}."


def state_result(differences: pd.DataFrame) -> str:
    """What tuning did, in two sentences: P and D of the objective with the highest pair score against the original.

    `differences`: as `statistics.paired_differences` returns them, with the columns `before` and `after`. Random pushes
    of the weights are no objectives.
    """
    tuned = differences[~differences["objective"].str.startswith("perturb")].dropna(subset="difference")
    pairs, classes = (tuned[tuned["measure"] == name].set_index("objective") for name in ("pairs/mean", "zeroshot"))
    if pairs.empty:
        return "No tuned encoder can be compared with the original."
    best = pairs["after"].idxmax()
    of = f", the best of {len(pairs)} objectives," if len(pairs) > 1 else ""
    text = f"By {label_of(best)}{of} the {label_of('pairs/mean')} is {_state_change(pairs.loc[best])}, "
    text += f"{verdict(*pairs.loc[best, ['low', 'high']])}."
    if best in classes.index:
        text += f" The zero-shot accuracy (D) is {_state_change(classes.loc[best])}."
    return text


def _state_change(row: pd.Series) -> str:
    change = points(*row[["difference", "low", "high"]])
    return f"**{percent(row['after'])}** against {percent(row['before'])} of the original: **{change}**"


def count_signs(differences: pd.DataFrame, name: str = "objective") -> str:
    """How many intervals lie above zero, below zero, and contain it; the column `name` names them."""
    parts, undecided = [], len(differences)
    for side, chosen in {"above": differences["low"] > 0, "below": differences["high"] < 0}.items():
        names = "; ".join(map(label_of, differences.loc[chosen, name]))
        parts.append(f"**{chosen.sum()}** {side} zero" + (f" ({names})" if names else ""))
        undecided -= chosen.sum()
    return f"of {len(differences)} intervals {', '.join(parts)}, {undecided} undecided"


def state_missing(missing: pd.DataFrame, rows: Sequence[str]) -> str:
    """Those of `rows` that lack seeds: " Not run: dcr (seeds 3, 4)."; "" if none does.

    `missing`: columns `row` and `seed`, as in data/results/missing.csv.
    """
    seeds_of = missing[missing["row"].isin(list(rows))].groupby("row", sort=False)["seed"]
    parts = [f"{name} (seeds {', '.join(map(str, seeds))})" for name, seeds in seeds_of]
    return f" Not run: {'; '.join(parts)}." if parts else ""


def state_slope(slope: tuple[float, float, float], runs: int, x: str, y: str) -> str:
    """A regression's slope with its interval, where a rising line is expected; `x` and `y` in words."""
    text = f"{x} goes with **{number(*slope, 2)}** points of {y}, over {runs} runs."
    return f"{text} A rising line was expected: {verdict(*slope[1:])}."


# --- published claims -------------------------------------------------------------------------------------------


def state_claim(claim: Mapping[str, object]) -> str:
    """The ruling on a published claim and what it rests on: a row of `evaluation.verdicts.claims`."""
    score = f"{claim['benchmark']}, {claim['set']} ({claim['metric']})"
    items = "pairs" if claim["metric"] == "pairs" else "items"
    text = (
        f"**{claim['verdict']}**: {label_of(claim['method'])} on {score}. Published: {claim['published']:+.1f} points, "
        f"from {claim['published_before']:g} to {percent(claim['published_after'] / 100, digits=None)}. "
    )
    if not np.isfinite(claim["difference"]):
        text += "Measured: not yet."
    else:
        after = percent(claim["after"] / 100)
        text += f"Measured: {claim['difference']:+.1f} points, from {claim['before']:.1f} to {after}"
        has_interval = np.isfinite([claim["low"], claim["high"]]).all()
        text += f", 95 % interval {claim['low']:+.1f} to {claim['high']:+.1f}" if has_interval else ", no interval"
        if np.isfinite(claim["gained"]):
            text += f"; of {claim['n']:.0f} {items} {claim['gained']:.0f} gained and {claim['lost']:.0f} lost"
        text += f"; p = {claim['p']:.2g}" if np.isfinite(claim["p"]) else ""
        text += f", {claim['holm']:.2g} after Holm's correction." if np.isfinite(claim["holm"]) else "."
        if has_interval and not min(0, claim["low"]) <= claim["published"] <= max(0, claim["high"]):
            text += " The published difference lies outside the interval."
    if claim["verdict"] == "undecided" and np.isfinite(claim["pairs"]):
        text += f" {claim['pairs']:.0f} {items} would decide it, if as many change; these are {claim['n']:.0f}."
    return text + (f" Elsewhere: {claim['elsewhere']}." if claim["elsewhere"] else "")


# --- alignments over the dose -----------------------------------------------------------------------------------


def state_alignment(curves: pd.DataFrame, alignment: str, measures: Sequence[str]) -> str:
    """What the last evaluation of an alignment's runs changed against the first, seeds of stage 2 within stage 1.

    `curves`: columns `alignment`, `seed`, `align_seed`, `images` and the measures, as in data/results/feedback.csv.
    """
    rows = curves[curves["alignment"] == alignment].sort_values("images")
    if rows.empty:
        return f"{alignment}: not run."
    last = rows.groupby("seed").last()
    changes = _state_changes(rows.groupby("seed").first(), last, measures)
    of = f"{_seeds(last)}, {last['align_seed'].nunique()} of stage 1"
    return f"{alignment} ({of}; {last['images'].max():,} images): {changes}."


def state_mix(mixes: pd.DataFrame, row: tuple[str, str], measures: Sequence[str]) -> str:
    """What a row's runs changed at the mix that was chosen beforehand; seeds of stage 2 lie within stage 1.

    Args:
        mixes: as data/results/feedback_mixes.csv.
        row: objective and alignment.
    """
    name = ", ".join(row)
    rows = mixes[(mixes["objective"] == row[0]) & (mixes["alignment"] == row[1])]
    if rows.empty:
        return f"{name}: not run."
    first, last = (rows[of].set_index("seed") for of in (rows["mix"] == 0, rows["chosen"]))
    return f"{name}, mix {last['mix'].iloc[0]:g} ({_seeds(last)}): {_state_changes(first, last, measures)}."


def tabulate_matched(matched: pd.DataFrame, at: str, measure: str) -> str:
    """A Markdown table: each row's `measure` in percent where it first comes to the levels of `at`, with its interval.

    A dash: not all runs of the row come there. One run, or one soup of runs, has no interval.

    Args:
        matched: as data/results/feedback_matched.csv.
        at: `pairs/mean`, a pair score, or `zeroshot`, points of zero-shot accuracy that were lost.
    """
    table = matched[(matched["at"] == at) & (matched["measure"] == measure)]
    levels = sorted(table["level"].unique())
    lines = [["", *(f"{100 * level:g}" for level in levels)], ["---"] * (len(levels) + 1)]
    for row, rows in table.groupby(["objective", "alignment"], sort=False):
        found = rows.set_index("level")[["value", "low", "high"]].reindex(levels)
        lines.append([_name_row(*row), *(brackets(*cell) for cell in found.to_numpy())])
    return _tabulate(lines)


def tabulate_mixes(mixes: pd.DataFrame, measures: Sequence[str]) -> str:
    """A Markdown table: each row's measures in percent at the mix that was chosen for it, with intervals over stage 1.

    Args:
        mixes: as data/results/feedback_mixes.csv; a soup has no interval.
    """
    names = [label_of(name) for name in measures]
    start = [brackets(value, np.nan, np.nan) for value in mixes.loc[mixes["mix"] == 0, measures].mean()]
    lines = [["", "mix", "seeds", *names], ["---"] * (len(names) + 3), ["original", "0", "", *start]]
    for row, runs in mixes[mixes["chosen"]].groupby(["objective", "alignment"], sort=False):
        groups = runs["align_seed"].fillna(runs["seed"]).tolist()
        cells = [brackets(*nested_t(runs[name].to_numpy(), groups)) for name in measures]
        seeds = "" if row[0].startswith(SOUP) else str(len(runs))
        lines.append([_name_row(*row), f"{runs['mix'].iloc[0]:g}", seeds, *cells])
    return _tabulate(lines)


def _name_row(objective: str, alignment: str) -> str:
    """What a row, or the mean of its runs, is called in a table."""
    base = objective.removeprefix(SOUP)
    other = label_of(base if alignment == "none" else f"{base}, {alignment}")
    name = ROWS.get((base, alignment), (other,))[0]
    return f"mean of the runs of {name}" if base != objective else name


def _seeds(runs: pd.DataFrame) -> str:
    """How many, a row each."""
    return f"{len(runs)} seed{'s' if len(runs) != 1 else ''}"


def _tabulate(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _state_changes(first: pd.DataFrame, last: pd.DataFrame, measures: Sequence[str]) -> str:
    """Each measure after training and its change, from tables with a row a seed and the column `align_seed`."""
    changes = nested_changes(first, last, measures).items()
    ends = {key: 100 * (first[key].mean() + change[0]) for key, change in changes}
    return "; ".join(f"{label_of(key)} **{ends[key]:.1f}**, {points(*change)}" for key, change in changes)


def state_readability(table: pd.DataFrame, name: str) -> str:
    """Known, readable, said and seen of a projector; `table` as `analysis.readability` returns it."""
    whole = table[(table["pattern"] == "mean") & (table["bin"] == "all")].set_index("measure")
    words = {"known": "the denoiser knows", "readable: diva": "its gradient says", "said": "CLIP's match says",
             "seen": "CLIP's image tower sees"}  # fmt: skip
    parts = [f"{text} **{percent(*whole.loc[key, ['value', 'low', 'high']], 0)}**" for key, text in words.items()]
    return f"{name}: of the right statements {', '.join(parts)}. Chance is 50 %."


def state_prediction(predicted: pd.DataFrame) -> str:
    """How readability before goes with the gain after; `predicted` as data/results/feedback_predicted.csv."""
    whole = rank_correlation(*(predicted[name].to_numpy() for name in ("readable", "gain", "projector")))
    means = predicted.groupby("projector")[["readable", "gain"]].mean()
    between = means["readable"].corr(means["gain"], method="spearman")
    anchored = predicted[predicted["alignment"] == "anchored"].groupby("projector")
    within = [part["readable"].corr(part["gain"], method="spearman") for _, part in anchored]
    return (
        f"Rank correlation (Spearman) of readability before with the gain after, over {len(predicted)} pairs of a "
        f"projector and a pattern: **{number(*whole, 2)}**, projectors resampled. Over the means of "
        f"the {len(means)} projectors: **{between:+.2f}**. Among the patterns of one anchored projector, "
        f"mean of {len(within)}: **{np.mean(within):+.2f}**, from {min(within):+.2f} to {max(within):+.2f}."
    )


def state_transfer(fitted: pd.DataFrame, tested: pd.DataFrame) -> str:
    """How well a line through one world's pairs of readability and gain foretells another's, beside its mean gain.

    Both as data/results/feedback_predicted.csv.
    """
    slope, at_zero = np.polyfit(fitted["readable"], fitted["gain"], 1)
    miss = (tested["gain"] - (at_zero + slope * tested["readable"])).abs().mean()
    plain = (tested["gain"] - fitted["gain"].mean()).abs().mean()
    rho = rank_correlation(*(tested[name].to_numpy() for name in ("readable", "gain", "projector")))
    return (
        f"Fitted on one world ({len(fitted)} pairs of a projector and a pattern): {slope / 10:+.1f} points of gain for "
        f"10 points of readability. In the other ({len(tested)} pairs) the line misses the gain by **{miss:.1f}** "
        f"points on average, the first world's mean gain by {plain:.1f}; rank correlation there **{number(*rho, 2)}**."
    )


def state_against_chance(name: str, report: Mapping[str, float]) -> str:
    """Whether an encoder's pair score lies above chance; `report` as `world_report` returns it."""
    score, low, high = (report[f"pairs/mean{end}"] for end in ("", "/low", "/high"))
    place = "below" if high < CHANCE else "above" if low > CHANCE else "not different from"
    text = f"{label_of(name)} gets **{percent(score, low, high)}** of the pairs right"
    return f"{text}, {place} chance ({percent(CHANCE, digits=0)})."


# --- the tiny world, its denoiser and its pairs -----------------------------------------------------------------


def state_pair_scores(report: Mapping[str, float], ceiling: pd.DataFrame) -> str:
    """An encoder's `world_report` against chance and the supervised ceiling (data/results/ceiling.csv)."""
    return (
        f"The encoder names the class of **{percent(report['zeroshot'])}** of the images. "
        f"{state_against_chance('It', report)} The supervised ceiling is {percent(ceiling['after'].mean())}. A "
        f"linear probe reads {percent(report['probe/mean'])} of the details from the same embedding."
    )


def state_drawn_attributes(quality: pd.DataFrame, target: Mapping[str, float]) -> str:
    """Which attribute the denoiser draws worst, and which miss their target; `quality` as data/results/quality.csv."""
    worst = quality.loc[quality["share"].idxmin()]
    short = quality["attribute"][quality["share"] < quality["attribute"].map(target)]
    return (
        f"The denoiser draws **{label_of(worst['attribute'])}** worst: it is right in "
        f"{percent(*worst[['share', 'low', 'high']], 0)} of {worst['n']} samples. Below their target: "
        f"**{', '.join(map(label_of, short)) or 'none'}**."
    )


def state_recovered(reports: Mapping[str, Mapping[str, float]], more: str = "recap", less: str = "global") -> str:
    """Recovered fractions of conditions (`alignment_report`); `more` is expected to recover more than `less`.

    The interval of their difference is the widest that the two intervals allow.
    """
    ends = {name: [report[f"recovered{end}"] for end in ("", "/low", "/high")] for name, report in reports.items()}
    result = verdict(ends[more][1] - ends[less][2], ends[more][2] - ends[less][1])
    text = ", ".join(f"{name} **{number(*values, 2)}**" for name, values in ends.items())
    return f"Recovered fraction: {text}. `{more}` was expected to recover more than `{less}`: **{result}**."


def state_changed_pairs(before: pd.DataFrame, after: pd.DataFrame, name: str) -> str:
    """Pairs that an encoder gained and lost, by their first id, with McNemar's test; scores as of `score_pairs`."""
    changes = compare_pairs(before, after)
    gained, lost = (", ".join(map(str, changes[key])) or "none" for key in ("gained", "lost"))
    test = f"McNemar's exact test of gains against losses: p = {changes['p']:.2g}"
    return f"{label_of(name)}: pairs gained {gained}; lost {lost}. {test}."


def state_scores(rows: pd.DataFrame) -> str:
    """Scores of several encoders on one benchmark and metric: rows of `evaluate`; notes what is not above chance."""
    parts = []
    for row in rows.itertuples():
        value = f"{label_of(row.encoder)} {percent(row.value, row.low, row.high)}"
        parts.append(", ".join(filter(None, (value, row.note))))
    return f"{rows['benchmark'].iloc[0]}, {rows['metric'].iloc[0]} (n = {rows['n'].iloc[0]:.0f}): {'; '.join(parts)}."


def state_patterns(differences: pd.DataFrame, objective: str) -> str:
    """Which patterns an objective changed, and the largest rise; training is expected to raise some pattern."""
    rows = differences[differences["objective"] == objective]
    best = rows.loc[rows["difference"].idxmax()]
    largest = f"{label_of(best['measure'])} {points(*best[['difference', 'low', 'high']])}"
    text = f"{label_of(objective)}: {count_signs(rows, 'measure')}. The largest rise: {largest}."
    unexpected = not (rows["low"] > 0).any() and not objective.startswith("perturb")
    return text + (" No pattern rose: **against expectation**." if unexpected else "")


# --- gradients --------------------------------------------------------------------------------------------------


def state_null(probe: Mapping[str, float]) -> str:
    """The cosine of two gradients of one batch against that of different batches: measures of `probe_gradients`."""
    outside = not probe["cos/low"] <= probe["other"] <= probe["cos/high"]
    return (
        f"Same batch: mean cosine **{number(probe['cos'], probe['cos/low'], probe['cos/high'])}**. Different batches: "
        f"{probe['other']:+.4f}, {'**outside**' if outside else 'inside'} that interval, standard deviation "
        f"{probe['other/sd']:.4f}. Random directions: 0 ± {probe['random/sd']:.4f}. Only the difference between the "
        "same batch and different batches depends on the images."
    )


def state_conflict(metrics: pd.DataFrame, published: float) -> str:
    """How often two gradients point apart, and how far, in the runs of `metrics` (columns `seed`, `step`, `cos`).

    The rate has the interval of a block bootstrap, the others Student's t over the seeds. `published` is the paper's
    rate, which the paper reports to grow during training.
    """
    each = metrics.dropna(subset="cos").groupby("seed")["cos"]
    rate, low, high = conflict_rate(each.apply(np.array).tolist())
    late = metrics["step"] >= metrics["step"].median()
    negative = (metrics["cos"] < 0).groupby([metrics["seed"], late]).mean().unstack()
    mean, growth = paired_t(each.mean().to_numpy()), paired_t((negative[True] - negative[False]).to_numpy())
    return (
        f"The gradients point apart in **{percent(rate, low, high, 0)}** of {len(metrics)} steps; the paper's "
        f"{percent(published)} is {'inside' if low <= published <= high else '**outside**'} this interval. Their "
        f"mean cosine is **{number(*mean)}** over {len(each)} seeds. From the first half of training to the second the "
        f"rate changes by **{points(*growth, 0)}**; the paper reports a rise: {verdict(*growth[1:])}."
    )


def state_parts(metrics: pd.DataFrame) -> str:
    """Blocks and kinds of layer with the lowest and highest mean cosine, and the embedding, over the seeds."""
    parts = [name for name in metrics if name.startswith("cos/") and metrics[name].notna().all()]
    means = metrics.groupby("seed")[parts].mean()  # [seeds, parts]
    chosen = dict.fromkeys((means.mean().idxmin(), means.mean().idxmax(), "cos/features"))
    texts = [f"{name.removeprefix('cos/')} **{number(*paired_t(means[name].to_numpy()))}**" for name in chosen]
    return f"Lowest and highest of {len(parts)} parts, and the embedding (`features`): {'; '.join(texts)}."


def state_timesteps(probes: pd.DataFrame, of: str) -> str:
    """The cosine of two objectives' gradients (`of`: "a~b") in each part of the timesteps, against its null."""
    if probes.empty:
        return f"{of}: **not run**."
    rows = probes[(probes["step"] == probes["step"].max()) & (probes["bin"] != "all") & (probes["of"] == of)]
    rows = rows.pivot(index="bin", columns="measure", values="value")
    cosine, below = rows["cos"], rows["cos/high"] < 0
    apart = (rows["other"] < rows["cos/low"]) | (rows["other"] > rows["cos/high"])
    return (
        f"{' and '.join(map(label_of, of.split('~')))}: the mean cosine ranges from {cosine.min():+.3f} (part "
        f"{cosine.idxmin()}) to {cosine.max():+.3f} (part {cosine.idxmax()}). Of {len(rows)} parts of the timesteps "
        f"its interval is below zero in **{below.sum()}** and excludes the mean of the null in **{apart.sum()}**."
    )


def state_agreement(metrics: pd.DataFrame, pair: str, block: int = 5) -> str:
    """How often two terms of one objective (`pair`: "a~b") point apart, from one run's metrics."""
    cosines = metrics[f"{pair}:cos"].to_numpy()
    rate = percent(*conflict_rate(cosines, block=block), 0)
    names = " and ".join(map(label_of, pair.split("~")))
    return f"{names}: mean cosine **{cosines.mean():+.2f}**, negative in {rate} of {len(cosines)} steps."


# --- theory -----------------------------------------------------------------------------------------------------


def state_bounds(rows: pd.DataFrame) -> str:
    """Theorem 1 for one kind of features and constants: rows of data/results/theory_scatter.csv."""
    columns = ["inner_holds", "inter_holds", "inter_says"]
    inner, inter, above_zero = (percent(share, digits=0) for share in rows[columns].mean())
    needed, ratio = (f"{rows[name].min():.1f} to {rows[name].max():.1f}" for name in ("needed", "ratio"))
    return (
        f"{rows['features'].iloc[0]}, {rows['constants'].iloc[0]}: the first bound holds in {inner} of the "
        f"halvings, the second in {inter}, but it is above zero in **{above_zero}**. For that the "
        f"ratio of scatters must exceed {needed}; it is {ratio}."
    )


def state_affine_ranges(rows: pd.DataFrame, r2: float = 0.99) -> str:
    """For which cosines of the negatives DCR's loss is affine (lower end of R²'s interval above `r2`), by timestep."""
    straight = rows[rows["r2/low"] > r2].groupby("t")["cosine"].agg(["min", "max"])
    ranges = [f"t = {t}: {row['min']:g} to {row['max']:g}" for t, row in straight.iterrows()]
    return f"R² above {r2:g} at cosines {'; '.join(ranges) or 'nowhere'}"


def state_line(rows: pd.DataFrame) -> str:
    """Slope and R² of the line through DCR's loss, mean over `rows` of data/results/theory_affine.csv."""
    slope, r2 = (rows[[key, f"{key}/low", f"{key}/high"]].mean() for key in ("slope", "r2"))
    return f"slope {number(*slope, 2)}, R² {number(*r2, 2)}"


def state_theorem_2(rows: pd.DataFrame, limit: float = 2.5) -> str:
    """Where the published form is affine: `rows` with turned negatives; `limit` is the slope 1 / 4τ."""
    nearest = rows[rows["r2/low"] > 0.99].groupby("t")["cosine"].min().max()
    left = rows.loc[rows["cosine"] == 0, "slope"].max() / limit
    result, left = "against expectation" if nearest > 0 and left < 0.5 else "as expected", percent(left, digits=0)
    return (
        f"At every t the published form is affine in the reconstruction error for negatives at cosines from "
        f"{nearest:g} to 1. For negatives at a right angle at most {left} of the slope 1 / 4τ is left. The "
        f"theorem expects it to be affine for well separated negatives: **{result}**."
    )
