"""The site is built as `make site` builds it, without a warning; its links hold and it loads nothing from elsewhere."""

import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import nbformat
import pytest
from make_targets import build_site

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}  # tag -> attribute


class Page(HTMLParser):
    """A page's names, links, what it loads, its images, and its text without code."""

    def __init__(self, path: Path):
        super().__init__()
        self.names, self.links, self.loads, self.images, self.text = set(), [], [], [], ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.names |= {values.get("id"), values.get("name")} - {None}
        self.links += [values["href"]] if tag == "a" and values.get("href") else []
        self.loads += [values[LOADS[tag]]] if values.get(LOADS.get(tag, "")) else []
        self.images += [values] if tag == "img" else []
        self.open += [tag] if tag in ("pre", "code", "script", "style") else []

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += "" if self.open else data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("trees"))


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


@pytest.fixture
def conf(tmp_path) -> Callable[[str], ModuleType]:
    """The site's settings as they are read where pyproject.toml holds this address of the repository, or none."""

    def read(address: str) -> ModuleType:
        (tmp_path / "docs").mkdir()
        project = re.sub(r"^\[project\.urls\]\n(.+\n)*", "", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
        urls = f'\n[project.urls]\nRepository = "{address}"\n' if address else ""
        (tmp_path / "pyproject.toml").write_text(project + urls)
        (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
        shutil.copy(ROOT / "docs" / "conf.py", tmp_path / "docs")
        spec = importlib.util.spec_from_file_location("conf", tmp_path / "docs" / "conf.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return read


def cells_on_site(conf: ModuleType, path: Path) -> list[str]:
    """The sources of a notebook's cells as the site's settings change them."""
    source = [path.read_text()]
    conf.add_parts(None, f"notebooks/{path.stem}", source)
    return [cell.source for cell in nbformat.reads(source[0], 4).cells]


def dead_links(pages: dict[Path, Page]) -> Iterator[str]:
    """Links within the site to a file or a name that is not there."""
    for path, page in pages.items():
        for link in page.links:
            place, _, name = unquote(link).partition("#")
            target = (path.parent / place).resolve() if place else path
            if re.match(r"[a-z]+:", link) or (target.is_file() and not name):
                continue
            if target not in pages or name not in pages[target].names:
                yield f"{path.name}: {link}"


def test_every_internal_link_leads_to_a_page_and_to_a_name_on_it(pages):
    assert sum(len(page.links) for page in pages.values()) > 500
    assert list(dead_links(pages)) == []


def test_a_dead_link_is_told(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html">b</a><a href="#c">c</a><a href="a.html#d">d</a><p id="d">')
    pages = {tmp_path / "a.html": Page(tmp_path / "a.html")}
    assert list(dead_links(pages)) == ["a.html: b.html", "a.html: #c"]


def test_nothing_is_loaded_from_elsewhere(site, pages):
    loads = {load for page in pages.values() for load in page.loads}
    assert [load for load in loads if re.match(r"(\w+:)?//", load)] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(errors="ignore")), style.name


def test_every_notebook_and_page_is_there_and_listed_on_the_front_page(site, pages):
    front = site / "docs" / "index.html"
    listed = {(front.parent / link.partition("#")[0]).resolve() for link in pages[front].links}
    sources = [*NOTEBOOKS, *(ROOT / "docs").glob("*.md"), *(ROOT / f"{n}.md" for n in ("README", "CHANGELOG", "LOG"))]
    assert {(site / path.relative_to(ROOT)).with_suffix(".html") for path in sources} <= listed | {front}
    assert 'url=docs/index.html"' in (site / "index.html").read_text()


def test_a_use_case_has_one_line_one_image_and_one_link_and_each_notebook_has_a_use_case():
    text = (ROOT / "docs" / "index.md").read_text().partition("## Use cases\n")[2]
    cases = re.split(r"^- ", text, flags=re.MULTILINE)[1:]
    for case in cases:
        line, image = case.strip().split("\n\n")
        assert len(re.findall(r"\]\(", line)) == 1 and len(line) < 180
        assert re.fullmatch(r"\s*!\[[^\]]{20,}\]\(\.\./figures/\w+\.png\)", image)
    for path in NOTEBOOKS:
        assert path.name in text or path.name == "10_referee.ipynb"  # whose use case is the page on the referee


def test_formulas_are_mathml_and_no_dollar_is_left(site, pages):
    assert [path.name for path, page in pages.items() if "$" in page.text] == []
    for name in ("docs/method", "notebooks/05_theory"):
        assert (site / f"{name}.html").read_text().count("<math") > 10


def test_no_line_of_a_table_ends_within_an_interval(site):
    cells = re.findall(r"<td>(.*?)</td>", (site / "docs" / "results.html").read_text(), flags=re.DOTALL)
    held = [cell for cell in cells if re.search(r"\[\D?[\d.]+, ", cell.replace("\xa0", " "))]
    assert held and not [cell for cell in held if re.search(r"\[[^\]]* |-\d", cell)]


def test_every_image_of_a_notebook_is_shown_with_an_alternative_text(site, pages):
    for path in NOTEBOOKS:
        outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
        images = pages[site / "notebooks" / f"{path.stem}.html"].images
        assert len(images) == sum("image/png" in output.get("data", {}) for output in outputs)
        assert all(len(image["alt"]) > 5 for image in images)


def test_lines_of_training_and_hidden_code_are_folded(site):
    page = (site / "notebooks" / "02_encoder_tuning.html").read_text()
    shown = re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL)
    for text in ("step 500/500, loss", "check_parameters"):
        assert text in page and text not in shown


# --- Binder and Colab -------------------------------------------------------------------------------------------


def test_without_the_repositorys_address_nothing_opens_a_notebook_elsewhere(conf):
    settings = conf("")
    for path in NOTEBOOKS:
        cells = cells_on_site(settings, path)
        assert len(cells) == len(nbformat.read(path, 4).cells)
        assert not any("mybinder" in source or "colab" in source for source in cells)


def test_binder_and_colab_clone_the_repository_at_its_address_and_install_it(conf):
    title, links, *rest = cells_on_site(conf("https://github.com/owner/diva-lab.git"), NOTEBOOKS[0])
    name = f"notebooks/{NOTEBOOKS[0].name}"
    assert title.startswith("# ") and len(rest) == len(nbformat.read(NOTEBOOKS[0], 4).cells) - 1
    assert f"(https://mybinder.org/v2/gh/owner/diva-lab/HEAD?labpath={name})" in links
    assert f"(https://colab.research.google.com/github/owner/diva-lab/blob/HEAD/{name})" in links
    assert "`!git clone https://github.com/owner/diva-lab && pip install -e diva-lab`, then `%cd diva-lab`" in links
    assert "- -e ." in (ROOT / "environment.yml").read_text()  # what Binder installs


def test_a_forge_that_colab_does_not_read_has_a_link_to_binder_alone(conf):
    links = cells_on_site(conf("https://forge.example/owner/lab"), NOTEBOOKS[0])[1]
    assert "mybinder.org/v2/git/https%3A%2F%2Fforge.example%2Fowner%2Flab/HEAD" in links and "Colab" not in links
