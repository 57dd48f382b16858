"""Executed notebooks -> one page: the result and a figure first, then differences to the original, then the notebooks.

The page can be sent: it shows prose and figures without code, and needs neither a script nor the network.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from jinja2 import pass_context
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from diva_lab import figures
from diva_lab.figures.style import label_of, minus_signs
from diva_lab.statistics import compare_rows, independent_difference
from diva_lab.workbook.findings import brackets, state_result, state_row
from diva_lab.workbook.outputs import HEADING, prepare_outputs
from diva_lab.workbook.page import bold_html, clean_html, figure_html, table_html, write_page

EMOJI = ("emoji/mean", "emoji-match/mean")
SCORES = (*figures.MEASURES, *EMOJI, "conflict_rate")  # fractions; the other columns of the first table follow
PUSHES = {name: f"{name}, own" for name in ("perturb-norm", "perturb-drift")}  # matched to a run here, not to DCR's
REPORT_COLUMNS = ("objective", "seed", *SCORES, "seconds_per_step", "steps", "note")


# --- notebooks --------------------------------------------------------------------------------------------------


class _Renderer(IPythonRenderer):
    """Markdown with formulas marked for `clean_html`."""

    def block_math(self, body: str) -> str:
        return f'<span class="formula block">{escape(body)}</span>'

    def inline_math(self, body: str) -> str:
        return f'<span class="formula">{escape(body)}</span>'

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")


class _Exporter(HTMLExporter):
    """Prose and outputs of a notebook, without code and prompts."""

    @pass_context
    def markdown2html(self, context: Mapping, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = _Renderer(escape=False, attachments=attachments, anchor_link_text="")
        html = MarkdownWithMath(renderer=renderer).render(source)
        return re.sub(r'<a class="anchor-link".*?(/>|</a>)', "", html)


def title_of(notebook: NotebookNode, name: str) -> str:
    """The first heading of a notebook, else `name`."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = HEADING.search(prose)
    return heading[2] if heading else name


def _body(notebook: NotebookNode, prefix: str, sections: Mapping[str, str]) -> str:
    """A notebook's prose and outputs as HTML.

    Args:
        prefix: of the names of its headings, which other notebooks may have too.
        sections: file name of each notebook on the page -> the name of its section, for links between them.
    """
    prepare_outputs(notebook)
    exporter = _Exporter(
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an image without alternative text in a notebook's own HTML
        body = exporter.from_notebook_node(notebook)[0]
    body = re.sub(r'(<[^<>]*?\s(?:id="|href="#))', rf"\1{prefix}-", body)
    for name, section in sections.items():
        body = re.sub(rf'<a href="(?:\./)?{re.escape(name)}"', f'<a href="#{section}"', body)
        body = re.sub(rf'<a href="(?:\./)?{re.escape(name)}#', f'<a href="#{section}-', body)
    return clean_html(body)


# --- the result -------------------------------------------------------------------------------------------------


def original_differences(summary: pd.DataFrame) -> pd.DataFrame:
    """What each objective of a summary changed against the original encoder (objective `none`).

    Returns:
        Columns objective, measure, before, after, difference, low, high, seeds; fractions. With several seeds the
        interval is Student's t over the seeds. With one it is that of two independent samples of test images, from the
        intervals of both scores, which is wider than a paired one; NaN where the scores have none.
    """
    measures = [name for name in (*figures.MEASURES, *EMOJI) if name in summary]
    measures = [name for name in measures if summary[name].notna().any()]
    table = compare_rows(summary, list(dict.fromkeys(summary["objective"])), measures)
    rows = summary.set_index(["objective", "seed"])
    before, after = [], []
    for k, row in table.iterrows():
        name, seeds = row["measure"], rows.loc[row["objective"]].index.intersection(rows.loc["none"].index)
        pair = [rows.loc[objective].loc[seeds] for objective in ("none", row["objective"])]
        before.append(pair[0][name].mean())
        after.append(pair[1][name].mean())
        columns = [name, f"{name}/low", f"{name}/high"]
        if len(seeds) == 1 and set(columns) <= set(summary):
            values = [tuple(one.iloc[0][columns].astype(float)) for one in pair]
            table.loc[k, ["low", "high"]] = independent_difference(*values)[1:3]
    return table.assign(before=before, after=after)


def _difference_table(changes: pd.DataFrame) -> str:
    """A row for the original's scores and one for each objective: differences in points, bold where beyond zero."""
    measures = list(dict.fromkeys(changes["measure"]))
    first = changes.drop_duplicates("measure").set_index("measure")["before"]
    cells = {label_of("none") + ", %": [f"{100 * first[name]:.1f}" for name in measures]}
    for objective, rows in changes.groupby("objective", sort=False):
        rows = rows.set_index("measure")
        cells[label_of(objective)] = [_difference_cell(rows.loc[name]) for name in measures]
    head = "".join(f'<th scope="col">{escape(label_of(name))}</th>' for name in ("encoder", *measures))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in row)}</tr>'
        for name, row in cells.items()
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide" tabindex="0">{table}</div>'


