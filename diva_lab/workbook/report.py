"""Executed notebooks -> one page of HTML without scripts, external fonts or network.

It shows the prose and figures of the notebooks without their code; a table of contents and the summary come first.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import bleach
import nbformat
import pandas as pd

WIDGET = "application/vnd.jupyter.widget-view+json"
CSS = """
body { margin: 0 auto; max-width: 58rem; padding: 2.5rem 1.25rem 5rem; color: #1d2430; background: #fff;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3 { line-height: 1.25; font-weight: 650; } h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; }
h3 { font-size: 1.05rem; }
section { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid #d8dde6; }
a { color: #1f5fa8; text-decoration: none; } a:hover { text-decoration: underline; }
nav ol { list-style: none; padding: 0; } nav li { padding: .15rem 0; } .faint { color: #6b7485; font-size: .85rem; }
img, svg { max-width: 100%; height: auto; display: block; margin: 1rem auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .65rem; text-align: right; border-bottom: 1px solid #e6e9ef; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #aab2c0; font-weight: 600; }
.wide { overflow-x: auto; margin: 1rem 0; } summary { cursor: pointer; color: #1f5fa8; }
pre, code { font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f5f7fa; border-radius: 4px; padding: .6rem .9rem; overflow-x: auto; white-space: pre-wrap; }
blockquote { margin: 1rem 0; padding-left: 1rem; border-left: 3px solid #d8dde6; color: #4a5262; }
.failed { color: #a3261b; font-weight: 600; } .output_error pre { background: #fdf1ef; }
"""
TAGS = bleach.ALLOWED_TAGS | {  # of a notebook's page; none that styles, runs, loads, asks or moves the base of links
    "br", "caption", "dd", "del", "details", "div", "dl", "dt", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr",
    "img", "main", "p", "pre", "q", "s", "section", "small", "span", "sub", "summary", "sup", "table", "tbody", "td",
    "tfoot", "th", "thead", "tr", "u",
}  # fmt: skip
REPORT_COLUMNS = {
    "objective": "objective",
    "seed": "seed",
    "pairs/mean": "pairs",
    "probe/mean": "probes",
    "zeroshot": "zero-shot",
    "nmi": "NMI",
    "acc": "ACC",
    "ari": "ARI",
    "emoji/mean": "emoji",
    "emoji-match/mean": "emoji match",
    "conflict_rate": "conflict",
    "seconds_per_step": "s / step",
    "steps": "steps",
    "note": "note",
}


def title_of(notebook: nbformat.NotebookNode, name: str) -> str:
    """The first heading of a notebook, else `name`."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = re.search(r"^#+\s+(.+)$", prose, re.MULTILINE)
    return heading[1].strip() if heading else name


def _body(notebook: nbformat.NotebookNode) -> str:
    """A notebook's prose and outputs as HTML, without widgets, warnings and prompts."""
    from nbconvert import HTMLExporter

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
            ]
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a figure without alternative text
        body = exporter.from_notebook_node(notebook)[0]
    return clean_html(body)


def clean_html(html: str) -> str:
    """HTML with known tags and attributes alone: nothing that runs, loads or moves; links to http(s) and fragments."""
    html = re.sub(r"<(script|style|svg)\b.*?</\1\s*>", "", html, flags=re.DOTALL | re.IGNORECASE)
    return bleach.clean(html, TAGS, _is_harmless, protocols=("http", "https", "data"), strip=True)


def _is_harmless(tag: str, name: str, value: str) -> bool:
    """Whether an attribute of a tag may stay."""
    if name == "href":
        return tag == "a" and bool(re.match(r"(https?://|#)", value, re.IGNORECASE))
    if name == "src":
        return tag == "img" and bool(re.match(r"data:image/(png|jpeg|gif|webp);base64,", value))
    return name in ("class", "id", "alt", "title", "width", "height", "colspan", "rowspan", "open")


def table_html(frame: pd.DataFrame) -> str:
    """A table of numbers and texts, which are escaped."""
    text = frame.to_html(index=False, border=0, na_rep="–", float_format=lambda x: f"{x:.3f}", justify="unset")
    return f'<div class="wide">{text}</div>'


def write_report(
    path: Path, notebooks: Sequence[Path], summary: pd.DataFrame, facts: Mapping[str, object], failed: str = ""
) -> None:
    """Write the report.

    Args:
        path: the file to write.
        notebooks: executed notebooks, in order.
        summary: as `notebooks.summarise_runs` returns it.
        facts: names and values that are printed under the summary.
        failed: file name of the notebook that failed, or "".
    """
    contents, sections = [], []
    for i, file in enumerate(notebooks):
        notebook = nbformat.read(file, as_version=4)
        mark = ' <span class="failed">failed</span>' if file.name == failed else ""
        contents.append(f'<li><a href="#notebook-{i}">{escape(title_of(notebook, file.stem))}</a>{mark}</li>')
        sections.append(f'<section id="notebook-{i}">{_body(notebook)}</section>')
    if len(summary):
        columns = [name for name in REPORT_COLUMNS if name in summary]
        details = summary.drop(columns=[name for name in columns if name not in ("objective", "seed")])
        tables = table_html(summary[columns].rename(columns=REPORT_COLUMNS))
        tables += f"<details><summary>every pattern, probe and run</summary>{table_html(details)}</details>"
    else:
        tables = '<p class="faint">No run of stage 2 has finished.</p>'
    notes = " · ".join(f"{escape(str(name))} {escape(str(value))}" for name, value in facts.items())
    body = f"""<h1>diva-lab</h1>
<nav><ol>{"".join(contents)}</ol></nav>
<h2>Objectives and seeds</h2>
{tables}
<p class="faint">{notes}</p>
{"".join(sections)}"""
    write_page(path, f"diva-lab · {path.parent.name}", body)


def write_page(path: Path, title: str, body: str) -> None:
    """Write a page of HTML in this project's style; `body` is HTML, `title` a text."""
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head>
<body>{body}
</body></html>
"""
    path.write_text(page, encoding="utf-8")
