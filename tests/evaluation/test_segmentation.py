import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_jaccard_index

from diva_lab import evaluate
from diva_lab.evaluation import segmentation as module
from diva_lab.evaluation.patches import IGNORED, count_classes, paint_patches
from diva_lab.evaluation.segmentation import (
    Segmented,
    body_maps,
    cluster_patches,
    iou,
    iou_counts,
    kmeans_rows,
    linear_rows,
    match_clusters,
    miou_rows,
    precision_rows,
    presence_rows,
    region_maps,
    whole_iou,
    zero_shot_rows,
)
from diva_lab.models.encoders import Encoder
from diva_lab.world import CLASSES, PARTS, REGIONS, SMALL_PARTS, World, draw_scenes

NAMES = ("land", "water", "air")


def segmented(n: int = 40, seed: int = 0, noise: float = 0.1, blocks: bool = True) -> Segmented:
    """16 patches of 2 x 2 pixels; a token says its patch's class up to noise; without `blocks` pixels are mixed."""
    random = np.random.default_rng(seed)
    labels = random.integers(3, size=(n, 16))
    maps = paint_patches(labels, 8).astype(np.uint8)
    if not blocks:
        maps[random.random(maps.shape) < 0.3] = 1
        maps[random.random(maps.shape) < 0.1] = IGNORED
    counts = count_classes(maps, 16, 3)
    tokens = torch.tensor([[4.0, 0, 1, 0], [0, 4, 0, 1], [-4, 0, 0, 1]])[counts.argmax(2)]
    return Segmented(tokens + noise * torch.from_numpy(random.normal(size=tokens.shape)).float(), maps, counts)


def by_category(rows) -> dict[str, dict]:
    return {row["category"]: row for row in rows}


# --- one confusion matrix ---------------------------------------------------------------------------------------


def test_intersection_over_union_by_hand():
    maps = np.array([[[0, 0], [1, IGNORED]], [[1, 1], [1, 0]]], np.uint8)
    counts, answers = count_classes(maps, 4, 3), np.array([[0, 1, 1, 2], [1, 1, 0, 0]])
    sums = iou_counts(answers, counts)
    assert sums[0].tolist() == [[1, 1, 0], [1, 2, 0], [2, 1, 0]], "right, answered, true; the ignored pixel is nowhere"
    values = iou(sums.sum(0))
    assert values[:2].tolist() == [2 / 4, 3 / 5] and np.isnan(values[2])


@pytest.mark.parametrize("blocks", [True, False])
def test_the_sums_of_images_give_what_torchmetrics_reads_from_the_pixels(blocks):
    found, answers = segmented(blocks=blocks), np.random.default_rng(1).integers(3, size=(40, 16))
    pixels, maps = torch.from_numpy(paint_patches(answers, 8)), torch.from_numpy(found.maps.astype(int))
    expected = multiclass_jaccard_index(pixels, maps, 3, average="macro", ignore_index=IGNORED)
    own = iou(iou_counts(answers, found.counts).sum(0))
    assert own.mean() == pytest.approx(float(expected), abs=1e-6)
    np.testing.assert_allclose(whole_iou(answers, found.maps, 3), own, atol=1e-6)
    rows = by_category(miou_rows("miou", answers, found, NAMES, 0))
    assert rows["all"]["value"] == pytest.approx(float(expected), abs=1e-6) and list(rows) == ["all", *NAMES]


def test_a_class_that_neither_occurs_nor_is_answered_is_no_part_of_the_mean():
    found = segmented()
    wide = Segmented(found.tokens, found.maps, count_classes(found.maps, 16, 4))
    rows = by_category(miou_rows("miou", wide.labels, wide, (*NAMES, "fire"), 0))
    assert rows["all"]["value"] == 1 and "fire" not in rows


def test_right_answers_score_1_shuffled_ones_chance_and_intervals_hold_the_value():
    found = segmented(blocks=False)
    assert (by_category(miou_rows("miou", found.labels, found, NAMES, 0))["all"]["value"]) > 0.6
    answers = np.random.default_rng(2).permutation(found.labels.ravel()).reshape(found.labels.shape)
    for row in miou_rows("miou", answers, found, NAMES, 0):
        assert row["low"] < row["value"] < row["high"] and row["low"] - 0.01 < row["chance"] < row["high"] + 0.01
    assert list(miou_rows("m", answers, found, NAMES, 3)) == list(miou_rows("m", answers, found, NAMES, 3))


def test_intervals_narrow_with_the_root_of_the_number_of_images():
    widths = []
    for n in (30, 480):
        found = segmented(n)
        answers = np.where(np.random.default_rng(0).random((n, 16)) < 0.3, 0, found.labels)
        row = next(miou_rows("miou", answers, found, NAMES, 0))
        widths.append(row["high"] - row["low"])
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.35)


# --- clusters, heads and names ----------------------------------------------------------------------------------


def test_clusters_are_matched_with_classes_whatever_their_numbers():
    found = segmented()
    clusters = cluster_patches(found, seed=0)
    expected = match_clusters(clusters, found.counts)
    for order in ([1, 2, 0], [2, 1, 0]):
        assert np.array_equal(match_clusters(np.array(order)[clusters], found.counts), expected)
    assert np.array_equal(expected, found.labels)
    row = next(kmeans_rows(found, NAMES, 0))
    assert row["value"] == 1 and 0.15 < row["chance"] < 0.3


def test_a_linear_head_reads_the_class_and_the_position_alone_does_not():
    known, found = segmented(60, seed=1), segmented(40, seed=2)
    rows = {(row["metric"], row["category"]): row["value"] for row in linear_rows(known, found, NAMES, 0)}
    assert rows["miou, linear", "all"] == 1 and rows["miou, position", "all"] < 0.35


