import base64
import io
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import numpy as np
import pandas as pd
import pytest
from html_checks import Nesting
from PIL import Image
from summaries import BETTER, summary_of

from diva_lab.paths import ROOT
from diva_lab.workbook.report import original_differences, write_report

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


# --- the differences --------------------------------------------------------------------------------------------


def test_with_one_seed_the_interval_is_that_of_two_independent_scores():
    table = original_differences(summary_of(**BETTER)).set_index(["objective", "measure"])
    pairs = table.loc["diva", "pairs/mean"]
    half = 0.02 * np.sqrt(2)
    np.testing.assert_allclose(pairs[["difference", "low", "high"]].astype(float), [0.1, 0.1 - half, 0.1 + half])
    assert (pairs["before"], pairs["after"], pairs["seeds"]) == (0.18, 0.28, 1)
    assert np.isnan(table.loc[("diva", "nmi"), "low"]) and "emoji/mean" not in table.index.get_level_values(1)


def test_with_several_seeds_the_interval_is_over_the_seeds():
    table = original_differences(summary_of(3, **BETTER)).set_index(["objective", "measure"])
    pairs = table.loc["diva", "pairs/mean"]
    assert pairs["seeds"] == 3 and pairs["difference"] == pytest.approx(0.11)
    assert pairs["high"] - pairs["difference"] == pytest.approx(4.3027 * 0.01 / np.sqrt(3), rel=1e-4)


def test_without_a_run_of_the_original_there_is_no_difference():
    summary = summary_of()
    assert original_differences(summary[summary["objective"] != "none"]).empty


def test_the_tables_of_all_scores_speak_as_the_figures_do(tmp_path):
    details = {"pairs__colour": 0.1, "probe__colour": 0.6, "conflict_rate": 0.25, "seconds_per_step": 0.5}
    write_report(tmp_path / "r.html", [], summary_of(**BETTER, **details), {})
    tables = (tmp_path / "r.html").read_text().partition("Scores of each objective")[2]
    assert "<td>28.0 [26.0, 30.0]</td>" in tables and "<td>25.0</td>" in tables and "<td>0.500</td>" in tables
    names = ("pair score (P)", "emoji by name (P)", "steps in conflict", "pairs: Color and Appearance", "DIVA, seed 0")
    assert all(name in tables for name in names) and "<td>diva-0</td>" in tables
    assert not re.search(r"\b(pairs|probe|emoji)/\w|[a-z]_[a-z]", tables)


# --- the page of the notebooks that ship ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("run") / "report.html"
    write_report(path, NOTEBOOKS, summary_of(**BETTER), {"git": "abc"})
    return path.read_text()


def test_the_report_is_one_valid_file_without_scripts_and_network(page):
    Nesting(page)
    assert not re.search(r"<script|<link|<iframe|@import|url\(|\son\w+=|\bsrc=.(?!data:image/)", page)


def test_the_result_comes_first_then_its_figure_the_differences_and_the_notebooks_in_order(page):
    main = page.partition("<main>")[2]
    assert "<b>28.0\xa0%</b> against 18.0\xa0% of the original: <b>+10.0 points" in main and "as expected." in main
    titles = ["Result", "Differences to the original"]
    titles += [nbformat.read(file, 4).cells[0].source.partition("\n")[0].lstrip("# ") for file in NOTEBOOKS]
    assert re.findall(r'<h2 id="[^"]+">(.*?)</h2>', main) == titles
    beside = main[: main.index("<h2", 5 + main.index("Differences to"))]
    assert "(D) is <b>95.5\xa0%</b>" in beside and "<b>−0.5 points" in beside
    assert not re.search(r">-\d|[ \[]-\d", beside)
    assert '<th scope="row">random push, same norms</th>' in main  # as far as DIVA's, in this summary
    marks = [main.index(mark) for mark in ('class="result"', "<img", "[+7.2, +12.8]</b></td>", 'id="notebook-0"')]
    assert marks == sorted(marks)


def test_the_contents_name_every_part(page):
    for nav in re.findall(r"<nav.*?</nav>", page, re.DOTALL):
        assert set(re.findall(r'href="#(.*?)"', nav)) == set(re.findall(r'<h2 id="(.*?)"', page))


def test_every_link_of_a_notebooks_contents_leads_to_its_heading(page):
    names = set(re.findall(r'\sid="([^"]+)"', page))
    links = re.findall(r'<a href="#([^"]+)"', page)
    assert sum("notebook-6-" in link for link in links) > 10
    assert [link for link in links if not {link, unquote(link)} & names] == []  # a browser looks for both


def test_formulas_are_mathml(page):
    prose = [cell.source for file in NOTEBOOKS for cell in nbformat.read(file, 4).cells if cell.cell_type == "markdown"]
    formulas = re.findall(r"\$\$.+?\$\$|\$.+?\$", "\n".join(prose), re.DOTALL)
    assert page.count("<math") == len(formulas) > 10 and "$" not in re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)


