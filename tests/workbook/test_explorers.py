from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from figure_records import texts
from ipywidgets import Widget
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
EXPLORERS = {
    "image": lambda *args: image_explorer(*args[:2], ("a red disc", "a blue disc"), args[2], steps=2),
    "noise": lambda *args: noise_explorer(*args[:2], "a photo of a disc", args[2], steps=2),
    "patch": patch_explorer,
}


@pytest.fixture(autouse=True)
def _no_figure_left_open():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def models() -> ImageModels:
    """With a denoiser of smaller images than the encoder's."""
    return open_models({"none": "tiny", "diva": "tiny"}, Settings(projector="anchored", vae_px=16))


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """An image, another one, and a text with an image's name."""
    paths = [tmp_path / f"{name}.png" for name in ("one", "other", "text")]
    for path, pixels in zip(paths, (IMAGE, OTHER), strict=False):
        Image.fromarray(pixels).save(path)
    paths[2].write_text("no image", encoding="utf-8")
    return paths


@pytest.fixture
def start(models, files, monkeypatch):
    """Start an explorer: its fields by their description, what it tells, and what it has drawn."""
    drawn = []
    monkeypatch.setattr(explorers, "show_figure", drawn.append)

    def start(name: str) -> SimpleNamespace:
        above, below, told, _ = EXPLORERS[name](models, files[0], True).children
        fields = {widget.description: widget for widget in (*above.children, *below.children)}
        return SimpleNamespace(fields=fields, path=fields["or its path"], told=told, drawn=drawn)

    return start


def shown(live: SimpleNamespace) -> list[np.ndarray]:
    return [ax.images[0].get_array() for ax in live.drawn[-1].axes if ax.images]


@pytest.mark.parametrize("name", EXPLORERS)
def test_without_a_front_end_an_explorer_is_a_figure_and_makes_no_widget(models, files, monkeypatch, name):
    monkeypatch.setattr(Widget, "open", lambda _: pytest.fail("a widget was made"))
    assert isinstance(EXPLORERS[name](models, files[0], None), Figure)


def test_ones_own_image_is_compared_and_what_is_wrong_is_told_while_the_figure_stays(start, files):
    live = start("image")
    button, second = live.fields["compare"], live.fields["statement 2"]
    assert len(live.drawn) == 1 and "① a photo of a red disc" in texts(live.drawn[0])
    for path, statement, words in (
        ("nowhere.png", "a star", f"nowhere.png in {Path.cwd()}: FileNotFoundError"),
        (str(files[2]), "a star", "expected an image, as JPEG"),
        ("", "a star", "no image; expected one that is uploaded, or its path"),
        (str(files[1]), " ", "statement 2 is empty"),
    ):
        live.path.value, second.value = path, statement
        button.click()
        assert words in live.told.value and len(live.drawn) == 1
    second.value = "a star"
    button.click()
    assert live.told.value == "" and np.array_equal(shown(live)[0], OTHER)
    assert "② a photo of a star" in texts(live.drawn[1])


def test_an_upload_takes_the_place_of_the_path_and_is_named_where_it_is_no_image(start, files):
    live = start("patch")
    for file, words in ((files[1], ""), (files[2], "text.png: UnidentifiedImageError")):
        upload = {"name": file.name, "type": "image/png", "size": 1, "content": file.read_bytes()}
        live.fields["your image"].value = [upload | {"last_modified": datetime(2026, 1, 1)}]
        assert live.path.value == "" and live.told.value.startswith(words) and np.array_equal(shown(live)[0], OTHER)
        assert len(live.drawn) == 2  # each change draws once


def test_the_timestep_changes_the_prediction_alone_and_seed_and_guidance_what_is_drawn(start):
    live = start("noise")
    before = shown(live)
    assert [picture.shape for picture in before] == [(16, 16, 3)] * 10
    predicted, drawn = {0, 1, 2, 3, 4}, {7, 8, 9}
    for name, value, changed in (
        ("timestep", 300, predicted),
        ("guidance", 1.5, drawn),
        ("seed", 7, predicted | {6} | drawn),
    ):
        live.fields[name].value = value
        assert {k for k in range(10) if not np.array_equal(before[k], shown(live)[k])} == changed, name
        before = shown(live)


def test_the_frame_follows_the_row_and_the_column_of_the_patch(start):
    live = start("patch")
    live.fields["row"].value, live.fields["column"].value, live.fields["layer"].value = 0, 3, -1
    image, before, _ = live.drawn[-1].axes[:3]
    assert image.patches[0].get_xy() == (23.5, -0.5) and before.patches[0].get_xy() == (2.5, -0.5)
    assert before.images[0].get_array()[0, 3] == pytest.approx(1)


def test_encoders_that_no_denoiser_reads_are_compared_without_one(files, small_clip, capsys):
    models = open_models({"tiny": "tiny", "small": small_clip}, Settings(projector="anchored"))
    assert "nothing is drawn from these embeddings: projector" in capsys.readouterr().out
    assert len(EXPLORERS["image"](models, files[0], False).axes) == 2
    with pytest.raises(ValueError, match="no denoiser reads the embeddings"):
        EXPLORERS["noise"](models, files[0], False)


def test_a_projector_that_was_trained_with_the_encoder_is_read_from_the_run(small_settings, tmp_path):
    run = tune(replace(small_settings, objective="diva", train_projector=True, steps=1), tmp_path)
    models = open_models({"none": small_settings.encoder, "diva": run.folder}, Settings())
    saved = Run(run.folder).weights()
    for name, value in models.conditioner.state_dict().items():
        assert (saved[f"conditioner.{name}"] == value).all()
