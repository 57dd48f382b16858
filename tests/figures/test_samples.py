import numpy as np
import pytest
from figure_records import ANSWERS, IMAGES, PAIRS, PATCH_MAPS, QUALITY, SCORES, lines, texts

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
