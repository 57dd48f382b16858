import csv
import doctest
import hashlib
import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import diva_lab.world
from diva_lab.world import (
    ATTRIBUTES,
    CLASSES,
    DETAILS,
    FAMILIES,
    NUISANCES,
    PARTS,
    PATTERNS,
    World,
    caption,
    captions,
    draw_pairs,
    draw_scenes,
    vocabulary,
    write_pairs,
)

FROZEN = {  # world seed -> sha256 of the bytes of `World(seed).render(draw_scenes(64, 0))`
    0: "f4dbf5c9b89de9f664e823466dc396bb114fea45adf4f1baac1171a7cc056e00",
    3: "3e5da398ad0b3c56485ff6682e1c61dc57e6c1cab825e962decd3541082d888d",
}


def digest(world: World) -> str:
    return hashlib.sha256(world.render(draw_scenes(64, 0)).tobytes()).hexdigest()


# --- scenes -----------------------------------------------------------------------------------------------------


def test_the_world_has_twelve_classes_in_four_families_and_mmvps_nine_patterns():
    assert len(CLASSES) == len(set(CLASSES)) == 12 and len(FAMILIES) == 4
    assert len(DETAILS) == len(set(PATTERNS.values())) == 9 and list(PATTERNS) == list(DETAILS)


def test_scenes_depend_on_the_seed_alone():
    assert (draw_scenes(20, 5) == draw_scenes(20, 5)).all()
    assert (draw_scenes(20, (5, 1)) != draw_scenes(20, (5, 2))).all()


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_each_value_of_an_attribute_is_as_frequent_as_the_others(attribute):
    n, count = 20_000, len(CLASSES if attribute == "class" else DETAILS[attribute])
    frequencies = np.bincount(draw_scenes(n, 0)[attribute], minlength=count) / n
    assert len(frequencies) == count
    assert np.abs(frequencies - 1 / count).max() < 4.5 * (1 / count / n) ** 0.5


def test_attributes_say_nothing_about_each_other_or_about_the_nuisance():
    scenes = draw_scenes(20_000, 0)
    columns = [scenes[name].astype(float) for name in ATTRIBUTES] + list(scenes["nuisance"].T)
    correlation = np.corrcoef(columns)[: len(ATTRIBUTES)]
    correlation[range(len(ATTRIBUTES)), range(len(ATTRIBUTES))] = 0
    assert np.abs(correlation).max() < 4.5 / 20_000**0.5


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize("world", [World(), World(3), World(px=64)], ids=["0", "3", "64px"])
def test_a_minimal_pair_differs_in_one_detail_only_and_its_pictures_differ(detail, world):
    pairs = draw_pairs(detail, 20, 7)
    for name in (*ATTRIBUTES, "nuisance"):
        same = pairs[:, 0][name] == pairs[:, 1][name]
        assert not same.any() if name == detail else same.all()
    one, two = world.render(pairs[:, 0]).astype(int), world.render(pairs[:, 1]).astype(int)
    assert (np.abs(one - two).max((1, 2, 3)) > 25).all()


def test_a_pair_can_hold_any_two_values():
    pairs = draw_pairs("colour", 500, 0)["colour"]
    assert {tuple(row) for row in pairs} == set(itertools.permutations(range(6), 2))


def test_a_pair_of_an_unknown_detail_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"unknown detail 'smell'; expected one of {', '.join(DETAILS)}"):
        draw_pairs("smell", 1, 0)


def test_nuisance_changes_the_picture_and_never_what_is_said_of_it():
    scenes = draw_scenes(50, 0)
    others = scenes.copy()
    others["nuisance"] = np.random.default_rng(1).random((50, NUISANCES))
    assert [caption(s, tuple(DETAILS)) for s in scenes] == [caption(s, tuple(DETAILS)) for s in others]
    assert (World().render(scenes) != World().render(others)).any((1, 2, 3)).all()


@pytest.mark.parametrize("number", range(NUISANCES))
def test_every_nuisance_shows(number):
    world, scenes = World(px=64), draw_scenes(8, 0)  # at 32 px the sign stands on whole pixels
    others = scenes.copy()
    others["nuisance"][:, number] = (others["nuisance"][:, number] + 0.5) % 1
    assert (world.render(scenes) != world.render(others)).any()


# --- captions ---------------------------------------------------------------------------------------------------


