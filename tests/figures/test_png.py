"""What a saved figure looks like: the colours of its series, its resolution, its text."""

import io

import numpy as np
import pandas as pd
import pytest
from figure_records import DOSE, DRAWN, RNG, report
from matplotlib.colors import to_rgba
from matplotlib.legend import Legend
from PIL import Image

from diva_lab import figures
from diva_lab.figures import style
from diva_lab.figures.feedback import ALIGNMENTS, DECISIONS, ROWS


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def series_colours(fig) -> dict[str, float]:
    """Label -> how far the nearest pixel of a legend's entry in the small PNG is from its colour; not of thin lines."""
    pixels, far = pixels_of(figures.to_png(fig, small=True)), {}
    for legend in fig.findobj(Legend):
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            if handle.get_linewidth() < 1.2 and not hasattr(handle, "get_facecolor"):
                continue  # thinner than a pixel: a line of reference
            box = handle.get_window_extent().padded(3)  # where it was drawn last: in the PNG
            x0, x1 = (max(round(x), 0) for x in (box.x0, box.x1))
            y0, y1 = (max(round(len(pixels) - y), 0) for y in (box.y1, box.y0))
            swatch = pixels[y0:y1, x0:x1].reshape(-1, 3)
            far[text.get_text()] = np.abs(swatch - colour_of(handle)).max(axis=1).min()
    return far


def colour_of(handle) -> np.ndarray:
    """The colour of a legend's entry as seen on white, 0..255."""
    if hasattr(handle, "get_facecolor"):
        *rgb, alpha = to_rgba(handle.get_facecolor())
    else:
        *rgb, alpha = to_rgba(handle.get_color(), handle.get_alpha())
    return 255 * (1 - alpha * (1 - np.array(rgb)))


def every_objective() -> dict:
    """Figures with a legend of every objective, alignment and term: how to draw them, and the names that they need."""
    names = [*figures.COLOURS]
    reports = pd.DataFrame([report(0.1 + k / 20) for k in range(len(names))], index=names)
    steps = [(name, 0, step, 0.9 - step / 1e3 * k, 0.3 + step / 1e3 * k, 0.5)
             for k, name in enumerate(names) for step in (0, 10, 20)]  # fmt: skip
    paths = pd.DataFrame(steps, columns=["objective", "seed", "step", "zeroshot", "pairs/mean", "probe/mean"])
    terms = {term: RNG.random(40) + k for k, term in enumerate(style.TERMS)}
    mixes = [(*row, 0, mix, mix == 1, 0.2 + mix * k / 20, 0.9 - mix / 9, 0.8) for k, row in enumerate(ROWS)
             for mix in (0.0, 0.5, 1.0)]  # fmt: skip
    columns = ["objective", "alignment", "seed", "mix", "chosen", "pairs/mean", "zeroshot", "nmi"]
    dose = pd.DataFrame([(name, s, i, 0.2, 0.5, 0.9 - i / 9e3, 0.8 + k / 50) for k, name in enumerate(ALIGNMENTS)
                         for s in (0, 1) for i in (0, 500)],
                        columns=[*DOSE.columns.drop("align_seed")])  # fmt: skip
    labels = list(map(style.label_of, names))
    return {
        "pair_scores": (lambda: figures.pair_scores(reports), labels),
        "trade_off": (lambda: figures.trade_off(paths), labels),
        "runs_scatter": (lambda: figures.runs_scatter(paths, "zeroshot", "pairs/mean"), labels),
        "loss_curves": (lambda: figures.loss_curves({"mine": pd.DataFrame({"step": range(40), **terms})}),
                        map(style.label_of, style.TERMS)),
        "front": (lambda: figures.front(pd.DataFrame(mixes, columns=columns)), [name for name, *_ in ROWS.values()]),
        "dose_curves": (lambda: figures.dose_curves(dose), ALIGNMENTS),
        "readability": (DRAWN["readability"], [name for name, _ in DECISIONS.values()]),
    }  # fmt: skip


EVERY = every_objective()


@pytest.mark.parametrize("name", EVERY)
def test_every_entry_of_a_legend_has_its_own_colour_in_the_small_png(name):
    draw, names = EVERY[name]
    far = series_colours(draw())
    assert set(names) <= set(far)
    assert max(far.values()) <= 2, far


@pytest.mark.parametrize(
    "name", ["selection", "recovered_fraction", "theorem_bounds", "affine_range", "parts_conflict"]
)
def test_colours_of_other_series_are_kept_too(name):
    far = series_colours(DRAWN[name]())
    assert far and max(far.values()) <= 2, far


def test_a_palette_keeps_the_worlds_hues():
    hues = np.array([(242, 31, 31), (242, 242, 31), (31, 242, 31), (31, 242, 242), (31, 31, 242), (242, 31, 242)])
    noise = RNG.integers(-8, 9, (6, 32, 32, 3))
    fig = figures.image_grid((hues[:, None, None] + noise).clip(0, 255).astype(np.uint8), [""] * 6)
    pixels = pixels_of(figures.to_png(fig, small=True)).reshape(-1, 3)
    for hue in hues:
        near = pixels[np.abs(pixels - hue).max(axis=1) <= 12]
        assert len(near) > 1000
        assert np.abs(near.mean(axis=0) - hue).max() < 4


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_saved_small_and_to_the_same_bytes_each_time(name, tmp_path):
    first, second = (figures.save(DRAWN[name](), tmp_path / "new" / f"{i}.png").read_bytes() for i in range(2))
    assert first == second
    assert len(first) < 60_000
    assert Image.open(io.BytesIO(first)).mode == "P"


def test_a_figure_that_is_not_committed_has_all_colours_and_twice_the_resolution_and_both_are_opaque_with_their_text():
    fig = DRAWN["gain_by_readability"]()
    full, small = (Image.open(io.BytesIO(figures.to_png(fig, small))) for small in (False, True))
    assert (full.mode, small.mode) == ("RGB", "P") and len(small.getcolors()) < len(full.getcolors(10**6))
    assert np.array(full.size) == pytest.approx(2 * np.array(small.size), rel=0.02)
    for image in (full, small):  # light on a dark page too
        assert "transparency" not in image.info and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert image.info["Description"] == figures.describe(fig)
