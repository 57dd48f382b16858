import numpy as np
import pytest

from diva_lab.evaluation import patches
from diva_lab.evaluation.patches import IGNORED, count_classes, paint_patches, pixel_patches, some_world_scenes
from diva_lab.models.encoders import load_encoder


@pytest.mark.parametrize(("px", "side"), [(32, 4), (384, 27), (224, 16)])
def test_every_pixel_belongs_to_a_patch_and_what_is_left_over_to_the_last(px, side):
    rows = pixel_patches(px, side)
    assert rows.shape == (px,) and set(rows) == set(range(side)) and (np.diff(rows) >= 0).all()
    assert (np.bincount(rows)[:-1] == px // side).all()


def test_the_classes_of_a_patch_are_counted_without_the_pixels_that_do_not_count():
    maps = np.zeros((2, 4, 4), np.uint8)
    maps[0, :2, 2:], maps[0, 0, 3], maps[1, 3, 0], maps[1, 3, 1] = 2, IGNORED, 1, 3
    counts = count_classes(maps, 4, 3)
    assert counts[0].tolist() == [[4, 0, 0], [0, 0, 3], [4, 0, 0], [4, 0, 0]]
    assert counts[1].tolist() == [[4, 0, 0], [4, 0, 0], [2, 1, 0], [4, 0, 0]], "of three classes number 3 is none"


def test_a_patchs_number_is_painted_on_its_pixels():
    painted = paint_patches(np.array([[1, 2, 3, 4]]), 4)
    assert painted.tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]]
    labels = np.random.default_rng(0).integers(5, size=(3, 9))
    counts = count_classes(paint_patches(labels, 31).astype(np.uint8), 9, 5)
    assert np.array_equal(counts.argmax(2), labels) and (counts.sum((1, 2)) == 31**2).all()


def test_a_large_tower_is_shown_as_many_scenes_as_its_tokens_may_take(small_world, monkeypatch):
    encoder = load_encoder("tiny")
    assert len(some_world_scenes(encoder, 2, -2)[0]) == small_world
    monkeypatch.setattr(patches, "HELD", 16 * 128 * 7)
    scenes, images = some_world_scenes(encoder, 2, -2)
    assert len(scenes) == len(images) == 7
