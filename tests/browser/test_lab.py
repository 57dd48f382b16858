"""Notebooks 00, 02 and 04 in JupyterLab, as a reader opens, runs, stops and saves them."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from make_targets import make_words

pytestmark = pytest.mark.browser
WORLD, TUNING, GRIDS = (f"notebooks/{name}.ipynb" for name in ("00_tiny_world", "02_encoder_tuning", "04_mmvp_grids"))
IDLE = "#jp-main-statusbar >> text=/ipykernel.*Idle/"
LONG = 900_000  # milliseconds, for what a slow and busy machine trains or evaluates


@pytest.fixture
def open_notebook(lab, git, open_page):
    """Open a notebook of the copy as it is committed, and wait for its kernel; it is shut down afterwards."""
    git("checkout", "-q", ".")
    pages = []

    def open_one(path: str):
        pages.append(page := open_page(f"{lab}/tree/{path}?reset"))
        page.wait_for_selector(IDLE, timeout=LONG)
        return page

    yield open_one
    for page in pages:
        choose(page, "Kernel", "Shut Down Kernel")
        page.wait_for_selector("text=No Kernel")


@pytest.fixture
def own_images(git) -> list[Path]:
    """Two images that the notebooks do not start with."""
    return sorted((git.folder / "data" / "emoji_pairs").rglob("*.png"))[:2]


def choose(page, *names: str) -> None:
    """Choose an entry of the menu bar."""
    page.click(f".lm-MenuBar-itemLabel:text-is('{names[0]}')")
    for name in names[1:]:
        page.click(f".lm-Menu-itemLabel:text-is('{name}')")


def wait_until_done(page) -> None:
    page.wait_for_function("![...document.querySelectorAll('.jp-InputPrompt')].some(x => x.innerText.includes('*'))",
                           timeout=LONG)  # fmt: skip
    page.wait_for_selector(IDLE, timeout=LONG)


def run_all(page) -> None:
    choose(page, "Run", "Run All Cells")
    page.wait_for_selector(".jp-InputPrompt:has-text('*')")


def save(page) -> None:
    """Save a notebook, and wait until it is written."""
    with page.expect_response(lambda answer: answer.request.method == "PUT" and "/api/contents/" in answer.url):
        page.keyboard.press("Control+s")


def check_saved(page, git, name: str) -> nbformat.NotebookNode:
    """Save a notebook that ran: it has no error and no warning, it alone differs, and nbstripout cleans it."""
    save(page)
    path = git.folder / name
    assert git("status", "--porcelain") == f" M {name}\n"
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    options = make_words(r"^NBSTRIPOUT := (.*?[^\\])\n")
    subprocess.run([Path(sys.executable).with_name("nbstripout"), *options, path], check=True)
    clean = nbformat.read(path, as_version=4)
    assert clean.metadata == nbformat.reads(git("show", f"HEAD:{name}"), as_version=4).metadata
    return notebook


def photograph_both(page, photograph, name: str, part) -> None:
    """Photograph JupyterLab, a part of it in sight, in its light and its dark theme."""
    for _ in range(2):  # cells above it get their height only when they come into sight
        part.scroll_into_view_if_needed()
        page.wait_for_timeout(1000)
    photograph(page, f"lab-{name}-light")
    choose(page, "Settings", "Theme", "JupyterLab Dark")
    page.wait_for_selector("body[data-jp-theme-light='false']", state="attached")
    page.wait_for_timeout(1000)
    photograph(page, f"lab-{name}-dark")
    choose(page, "Settings", "Theme", "JupyterLab Light")
    page.wait_for_selector("body[data-jp-theme-light='true']", state="attached")


def test_notebooks_that_are_opened_and_saved_stay_as_they_were(open_notebook, git):
    for path in (WORLD, TUNING, GRIDS):
        save(open_notebook(path))
    assert git("status", "--porcelain") == ""


def test_the_tiny_world_runs_and_nothing_else_changes(open_notebook, git, photograph):
    page = open_notebook(WORLD)
    run_all(page)
    wait_until_done(page)
    cells = [cell for cell in check_saved(page, git, WORLD).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    photograph_both(page, photograph, "world", page.locator("img").first)


def test_training_is_stopped_by_the_stop_button_and_goes_on_when_its_cell_runs_again(open_notebook, git, photograph):
    page = open_notebook(TUNING)
    choose(page, "Settings", "Save Widget State Automatically")
    run_all(page)
    cell = page.locator(".jp-CodeCell", has_text="runs[name, seed] = tune(")
    panel = cell.locator(".widget-html-content").last
    steps = panel.get_by_text(re.compile(r"^[1-9]\d* of 25$"))
    steps.wait_for(timeout=LONG)
    page.click("[data-jp-item-name='interrupt'] jp-button")
    panel.get_by_text("stopped; run the cell again, it goes on from there").wait_for(timeout=LONG)
    wait_until_done(page)
    done = int(steps.text_content().split()[0])  # what is out of sight has no inner text
    assert "KeyboardInterrupt: the run was stopped" in cell.text_content() and "Traceback" not in cell.text_content()
    photograph_both(page, photograph, "stopped", panel)
    cell.locator(".jp-InputArea-editor").click()
    choose(page, "Run", "Run Selected Cell and All Below")
    cell.get_by_text(f"{done} of 25 steps done before").wait_for(timeout=LONG)
    panel.scroll_into_view_if_needed()
    photograph(page, "lab-training")
    wait_until_done(page)
    assert 0 < done < 25 and "finished" in panel.text_content() and "25 of 25" in panel.text_content()
    photograph_both(page, photograph, "tuned", panel)
    assert "widgets" in check_saved(page, git, TUNING).metadata


def move(cell, action, *values: object) -> None:
    """Move a control of a cell, and wait for the cell's picture to change."""
    from playwright.sync_api import expect

    image = cell.locator("img")
    before = image.get_attribute("src")
    action(*values)
    expect(image).not_to_have_attribute("src", before, timeout=LONG)


