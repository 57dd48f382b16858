"""The report and the site in a browser, light and dark: no serious fault for anyone, and nothing scrolls sideways."""

from pathlib import Path

import pytest
from make_targets import build_site
from summaries import BETTER, summary_of

from diva_lab.paths import ROOT
from diva_lab.workbook.report import write_report

pytestmark = pytest.mark.browser
DESK, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "report.html"
    write_report(path, sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")), summary_of(3, **BETTER), {"git": "abc"})
    return path


@pytest.fixture(scope="module")
def site(chromium, tmp_path_factory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("trees"))


def faults(page, *rules: str) -> list[str]:
    """Serious and critical faults that axe-core finds, by all its rules or some, and a page that scrolls sideways."""
    from axe_playwright_python.sync_playwright import Axe

    options = {"resultTypes": ["violations"], "preload": False} | ({"runOnly": list(rules)} if rules else {})
    texts = [
        f"{rule['id']}: {node['target']} {node['html'][:200]}"
        for rule in Axe().run(page, options=options).response["violations"]
        for node in rule["nodes"]
        if rule["impact"] in ("serious", "critical")
    ]
    return texts + sideways(page)


def sideways(page) -> list[str]:
    root = "document.documentElement"
    return ["scrolls sideways"] * page.evaluate(f"{root}.scrollWidth > {root}.clientWidth")


def test_the_report_has_no_serious_fault(report, open_page, photograph):
    wrong = {}
    for scheme in ("light", "dark"):
        for name, size in (("desk", DESK), ("phone", PHONE)):
            page = open_page(report.as_uri(), viewport=size, color_scheme=scheme)
            photograph(page, f"report-{scheme}-{name}")
            wrong[scheme, name] = faults(page)
    assert not any(wrong.values()), wrong


def test_no_page_of_the_site_has_a_serious_fault(site, open_page, photograph):
    front = site / "index.html"  # only leads to docs/index.html
    pages = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts and path != front]
    light, dark = (open_page(pages[0].as_uri(), color_scheme=scheme) for scheme in ("light", "dark"))
    phone, wrong = open_page(pages[0].as_uri(), viewport=PHONE), {}
    for path in pages:
        for page, scheme in ((light, "light"), (dark, "dark"), (phone, "phone")):
            page.goto(path.as_uri())
            photograph(page, f"site-{path.stem}-{scheme}")
        wrong[path.stem] = faults(light) + faults(dark, "color-contrast", "link-in-text-block") + sideways(phone)
    assert not any(wrong.values()), {name: texts for name, texts in wrong.items() if texts}
