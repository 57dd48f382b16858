"""The pair explorer: minimal pairs with controls in a live session, a still figure elsewhere.

A committed notebook has no widgets: with `interactive=False`, the notebooks' default, no widget is made.
"""

from collections.abc import Callable, Mapping

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from jaxtyping import UInt8
from matplotlib.figure import Figure

from diva_lab.figures.samples import minimal_pairs
from diva_lab.image_files import decode_square

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
            display(fig)
        plt.close(fig)

    for control in (pattern, number, selected):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([ipywidgets.HBox([pattern, number, selected]), screen])
