"""Pages of HTML in one style, each one file without scripts, external fonts or network: for a screen or a phone.

A page has contents that stay in sight, and is light or dark as the reader's system is. What is wide (a table, a figure
on a phone, a line of code) scrolls in a box of its own. Formulas are MathML, which browsers draw themselves.
"""

import base64
import io
import re
from html import escape, unescape
from pathlib import Path
from xml.etree import ElementTree

import bleach
import matplotlib.pyplot as plt
import pandas as pd
from latex2mathml.converter import convert_to_element
from matplotlib.figure import Figure
from PIL import Image

from diva_lab.figures.alt import describe
from diva_lab.figures.png import to_png

FIGURE_DPI = 110  # at which a figure is shown, however many pixels it has
CSS = """
:root { color-scheme: light dark; --ink: #1d2430; --back: #fff; --faint: #5b6474; --link: #1f5fa8; --line: #d8dde6;
  --soft: #f5f7fa; --bad: #a3261b; --bad-soft: #fdf1ef; --shade: #0003; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3ea; --back: #14171c; --faint: #a0a9b8; --link: #8cbcf3;
  --line: #363d49; --soft: #1e232b; --bad: #ff9a8d; --bad-soft: #3a1f1c; --shade: #fff4; } }
* { box-sizing: border-box; } html { scroll-padding-top: 3.5rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: var(--back); overflow-wrap: break-word;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { min-width: 0; max-width: 54rem; margin: 0 auto; padding: 1rem 1rem 5rem; }
nav ol { list-style: none; margin: 0; padding: 0; } nav li { padding: .2rem 0; line-height: 1.35; }
nav.beside { display: none; }
details.contents { position: sticky; top: 0; z-index: 1; padding: .5rem 1rem; background: var(--back);
  border-bottom: 1px solid var(--line); } details.contents nav { max-height: 70vh; overflow-y: auto; }
@media (min-width: 64rem) { details.contents { display: none; } html { scroll-padding-top: 1rem; }
  body { display: grid; grid-template-columns: 17rem minmax(0, 1fr); }
  nav.beside { display: block; position: sticky; top: 0; height: 100vh; overflow-y: auto; padding: 2rem 1.25rem;
    border-right: 1px solid var(--line); font-size: .9rem; } main { width: 100%; padding: 1.5rem 2.5rem 5rem; } }
h1, h2, h3, h4 { line-height: 1.25; font-weight: 650; } h1 { font-size: 1.7rem; } h2 { font-size: 1.4rem; }
h3 { font-size: 1.15rem; } h4 { font-size: 1rem; }
section { margin-top: 3.5rem; padding-top: .5rem; border-top: 1px solid var(--line); }
a[href] { color: var(--link); } a:not([href]) { color: inherit; } nav a[href] { text-decoration: none; }
a[href]:hover { text-decoration: underline; } .faint { color: var(--faint); font-size: .85rem; }
.result { font-size: 1.1rem; } .failed { color: var(--bad); font-weight: 600; }
.wide { --box: var(--back); display: block; max-width: 100%; overflow-x: auto; margin: 1rem 0; background:
    linear-gradient(to left, var(--box) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat scroll, var(--box); }
.figure { background: #fff; border-radius: 6px; padding: .5rem; width: fit-content; margin: 1rem auto; }
.figure img { display: block; height: auto; max-width: 100%; }
@media (max-width: 48rem) { .figure img { max-width: max(100%, min(40rem, 180vw)); } }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { white-space: normal; min-width: 7rem; text-align: left; position: sticky; left: 0;
  background: var(--back); }
thead th { border-bottom: 2px solid var(--faint); font-weight: 600; white-space: normal; vertical-align: bottom; }
@media (max-width: 48rem) { th:first-child, td:first-child { max-width: 9rem; } }
summary { cursor: pointer; color: var(--link); }
pre, code { font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; } code { background: var(--soft); }
pre { background: var(--soft); border-radius: 4px; padding: .6rem .9rem; overflow-x: auto; }
.output_error pre { background: var(--bad-soft); }
blockquote { margin: 1rem 0; padding-left: 1rem; border-left: 3px solid var(--line); color: var(--faint); }
@media print { nav.beside, details.contents { display: none; } body { display: block; } }
"""
TAGS = bleach.ALLOWED_TAGS | {  # of a notebook's page; none that styles, runs, loads, asks or moves the base of links
    "br", "caption", "dd", "del", "details", "div", "dl", "dt", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr",
    "img", "main", "p", "pre", "q", "s", "section", "small", "span", "sub", "summary", "sup", "table", "tbody", "td",
    "tfoot", "th", "thead", "tr", "u",
}  # fmt: skip
MATH_ATTRIBUTES = {"display", "stretchy", "fence", "form", "separator", "largeop", "movablelimits", "accent", "width",
                   "accentunder", "mathvariant", "columnalign", "rowspacing", "columnspacing", "linethickness",
                   "maxsize", "lspace", "rspace", "mathsize", "displaystyle", "scriptlevel", "height", "depth", "xmlns",
                   "minsize", "voffset"}  # fmt: skip


# --- parts of a page --------------------------------------------------------------------------------------------


