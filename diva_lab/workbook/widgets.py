"""Interactive views: the figures of figures.py with controls before them, and without where nobody can use any.

Widgets live in a session, never in a committed notebook: with `interactive=False`, as the notebooks run by default,
a function here returns a still figure and makes no widget at all.
"""

from collections.abc import Callable, Mapping

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from jaxtyping import UInt8
from matplotlib.figure import Figure

from diva_lab.figures.samples import minimal_pairs
from diva_lab.image_files import decode_square

PairImages = Callable[[pd.Series], UInt8[np.ndarray, "2 h w 3"]]


def say(text: str) -> None:
    """Show `text`, Markdown, as the output of a notebook's cell."""
    display(Markdown(text))


def open_pair(pair: pd.Series, px: int = 32) -> UInt8[np.ndarray, "2 px px 3"]:
    """The two pictures of a row of `read_pairs`, brought to `px` by `px`."""
    return np.stack([decode_square(pair[name], px) for name in ("image_1", "image_2")])


def pair_explorer(
    pairs: pd.DataFrame,
    scores: Mapping[str, pd.DataFrame],
    images: PairImages = open_pair,
    interactive: bool = False,
    still: int = 6,
    source: str = "",
) -> Figure | ipywidgets.VBox:
    """Choose pattern, pair and encoders, and see the pair with its similarities and verdicts.

    Args:
        pairs: as `read_pairs` gives them.
        scores: encoder -> the scores of all `pairs`, in their order, as `score_pairs` gives them.
        images: a row of `pairs` -> its two pictures.
        interactive: controls where True; a still figure of `still` pairs where False.
        still: how many pairs the figure shows, spread evenly over `pairs` so that they are nobody's choice.
        source: printed under the figure.

    Raises:
        ValueError: where the scores are not those of the pairs, or there is nothing to show.
    """
    if not len(pairs) or not scores:
        raise ValueError(f"nothing to explore: {len(pairs)} pairs, {len(scores)} encoders")
    for name, table in scores.items():
        if len(table) != len(pairs):
            raise ValueError(f"{len(pairs)} pairs, but {name} has scores for {len(table)}")

    def draw(rows: list[int], encoders: tuple[str, ...]) -> Figure:
        chosen = pairs.iloc[rows]
        pictures = np.stack([images(pair) for _, pair in chosen.iterrows()])
        return minimal_pairs(chosen, pictures, {name: scores[name].iloc[rows] for name in encoders}, source)

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
    shown = ipywidgets.SelectMultiple(options=encoders, value=encoders[-2:], description="encoders", rows=3)
    screen = ipywidgets.Output()

    def show(_: object = None) -> None:
        rows = rows_of[pattern.value]
        number.max = len(rows)
        fig = draw([int(rows[number.value - 1])], shown.value or encoders[:1])
        screen.clear_output(wait=True)
        with screen:
            display(fig)
        plt.close(fig)

    for control in (pattern, number, shown):
        control.observe(show, "value")
    show()
    return ipywidgets.VBox([ipywidgets.HBox([pattern, number, shown]), screen])
