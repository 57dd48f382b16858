"""A figure as a PNG: the alternative text that is made from what it draws, and the colours of one that is committed."""

import io
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.spatial import KDTree

from diva_lab.figures import style
from diva_lab.figures.alt import describe

SHARPER = 2  # times the resolution of a figure that is committed: on a screen, where bytes do not matter
PALETTE = 48  # colours of a figure that is committed


def save(fig: Figure, path: str | Path) -> Path:
    """Write `fig` as the small PNG `path`, folders included, the same bytes each time. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(fig, small=True))
    return path


def to_png(fig: Figure, small: bool = False) -> bytes:
    """`fig` as a PNG that holds its alternative text as `Description`.

    Args:
        small: to be committed: a palette image, a quarter of the bytes. Else in all colours, twice as fine (`SHARPER`).
    """
    dpi = style.STYLE["savefig.dpi"] * (1 if small else SHARPER)
    fig.savefig(full := io.BytesIO(), format="png", dpi=dpi, bbox_inches="tight")
    image, info = Image.open(full).convert("RGB"), PngInfo()
    info.add_itxt("Description", describe(fig), zip=True)
    if small:
        image = _in_palette(np.asarray(image), _series_colours(fig))
    image.save(file := io.BytesIO(), format="png", optimize=small, dpi=(dpi, dpi), pnginfo=info)
    return file.getvalue()


def _series_colours(fig: Figure) -> np.ndarray:
    """The colours, [n, 3] in 0..255, of everything that is drawn in a colour of its own, seen on white."""
    colours = [to_rgba_array([*style.HOUSE, *style.COLOURS.values()])]
    for artist in fig.findobj(lambda artist: getattr(artist, "get_array", lambda: None)() is None):
        for name in ("color", "markerfacecolor", "markeredgecolor", "facecolor", "edgecolor"):
            if hasattr(artist, f"get_{name}"):
                rgba = to_rgba_array(getattr(artist, f"get_{name}")())
                colours.append(np.column_stack([rgba[:, :3], rgba[:, 3] * (artist.get_alpha() or 1)])
                               if isinstance(artist, Line2D) else rgba)  # fmt: skip
    rgba = np.unique(np.concatenate(colours), axis=0)
    return 255 * (1 - rgba[:, 3:] * (1 - rgba[:, :3]))


def _in_palette(pixels: np.ndarray, series: np.ndarray) -> Image.Image:
    """A palette image of `pixels` [h, w, 3]: the colours of `series` in them stay, the others are merged by k-means.

    K-means of all would merge thin lines of two series into one colour.
    """
    codes, place, counts = np.unique(pixels.reshape(-1, 3) @ [65536, 256, 1], return_inverse=True, return_counts=True)
    present = codes[:, None] // [65536, 256, 1] % 256  # [colours, 3]
    near = KDTree(present).query_ball_point(series, 2, p=np.inf)  # opacity rounds
    pinned = np.unique([of[np.argmax(counts[of])] for of in near if of]).astype(int)
    pinned = pinned[np.argsort(-counts[pinned], kind="stable")][: 256 - PALETTE]
    rest = np.isin(place, pinned, invert=True)
    palette = present[pinned]
    if rest.any():
        others = Image.fromarray(pixels.reshape(1, -1, 3)[:, rest])
        others = others.quantize(max(PALETTE - len(pinned), 16), kmeans=1, dither=Image.Dither.NONE)
        palette = np.concatenate([palette, np.reshape(others.getpalette(), (-1, 3))])
    nearest = KDTree(palette).query(present)[1]
    image = Image.fromarray(nearest[place].astype(np.uint8).reshape(pixels.shape[:2]), "P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image