def formula_html(tex: str, block: bool = False) -> str:
    """A formula in LaTeX as MathML; what is no formula is shown as it is written."""
    try:
        tree = convert_to_element(tex, display="block" if block else "inline")
    except Exception:  # the converter raises errors of many kinds for what it cannot read
        return f"<code>{escape(tex)}</code>"
    for element in tree.iter():
        element.text = unescape(element.text or "") or None  # the converter writes symbols as entities
        for name in set(element.attrib) - MATH_ATTRIBUTES:
            del element.attrib[name]
    math = ElementTree.tostring(tree, encoding="unicode")
    return f'<span class="wide" tabindex="0">{math}</span>' if block else math


def table_html(frame: pd.DataFrame) -> str:
    """A table of numbers and texts, which are escaped."""
    return _in_box(frame.to_html(index=False, border=0, na_rep="–", float_format=lambda x: f"{x:.3f}", justify="unset"))


def _in_box(html: str) -> str:
    """Each table in a box that scrolls by itself, and by the keyboard."""
    return re.sub(r"<table\b.*?</table>", r'<div class="wide" tabindex="0">\g<0></div>', html, flags=re.DOTALL)


def image_html(data: str, alt: str, width: int = 0) -> str:
    """A PNG or JPEG (base64) on a light card.

    Args:
        alt: its alternative text, for a reader who does not see it.
        width: in CSS pixels; 0 follows from its pixels and their density.
    """
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        kind, density = str(image.format).lower(), float(image.info.get("dpi", (FIGURE_DPI,))[0]) or FIGURE_DPI
        width = width or round(image.width * FIGURE_DPI / density)
        height = round(image.height * width / image.width)
    source = f'src="data:image/{kind};base64,{data}" width="{width}" height="{height}"'
    return f'<div class="figure wide" tabindex="0"><img alt="{escape(alt)}" {source}></div>'


def figure_html(fig: Figure, alt: str = "") -> str:
    """A figure of matplotlib, which is closed, as `image_html`; `alt` in place of its own alternative text."""
    data, text = to_png(fig), alt or describe(fig)
    plt.close(fig)
    return image_html(base64.b64encode(data).decode(), text)


def bold_html(sentence: str) -> str:
    """A text with **bold** words as HTML."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(sentence))


# --- HTML of others ---------------------------------------------------------------------------------------------


def clean_html(html: str) -> str:
    """HTML with known tags and attributes alone: nothing that runs, loads or moves; links to http(s) and fragments.

    Its headings are one level lower, below a page's own; tables and code scroll in their own boxes; an image without a
    source is left out; `<span class="formula">`, with `block` or without, becomes MathML.
    """
    html = re.sub(r"<(script|style|svg)\b.*?</\1\s*>", "", html, flags=re.DOTALL | re.IGNORECASE)
    html = bleach.clean(html, TAGS, _is_harmless, protocols=("http", "https", "data"), strip=True)
    html = re.sub(r"<(/?)h([1-5])\b", lambda tag: f"<{tag[1]}h{int(tag[2]) + 1}", html)
    html = re.sub(r"<img(?![^>]*\ssrc=)[^>]*>", "", html)
    html = re.sub(r"<img(?![^>]*\salt=)", '<img alt="image"', html)
    html = re.sub(r'<pre\b|<div class="figure wide"', r'\g<0> tabindex="0"', _in_box(html))
    formula = r'<span class="formula( block)?">([^<]*)</span>'
    return re.sub(formula, lambda span: formula_html(unescape(span[2]), bool(span[1])), html)


def _is_harmless(tag: str, name: str, value: str) -> bool:
    """Whether an attribute of a tag may stay."""
    if name == "href":
        return tag == "a" and bool(re.match(r"(https?://|#)", value, re.IGNORECASE))
    if name == "src":
        return tag == "img" and bool(re.match(r"data:image/(png|jpeg|gif|webp);base64,", value))
    return name in ("class", "id", "alt", "title", "width", "height", "colspan", "rowspan", "open")


# --- the page ---------------------------------------------------------------------------------------------------


def write_page(path: Path, title: str, body: str) -> None:
    """Write a page of HTML in this project's style, with its headings of level 2 as contents.

    Args:
        path: the file to write.
        title: a text.
        body: HTML.
    """
    entries: list[str] = []

    def mark(heading: re.Match) -> str:
        name = heading[1] or f"part-{len(entries)}"
        words = re.sub(r"<(?!/?span\b)[^>]*>", "", heading[2])
        entries.append(f'<li><a href="#{name}">{words}</a></li>')
        return f'<h2 id="{name}">{heading[2]}</h2>'

    body = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", body)
    body = re.sub(r'<h2(?: id="([^"]*)"| [^>]*)?>(.*?)</h2>', mark, body, flags=re.DOTALL)
    contents = f"<ol>{''.join(entries)}</ol>"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head>
<body><details class="contents"><summary>Contents</summary><nav aria-label="Contents">{contents}</nav></details>
<nav class="beside" aria-label="Contents">{contents}</nav>
<main>{body}
</main></body></html>
"""
    path.write_text(page, encoding="utf-8")