def test_a_caption_always_names_the_class():
    scenes = draw_scenes(200, 0)
    for p in (0.0, 0.3, 1.0):
        for scene, text in zip(scenes, captions(scenes, p, np.random.default_rng(0)), strict=True):
            assert [word for word in text.split() if word in CLASSES] == [CLASSES[scene["class"]]]


def test_a_full_caption_names_all_nine_details_and_a_bare_one_none():
    scenes = draw_scenes(200, 0)
    full = captions(scenes, 1.0, np.random.default_rng(0))
    for scene, text in zip(scenes, full, strict=True):
        for detail, values in DETAILS.items():
            assert caption(scene, (detail,)).split()[4 if detail in ("colour", "structure", "state") else -1] in text
            assert values[scene[detail]] in text.split()
    bare = captions(scenes, 0.0, np.random.default_rng(0))
    assert bare == [f"a photo of a {CLASSES[scene['class']]}" for scene in scenes]


def test_scenes_of_other_attributes_have_other_full_captions():
    scenes = np.unique(draw_scenes(3000, 0)[list(ATTRIBUTES)])
    assert len({caption(scene, tuple(DETAILS)) for scene in scenes}) == len(scenes)


def test_details_are_mentioned_as_often_as_asked():
    words = [len(text.split()) > 5 for text in captions(draw_scenes(4000, 0), 0.02, np.random.default_rng(0))]
    assert abs(np.mean(words) - (1 - 0.98**9)) < 0.025


def test_the_vocabulary_is_the_set_of_words_in_captions():
    texts = captions(draw_scenes(2000, 0), 1.0, np.random.default_rng(0))
    assert vocabulary() == sorted({word for text in texts for word in text.split()})


def test_the_example_in_the_docstring_is_right():
    results = doctest.testmod(diva_lab.world)
    assert results.attempted and not results.failed


# --- pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", FROZEN)
def test_the_bytes_of_a_world_are_frozen(seed):
    assert digest(World(seed)) == FROZEN[seed]


CHANGED = {  # detail -> the parts that a pixel shows, in one of the two images, where a minimal pair of it differs
    "presence": {"tail"}, "quantity": {"dots"}, "position": {"ball"}, "text": {"sign"}, "colour": {"body", "tail"},
    "structure": {"body"}, "orientation": {"arrowhead"}, "viewpoint": {"sky", "ground"},
}  # fmt: skip