def _difference_cell(row: pd.Series) -> str:
    value, low, high = (100 * float(row[name]) for name in ("difference", "low", "high"))
    if not np.isfinite(value):
        return "–"
    if not np.isfinite([low, high]).all():
        return minus_signs(f"{value:+.1f}")
    text = minus_signs(f"{value:+.1f}<br>[{low:+.1f}, {high:+.1f}]")
    return text if low <= 0 <= high else f"<b>{text}</b>"


def _score_table(summary: pd.DataFrame) -> pd.DataFrame:
    """A row of texts for each run: its scores."""
    columns = [name for name in REPORT_COLUMNS if name in summary]
    rows = [[_score_cell(row, name) for name in columns] for _, row in summary.iterrows()]
    return pd.DataFrame(rows, columns=list(map(label_of, columns)))


def _detail_table(summary: pd.DataFrame) -> pd.DataFrame:
    """A column of texts for each run: its score of every pattern and of every probe, and its id."""
    names = [name for name in summary if name not in REPORT_COLUMNS and not name.endswith(("/low", "/high"))]
    kinds = [name.partition("/") for name in names]
    table = {"score": [f"{kind}: {label_of(detail)}" if detail else kind for kind, _, detail in kinds]}
    for _, row in summary.iterrows():
        table[f"{label_of(row['objective'])}, seed {row['seed']}"] = [_score_cell(row, name) for name in names]
    return pd.DataFrame(table)


def _score_cell(row: pd.Series, name: str) -> str:
    """A value of a run's row: a fraction in percent, with its interval where it has one; else as it is."""
    value = row[name]
    if name == "objective":
        return label_of(value)
    if name not in SCORES and "/" not in name:
        return "–" if pd.isna(value) else f"{value:.3f}" if name == "seconds_per_step" else str(value)
    return brackets(*(row.get(f"{name}{end}", np.nan) for end in ("", "/low", "/high")))


def _result(summary: pd.DataFrame, source: str) -> str:
    """The first part of the page: the result, its figure, the differences, and all scores."""
    if summary.empty:
        return '<h2>Result</h2><p class="result">No run of stage 2 has finished, so nothing can be compared.</p>'
    summary = summary.replace({"objective": PUSHES})
    changes = original_differences(summary)
    drawn, table = "", '<p class="faint">There is no run of the original encoder (objective none).</p>'
    if len(changes):
        chosen = changes[changes["measure"].isin(("pairs/mean", "zeroshot"))]
        chosen = chosen if chosen["seeds"].max() > 1 else chosen.drop(columns="seeds")  # intervals over test images
        expected = dict.fromkeys(chosen["measure"], 0)
        texts = [state_row(changes, name, expected).replace("*", "") for name in dict.fromkeys(chosen["objective"])]
        text = minus_signs(f"Against the original. {' '.join(texts)}")
        drawn = figure_html(figures.objective_differences(chosen, source), text)
        table = _difference_table(changes)
    return f"""<h2>Result</h2>
<p class="result">{bold_html(minus_signs(state_result(changes)))}</p>
{drawn}
<p class="faint">P, perception: details that the embedding keeps, by pairs of images that differ in one. D,
discrimination: how well it separates classes. A gain that a random push of the weights has too is no result.</p>
<h2>Differences to the original</h2>
<p>In points, with 95 % intervals. Over the seeds of training where there are several; with one seed over the test
images, both scores taken as independent. Bold: the interval excludes zero.</p>
{table}
<details><summary>Scores of each objective and seed, %</summary>{table_html(_score_table(summary))}</details>
<details><summary>Every pattern, probe and run, %</summary>{table_html(_detail_table(summary))}</details>"""


# --- the page ---------------------------------------------------------------------------------------------------


def write_report(
    path: Path, notebooks: Sequence[Path], summary: pd.DataFrame, facts: Mapping[str, object], failed: str = ""
) -> None:
    """Write the report.

    Args:
        path: the file to write.
        notebooks: executed notebooks, in order.
        summary: as `notebooks.summarise_runs` returns it.
        facts: names and values that are printed under the scores.
        failed: file name of the notebook that failed, or "".
    """
    sections, names = [], {file.name: f"notebook-{i}" for i, file in enumerate(notebooks)}
    for file in notebooks:
        notebook = nbformat.read(file, as_version=4)
        title = title_of(notebook, file.stem)
        body = _body(notebook, names[file.name], names)
        if "<h2" not in body:
            body = f"<h2>{escape(title)}</h2>{body}"
        if file.name == failed:
            body = body.replace("</h2>", ' <span class="failed">failed</span></h2>', 1)
        sections.append(f'<section id="{names[file.name]}">{body}</section>')
    notes = " · ".join(f"{escape(str(name))} {escape(str(value))}" for name, value in facts.items())
    title = f"diva-lab · {path.parent.name}"
    body = f"""<h1>{escape(title)}</h1>
{_result(summary, figures.trace(facts, f"run {path.parent.name}"))}
<p class="faint">{notes}</p>
{"".join(sections)}"""
    write_page(path, title, body)
