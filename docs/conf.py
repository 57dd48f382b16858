"""The site: Sphinx's settings, for `make site`. Its source folder is the repository, so that links hold in both.

Nothing is run and nothing fetched: notebooks show the outputs that they hold, formulas are MathML, and styles, scripts
and fonts are the theme's own files.
"""

import re
import tomllib
from pathlib import Path
from urllib.parse import quote

import nbformat
from docutils import nodes
from mdit_py_plugins.anchors.index import slugify
from sphinx.application import Sphinx

from diva_lab.figures.style import minus_signs
from diva_lab.workbook.page import formula_html

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESS = PROJECT.get("urls", {}).get("Repository", "").removesuffix("/").removesuffix(".git")
PARTS = {
    "Start": ["Get it, and use it </README>"],
    "Notebooks": sorted(f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")),
    "Docs": [f"docs/{name}" for name in ("method", "results", "referee", "backbones", "gpu", "speed", "integration",
                                         "extending", "promises")],
    "Project": ["CONTRIBUTING", "CHANGELOG", "LOG", "data/emoji_pairs/NOTICE"],
}  # fmt: skip

project, version = PROJECT["name"], PROJECT["version"]
copyright, author = "", ""
extensions = ["myst_nb"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "README.md", *(f"{name}.md" for name in PARTS["Project"])]
include_patterns += [f"{name}.ipynb" for name in PARTS["Notebooks"]]
exclude_patterns = [".*", "*.egg-info", "build", "diva_lab", "runs", "tests", "tools"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_custom_formats = {".ipynb": "diva_lab.workbook.outputs.read_for_site"}
nb_ipywidgets_js = {}
html_theme, html_title, html_show_sphinx = "sphinx_book_theme", f"{project} {version}", False
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_copy_source = False
html_theme_options = {
    "use_download_button": False,
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "navbar_persistent": [],
}
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"


def launch_links(address: str, notebook: str) -> str:
    """Links that open a notebook elsewhere, in Markdown; "" without the repository's address.

    Binder clones the repository and installs environment.yml, which holds `-e .`. Colab opens the notebook alone, so a
    line for its first cell clones and installs.
    """
    if not address:
        return ""
    owner = address.removeprefix("https://github.com/")
    place = f"gh/{owner}" if owner != address else f"git/{quote(address, safe='')}"
    links = [f"[Binder](https://mybinder.org/v2/{place}/HEAD?labpath={quote(notebook)})"]
    if owner == address:
        return f"Run it: {links[0]}.\n"
    name = owner.rpartition("/")[2]
    links.append(f"[Colab](https://colab.research.google.com/github/{owner}/blob/HEAD/{notebook})")
    line = f"!git clone {address} && pip install -e {name}"
    return f"Run it: {' · '.join(links)}. In Colab, first run `{line}`, then `%cd {name}`.\n"


def add_parts(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give the front page its list of all pages, and each notebook the links that open it elsewhere.

    Links between notebooks end in JupyterLab's anchors of headings; here they get this site's own.
    """
    if docname in PARTS["Notebooks"]:
        anchor = r"(\]\(\d\d_\w+\.ipynb#)([^)\s]+)\)"
        source[0] = re.sub(anchor, lambda link: f"{link[1]}{slugify(link[2])})", source[0])
    if docname in PARTS["Notebooks"] and (links := launch_links(ADDRESS, f"{docname}.ipynb")):
        notebook = nbformat.reads(source[0], as_version=4)
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(links))
        source[0] = nbformat.writes(notebook)
    if docname == root_doc:
        for caption, names in PARTS.items():
            pages = "\n".join(name if " " in name else f"/{name}" for name in names)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def keep_numbers_whole(app: Sphinx, doctree: nodes.document) -> None:
    """In tables, write minus signs, and let no line end within an interval: `+0.1 [-1.2, +1.4]`."""
    for cell in doctree.findall(nodes.entry):
        for text in list(cell.findall(nodes.Text)):
            if not isinstance(text.parent, nodes.literal | nodes.math):
                whole = re.sub(r"\[[^\[\]]*\d, [^\[\]]*\d\]", lambda part: part[0].replace(" ", "\xa0"), text.astext())
                text.parent.replace(text, nodes.Text(minus_signs(whole)))


def visit_formula(translator: nodes.NodeVisitor, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML."""
    translator.body.append(formula_html(node.astext(), isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def lead_to_front_page(app: Sphinx, error: Exception | None) -> None:
    """Make the site's own address lead to the front page, which lies in docs/ as its source does."""
    front = f"{root_doc}.html"
    page = f'<meta charset="utf-8"><meta http-equiv="refresh" content="0;url={front}"><a href="{front}">{project}</a>'
    (app.outdir / "index.html").write_text(f'<!doctype html><html lang="en"><title>{project}</title>{page}</html>\n')


def setup(app: Sphinx) -> None:
    """Sphinx calls this once."""
    app.connect("source-read", add_parts)
    app.connect("doctree-read", keep_numbers_whole)
    app.connect("build-finished", lead_to_front_page)
    app.add_html_math_renderer("mathml", (visit_formula, None), (visit_formula, None))
