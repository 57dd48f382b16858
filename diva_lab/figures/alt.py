"""Alternative text for a figure, made from what it draws, for those who do not see it."""

from numbers import Real

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from diva_lab.figures import style
from diva_lab.statistics import percent

MOST = 500  # characters of values
Entry = tuple[str, str, str, str]  # of a legend: colour, dashes, marker and name


def describe(fig: Figure) -> str:
    """What `fig` is (its label), then panel by panel the series with their values, and the rest of the legend.

    A line has its first and last value, marks have their range. Panels that do not fit into about `MOST` characters
    have their titles only.
    """
    names = _legend(fig)
    pictures = sum(image.get_array().ndim == 3 for ax in fig.axes for image in ax.images)
    panels = [(f"{pictures} picture{'s' * (pictures > 1)}", "")] * bool(pictures) + [
        _panel(ax, names) for ax in fig.axes
    ]
    text, left = [style.shorten(fig.get_label(), 200)], []
    for head, values in panels:
        if len(" ".join(text)) + len(values) > MOST and len(text) > 1:
            left.append(head)
        elif head or values:
            text.append(": ".join(filter(None, (head, values))))
    shown = " ".join(text)
    left += [name for *_, name in names if name not in shown]
    text += [style.shorten(f"Also {'; '.join(dict.fromkeys(left))}", 200)] * any(left)
    return " ".join(f"{part.rstrip('.')}." for part in text if part)


def _legend(fig: Figure) -> list[Entry]:
    """Colour, dashes, marker and name of all entries of all legends."""
    legends = [*fig.legends, *(ax.get_legend() for ax in fig.axes if ax.get_legend())]
    entries = [pair for one in legends for pair in zip(one.legend_handles, one.get_texts(), strict=True)]
    return [(*_look(handle), text.get_text()) for handle, text in entries]


def _look(artist: Artist) -> tuple[str, str, str]:
    """Colour, dashes and marker; of a patch its colour."""
    if isinstance(artist, Line2D):
        return to_hex(artist.get_color()), artist.get_linestyle(), str(artist.get_marker())
    colours = np.atleast_2d(artist.get_facecolor()) if hasattr(artist, "get_facecolor") else np.empty(0)
    return (to_hex(colours[0]) if colours.size else ""), "", ""


def _name(look: tuple[str, str, str], names: list[Entry]) -> str:
    """The name of the legend's entry of this colour, and where several have it, of the same dashes and marker."""
    alike = [entry for entry in names if entry[0] == look[0]]
    return max(alike, key=lambda entry: (entry[1] == look[1]) + (entry[2] == look[2]))[3] if alike else ""


def _panel(ax: Axes, names: list[Entry]) -> tuple[str, str]:
    """The titles and axes of a panel, and its values in words."""
    title = [ax.get_title(loc=place) for place in ("left", "center", "right")]
    labels = " by ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
    head = style.shorten(", ".join(filter(None, (*title, labels))), 160)
    rows = _rows(ax.yaxis)
    maps = [each.get_array() for each in (*ax.images, *ax.collections) if isinstance(each, QuadMesh) or ax.images]
    maps = [
        each for each in maps if each is not None and each.ndim == 2 and np.ma.filled(np.isfinite(each), False).any()
    ]
    if maps:
        parts = [f"{_range(maps[0])}"] + [f"{row} {_number(np.nanmean(values))} in the mean"
                                          for row, values in zip(rows.values(), maps[0], strict=False)]  # fmt: skip
    elif rows and ax.name != "polar":
        parts = _row_values(ax, rows, names)
    elif ax.axison:
        parts = _line_values(ax, names) | _mark_values(ax, names)
        parts = [f"{name} {values}".strip() for name, values in parts.items() if name or len(parts) == 1]
    else:  # a table or statements beside pictures
        parts = [words for text in ax.texts if len(words := " ".join(text.get_text().split())) > 3]
    return head, style.shorten("; ".join(dict.fromkeys(parts)), MOST)


