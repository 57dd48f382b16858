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
from ipywidgets import FloatSlider, IntSlider, Text, Widget
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

WIDE = {"width": "36rem"}  # of a field for a path or a whole sentence
Controls = list[tuple[type[Widget], dict]]  # a widget's class and its options


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
    image: Path,
    statements: tuple[str, str],
    interactive: bool | None = None,
    source: str = "",
    steps: int = 20,
) -> Figure | ipywidgets.VBox:
    """Two statements about an image: which one each encoder and the denoiser prefer, and what each encoder saw.

    Args:
        image, statements: to begin with; a statement is what the image shows, after 'a photo of'.
        interactive: controls for an image and statements of one's own if true; a still figure if false; None: controls
            where a front end answers.
        source: printed under the figure.
        steps: of the sampler that draws.

    Raises:
        ValueError: for an image that cannot be read, and for an empty statement.
    """

    def draw(picture: Picture, *texts: str) -> Figure:
        for n, text in enumerate(texts, 1):
            if not text.strip():
                raise ValueError(f"statement {n} is empty; expected what the image shows, after 'a photo of'")
        whole = [PREFIX + text.strip() for text in texts]
        losses, drawn = None, {}
        if models.denoiser is not None:
            conditions = models.conditions(picture)
            drawn = draw_images(models.denoiser, {name: conditions[name] for name in models.encoders}, steps=steps)
        if models.reads_text:
            losses = statement_losses(models, picture, whole)
        return own_image(picture, whole, statement_similarities(models, picture, whole), drawn, losses, source)

    controls = [(Text, {"value": text, "description": f"statement {n}"}) for n, text in enumerate(statements, 1)]
    return _explore(draw, image, models.px, controls, interactive, button="compare")


