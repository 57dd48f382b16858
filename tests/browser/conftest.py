"""JupyterLab as `make lab` starts it, in a copy of the repository; a browser that tells what went wrong on its pages.

Screenshots are written to the folder that DIVA_LAB_SCREENSHOTS names, or to pytest's own.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from make_targets import ROOT, start_lab

MISSING = "no browser: needs the extra `browser` and Debian's chromium"


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """Debian's Chromium, by Playwright."""
    program = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if not program:
        pytest.skip(MISSING)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium) -> Iterator[Callable]:
    """Open an address in a page of its own; at the end of the test no page may have written an error."""
    errors, contexts = [], []

    def hear(message) -> None:
        if message.type == "error":
            errors.append(f"{message.text} ({message.location.get('url', '')})")

    def open_one(address: str, **settings: object):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1400, "height": 900}} | settings))
        contexts[-1].set_default_timeout(90_000)  # milliseconds: the machine may be busy
        page = contexts[-1].new_page()
        page.on("console", hear)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="session")
def photograph(tmp_path_factory) -> Callable:
    """Save what a page shows, under a name."""
    folder = Path(os.environ.get("DIVA_LAB_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png", animations="disabled")


@pytest.fixture(scope="session")
def git(chromium, tmp_path_factory) -> Callable[..., str]:
    """Run git in a copy of the repository's files, `git.folder`, which is a repository with nothing to commit."""
    copy = tmp_path_factory.mktemp("copy") / "diva-lab"

    def run(*words: str, folder: Path = copy) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout

    for name in run("ls-files", "-z", folder=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    run("init", "-q")
    run("add", "-A")
    run("-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "copy")
    run.folder = copy
    return run


@pytest.fixture(scope="session")
def lab(git, tmp_path_factory) -> Iterator[str]:
    """The address of a JupyterLab that runs in the copy, with runs and settings of its own."""
    with start_lab(git.folder, tmp_path_factory.mktemp("lab")) as address:
        yield address
