import numpy as np
import pytest
from figure_records import (
    ANSWERS,
    IMAGES,
    LOSSES,
    PAIRS,
    PATCH_COSINES,
    PATCH_MAPS,
    QUALITY,
    SAID,
    SCORES,
    figure,
    lines,
    texts,
)
from matplotlib.colors import to_hex

from diva_lab import figures
from diva_lab.figures import style
from diva_lab.world import PATTERNS


def test_the_image_grid_shows_every_image_over_its_caption():
    fig = figures.image_grid(IMAGES.reshape(4, 8, 8, 3), list("abcd"), columns=3)
    shown = [ax for ax in fig.axes if ax.images]
    assert [ax.get_xlabel() for ax in shown] == list("abcd")
    for ax, pixels in zip(shown, IMAGES.reshape(4, 8, 8, 3), strict=True):
        assert np.array_equal(ax.images[0].get_array(), pixels)
    with pytest.raises(ValueError, match="4 images, but 1 captions"):
        figures.image_grid(IMAGES.reshape(4, 8, 8, 3), ["a"])


def test_minimal_pairs_tick_what_the_rule_says_and_a_tie_chooses_image_2():
    fig = figures.minimal_pairs(PAIRS, IMAGES, SCORES)
    ticks = [[t.get_text() for t in ax.texts if t.get_text() in "✓✗"] for ax in fig.axes if len(ax.patches) == 4]
    none_1, dcr_1, none_2, dcr_2 = ticks
    assert (none_1, none_2) == (["✓", "✗"], ["✗", "✓"])  # the second pair: a tie for text 1
    assert (dcr_1, dcr_2) == (["✓", "✓", "✓"], ["✗", "✓"])
    assert "none (original): 0 of 2" in texts(fig)
    assert "DCR: 1 of 2" in texts(fig)


def test_minimal_pairs_refuses_scores_of_other_pairs():
    with pytest.raises(ValueError, match="1 scored by dcr"):
        figures.minimal_pairs(PAIRS, IMAGES, SCORES | {"dcr": SCORES["dcr"][:1]})


def test_answers_are_ticked_where_they_are_the_right_ones():
    fig = figures.answers(["Colour?", "How many?"], IMAGES, ANSWERS["diva"], ANSWERS)
    assert [text for text in texts(fig) if "✓" in text] == ["① ✓ red", "① ✓ red", "② ✓ blue", "① ✓ two", "② ✓ one"]
    assert [text for text in texts(fig) if "✗" in text] == ["② ✗ red", "① ✗ one", "② ✗ two"]
    with pytest.raises(ValueError, match="2 pairs of images and 1 of 'diva'"):
        figures.answers(["a", "b"], IMAGES, ANSWERS["diva"], {"diva": ANSWERS["diva"][:1]})


def test_drawn_attributes_have_their_share_its_interval_and_the_least_share_required():
    fig = figures.drawn_attributes(QUALITY, {"class": 0.8, "colour": 0.6})
    ax = fig.axes[0]
    drawn = lines(ax, style.RIGHT)
    dots, bars = np.concatenate(drawn[1::2]), drawn[::2]
    assert dots == pytest.approx(np.column_stack([QUALITY["share"], np.arange(10)]))
    assert np.array(bars)[:, :, 0] == pytest.approx(np.tile([0.75, 0.84], (10, 1)))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["class", *PATTERNS.values()]
    (required,) = (c for c in ax.collections if c.get_label() == "least share required")
    ends = [segment.tolist() for segment in required.get_segments() if len(segment)]
    colour = QUALITY["attribute"].tolist().index("colour")
    assert np.array(ends) == pytest.approx(
        np.array([[[x, y - 0.34], [x, y + 0.34]] for x, y in ((0.8, 0), (0.6, colour))])
    )


def test_patch_maps_stand_beside_their_images_on_one_scale_and_masks_have_a_colour_for_each_class():
    masks = {"regions": np.arange(8).reshape(2, 2, 2)}
    fig = figures.patch_maps(IMAGES, PATCH_MAPS | masks)
    rows = np.array([ax.images[0] for ax in fig.axes]).reshape(2, 6)
    for k, row in enumerate(rows):
        shown = [image.get_array() for image in row]
        assert all(np.array_equal(*both) for both in zip(shown[:2], IMAGES[k], strict=True))
        for image, maps in zip(row[2:], (PATCH_MAPS | masks).values(), strict=True):
            assert np.array_equal(image.get_array(), maps[k])
    largest = max(PATCH_MAPS[name].max() for name in ("before", "after"))
    assert {image.get_clim() for image in rows[:, 3:5].flat} == {(0, largest)}
    colours = {image.to_rgba(value)[:3] for image in rows[:, 5] for value in image.get_array().ravel()}
    assert len(colours) == 8 and "before" in texts(fig)
    with pytest.raises(ValueError, match="2 groups of images, but 1 maps of 'before'"):
        figures.patch_maps(IMAGES, {"before": PATCH_MAPS["before"][:1]})


def test_the_statement_that_each_model_prefers_is_dark_and_none_where_the_loss_is_undecided():
    def coloured(losses: np.ndarray | None) -> list[tuple[int, int]]:
        table = figures.own_image(IMAGES[0, 0], ["one", "two"], SAID, {}, losses).axes[-1]
        cells = [patch for patch in table.patches if to_hex(patch.get_facecolor()) == style.INK.lower()]
        return [(int(cell.get_x()), int(cell.get_y() > 1)) for cell in cells]  # column and statement

    assert sorted(coloured(LOSSES)) == [(0, 0), (1, 0), (2, 0)]
    assert sorted(coloured(LOSSES[:, ::-1])) == [(0, 0), (1, 0), (2, 1)]
    assert sorted(coloured(LOSSES - LOSSES.mean(0))) == sorted(coloured(None)) == [(0, 0), (1, 0)]
    assert {"your image", "DIVA", "−0.200", "0.300, preferred", "① a photo of one"} <= set(texts(figure("own_image")))


def test_the_map_of_a_patch_is_its_row_of_the_cosines_and_a_frame_is_at_one_place_on_every_grid():
    shown = [ax for ax in figure("patch_similarity").axes if ax.images]
    rows = {"none": 1 * 4 + 3, "diva": 0 * 2 + 1}  # of the patch at .3 of the height and .8 of the width
    for ax, (name, row) in zip(shown[1:], rows.items(), strict=True):
        each = PATCH_COSINES[name]
        assert np.array_equal(ax.images[0].get_array().ravel(), each[row])
    frames = [(ax.patches[0].get_xy(), ax.patches[0].get_width()) for ax in shown]
    assert frames == [((5.5, 1.5), 2), ((2.5, 0.5), 1), ((0.5, -0.5), 1)]  # of 8 pixels, 4 patches and 2
    assert len({ax.images[0].get_clim() for ax in shown[1:]}) == 1
