import matplotlib.pyplot as plt
import pandas as pd
import pytest
from html_checks import Nesting

from diva_lab.workbook.page import clean_html, figure_html, formula_html, table_html, write_page

# --- formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tex", "part"),
    [
        (r"\frac{a}{b}", "<mfrac>"),
        (r"\tau \le 1", "τ"),
        (r"\lVert\hat\epsilon - \epsilon\rVert^2", "‖"),
        (r"\mathbb{E}", "𝔼"),
        (r"\operatorname*{argmax}_x \gcd", "gcd"),
        (r"a < b", "&lt;"),
    ],
)
def test_a_formula_is_mathml(tex, part):
    for block in (False, True):
        html = formula_html(tex, block)
        assert part in html and "$" not in html and ('display="block"' in html) == block
        Nesting(html)


@pytest.mark.parametrize("tex", ["{", r"\frac", r"\left(", "x_", "", r"\begin{matrix}"])
def test_what_is_no_formula_is_shown_as_written_or_as_well_as_it_can_be(tex):
    Nesting(formula_html(tex))


@pytest.mark.parametrize(
    "tex",
    [
        r"\text{<img src=x onerror=alert(1)>}",
        r"\href{javascript:alert(1)}{x}",
        r"\style{background:url(http://x.org)}{x}",
        r"\text{&lt;script&gt;alert(1)&lt;/script&gt;}",
        r"\class{x}{y}",
        "<script>alert(1)</script>",
    ],
)
def test_a_formula_runs_and_loads_nothing(tex):
    html = formula_html(tex) + clean_html(f'<span class="formula">{tex}</span>')
    assert not any(word in html for word in ("<img", "<script", "href=", "style=", "class="))


# --- HTML of others ---------------------------------------------------------------------------------------------


def test_headings_go_down_a_level_and_wide_parts_scroll_in_their_own_boxes():
    html = clean_html("<h1>a</h1><h6>b</h6><table><tr><td>1</td></tr></table><pre>c</pre>")
    assert "<h2>a</h2><h6>b</h6>" in html and '<pre tabindex="0">' in html
    assert '<div class="wide" tabindex="0"><table>' in html
    Nesting(html)


def test_an_image_has_an_alternative_text_or_is_left_out():
    data = "data:image/png;base64,AA=="
    assert clean_html(f'<img src="{data}">') == f'<img alt="image" src="{data}">'
    assert clean_html(f'<img alt="x" src="{data}">').count("alt=") == 1
    assert clean_html('<img src="http://x.org/a.png"><img alt="x">') == ""


def test_raw_mathml_of_a_notebook_is_text():
    assert clean_html('<math href="javascript:x"><mi>y</mi></math>') == "y"


# --- pages ------------------------------------------------------------------------------------------------------


def test_a_page_has_its_headings_as_contents_beside_it_and_on_top(tmp_path):
    write_page(tmp_path / "a.html", "<t>", '<h1>a</h1><h2 id="x">b &amp; <a href="#y">c</a></h2><h2>d</h2><h3>e</h3>')
    page = (tmp_path / "a.html").read_text()
    Nesting(page)
    assert page.count('<li><a href="#x">b &amp; c</a></li><li><a href="#part-1">d</a></li>') == 2
    assert '<h2 id="x">b' in page and "<title>&lt;t&gt;</title>" in page
    assert page.index("<details class") < page.index("<nav class") < page.index("<main>")
    assert "prefers-color-scheme: dark" in page and "url(" not in page


def test_a_figure_has_its_size_in_the_page_whatever_its_resolution():
    sizes = []
    for dpi in (110, 220):
        fig, ax = plt.subplots(figsize=(4, 2), dpi=dpi)
        ax.plot([0, 1])
        with plt.rc_context({"savefig.dpi": dpi}):
            sizes.append(figure_html(fig, '"quoted"').partition("width=")[2].split('"')[1])
    assert abs(int(sizes[0]) - int(sizes[1])) <= 4


def test_a_table_escapes_its_texts():
    html = table_html(pd.DataFrame({"<b>": ["<i>"], "x": [0.5]}))
    assert "&lt;b&gt;" in html and "&lt;i&gt;" in html and "0.500" in html
    Nesting(html)
