from types import SimpleNamespace

import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from ipywidgets import Widget
from matplotlib.figure import Figure

from diva_lab.evaluation.pairs import read_pairs
from diva_lab.workbook import widgets
from diva_lab.workbook.widgets import open_pairs, pair_explorer, statement_writer
from diva_lab.world import World, draw_pairs, write_pairs

matplotlib.use("agg")
PAIRS = pd.DataFrame(
    {"pattern": ["Color and Appearance"] * 5 + ["Texts"] * 3, "statement_1": list("abcdefgh"), "statement_2": "other"}
).assign(id_1=range(1, 16, 2), id_2=range(2, 17, 2))
COSINES = pd.DataFrame({name: np.linspace(0.1, 0.4, 8) for name in ("t1i1", "t1i2", "t2i1", "t2i2")})
RIGHT = {"none": [0, 1, 1, 0, 0, 0, 0, 1], "diva": [1, 1, 1, 1, 0, 0, 0, 1], "dcr": [0, 1, 1, 0, 1, 0, 0, 1]}
SCORES = {name: COSINES.assign(correct=np.array(right, bool)) for name, right in RIGHT.items()}


@pytest.fixture(autouse=True)
def _no_figure_left_open():
    yield
    plt.close("all")


def images(pairs: pd.DataFrame) -> np.ndarray:
    return np.zeros((len(pairs), 2, 4, 4, 3), np.uint8)


def statements(fig: Figure) -> list[str]:
    texts = [text.get_text() for ax in fig.axes for text in ax.texts]
    return [text.removeprefix("① ") for text in texts if text.startswith("① ")]


def test_the_images_of_pairs_are_read_from_disk_and_resized(tmp_path):
    pairs = read_pairs(write_pairs(tmp_path, World(), 1, 0))
    rendered = World().render(draw_pairs("orientation", 1, (0, 0))[0])
    assert np.abs(open_pairs(pairs)[0].astype(int) - rendered).mean() < 8  # JPEG
    assert open_pairs(pairs[:3], 20).shape == (3, 2, 20, 20, 3)


def test_the_explorer_without_controls_is_a_figure_and_makes_no_widget(monkeypatch):
    monkeypatch.setattr(Widget, "open", lambda _: pytest.fail("a widget was made"))
    fig = pair_explorer(PAIRS, SCORES, images, still=3)
    assert isinstance(fig, Figure)
    assert statements(fig) == ["a", "e", "h"]


@pytest.fixture
def explorer(monkeypatch) -> SimpleNamespace:
    """The explorer's controls by name, and what it has drawn."""
    drawn = []
    monkeypatch.setattr(widgets, "show_figure", drawn.append)
    box = pair_explorer(PAIRS, SCORES, images, interactive=True)
    (pattern, encoders), (back, on, number, changed, told) = (row.children for row in box.children[:2])
    controls = {"pattern": pattern, "encoders": encoders, "back": back, "on": on, "number": number}
    return SimpleNamespace(**controls, changed=changed, told=told, drawn=drawn, box=box)


def test_the_explorer_begins_with_the_original_beside_the_best_tuned_encoder(explorer):
    assert isinstance(explorer.box, ipywidgets.VBox)
    assert statements(explorer.drawn[-1]) == ["a"] and explorer.encoders.value == ("none", "diva")
    assert explorer.told.value == "1 of 8: pair 1, Color and Appearance"


def test_the_explorer_goes_on_and_back_and_around(explorer):
    explorer.on.click()
    assert statements(explorer.drawn[-1]) == ["b"] and explorer.told.value == "2 of 8: pair 3, Color and Appearance"
    explorer.back.click(), explorer.back.click()
    assert statements(explorer.drawn[-1]) == ["h"] and explorer.number.value == 8


def test_the_explorer_shows_the_pair_that_is_chosen(explorer):
    explorer.number.value = 5
    assert statements(explorer.drawn[-1]) == ["e"]
    explorer.pattern.value = "Texts"  # has three pairs: the number is limited to the last
    assert (explorer.number.value, statements(explorer.drawn[-1])) == (3, ["h"])
    assert explorer.told.value == "3 of 3: pair 15, Texts"
    explorer.encoders.value = ("none",)
    assert "none (original): 0 of 1" in [ax.get_title() for ax in explorer.drawn[-1].axes]


def test_the_explorer_shows_only_pairs_that_changed_between_the_chosen_encoders(explorer):
    explorer.changed.value = True
    assert explorer.told.value == "1 of 2: pair 1, Color and Appearance"
    explorer.on.click()
    assert statements(explorer.drawn[-1]) == ["d"]
    explorer.encoders.value = ("none", "dcr")
    assert statements(explorer.drawn[-1]) == ["e"] and explorer.told.value.startswith("1 of 1")
    count = len(explorer.drawn)
    explorer.pattern.value = "Texts"
    assert explorer.told.value == "no pair: nothing changed between these encoders" and len(explorer.drawn) == count


@pytest.mark.parametrize("answers", [True, False])
def test_the_explorer_has_controls_where_a_front_end_answers(monkeypatch, answers):
    monkeypatch.setattr(widgets, "has_front_end", lambda: answers)
    monkeypatch.setattr(widgets, "show_figure", lambda fig: None)
    assert isinstance(pair_explorer(PAIRS, SCORES, images, interactive=None), ipywidgets.VBox if answers else Figure)


def test_the_explorer_closes_what_it_draws():
    pair_explorer(PAIRS, SCORES, images, interactive=True)
    assert not plt.get_fignums()


def test_the_explorer_refuses_scores_of_other_pairs_and_an_empty_table():
    with pytest.raises(ValueError, match="8 pairs, but dcr has scores for 2"):
        pair_explorer(PAIRS, {"dcr": COSINES[:2]}, images)
    with pytest.raises(ValueError, match="nothing to explore"):
        pair_explorer(PAIRS[:0], SCORES, images)


def test_statements_are_written_pair_by_pair_and_make_the_folder_whole(tmp_path):
    folder = write_pairs(tmp_path, World(), 1, 0)
    table = folder / "Questions.csv"
    header, *rows = table.read_text().splitlines()
    unsorted = folder / "MLLM_VLM Images" / "unsorted"
    unsorted.mkdir()
    for path in folder.rglob("*.jpg"):
        path.rename(unsorted / path.name)
    table.write_text("\n".join([header, *(f"{i},unsorted," for i in range(1, len(rows) + 1))]))
    box = statement_writer(folder)
    (number, pattern, button, told), texts = box.children[0].children, box.children[2:]
    for k in range(len(rows) // 2):
        assert number.value == k + 1 and told.value == f"{2 * k} of {len(rows)} statements are written"
        pattern.value = "Color and Appearance" if k % 2 else "Texts"
        for n, text in enumerate(texts):
            text.value = f" a thing, {n} "
        button.click()
    pairs = read_pairs(folder)
    assert set(pairs["statement_1"]) == {"a thing, 0"} and set(pairs["statement_2"]) == {"a thing, 1"}
    assert set(pairs["pattern"]) == {"Color and Appearance", "Texts"} and not any(unsorted.iterdir())
    assert box.children[0].children[0].value == len(rows) // 2
