"""Controls over one image in a live session: two statements about it, noise and what is drawn, and its patches.

As in `widgets`, each is a still figure where no front end answers.
"""

import html
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path

import ipywidgets
import numpy as np
import torch
from ipywidgets import Widget
from matplotlib.figure import Figure

from diva_lab import messages
from diva_lab.analysis.one_image import (
    ImageModels,
    Picture,
    draw_images,
    patch_cosines,
    predict_clean,
    statement_losses,
    statement_similarities,
)
from diva_lab.evaluation.pairs import PREFIX
from diva_lab.evaluation.table import open_encoder
from diva_lab.figures.samples import image_grid, own_image, patch_similarity
from diva_lab.figures.style import label_of
from diva_lab.image_files import FORMATS, decode_square
from diva_lab.training.build import build_conditioner, build_denoiser, split_mix
from diva_lab.training.progress import has_front_end
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.workbook.display import show_figure


def open_models(paths: Mapping[str, str | Path], settings: Settings, device: torch.device | str = "cpu") -> ImageModels:
    """Encoders, as `open_encoder` takes them, and the denoiser that reads their embeddings.

    How it reads them is said by the last path's run, or, where that is none, by `settings`. Where no denoiser fits all
    the encoders, a line says why, and what needs one is left out.
    """
    encoders = {name: open_encoder(path, device) for name, path in paths.items()}
    folder, _ = split_mix([*paths.values()][-1])
    if (folder / "settings.json").is_file():
        settings = Settings.of(Run(folder))
        if settings.train_projector:
            settings = replace(settings, projector=str(folder))
    if not {"denoiser", "decoder"} & {*settings.models}:
        settings = replace(settings, objective="diva")
    try:
        denoiser = build_denoiser(settings, device)
        conditioners = [build_conditioner(settings, encoder, denoiser) for encoder in encoders.values()]
    except (FileNotFoundError, ValueError) as error:
        print(f"nothing is drawn from these embeddings: {error}")
        return ImageModels(encoders)
    return ImageModels(encoders, denoiser, conditioners[0].eval().requires_grad_(False))


def image_explorer(
    models: ImageModels,
    image: Picture,
    statements: tuple[str, str],
    interactive: bool | None = None,
    source: str = "",
) -> Figure | ipywidgets.VBox:
    """Two statements about an image: which one each encoder and the denoiser prefer, and what each encoder saw.

    Args:
        image, statements: to begin with; a statement is what the image shows, after 'a photo of'.
        interactive: controls for an image and statements of one's own if true; a still figure if false; None: controls
            where a front end answers.
        source: printed under the figure.

    Raises:
        ValueError: for an empty statement.
    """

    def draw(picture: Picture, texts: tuple[str, str]) -> Figure:
        for n, text in enumerate(texts, 1):
            if not text.strip():
                raise ValueError(f"statement {n} is empty; expected what the image shows, after 'a photo of'")
        whole = [PREFIX + text.strip() for text in texts]
        losses, drawn = None, {}
        if models.denoiser is not None:
            conditions = models.conditions(picture)
            drawn = draw_images(models.denoiser, {name: conditions[name] for name in models.encoders})
        if models.reads_text:
            losses = statement_losses(models, picture, whole)
        return own_image(picture, whole, statement_similarities(models, picture, whole), drawn, losses, source)

    if not (has_front_end() if interactive is None else interactive):
        return draw(image, statements)
    fields, read = _image_fields(image, models.px)
    texts = [ipywidgets.Text(text, description=f"statement {n}") for n, text in enumerate(statements, 1)]
    button = ipywidgets.Button(description="compare")
    rows = [fields, ipywidgets.HBox([*texts, button])]
    return _controls(rows, [button], lambda: draw(read(), tuple(text.value for text in texts)))