def test_a_head_is_fitted_on_patches_in_which_pixels_count_and_on_no_more_than_is_allowed(monkeypatch):
    found = segmented()
    found.maps[:, :2], found.maps[20:] = IGNORED, IGNORED
    found = Segmented(found.tokens, found.maps, count_classes(found.maps, 16, 3))
    assert len(found.draw(0)[0]) == 20 * 12
    monkeypatch.setattr(module, "FITTED", 50)
    (tokens, labels), again = found.draw(0), found.draw(0)
    assert len(tokens) == len(labels) == 50 and torch.equal(tokens, again[0])
    one = Segmented(found.tokens, found.maps * 0, count_classes(found.maps * 0, 16, 3))
    assert (module.linear_answers(one, found, 0) == 0).all(), "a single class needs no regression"


class Speaker(Encoder):
    """Patches are black, grey or white, and so are the names."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.register_buffer("mean", torch.zeros(1))

    def patch_embeddings(self, images):
        level = F.avg_pool2d(images[:, :1], 2).flatten(1)
        return F.normalize(torch.stack([1 - level, 2 - (4 * level - 2).abs(), level], dim=2), dim=2)

    def encode_text(self, texts):
        return torch.eye(3)[[{"a": 0, "a water": 1, "a air": 2, "a land": 0}[text.strip()] for text in texts]]


@pytest.mark.parametrize("rest", [False, True])
def test_a_patch_has_the_class_whose_name_is_nearest_and_the_rest_is_asked_without_a_name(rest):
    found = segmented()
    images = torch.from_numpy(found.maps * 127)[:, None].repeat(1, 3, 1, 1)
    rows = list(zero_shot_rows(Speaker(), images, found, NAMES, rest, ("a {}",), 0))
    values = {(row["metric"], row["category"]): row["value"] for row in rows}
    assert values["miou, zero-shot", "all"] == 1 and values["precision, zero-shot", "all"] == 1
    assert (("precision, zero-shot", "land") in values) is not rest


def test_the_mean_precision_is_that_of_the_names_that_occur():
    random = np.random.default_rng(0)
    present = {name: random.random((50, 16)) < share for name, share in (("land", 0.3), ("air", 0.1), ("water", 0))}
    scores = {name: there + random.normal(size=there.shape) for name, there in present.items()}
    rows = by_category(precision_rows("precision", scores, present, 0))
    assert list(rows) == ["all", "land", "air"]
    assert rows["all"]["value"] == pytest.approx((rows["land"]["value"] + rows["air"]["value"]) / 2)
    assert all(row["chance"] < row["low"] < row["value"] < row["high"] for row in rows.values())
    assert not list(precision_rows("precision", scores, {"water": present["water"]}, 0))


# --- the tiny world ---------------------------------------------------------------------------------------------


def test_the_worlds_maps_name_its_regions_and_its_bodies():
    scenes = draw_scenes(50, 3)
    parts = World().parts(scenes)
    regions, bodies = region_maps(parts), body_maps(parts, scenes["class"])
    for name in ("sky", "ground", "sign"):
        assert (regions[parts == PARTS.index(name)] == REGIONS.index(name)).all()
        assert (bodies[parts == PARTS.index(name)] == 0).all()
    for scene, part, region, body in zip(scenes, parts, regions, bodies, strict=True):
        on = np.isin(part, [PARTS.index("body"), PARTS.index("arrowhead")])
        assert (region[on] == REGIONS.index("body")).all() and (body[on] == 1 + scene["class"]).all()
    small = np.isin(parts, [PARTS.index(name) for name in ("ball", "dots", "tail")])
    assert np.array_equal(regions == IGNORED, small) and np.array_equal(bodies == IGNORED, small)


def test_a_small_part_is_present_in_a_patch_that_shows_one_pixel_of_it():
    parts = [World().parts(draw_scenes(80, seed)) for seed in (0, 1)]
    counts = [count_classes(own, 16, len(PARTS)) for own in parts]
    tokens = [torch.from_numpy((own > 0).astype(np.float32)) for own in counts]
    rows = {(row["metric"], row["category"]): row for row in presence_rows(tokens, parts, 0)}
    for name in SMALL_PARTS:
        row = rows["presence, linear", name]
        assert row["value"] == 1 and row["chance"] == (counts[1][..., PARTS.index(name)] > 0).mean()
        assert rows["presence, position", name]["value"] <= 1
    assert rows["presence, position", "ball"]["value"] < 0.6


def test_the_worlds_table_has_every_score_with_its_oracle_chance_and_interval(small_world):
    table = evaluate(["tiny"], ["world-segmentation"])
    assert not table[["value", "low", "high", "chance"]].isna().any(axis=None)
    assert set(table["set"]) == {"world-segmentation, layer -2"} and set(table["n"]) == {small_world}
    whole = table[table["category"] == "all"].set_index("metric")["value"]
    assert list(whole.index) == [
        "miou, k-means", "miou, linear", "miou, position", "miou, oracle", "miou, zero-shot", "precision, zero-shot",
        "miou, zero-shot's oracle", "presence, linear", "presence, position",
    ]  # fmt: skip
    assert max(whole["miou, k-means"], whole["miou, position"]) < whole["miou, linear"] < whole["miou, oracle"] < 0.75
    names = table.groupby("metric")["category"].apply(list)
    assert names["miou, linear"] == ["all", *REGIONS] and names["presence, linear"] == ["all", *SMALL_PARTS]
    assert set(names["miou, zero-shot"]) == {"all", "the rest", *CLASSES} and set(names["precision, zero-shot"]) == {
        "all", *CLASSES
    }  # fmt: skip
