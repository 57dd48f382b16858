import nbformat
import pytest

from diva_lab.paths import ROOT
from diva_lab.workbook.outputs import HEADING
from diva_lab.workbook.report import title_of
from tools.navigation import COSTS, anchor_of, write_navigation

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
TITLES = {path.name: title_of(nbformat.read(path, 4), path.name) for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_contents_and_cost_are_as_the_tool_writes_them(path):
    notebook = nbformat.read(path, 4)
    before = [cell.source for cell in notebook.cells]
    after = [cell.source for cell in write_navigation(notebook, path.name, TITLES).cells]
    assert before == after, "write them again: python -m tools.navigation"


def test_every_notebook_links_to_its_neighbours():
    assert set(COSTS) <= {path.name[:2] for path in NOTEBOOKS}
    for k, path in enumerate(NOTEBOOKS):
        cells = nbformat.read(path, 4).cells
        for cell in (cells[1], cells[-1]):
            links = cell.source.partition("\n")[0]
            for word, near in (("Previous", k - 1), ("Next", k + 1)):
                there = 0 <= near < len(NOTEBOOKS)
                assert (f"{word}: " in links) == there and (not there or f"]({NOTEBOOKS[near].name})" in links)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_two_headings_of_a_notebook_have_one_anchor_and_none_breaks_a_link(path):
    prose = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    names = [anchor_of(text) for _, text in HEADING.findall(prose)]
    assert len(names) == len(set(names))
    assert not any(set(name) & set('()[]<>$*_"%') for name in names)