def noise_explorer(
    models: ImageModels, image: Picture, caption: str, interactive: bool | None = None, source: str = ""
) -> Figure | ipywidgets.VBox:
    """Noise on an image, the clean image that is predicted under each condition, and what is drawn from noise alone.

    Args:
        image, caption: to begin with; the caption is a whole sentence, and one of the conditions.
        interactive, source: as in `image_explorer`. The sliders are timestep, seed and guidance.

    Raises:
        ValueError: without a denoiser.
    """
    denoiser, last = models.denoiser, {}
    if denoiser is None:
        raise ValueError("no denoiser reads the embeddings of these encoders: nothing to predict")

    def draw(picture: Picture, text: str, t: int, seed: int, guidance: float) -> Figure:
        conditions = models.conditions(picture, text.strip())
        noisy, predicted = predict_clean(denoiser, models.pixels(picture), conditions, t, seed)
        key = picture.tobytes(), text, seed, guidance
        if key not in last:  # the timestep changes no sample
            last.clear()
            last[key] = draw_images(denoiser, conditions, seed, guidance)
        captions = [f"noise at t = {t}", *(f"{label_of(n)}: loss {loss:.4f}" for n, (_, loss) in predicted.items())]
        captions += ["the image", *(f"drawn: {label_of(name)}" for name in last[key])]
        images = [noisy, *(clean for clean, _ in predicted.values()), picture, *last[key].values()]
        title = f"Above: the clean image as predicted. Below: drawn from noise, guidance {guidance:g}, seed {seed}"
        return image_grid(np.stack(images), captions, len(images) // 2, title, source)

    begin = {"t": denoiser.timesteps * 7 // 10, "seed": 0, "guidance": 3.0}
    if not (has_front_end() if interactive is None else interactive):
        return draw(image, caption, **begin)
    fields, read = _image_fields(image, denoiser.px)
    text = ipywidgets.Text(caption, description="caption", continuous_update=False)
    slide = {"continuous_update": False}
    sliders = [
        ipywidgets.IntSlider(begin["t"], 0, denoiser.timesteps - 1, description="timestep", **slide),
        ipywidgets.IntSlider(begin["seed"], 0, 99, description="seed", **slide),
        ipywidgets.FloatSlider(value=begin["guidance"], min=1, max=10, step=0.5, description="guidance", **slide),
    ]
    rows = [fields, text, ipywidgets.HBox(sliders)]
    changes = [*fields.children, text, *sliders]
    return _controls(rows, changes, lambda: draw(read(), text.value, *(slider.value for slider in sliders)))


def patch_explorer(
    models: ImageModels,
    image: Picture,
    interactive: bool | None = None,
    source: str = "",
    place: tuple[float, float] = (0.5, 0.5),
    layer: int = -2,
) -> Figure | ipywidgets.VBox:
    """How alike a patch of an image is to all others, for each encoder.

    Args:
        image: to begin with.
        interactive, source: as in `image_explorer`. The sliders are the row and column of the patch, and the layer.
        place: of the patch: shares of the image's height and width, in [0, 1).
        layer: of the image tower, as in `Encoder.tokens`.
    """
    last = {}

    def draw(picture: Picture, place: tuple[float, float], layer: int) -> Figure:
        key = picture.tobytes(), layer
        if key not in last:
            last.clear()
            pixels = models.pixels(picture)
            last[key] = {name: patch_cosines(encoder, pixels, layer) for name, encoder in models.encoders.items()}
        return patch_similarity(picture, last[key], place, source)

    if not (has_front_end() if interactive is None else interactive):
        return draw(image, place, layer)
    fields, read = _image_fields(image, models.px)
    first = next(iter(models.encoders.values()))
    side = isqrt(len(patch_cosines(first, models.pixels(image), layer)))
    options = {"min": 0, "max": side - 1, "continuous_update": False}
    row, column = (
        ipywidgets.IntSlider(value=int(share * side), description=name, **options)
        for share, name in zip(place, ("row", "column"), strict=True)
    )
    deep = ipywidgets.IntSlider(layer, -min(encoder.depth for encoder in models.encoders.values()), -1)
    deep.description, deep.continuous_update = "layer", False
    changes = [*fields.children, row, column, deep]
    return _controls(
        [fields, ipywidgets.HBox([row, column, deep])],
        changes,
        lambda: draw(read(), ((row.value + 0.5) / side, (column.value + 0.5) / side), deep.value),
    )


def _image_fields(example: Picture, px: int) -> tuple[ipywidgets.HBox, Callable[[], Picture]]:
    """Fields for an image of one's own, and what they name, `px` by `px`: a path, else an upload, else `example`."""
    upload = ipywidgets.FileUpload(accept="image/*", description="your image")
    path = ipywidgets.Text(placeholder="or its path", continuous_update=False)

    def forget_path(_: object) -> None:
        path.value = ""

    def read() -> Picture:
        if name := path.value.strip():
            data = Path(name).expanduser()
        elif upload.value:
            name, data = upload.value[0]["name"], bytes(upload.value[0]["content"])
        else:
            return example
        try:
            return decode_square(data, px)
        except ValueError as error:
            place = messages.read_from(name) if path.value else ""
            raise ValueError(f"{name}{place}: {error}; expected an image, as {', '.join(FORMATS)}") from error

    upload.observe(forget_path, "value")
    return ipywidgets.HBox([upload, path]), read


def _controls(rows: list[Widget], changes: list[Widget], draw: Callable[[], Figure]) -> ipywidgets.VBox:
    """`rows` of controls over the figure that `draw` makes, again when one of `changes` changes or is clicked.

    What is wrong is told in one line; the figure before it stays.
    """
    told, screen = ipywidgets.HTML(), ipywidgets.Output()

    def redraw(_: object = None) -> None:
        told.value = "computing …"
        try:
            fig = draw()
        except (ValueError, OSError, RuntimeError) as error:
            told.value = html.escape(str(error))
            return
        told.value = ""
        screen.clear_output(wait=True)
        with screen:
            show_figure(fig)

    for widget in changes:
        widget.on_click(redraw) if isinstance(widget, ipywidgets.Button) else widget.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([*rows, told, screen])
