"""Controls in a live session: the pair explorer, which is a still figure elsewhere, and a writer of statements.

A committed notebook has no widgets: with `interactive=False`, the notebooks' default, no widget is made.
"""

import csv
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
from jaxtyping import UInt8
from matplotlib.figure import Figure

from diva_lab.evaluation.image_sets import IMAGE_FOLDERS
from diva_lab.evaluation.pairs import PAIR_SUFFIXES
from diva_lab.figures.samples import minimal_pairs
from diva_lab.image_files import decode_square
from diva_lab.workbook.display import show_figure
from diva_lab.world import PATTERNS

PairImages = Callable[[pd.DataFrame], UInt8[np.ndarray, "n 2 h w 3"]]


def open_pairs(pairs: pd.DataFrame, px: int = 32) -> UInt8[np.ndarray, "n 2 px px 3"]:
    """The two images of each row of `read_pairs`, resized to `px` by `px`."""
    files = pairs[["image_1", "image_2"]].to_numpy()  # [n, 2]
    return np.stack([[decode_square(file, px) for file in pair] for pair in files])


def pair_explorer(
    pairs: pd.DataFrame,
    scores: Mapping[str, pd.DataFrame],
    images: PairImages = open_pairs,
    interactive: bool = False,
    still: int = 6,
    source: str = "",
) -> Figure | ipywidgets.VBox:
    """Show a pair of a chosen pattern with the similarities and verdicts of chosen encoders.

    Args:
        pairs: as `read_pairs` returns them.
        scores: encoder -> the scores of all `pairs`, in their order, as `score_pairs` returns them.
        images: rows of `pairs` -> their images.
        interactive: controls if true; a still figure of `still` pairs if false.
        still: how many pairs the figure shows, spread evenly over `pairs`.
        source: printed under the figure.

    Raises:
        ValueError: if the scores belong to other pairs, or there is nothing to show.
    """
    if not len(pairs) or not scores:
        raise ValueError(f"nothing to explore: {len(pairs)} pairs, {len(scores)} encoders")
    for name, table in scores.items():
        if len(table) != len(pairs):
            raise ValueError(f"{len(pairs)} pairs, but {name} has scores for {len(table)}")

    def draw(rows: list[int], encoders: tuple[str, ...]) -> Figure:
        chosen = pairs.iloc[rows]
        return minimal_pairs(chosen, images(chosen), {name: scores[name].iloc[rows] for name in encoders}, source)

    if not interactive:
        rows = np.linspace(0, len(pairs) - 1, min(still, len(pairs))).round().astype(int)
        return draw(rows.tolist(), tuple(scores))
    return _controls(pairs, tuple(scores), draw)


def _controls(
    pairs: pd.DataFrame, encoders: tuple[str, ...], draw: Callable[[list[int], tuple[str, ...]], Figure]
) -> ipywidgets.VBox:
    rows_of = {name: np.flatnonzero(pairs["pattern"] == name) for name in dict.fromkeys(pairs["pattern"])}
    pattern = ipywidgets.Dropdown(options=list(rows_of), description="pattern")
    number = ipywidgets.BoundedIntText(1, 1, len(rows_of[pattern.value]), description="pair")
    selected = ipywidgets.SelectMultiple(options=encoders, value=encoders[-2:], description="encoders", rows=3)
    screen = ipywidgets.Output()

    def redraw(_: object = None) -> None:
        rows = rows_of[pattern.value]
        number.max = len(rows)
        fig = draw([int(rows[number.value - 1])], selected.value or encoders[:1])
        screen.clear_output(wait=True)
        with screen:
            show_figure(fig)

    for control in (pattern, number, selected):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([ipywidgets.HBox([pattern, number, selected]), screen])


def statement_writer(folder: str | Path) -> ipywidgets.VBox:
    """Controls to say what the images of a pair show: its pattern and two statements, for `diva-lab blind-pairs`.

    Args:
        folder: pairs in MMVP-VLM's layout. `save` writes the statements into its Questions.csv, whole or not at all,
            and moves the two images into the folder of their pattern.

    Raises:
        FileNotFoundError: where there is no such folder.
    """
    folder = Path(folder)
    table = folder / "Questions.csv"
    images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), folder)
    header, *rows = csv.reader(table.read_text(encoding="utf-8").splitlines())
    number = ipywidgets.BoundedIntText(1, 1, len(rows) // 2, description="pair")
    pattern = ipywidgets.Dropdown(options=list(PATTERNS.values()), description="pattern")
    texts = [ipywidgets.Text(description=f"image {n}", placeholder="what it shows, after 'a photo of'") for n in (1, 2)]
    pictures = [ipywidgets.Image(width=224) for _ in texts]
    button, told = ipywidgets.Button(description="save"), ipywidgets.Label()

    def find(row: list[str]) -> Path:
        paths = [images / row[1] / f"{row[0]}{suffix}" for suffix in PAIR_SUFFIXES]
        return next((path for path in paths if path.is_file()), paths[0])

    def show(_: object = None) -> None:
        pair = rows[2 * number.value - 2 : 2 * number.value]
        for row, text, picture in zip(pair, texts, pictures, strict=True):
            text.value, picture.value = row[2], find(row).read_bytes()
        pattern.value = pair[0][1] if pair[0][1] in pattern.options else pattern.options[0]
        told.value = f"{sum(bool(row[2]) for row in rows)} of {len(rows)} statements are written"

    def save(_: object) -> None:
        moved = []
        for row, text in zip(rows[2 * number.value - 2 : 2 * number.value], texts, strict=True):
            path, row[1], row[2] = find(row), pattern.value, text.value.strip()
            if path.parent.name != row[1]:
                (images / row[1]).mkdir(exist_ok=True)
                shutil.copyfile(path, images / row[1] / path.name)
                moved.append(path)
        draft = table.with_suffix(".new")
        with open(draft, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        draft.replace(table)
        for path in moved:
            path.unlink()
        number.value = min(number.value + 1, number.max)
        show()

    number.observe(show, "value")
    button.on_click(save)
    show()
    return ipywidgets.VBox([ipywidgets.HBox([number, pattern, button, told]), ipywidgets.HBox(pictures), *texts])