def _rows(axis: Axis) -> dict[Real, str]:
    """Place -> name, where an axis has names for its ticks."""
    places = axis.get_major_locator()
    if not isinstance(places, FixedLocator):
        return {}
    texts = axis.get_major_formatter().format_ticks(places.locs)
    texts = {place: " ".join(str(text).split()) for place, text in zip(places.locs, texts, strict=True)}
    return {} if all(text.rstrip(" %").replace(".", "").isdigit() for text in texts.values()) else texts


def _row_values(ax: Axes, rows: dict[Real, str], names: list[Entry]) -> list[str]:
    """Of each series that the legend names the range over the rows; of a row without such a series its values."""
    series, single = {}, {place: [] for place in rows}
    for line in ax.lines:
        if line.get_marker() in ("", "None", None):
            continue  # an interval
        for x, y in (point for point in np.asarray(line.get_xydata(), float) if np.isfinite(point).all()):
            place, name = _nearest(rows, y), _name(_look(line), names)
            if name:
                series.setdefault(name, []).append((x, rows[place]))
            else:
                single[place].append(_number(x, ax.xaxis))
    for text in ax.texts:
        place, words = _nearest(rows, text.get_position()[1]), text.get_text().strip()
        single[place] = [words] if words[:1] in tuple("+−0123456789") else [*single[place], *filter(None, [words])]
    parts = [f"{name} {_ends(min(values), max(values), ax.xaxis)}" for name, values in series.items()]
    return parts + [f"{rows[place]} {' '.join(values)}" for place, values in single.items() if values and not series]


def _nearest(rows: dict[Real, str], y: Real) -> Real:
    return min(rows, key=lambda place: abs(place - y))


def _line_values(ax: Axes, names: list[Entry]) -> dict[str, str]:
    """First and last value of each series: of its strongest line, where the seeds of a mean are thin ones."""
    strongest = {}
    for line in ax.lines:
        values = np.asarray(line.get_ydata(orig=False), float)  # of names and dates too
        if not np.isfinite(values).any() or line.get_transform() != ax.transData:
            continue  # an entry of the legend, or a line across the panel
        weight = (line.get_linewidth() * (line.get_alpha() or 1), len(values))
        name = _name(_look(line), names)
        if weight > strongest.get(name, ((0, 0), None))[0]:
            strongest[name] = weight, values[np.isfinite(values)]
    around = _rows(ax.xaxis) if ax.name == "polar" else {}
    parts = {}
    for name, (_, values) in strongest.items():
        ends = list(zip(values, around.values(), strict=False))
        ends = (min(ends), max(ends)) if ends else ((values[0], ""), (values[-1], ""))
        parts[name] = _ends(*ends, ax.yaxis)
    return parts


def _mark_values(ax: Axes, names: list[Entry]) -> dict[str, str]:
    """The range of each series of marks that has no line."""
    series = {}
    for marks in (each for each in ax.collections if isinstance(each, PathCollection)):
        places, colours = np.asarray(marks.get_offsets(), float), marks.get_facecolor()
        for (_, y), colour in zip(places, np.resize(colours, (len(places), 4)), strict=True):
            alike = [name for look, *_, name in names if look == to_hex(colour)]  # variants of one objective
            series.setdefault(" and ".join(alike) or "marks", []).append((y, ""))
    with_line = {_name(_look(line), names) for line in ax.lines if len(line.get_xdata())}
    return {name: _ends(min(values), max(values), ax.yaxis) for name, values in series.items() if name not in with_line}


def _range(values: np.ndarray) -> str:
    return f"from {_number(np.nanmin(values))} to {_number(np.nanmax(values))}"


def _ends(first: tuple[Real, str], last: tuple[Real, str], axis: Axis) -> str:
    """Two values with their places: "from 12 % (Texts) to 80 % (State and Condition)"; one where they are the same."""
    one, other = (_number(value, axis) for value, _ in (first, last))
    places = [f" ({place})" if place else "" for _, place in (first, last)]
    return f"from {one}{places[0]} to {other}{places[1]}" if one != other else one


def _number(value: Real, axis: Axis | None = None) -> str:
    """A value as its axis shows it."""
    if axis is not None and (axis.axes.name == "polar" or axis.get_major_formatter() is style.PERCENT):
        return percent(value)
    in_percent = axis is not None and axis.get_label_text().endswith("%")
    return style.minus_signs(percent(value / 100) if in_percent else f"{value:.3g}")
