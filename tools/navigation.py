"""Write what leads through the notebooks: links to the one before and after, contents, cost, and the papers.

`python -m tools.navigation` writes the second cell and the last cell of every notebook again, from the names of the
files and from their headings; run it after a change of either. A link names its own file too: with several notebooks
open JupyterLab would look for a bare heading in the first one.
"""

import argparse

import nbformat
from nbformat import NotebookNode

from diva_lab.paths import ROOT
from diva_lab.workbook.outputs import HEADING
from diva_lab.workbook.report import title_of

PAPERS = "[DIVA](https://arxiv.org/abs/2407.20171) and [DCR](https://arxiv.org/abs/2603.04803)"
COSTS: dict[str, tuple[int, int, float]] = {  # of those that were measured, by papermill with one thread: minutes of a
    # processor (0: less than one), the same where notebook 02 ran before (its run is shared), and peak memory in GB. Of
    # the 500 steps of DIVA 25 were run, and a step was timed.
    "00": (1, 1, 1.2), "01": (2, 2, 1.2), "02": (8, 8, 1.3), "03": (2, 2, 1.5), "04": (8, 1, 1.2), "05": (1, 1, 1.4),
    "06": (0, 0, 1.1), "07": (8, 1, 1.3), "08": (1, 1, 1.2), "11": (0, 0, 1.1),
}  # fmt: skip
ENDS = ("contents", "next")  # of the ids of both cells


def anchor_of(heading: str) -> str:
    """The anchor that JupyterLab and nbconvert give a heading."""
    return heading.replace("`", "").replace(" ", "-")


def neighbours(titles: dict[str, str], name: str) -> str:
    """Links from the notebook `name` to the one before and after it; `titles`: file name -> title, in order."""
    names = list(titles)
    k = names.index(name)
    places = {"Previous": names[k - 1 : k] if k else [], "Next": names[k + 1 : k + 2]}
    return " · ".join(f"{word}: [{titles[other]}]({other})" for word, others in places.items() for other in others)


def contents(notebook: NotebookNode, name: str) -> str:
    """Links to the notebook's headings of level 2."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = [text for level, text in HEADING.findall(prose) if level == "##"]
    return " · ".join(f"[{heading}]({name}#{anchor_of(heading)})" for heading in headings)


def state_cost(number: str) -> str:
    """What a notebook takes, in a sentence; "" where it was not measured."""
    if number not in COSTS:
        return ""
    minutes, after, memory = COSTS[number]
    took = f"about {minutes} minute{'s' if minutes > 1 else ''}" if minutes else "less than a minute"
    shared = f" ({after} where notebook 02 ran before)" if after < minutes else ""
    return f"It takes {took} of one processor{shared} and {memory:g} GB of memory. "


def write_navigation(notebook: NotebookNode, name: str, titles: dict[str, str]) -> NotebookNode:
    """The notebook, changed in place, with both cells as they should be."""
    number, links = name[:2], neighbours(titles, name)
    head = f"{links}\n\nContents: {contents(notebook, name)}\n\n{state_cost(number)}Papers: {PAPERS}."
    ids = [f"{number}-{end}" for end in ENDS]
    first, last = (nbformat.v4.new_markdown_cell(text, id=own) for text, own in zip((head, links), ids, strict=True))
    others = [cell for cell in notebook.cells if cell.id not in ids]
    notebook.cells = [others[0], first, *others[1:], last]
    return notebook


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.navigation", description=__doc__.split("\n")[0])
    parser.parse_args(argv)
    paths = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    notebooks = {path: nbformat.read(path, as_version=4) for path in paths}
    titles = {path.name: title_of(notebook, path.name) for path, notebook in notebooks.items()}
    for path, notebook in notebooks.items():
        text = nbformat.writes(write_navigation(notebook, path.name, titles), version=nbformat.NO_CONVERT)
        path.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
