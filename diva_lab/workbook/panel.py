"""A live panel while a notebook's cell trains: loss, terms, conflict, P and D so far, speed and time left.

`show_training()` turns it on. Where no front end answers, as under papermill and nbval, training prints lines.
"""

import html
import time

import ipywidgets
from IPython.display import display

from diva_lab.figures.style import label_of
from diva_lab.statistics import percent
from diva_lab.training.progress import PANELS

WIDTH, HEIGHT = 360, 60  # of the curve of the loss, in pixels
POINTS = 120  # of it at most
EVERY = 0.5  # seconds between two drawings
SCORES = ("pairs/mean", "probe/mean", "zeroshot", "nmi")


def show_training() -> None:
    """Show a panel in place of a bar, in this kernel, where a front end answers."""
    PANELS[:] = [Panel]


class Panel:
    """A `training.progress.View` in a notebook's output; the arguments are those of `Lines`."""

    def __init__(self, total: int, first: int, images: int, label: str):
        self.total, self.first, self.images, self.label = total, first, images, label
        self.done, self.before, self.drawn = first, 0.0, 0.0  # steps; seconds of training before; time of drawing
        self.losses: list[float] = []
        self.line: dict[str, float] = {}
        self.rows: list[dict] = []
        self.text = "starting ..."
        self.html = ipywidgets.HTML()
        display(self.html)
        self.draw()

    def step(self, done: int, line: dict[str, float]) -> None:
        if not self.losses:
            self.before = line["seconds"]
        self.done, self.line, self.text = done, line, "training"
        self.losses.append(line["loss"])
        if time.monotonic() > self.drawn + EVERY or done == self.total:
            self.draw()

    def wait(self, text: str) -> None:
        self.text = text
        self.draw()

    def report(self, done: int, row: dict[str, float | str]) -> None:
        self.rows.append(row)
        self.text = "training"
        self.draw()

    def close(self) -> None:
        self.text = "finished" if self.done == self.total else "stopped; run the cell again, it goes on from there"
        self.draw()

    def draw(self) -> None:
        self.drawn = time.monotonic()
        cells = "".join(
            f"<tr><td style='padding-right:1.5em'>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
            for name, value in self.facts().items()
        )
        self.html.value = (
            f"<div><b>{html.escape(self.label)}</b> · {html.escape(self.text)}<br>"
            f"<progress max='{self.total}' value='{self.done}' style='width:{WIDTH}px'></progress>"
            f"<table>{cells}</table>{curve(self.losses)}</div>"
        )

    def facts(self) -> dict[str, str]:
        """What the table says, by name."""
        facts = {"step": f"{self.done} of {self.total}"}
        if self.line:
            facts["loss"] = f"{self.line['loss']:.4f}"
            terms = [name.removeprefix("norm_") for name in self.line if name.startswith("norm_")]
            facts |= {name: f"{self.line[name]:.4f}" for name in terms if len(terms) > 1 and name in self.line}
        if "cos" in self.line:
            facts["cosine of the terms' gradients"] = f"{self.line['cos']:+.2f}"
        for name in [name for name in SCORES if self.rows and name in self.rows[-1]]:
            first, last = (self.rows[k][name] for k in (0, -1))
            facts[label_of(name)] = f"{percent(last)}, {100 * (last - first):+.1f} since its first evaluation"
        steps = len(self.losses) - 1
        if steps > 0 and (seconds := self.line["seconds"] - self.before) > 0:
            facts["images a second"] = f"{steps * self.images / seconds:.1f}"
            facts["time left"] = f"{(self.total - self.done) * seconds / steps / 60:.1f} minutes of training"
        return facts


def curve(losses: list[float]) -> str:
    """The losses as a line in SVG, in the colour of the text; means where there are more than `POINTS`."""
    size = -(-len(losses) // POINTS) or 1
    means = [sum(part) / len(part) for part in (losses[k : k + size] for k in range(0, len(losses), size))]
    if len(means) < 2:
        return ""
    low, span = min(means), (max(means) - min(means)) or 1
    points = " ".join(
        f"{k * WIDTH / (len(means) - 1):.1f},{HEIGHT - (value - low) / span * HEIGHT:.1f}"
        for k, value in enumerate(means)
    )
    return (
        f"<svg width='{WIDTH}' height='{HEIGHT + 4}' viewBox='0 -2 {WIDTH} {HEIGHT + 4}' role='img' "
        f"aria-label='loss, from {means[0]:.4f} to {means[-1]:.4f}'>"
        f"<polyline points='{points}' fill='none' stroke='currentColor' stroke-width='1.5'/></svg>"
    )
