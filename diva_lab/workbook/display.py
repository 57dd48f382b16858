"""What a notebook shows, and how JupyterLab saves it."""

from collections.abc import Callable

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import Image, Markdown, display
from ipywidgets import Widget
from matplotlib.figure import Figure

from diva_lab.figures.alt import describe
from diva_lab.figures.png import save, to_png
from diva_lab.paths import ROOT
from diva_lab.workbook.panel import show_training

GALLERY = ROOT / "figures"


def say(text: str) -> None:
    """Show `text`, Markdown, as the output of a notebook's cell; in a script it is printed."""
    if get_ipython() is None:
        print(text)
    else:
        display(Markdown(text))


def show_figure(fig: Figure, small: bool = False) -> None:
    """Show `fig` as an output, its alternative text in the output's metadata, and close it; `small` as in `to_png`.

    In a script the text is printed.
    """
    if get_ipython() is None:
        print(describe(fig))
    else:
        display(Image(to_png(fig, small), alt=describe(fig), retina=not small))
    plt.close(fig)


def make_show(save_figures: bool) -> Callable[[Figure | Widget, str], None]:
    """A notebook's `show(fig, name)`: it displays the figure, in full colour and resolution, or controls as they are.

    If `save_figures` is true, as where notebooks are run to be committed, it is small, and also figures/NAME.png. From
    here on training shows a live panel, where a front end answers.
    """
    show_training()

    def show(fig: Figure | Widget, name: str) -> None:
        if not isinstance(fig, Figure):
            return display(fig)
        if save_figures:
            save(fig, GALLERY / f"{name}.png")
        show_figure(fig, save_figures)

    return show


def drop_python_version(model: dict, **_: object) -> None:
    """Leave the kernel's Python version out of a notebook that JupyterLab saves: it differs between machines.

    `make lab` sets it as `ContentsManager.pre_save_hook`; `model` is the file that is about to be written.
    """
    if model["type"] == "notebook":
        model["content"]["metadata"].get("language_info", {}).pop("version", None)
