"""A referee's results -> one page of HTML: rulings, differences, figures, and what is unknown.

`referee_figures` and `state_rulings` are what a notebook shows of the same table.
"""

from html import escape
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from diva_lab import figures
from diva_lab.evaluation.referee import OWN, PUBLISHED, Referee
from diva_lab.evaluation.verdicts import (
    HEADLINES,
    balance_table,
    claims,
    difference_table,
    differences,
    score_table,
)
from diva_lab.models.released import RELEASED
from diva_lab.provenance import environment
from diva_lab.workbook.findings import state_claim
from diva_lab.workbook.page import bold_html, figure_html, table_html, write_page

SHOWN = {  # columns of `differences` on the page
    "method": "method", "benchmark": "benchmark", "set": "set", "metric": "metric", "ability": "P or D",
    "before": "original, %", "after": "improved, %", "difference": "points", "low": "low", "high": "high", "p": "p",
    "holm": "p, Holm", "n": "items", "gained": "gained", "lost": "lost", "how": "samples",
}  # fmt: skip


def state_rulings(results: pd.DataFrame, original: str) -> list[str]:
    """A sentence for each published claim, decided ones first."""
    rows = claims(results, original).to_dict("records")
    order = {"confirmed": 0, "contradicted": 1, "undecided": 2}
    return [state_claim(row) for row in sorted(rows, key=lambda row: order[row["verdict"]])]


def referee_figures(results: pd.DataFrame, original: str) -> dict[str, Figure]:
    """The figures that the table has data for: `scores`, `differences`, `balance` (D against P).

    Args:
        results: as `referee.read_results` reads them.
        original: the encoder that all others are compared with.
    """
    source = figures.trace(environment(), f"referee of {original}")
    scores, changes = score_table(results, original), differences(results, original)
    published = PUBLISHED[(PUBLISHED["backbone"] == original) & PUBLISHED["benchmark"].isin(list(scores["benchmark"]))]
    theirs = results[(results["source"] != OWN) & (results["backbone"] == original)]
    drawn = {}
    if len(scores):
        drawn["scores"] = figures.benchmark_scores(scores, published if len(published) else None, source, theirs)
    if len(changes):
        drawn["differences"] = figures.claims(
            difference_table(changes), {"": list(dict.fromkeys(changes["method"]))}, source
        )
    if len(balance := balance_table(results, original)):
        drawn["balance"] = figures.trade_off(balance, (("D", "P"),), source)
    return drawn


def state_unknown(original: str) -> list[str]:
    """What is not known of the published encoders of an original: a line for each that has an empty cell."""
    mine = [one for one in RELEASED.values() if one.original in (original, "")]
    return [f"{one.name}: {', '.join(one.unknown)}" for one in mine if one.unknown]


def write_referee_page(path: Path, referee: Referee) -> None:
    """Write the page of one call of `run_referee`."""
    changes = differences(referee.results, referee.original)
    tests = int(changes["holm"].notna().sum())
    rulings = [bold_html(sentence) for sentence in state_rulings(referee.results, referee.original)]
    rulings = rulings or [f"No claim on {escape(referee.original)} is published that we know of."]
    elsewhere = referee.results[referee.results["source"] != OWN].dropna(axis=1, how="all")
    drawn = list(map(figure_html, referee_figures(referee.results, referee.original).values()))
    first = "; ".join(f"{name}: {' and '.join(metrics)}" for name, metrics in HEADLINES.items())
    body = f"""<h1>The referee: {escape(referee.original)}</h1>
<h2>Published claims</h2>{_list(rulings)}
<h2>What was compared</h2>{_list([escape(f"{method}: {name}") for method, name in referee.encoders.items()])}
{_section("Published, but not on this machine", [f"{name}: {why}" for name, why in referee.missing.items()])}
{_section("What could not be measured", referee.failures.splitlines())}
<h2>Differences to the original</h2>
<p>In points, with 95 % intervals. Holm's correction is over {tests} tests: one for each method, benchmark and set, by
its first metric ({escape(first)}). <em>Paired</em>: of the same items; p by McNemar's exact test where items gained and
lost are counted, else by resampling images. <em>Independent</em>: from the intervals of both scores, which is wider
than a paired comparison.</p>
{table_html(changes[list(SHOWN)].rename(columns=SHOWN))}
{"".join(drawn)}
<h2>Numbers from elsewhere</h2>{table_html(elsewhere) if len(elsewhere) else "<p>None.</p>"}
{_section("Unknown of the published encoders", state_unknown(referee.original))}
<p class="faint">{escape(" · ".join(f"{name} {value}" for name, value in environment().items() if name != "versions"))}
</p>"""
    write_page(path, f"diva-lab · referee of {referee.original}", body)


def _list(items: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _section(title: str, lines: list[str]) -> str:
    """A heading and a list of texts; "" where there are none."""
    return f"<h2>{title}</h2>{_list(list(map(escape, lines)))}" if lines else ""