def slide(cell, names: list[str]) -> None:
    """Move sliders of a cell by the keyboard, one after the other."""
    for name in names:
        handle = cell.locator(".widget-slider", has_text=name).get_by_role("slider")
        move(cell, handle.press, "ArrowLeft" if name == "layer" else "ArrowRight")


def write(cell, name: str, text: str) -> None:
    """Write into a field of a cell and leave it."""
    field = cell.get_by_label(name, exact=True)
    field.fill(text)
    field.press("Tab")


def upload(page, cell, file: Path) -> None:
    """Upload an image, and wait until it takes the place of the path."""
    from playwright.sync_api import expect

    with page.expect_file_chooser() as chooser:
        cell.get_by_role("button", name="your image").click()
    chooser.value.set_files(file)
    expect(cell.get_by_label("or its path")).to_have_value("", timeout=LONG)


def explore_pairs(cell) -> None:
    """Move every control of the pair explorer."""
    told = cell.get_by_text(re.compile(r"^\d+ of \d+: pair "))
    back, on = (cell.get_by_role("button", name=name) for name in ("previous", "next"))
    pattern, encoders, number = (cell.get_by_label(name, exact=True) for name in ("pattern", "encoders", "pair"))

    def tell(action, *values: object) -> str:
        move(cell, action, *values)
        return told.inner_text()

    count = int(re.match(r"1 of (\d+)", told.inner_text())[1])
    assert tell(on.click).startswith(f"2 of {count}: ")
    assert tell(back.click).startswith(f"1 of {count}: ")
    number.fill("5")
    assert tell(number.press, "Enter").startswith(f"5 of {count}: ")
    tell(encoders.select_option, "none")
    tell(encoders.select_option, ["none", "diva"])
    last = pattern.locator("option").all_inner_texts()[-1].replace("\N{NO-BREAK SPACE}", " ")
    assert tell(pattern.select_option, last).endswith(f", {last}")
    assert tell(pattern.select_option, "all").startswith(f"5 of {count}: ")
    assert f" of {count}: " not in tell(cell.get_by_label("only changed pairs").check)


def explore_image(page, cell, one: Path, other: Path) -> None:
    """Change the image by an upload and by its path, and both statements; what is wrong is told."""
    compare = cell.get_by_role("button", name="compare").click
    upload(page, cell, one)
    move(cell, compare)
    for name, text in (("or its path", other), ("statement 1", "a red disc"), ("statement 2", "a star")):
        write(cell, name, str(text))
        move(cell, compare)
    write(cell, "or its path", "nowhere.png")
    compare()
    cell.get_by_text("nowhere.png in").wait_for()
    assert cell.locator("img").count() == 1


def test_every_control_over_pairs_image_and_patches_changes_the_picture(open_notebook, own_images, git, photograph):
    page = open_notebook(GRIDS)
    choose(page, "Settings", "Save Widget State Automatically")
    run_all(page)
    wait_until_done(page)
    calls = ("view = pair_explorer(", "show(image_explorer(", "show(patch_explorer(")
    pairs, own, patches = (page.locator(".jp-CodeCell", has_text=call) for call in calls)
    photograph_both(page, photograph, "explorer", pairs.locator("img"))
    explore_pairs(pairs)
    photograph_both(page, photograph, "changed", pairs.locator("img"))
    explore_image(page, own, *own_images)
    photograph_both(page, photograph, "image", own.locator("img"))
    slide(patches, ["row", "column", "layer"])
    move(patches, write, patches, "or its path", str(own_images[1]))
    move(patches, upload, page, patches, own_images[0])
    photograph_both(page, photograph, "patches", patches.locator("img"))
    assert "widgets" in check_saved(page, git, GRIDS).metadata


def test_every_control_over_noise_changes_the_picture(open_notebook, own_images, git, photograph):
    page = open_notebook(TUNING)
    choose(page, "Settings", "Save Widget State Automatically")
    run_all(page)
    wait_until_done(page)
    cell = page.locator(".jp-CodeCell", has_text="show(noise_explorer(")
    photograph_both(page, photograph, "noise", cell.locator("img"))
    slide(cell, ["timestep", "seed", "guidance"])
    move(cell, write, cell, "caption", "a photo of a star")
    move(cell, write, cell, "or its path", str(own_images[1]))
    move(cell, upload, page, cell, own_images[0])
    photograph_both(page, photograph, "noise-changed", cell.locator("img"))
    check_saved(page, git, TUNING)
