"""A notebook's outputs, made ready for a page of HTML: the report's, or the site's."""

import re
from html import escape

import nbformat
from nbformat import NotebookNode

from diva_lab.figures.style import minus_signs
from diva_lab.workbook.page import image_html

WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(  # lines that tell how far a run is, that it was done before, and where it lies
    r"\bstep \d+/\d+\b|\bevaluating\b|\b\d+ images, \d+ a second\b|\bdone before\b|-[0-9a-f]{8}: in "
)
HEADING = re.compile(r"^(#+)\s+(.*\S)", re.MULTILINE)  # of prose: its level as signs, and its text
IMAGES = ("image/png", "image/jpeg")


def _show(html: str) -> NotebookNode:
    return nbformat.v4.new_output("display_data", {"text/html": html})


def _fold_progress(text: str) -> list[NotebookNode]:
    """Printed text as outputs: lines that tell how far a run is, one after the other, are folded."""
    lines, outputs = text.splitlines(keepends=True), []
    while lines:
        folds = bool(PROGRESS.search(lines[0]))
        end = next((k for k, line in enumerate(lines) if bool(PROGRESS.search(line)) != folds), len(lines))
        chosen, lines = lines[:end], lines[end:]
        if folds:
            head = f"Progress: {len(chosen)} line{'s' if len(chosen) > 1 else ''}"
            outputs.append(_show(f"<details><summary>{head}</summary><pre>{escape(''.join(chosen))}</pre></details>"))
        elif "".join(chosen).strip():
            outputs.append(nbformat.v4.new_output("stream", text="".join(chosen)))
    return outputs


def _image(output: NotebookNode, heading: str, number: int) -> NotebookNode:
    """An output with an image; its alternative text is its own, else the heading above it."""
    kind = next(name for name in IMAGES if name in output.data)
    facts = output.metadata.get(kind, {})
    alt = facts.get("alt") or f"{heading}, figure {number}"
    alt = alt.replace('"', "'")  # bleach would escape what stands between single quotes twice
    try:
        return _show(image_html(output.data[kind].replace("\n", ""), alt, facts.get("width", 0)))
    except (OSError, ValueError) as error:  # a damaged notebook: the rest of it stays on the page
        return _show(f"<p>{escape(alt)}: the image cannot be read ({escape(type(error).__name__)}).</p>")


def prepare_outputs(notebook: NotebookNode) -> NotebookNode:
    """A notebook, changed in place, whose outputs are ready for a page.

    Without widgets and warnings; neighbouring prints are one text, lines of progress folded; sentences have minus
    signs; formulas are Markdown; images are HTML, with an alternative text.
    """
    heading, shown = "", 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            titles = HEADING.findall(cell.source)
            heading, shown = (titles[-1][1], 0) if titles else (heading, shown)
        elif cell.cell_type == "code":
            shown = _prepare_cell(cell, heading, shown)
    return notebook


def _prepare_cell(cell: NotebookNode, heading: str, shown: int) -> int:
    """Make a cell's outputs ready; `shown` images lie between it and the `heading` above. Returns how many now."""
    outputs, printed = [], ""
    for output in [*cell.outputs, None]:
        if output is not None and output.output_type == "stream":
            printed += output.text if output.name == "stdout" else ""
            continue
        outputs, printed = outputs + _fold_progress(printed), ""
        data = {} if output is None else output.get("data", {})
        if output is None or WIDGET in data:
            continue
        if "text/html" not in data and any(name in data for name in IMAGES):
            shown += 1
            output = _image(output, heading, shown)
        elif "text/latex" in data and "text/html" not in data:
            output = nbformat.v4.new_output("display_data", {"text/markdown": data["text/latex"]})
        elif "text/markdown" in data:
            output = nbformat.v4.new_output("display_data", {"text/markdown": minus_signs(data["text/markdown"])})
        outputs.append(output)
    cell.outputs = outputs
    return shown


def read_for_site(text: str) -> NotebookNode:
    """A notebook's file as the site shows it: its outputs prepared, cells of hidden code folded."""
    notebook = prepare_outputs(nbformat.reads(text, as_version=4))
    for cell in notebook.cells:
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata.tags = [*cell.metadata.get("tags", []), "hide-input"]
    return notebook