def noise_explorer(
    models: ImageModels,
    image: Path,
    caption: str,
    interactive: bool | None = None,
    source: str = "",
    steps: int = 20,
) -> Figure | ipywidgets.VBox:
    """Noise on an image, the clean image that is predicted under each condition, and what is drawn from noise alone.

    Args:
        image, caption: to begin with; the caption is a whole sentence, and one of the conditions.
        interactive, source, steps: as in `image_explorer`. The sliders are timestep, seed and guidance.

    Raises:
        ValueError: without a denoiser, and for an image that cannot be read.
    """
    if (denoiser := models.denoiser) is None:
        raise ValueError("no denoiser reads the embeddings of these encoders: nothing to predict")

    def sample(picture: Picture, text: str, seed: int, guidance: float) -> dict[str, Picture]:
        return draw_images(denoiser, models.conditions(picture, text), seed, guidance, steps)

    sample_once = _keep_last(sample)  # the timestep changes no sample

    def draw(picture: Picture, text: str, t: int, seed: int, guidance: float) -> Figure:
        conditions = models.conditions(picture, text.strip())
        noisy, predicted = predict_clean(denoiser, models.pixels(picture), conditions, t, seed)
        drawn = sample_once(picture, text.strip(), seed, guidance)
        captions = [f"noise at t = {t}", *(f"{label_of(n)}: {loss:.4f}" for n, (_, loss) in predicted.items())]
        captions += ["the image", *(f"drawn: {label_of(name)}" for name in drawn)]
        images = [noisy, *(clean for clean, _ in predicted.values()), picture, *drawn.values()]
        title = f"Above: the clean image as predicted, with its loss. Below: drawn, guidance {guidance:g}, seed {seed}"
        return image_grid(np.stack(images), captions, len(images) // 2, title, source)

    last = denoiser.timesteps - 1
    controls = [
        (Text, {"value": caption, "description": "caption", "layout": WIDE}),
        (IntSlider, {"value": 7 * last // 10, "max": last, "description": "timestep"}),
        (IntSlider, {"value": 0, "max": 99, "description": "seed"}),
        (FloatSlider, {"value": 3.0, "min": 1, "max": 10, "step": 0.5, "description": "guidance"}),
    ]
    return _explore(draw, image, denoiser.px, controls, interactive)


def patch_explorer(
    models: ImageModels, image: Path, interactive: bool | None = None, source: str = "", layer: int = -2
) -> Figure | ipywidgets.VBox:
    """How alike a patch of an image is to all others, for each encoder; the first's grid of patches numbers them.

    Args:
        image: to begin with.
        interactive, source: as in `image_explorer`. The sliders are row and column of the patch, and the layer.
        layer: of the image tower, from the last, as in `Encoder.tokens`.
    """

    def compare(picture: Picture, layer: int) -> dict[str, np.ndarray]:
        pixels = models.pixels(picture)
        return {name: patch_cosines(encoder, pixels, layer) for name, encoder in models.encoders.items()}

    compare_once = _keep_last(compare)
    first = compare_once(open_square(image, models.px), layer)
    side = isqrt(len(next(iter(first.values()))))

    def draw(picture: Picture, row: int, column: int, layer: int) -> Figure:
        place = (row + 0.5) / side, (column + 0.5) / side
        return patch_similarity(picture, compare_once(picture, layer), place, source)

    middle = {"value": side // 2, "max": side - 1}
    depth = min(encoder.depth for encoder in models.encoders.values())
    controls = [(IntSlider, {"description": name, **middle}) for name in ("row", "column")]
    controls += [(IntSlider, {"value": layer, "min": -depth, "max": -1, "description": "layer"})]
    return _explore(draw, image, models.px, controls, interactive)


def open_square(data: bytes | Path, px: int, name: object = None) -> Picture:
    """An image as RGB, `px` by `px`, cut at the centre; `name` stands for it in an error.

    Raises:
        ValueError: where it cannot be read; says what is.
    """
    try:
        return decode_square(data, px)
    except ValueError as error:
        place = f"{name or data}{'' if name else messages.read_from(str(data))}"
        raise ValueError(f"{place}: {error}; expected an image, as {', '.join(FORMATS)}") from error


def _keep_last(compute: Callable) -> Callable:
    """`compute` of a picture and values, whose last result is kept for the same ones."""
    last = {}

    def call(picture: Picture, *values: object) -> object:
        key = picture.tobytes(), values
        if key not in last:
            last.clear()
            last[key] = compute(picture, *values)
        return last[key]

    return call


def _explore(
    draw: Callable[..., Figure], image: Path, px: int, controls: Controls, interactive: bool | None, button: str = ""
) -> Figure | ipywidgets.VBox:
    """The figure that `draw` makes of an image and of the controls' values, under controls where a front end answers.

    What is wrong is told in one line; the figure before it stays. With a `button`, changes wait for it.
    """
    if not (has_front_end() if interactive is None else interactive):
        return draw(open_square(image, px), *(options["value"] for _, options in controls))
    widgets = [kind(**options, continuous_update=False) for kind, options in controls]
    upload = ipywidgets.FileUpload(accept="image/*", description="your image")
    path = Text(str(image), description="or its path", continuous_update=False, layout=WIDE)
    told, screen = ipywidgets.HTML(), ipywidgets.Output()

    def read() -> Picture:
        if path.value.strip():
            return open_square(Path(path.value.strip()).expanduser(), px)
        if not upload.value:
            raise ValueError("no image; expected one that is uploaded, or its path")
        return open_square(bytes(upload.value[0]["content"]), px, upload.value[0]["name"])

    def redraw(_: object = None) -> None:
        told.value = "computing …"
        try:
            fig = draw(read(), *(widget.value for widget in widgets))
        except (ValueError, OSError, RuntimeError) as error:
            told.value = html.escape(str(error))
            return
        told.value = ""
        screen.clear_output(wait=True)
        with screen:
            show_figure(fig)

    def take_upload(_: object) -> None:
        if path.value:
            path.value = ""  # draws, unless a button does
        elif not start:
            redraw()

    start = [ipywidgets.Button(description=button)] if button else []
    upload.observe(take_upload, "value")
    for widget in start or [path, *widgets]:
        widget.on_click(redraw) if start else widget.observe(redraw, "value")
    redraw()
    rows = [ipywidgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in ([upload, path, *start], widgets)]
    return ipywidgets.VBox([*rows, told, screen])