def test_every_image_has_an_alternative_text_and_scrolls_in_its_own_box(page):
    cells = [cell for file in NOTEBOOKS for cell in nbformat.read(file, 4).cells]
    shown = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    images = Nesting(page).images
    assert len(images) == page.count('<div class="figure wide" tabindex="0"><img ') == shown + 1
    for image in images:
        assert len(image["alt"]) > 5 and int(image["width"]) > 0 and int(image["height"]) > 0


def test_lines_of_training_are_folded(page):
    printed = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert "step 10/10, loss" in page and "evaluating after" in page
    assert "step 10/10, loss" not in printed and "evaluating after" not in printed
    assert "the supervised ceiling is" in printed


def test_links_between_notebooks_stay_on_the_page_and_no_link_leads_nowhere(tmp_path):
    for k, link in enumerate(("[b](01_b.ipynb) [c](01_b.ipynb#Part)", "# B\n[a](./00_a.ipynb) [doc](../x.md)")):
        cells = [nbformat.v4.new_markdown_cell(f"{link}\n## Part\n[here](#Part)")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"0{k}_{'ab'[k]}.ipynb")
    write_report(tmp_path / "r.html", sorted(tmp_path.glob("*.ipynb")), summary_of(), {})
    page = (tmp_path / "r.html").read_text()
    Nesting(page)
    targets = set(re.findall(r'id="([^"]+)"', page))
    links = re.findall(r'href="#([^"]+)"', page)
    assert set(links) <= targets and links.count("notebook-0") == links.count("notebook-1") == 1
    assert links.count("notebook-1-Part") == 2  # its own, and the other notebook's
    assert "x.md" not in page and ">doc<" in page


# --- outputs ----------------------------------------------------------------------------------------------------


def report_on(folder: Path, *outputs: nbformat.NotebookNode) -> str:
    cells = [
        nbformat.v4.new_markdown_cell('# T\n## How far?\n`<a id="x">`'),
        nbformat.v4.new_code_cell("0", outputs=list(outputs)),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "00_t.ipynb")
    write_report(folder / "report.html", [folder / "00_t.ipynb"], pd.DataFrame(), {})
    return (folder / "report.html").read_text().partition('<section id="notebook-0">')[2].partition("</section>")[0]


def image_output(**facts: object) -> nbformat.NotebookNode:
    data = io.BytesIO()
    Image.new("RGB", (40, 20)).save(data, format="png")
    data = {"image/png": base64.b64encode(data.getvalue()).decode()}
    return nbformat.v4.new_output("display_data", data, metadata={"image/png": facts} if facts else {})


def test_an_images_own_text_comes_before_the_heading_above_it(tmp_path):
    page = report_on(tmp_path, image_output(alt='P & "D"'), image_output(), image_output(width=20))
    images = [(image["alt"], image["width"], image["height"]) for image in Nesting(page).images]
    assert images == [("P & 'D'", "40", "20"), ("How far?, figure 2", "40", "20"), ("How far?, figure 3", "20", "10")]


def test_an_image_that_cannot_be_read_is_named_and_the_rest_stands(tmp_path):
    for damaged in ("AAAA", "not base64!", ""):
        output = nbformat.v4.new_output("display_data", {"image/png": damaged})
        page = report_on(tmp_path, output, image_output())
        assert "How far?, figure 1: the image cannot be read" in page and page.count("<img") == 1


def test_prints_beside_lines_of_training_stay_in_sight_and_in_order(tmp_path):
    texts = ["before\n", "a: evaluating after 0 steps ...\na: step 1/2, loss 1\n", "a: step 2/2, loss 1\n"]
    texts += ["a: done before, see /b\na-0123abcd: in /c\na: 3 of 4 steps done before, in /d\nafter: in time\n"]
    page = report_on(tmp_path, *(nbformat.v4.new_output("stream", text=text) for text in texts))
    assert "<summary>Progress: 6 lines</summary>" in page
    words = (
        "before",
        "<details>",
        "evaluating",
        "2/2",
        "see /b",
        "in /c",
        "in /d",
        "</details>",
        "after: in time\n</pre>",
    )
    places = [page.index(word) for word in words]
    assert places == sorted(places)


def test_formulas_of_outputs_are_mathml_and_widgets_and_warnings_are_left_out(tmp_path):
    outputs = [
        nbformat.v4.new_output("display_data", {"text/latex": r"$$\frac{1}{2}$$", "text/plain": "half"}),
        nbformat.v4.new_output("display_data", {"text/markdown": "**$x$** and `$y`, zero-shot -0.5"}),
        nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Box()"}),
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
    ]
    page = report_on(tmp_path, *outputs)
    assert page.count("<math") == 2 and "<mfrac>" in page and "<code>$y</code>, zero-shot −0.5" in page
    assert "Box()" not in page and '&lt;a id="x"&gt;' in page and "a warning" not in page


def test_without_a_run_the_page_says_so(tmp_path):
    report_on(tmp_path)
    assert "nothing can be compared" in (tmp_path / "report.html").read_text()