def near(mask: np.ndarray) -> np.ndarray:
    """`mask` [n, h, w] and the pixels beside it: edges are one pixel wide."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    size = mask.shape[1]
    return np.any([padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3)], axis=0)


@pytest.mark.parametrize("px", [32, 64])
@pytest.mark.parametrize("detail", CHANGED)
def test_minimal_pairs_differ_in_the_pixels_that_show_the_parts_of_their_detail(detail, px):
    pairs, world = draw_pairs(detail, 60, 8).T, World(px=px)
    images = np.stack([world.render(scenes).astype(int) for scenes in pairs])
    shown = np.stack([world.parts(scenes) for scenes in pairs])
    differ = np.abs(images[0] - images[1]).max(-1)
    concerned = np.isin(shown, [PARTS.index(name) for name in CHANGED[detail]]).any(0)
    outside = differ[~near(concerned)] > 0  # a concave outline's soft edge is wider than a pixel at its corners
    assert outside.sum() < 0.01 * (differ > 0).sum(), "nothing changes apart from these parts and their edges"
    changed = shown[0] != shown[1]
    assert changed.any() == (detail not in ("text", "colour", "structure")), "these change no outline"
    assert (differ[changed] > 0).mean() > 0.99 if changed.any() else (differ[concerned] > 0).mean() > 0.2
    if detail in ("presence", "position", "colour"):
        assert (differ[concerned] > 0).all()


def test_every_part_is_shown_where_it_is_painted_last():
    scenes, world = draw_scenes(400, 4), World()
    shown = world.parts(scenes)
    assert shown.shape == (400, 32, 32) and set(np.unique(shown)) == set(range(len(PARTS)))
    has = {name: (shown == k).any((1, 2)) for k, name in enumerate(PARTS)}
    tailed = scenes["presence"] == DETAILS["presence"].index("with")
    assert not has["tail"][~tailed].any() and has["tail"][tailed].mean() > 0.99, "a sign or dots never hide it all"
    assert all(has[name].all() for name in ("sky", "body", "arrowhead", "ball", "sign", "dots"))
    sizes = {name: (shown == k).mean((1, 2)) * 32**2 for k, name in enumerate(PARTS)}
    assert (sizes["sign"] == 63).mean() > 0.8 and sizes["sign"].min() >= 49, "7 x 9 on the canvas, cut at its border"
    for count in range(4):
        per_dot = sizes["dots"][scenes["quantity"] == count] / (count + 1)
        assert np.abs(per_dot - np.pi * 1.25**2).max() < 2.6


def test_the_map_of_parts_is_that_of_a_finer_picture_but_at_edges():
    scenes = draw_scenes(40, 6)
    coarse, fine = World().parts(scenes), World(px=256).parts(scenes).reshape(40, 32, 8, 32, 8)
    inside = (fine == fine[:, :, :1, :, :1]).all((2, 4))
    assert np.array_equal(coarse[inside], fine[:, :, 0, :, 0][inside]) and inside.mean() > 0.7


def test_the_bytes_do_not_depend_on_the_machines_vector_units():
    code = (
        "import hashlib; from diva_lab.world import World, draw_scenes;"
        "print(hashlib.sha256(World().render(draw_scenes(64, 0)).tobytes()).hexdigest())"
    )
    found = np.show_config("dicts")["SIMD Extensions"].get("found", [])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(found)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == FROZEN[0], done.stderr


def test_another_seed_gives_another_world_under_the_same_names():
    scenes = draw_scenes(30, 0)
    assert (World(0).render(scenes) != World(3).render(scenes)).any((1, 2, 3)).all()
    assert (World(2).render(scenes) != World(3).render(scenes)).any((1, 2, 3)).all()


def test_a_picture_does_not_depend_on_the_others_in_its_batch():
    scenes = draw_scenes(37, 0)
    together = World().render(scenes)
    assert (together == np.concatenate([World().render(scenes[i : i + 1]) for i in range(37)])).all()
    assert (together[::-1] == World().render(scenes[::-1])).all()


@pytest.mark.parametrize("px", [16, 32, 64])
def test_pictures_have_the_size_asked_for(px):
    pictures = World(px=px).render(draw_scenes(3, 0))
    assert pictures.shape == (3, px, px, 3) and pictures.dtype == np.uint8
    assert World(px=px).render(draw_scenes(0, 0)).shape == (0, px, px, 3)


def test_one_core_renders_a_thousand_pictures_a_second():
    scenes, seconds = draw_scenes(400, 0), []
    for _ in range(3):
        start = time.process_time()  # of this process alone, whatever else the machine does
        World().render(scenes)
        seconds.append(time.process_time() - start)
    assert 400 / min(seconds) >= 1000


# --- pairs on disk ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), World(), 2, seed=5)


def test_pairs_are_written_in_mmvp_vlms_layout(folder):
    with open(folder / "Questions.csv", newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["Question ID", "Type", "Statement"]
    assert [int(number) for number, _, _ in rows] == list(range(1, 2 * 2 * 9 + 1))
    assert [pattern for _, pattern, _ in rows] == [p for p in PATTERNS.values() for _ in range(4)]
    images = folder / "MLLM_VLM Images"
    assert {path.relative_to(images).as_posix() for path in images.rglob("*.jpg")} == {
        f"{p}/{i}.jpg" for i, p, _ in rows
    }


def test_the_statements_of_a_written_pair_tell_its_pictures_apart(folder):
    with open(folder / "Questions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert one["Type"] == two["Type"] and one["Statement"] != two["Statement"]
        differing = set(one["Statement"].split()) ^ set(two["Statement"].split())
        detail = next(d for d, pattern in PATTERNS.items() if pattern == one["Type"])
        assert differing <= {*DETAILS[detail], "dot", "dots"}


def test_a_written_picture_is_the_rendered_one_but_for_compression(folder):
    for number, (detail, pattern) in enumerate(PATTERNS.items()):
        rendered = World().render(draw_pairs(detail, 2, (5, number)).reshape(-1)).astype(int)
        for k, pixels in enumerate(rendered):
            written = np.asarray(Image.open(folder / "MLLM_VLM Images" / pattern / f"{4 * number + k + 1}.jpg"))
            assert np.abs(written - pixels).mean() < 5
