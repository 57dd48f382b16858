"""What a notebook shows, and how JupyterLab saves it."""

from collections.abc import Callable

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from diva_lab.figures.style import save
from diva_lab.paths import ROOT

GALLERY = ROOT / "figures"


def say(text: str) -> None:
    """Show `text`, Markdown, as the output of a notebook's cell; in a script it is printed."""
    if get_ipython() is None:
        print(text)
    else:
        display(Markdown(text))


def make_show(save_figures: bool) -> Callable[[Figure, str], None]:
    """A notebook's `show(fig, name)`: it displays the figure, and writes figures/NAME.png if `save_figures` is true."""

    def show(fig: Figure, name: str) -> None:
        if save_figures:
            save(fig, GALLERY / f"{name}.png")
        plt.show()

    return show


def drop_python_version(model: dict, **_: object) -> None:
    """Leave the kernel's Python version out of a notebook that JupyterLab saves: it differs between machines.

    `make lab` sets it as `ContentsManager.pre_save_hook`; `model` is the file that is about to be written.
    """
    if model["type"] == "notebook":
        model["content"]["metadata"].get("language_info", {}).pop("version", None)
