from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from figure_records import texts
from ipywidgets import Button, FloatSlider, IntSlider, Text, Widget
from matplotlib.figure import Figure
from PIL import Image

from diva_lab.analysis.one_image import ImageModels
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.training.stages import tune
from diva_lab.workbook import explorers
from diva_lab.workbook.explorers import image_explorer, noise_explorer, open_models, patch_explorer
from diva_lab.world import World, draw_scenes

matplotlib.use("agg")
IMAGE, OTHER = World().render(draw_scenes(2, 0))
STATEMENTS = "a red disc", "a blue disc"


@pytest.fixture(autouse=True)
def _no_figure_left_open():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def models() -> ImageModels:
    return open_models({"none": "tiny", "diva": "tiny"}, Settings(projector="anchored"))


EXPLORERS = {
    "image": lambda models, live: image_explorer(models, IMAGE, STATEMENTS, live),
    "noise": lambda models, live: noise_explorer(models, IMAGE, "a photo of a disc", live),
    "patch": lambda models, live: patch_explorer(models, IMAGE, live),
}


@pytest.fixture
def start(models, monkeypatch):
    """Start an explorer: its fields by their description or placeholder, what it tells, and what it has drawn."""
    drawn = []
    monkeypatch.setattr(explorers, "show_figure", drawn.append)

    def start(name: str) -> SimpleNamespace:
        *rows, told, _ = EXPLORERS[name](models, True).children
        widgets = [widget for row in rows for widget in getattr(row, "children", [row])]
        fields = {widget.description or widget.placeholder: widget for widget in widgets}
        assert all(isinstance(widget, (Text, IntSlider, FloatSlider, Button)) or widget is fields["your image"]
                   for widget in widgets)  # fmt: skip
        return SimpleNamespace(fields=fields, told=told, drawn=drawn)

    return start


@pytest.mark.parametrize("name", EXPLORERS)
def test_without_a_front_end_an_explorer_is_a_figure_and_makes_no_widget(models, monkeypatch, name):
    monkeypatch.setattr(Widget, "open", lambda _: pytest.fail("a widget was made"))
    assert isinstance(EXPLORERS[name](models, None), Figure)


def test_ones_own_image_is_compared_and_what_is_wrong_is_told_while_the_figure_stays(start, tmp_path):
    live = start("image")
    button, path = live.fields["compare"], live.fields["or its path"]
    assert len(live.drawn) == 1 and "① a photo of a red disc" in texts(live.drawn[0])
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    for wrong, words in (
        ("nowhere.png", "nowhere.png in "),
        (str(tmp_path / "text.png"), "expected an image, as JPEG"),
    ):
        path.value = wrong
        button.click()
        assert words in live.told.value and len(live.drawn) == 1
    path.value = str(tmp_path / "mine.png")
    Image.fromarray(OTHER).save(path.value)
    live.fields["statement 2"].value = " "
    button.click()
    assert "statement 2 is empty" in live.told.value and len(live.drawn) == 1
    live.fields["statement 2"].value = "a star"
    button.click()
    assert live.told.value == "" and np.array_equal(live.drawn[1].axes[0].images[0].get_array(), OTHER)
    assert "② a photo of a star" in texts(live.drawn[1])


def test_an_upload_takes_the_place_of_the_path(start, tmp_path):
    live = start("patch")
    Image.fromarray(OTHER).save(tmp_path / "mine.png")
    live.fields["or its path"].value = "nowhere.png"
    upload = {"name": "mine.png", "type": "image/png", "size": 1, "content": (tmp_path / "mine.png").read_bytes()}
    live.fields["your image"].value = [upload | {"last_modified": "2026-01-01T00:00:00+00:00"}]
    assert live.fields["or its path"].value == "" and live.told.value == ""
    assert np.array_equal(live.drawn[-1].axes[0].images[0].get_array(), OTHER)


def test_the_timestep_changes_the_prediction_alone_and_seed_and_guidance_what_is_drawn(start):
    live = start("noise")

    def shown() -> list[np.ndarray]:
        return [ax.images[0].get_array() for ax in live.drawn[-1].axes if ax.images]

    before = shown()
    assert len(before) == 10 and np.array_equal(before[5], IMAGE)
    for name, value, changed in (("timestep", 300, {0, 1, 2, 3, 4}), ("guidance", 1.5, {7, 8, 9}),
                                 ("seed", 7, {0, 1, 2, 3, 4, 6, 7, 8, 9})):  # fmt: skip
        live.fields[name].value = value
        assert {k for k in range(10) if not np.array_equal(before[k], shown()[k])} == changed, name
        before = shown()


def test_the_frame_follows_the_row_and_the_column_of_the_patch(start):
    live = start("patch")
    live.fields["row"].value, live.fields["column"].value = 0, 7
    live.fields["layer"].value = -1
    image, before, _ = live.drawn[-1].axes[:3]
    assert image.patches[0].get_xy() == (27.5, -0.5) and before.patches[0].get_xy() == (6.5, -0.5)
    assert before.images[0].get_array()[0, 7] == pytest.approx(1)


def test_encoders_that_no_denoiser_reads_are_compared_without_one(small_clip, capsys):
    models = open_models({"tiny": "tiny", "small": small_clip}, Settings(projector="anchored"))
    assert "nothing is drawn from these embeddings: projector" in capsys.readouterr().out
    assert len(image_explorer(models, IMAGE, STATEMENTS).axes) == 2
    with pytest.raises(ValueError, match="no denoiser reads the embeddings"):
        noise_explorer(models, IMAGE, "a disc")


def test_a_projector_that_was_trained_with_the_encoder_is_read_from_the_run(small_settings, tmp_path):
    from dataclasses import replace

    settings = replace(small_settings, objective="diva", train_projector=True, steps=1)
    run = tune(settings, tmp_path)
    models = open_models({"none": settings.encoder, "diva": run.folder}, Settings())
    weights = {f"conditioner.{name}": value for name, value in models.conditioner.state_dict().items()}
    saved = Run(run.folder).weights()
    assert weights and all((saved[name] == value).all() for name, value in weights.items())
