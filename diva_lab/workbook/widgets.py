"""Controls in a live session: the pair explorer, which is a still figure elsewhere, and a writer of statements.

A committed notebook has no widgets: where no front end answers, as under nbval and papermill, none is made.
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
from diva_lab.training.progress import has_front_end
from diva_lab.workbook.display import show_figure
from diva_lab.world import PATTERNS

ALL = "all"  # patterns
PairImages = Callable[[pd.DataFrame], UInt8[np.ndarray, "n 2 h w 3"]]


def open_pairs(pairs: pd.DataFrame, px: int = 32) -> UInt8[np.ndarray, "n 2 px px 3"]:
    """The two images of each row of `read_pairs`, resized to `px` by `px`."""
    files = pairs[["image_1", "image_2"]].to_numpy()  # [n, 2]
    return np.stack([[decode_square(file, px) for file in pair] for pair in files])


def pair_explorer(
    pairs: pd.DataFrame,
    scores: Mapping[str, pd.DataFrame],
    images: PairImages = open_pairs,
    interactive: bool | None = False,
    still: int = 6,
    source: str = "",
) -> Figure | ipywidgets.VBox:
    """Show a pair of a chosen pattern with the similarities and verdicts of chosen encoders.

    Args:
        pairs: as `read_pairs` returns them.
        scores: encoder -> the scores of all `pairs`, in their order, as `score_pairs` returns them.
        images: rows of `pairs` -> their images.
        interactive: controls if true; a still figure of `still` pairs if false; None where a front end answers.
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

    if not (has_front_end() if interactive is None else interactive):
        rows = np.linspace(0, len(pairs) - 1, min(still, len(pairs))).round().astype(int)
        return draw(rows.tolist(), tuple(scores))
    return _controls(pairs, scores, draw)


def best_encoder(scores: Mapping[str, pd.DataFrame]) -> str:
    """The encoder after the first one that is right on the most pairs; the first where there is no other."""
    first, *others = scores
    return max(others, key=lambda name: scores[name]["correct"].mean(), default=first)


def _controls(
    pairs: pd.DataFrame,
    scores: Mapping[str, pd.DataFrame],
    draw: Callable[[list[int], tuple[str, ...]], Figure],
) -> ipywidgets.VBox:
    """The pairs one by one: all or one pattern, all or those whose verdicts differ between the chosen encoders."""
    first = next(iter(scores))
    pattern = ipywidgets.Dropdown(options=[ALL, *dict.fromkeys(pairs["pattern"])], description="pattern")
    selected = ipywidgets.SelectMultiple(
        options=list(scores), value=tuple(dict.fromkeys((first, best_encoder(scores)))), description="encoders", rows=3
    )
    changed = ipywidgets.Checkbox(description="only changed pairs", indent=False, layout={"width": "auto"})
    number = ipywidgets.BoundedIntText(1, 1, len(pairs), description="pair", layout={"width": "11rem"})
    back, on = (ipywidgets.Button(description=text, layout={"width": "auto"}) for text in ("previous", "next"))
    told, screen = ipywidgets.Label(layout={"margin": "2px 2px 2px 1.5rem"}), ipywidgets.Output()

    def choose() -> np.ndarray:
        rows = pairs["pattern"].eq(pattern.value).to_numpy() | (pattern.value == ALL)
        verdicts = np.array([scores[name]["correct"] for name in selected.value or (first,)])  # [encoders, n]
        return np.flatnonzero(rows & (verdicts.min(0) != verdicts.max(0)) if changed.value else rows)

    def redraw(_: object = None) -> None:
        rows = choose()
        number.max = max(1, len(rows))  # a larger value becomes this one, and draws
        screen.clear_output(wait=True)
        if not len(rows):
            told.value = "no pair: nothing changed between these encoders"
            return
        row = int(rows[number.value - 1])
        told.value = f"{number.value} of {len(rows)}: pair {pairs['id_1'].iloc[row]}, {pairs['pattern'].iloc[row]}"
        fig = draw([row], selected.value or (first,))
        with screen:
            show_figure(fig)

    def go(step: int) -> None:
        number.value = (number.value - 1 + step) % number.max + 1

    back.on_click(lambda _: go(-1))
    on.on_click(lambda _: go(1))
    for control in (pattern, changed, number, selected):
        control.observe(redraw, "value")
    redraw()
    rows = [[pattern, selected], [back, on, number, changed, told]]
    return ipywidgets.VBox([*(ipywidgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in rows), screen])


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
