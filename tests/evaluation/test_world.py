import dataclasses

import numpy as np
import pytest

from diva_lab.evaluation import world as evaluation
from diva_lab.evaluation.pairs import read_pairs, score_pairs, summarise
from diva_lab.evaluation.world import PROBE_TRAIN, WORLD_SPLITS, world_pairs, world_report
from diva_lab.world import DETAILS, PATTERNS, World, draw_scenes

SMALL = World(px=8)  # its images are drawn in a tenth of the time


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def report(encoder, cache):
    return world_report(encoder, SMALL, "choose", cache=cache)


def test_the_record_has_exactly_the_agreed_keys_and_holds_fractions(report):
    pairs = [f"pairs/{name}{end}" for name in (*DETAILS, "mean") for end in ("", "/low", "/high")]
    probes = [f"probe/{name}" for name in (*DETAILS, "mean")]
    assert list(report) == [*pairs, *probes, "zeroshot", "nmi", "acc", "ari"]
    assert all(type(value) is float and 0 <= value <= 1 for key, value in report.items() if key != "ari")


def test_every_interval_holds_its_score(report):
    for name in (*DETAILS, "mean"):
        assert report[f"pairs/{name}/low"] <= report[f"pairs/{name}"] <= report[f"pairs/{name}/high"]


def test_pairs_are_scored_from_disk_by_the_benchmarks_own_code(report, encoder, cache):
    summary = summarise(score_pairs(encoder, cache / "world-0-8" / "pairs-choose"))
    assert report["pairs/mean"] == summary["mean"]
    assert all(report[f"pairs/{detail}"] == summary[pattern] for detail, pattern in PATTERNS.items())


def test_an_encoder_that_knows_no_word_does_not_beat_guessing_at_pairs(report):
    assert report["pairs/mean"] < 0.35 and report["zeroshot"] < 0.25


def test_the_same_seed_gives_the_same_record(report, encoder, cache):
    assert world_report(encoder, SMALL, "choose", cache=cache) == report


def test_statements_and_class_names_are_each_encoded_in_one_call(encoder, cache):
    world_report(encoder, SMALL, "choose", cache=cache)
    assert len(encoder.asked) == 2 and all(len(texts) == len(set(texts)) for texts in encoder.asked)


def test_a_split_has_its_number_of_pairs_and_is_written_once(cache):
    folder = world_pairs(SMALL, "choose", cache)
    before = (folder / "Questions.csv").stat().st_mtime_ns
    assert read_pairs(world_pairs(SMALL, "choose", cache)).groupby("pattern").size().tolist() == [100] * 9
    assert (folder / "Questions.csv").stat().st_mtime_ns == before
    assert WORLD_SPLITS["measure"][0] == 300


def test_a_killed_write_is_not_mistaken_for_a_whole_one(tmp_path, monkeypatch):
    def killed(folder, *_):
        folder.mkdir()
        (folder / "Questions.csv").write_text("half a line")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "write_pairs", killed)
        world_pairs(SMALL, "choose", tmp_path)
    assert not (tmp_path / "world-0-8" / "pairs-choose").exists()
    assert len(read_pairs(world_pairs(SMALL, "choose", tmp_path))) == 900


def test_no_scene_is_shared_between_training_splits_and_probes():
    seeds = [(0, 1), (0, 4, 0, 0), (0, PROBE_TRAIN)]  # pretraining, tuning's first step, probes
    for _, pairs, scenes in WORLD_SPLITS.values():
        seeds += [(0, scenes), *((pairs, number) for number in range(len(DETAILS)))]
    drawn = [draw_scenes(200, seed)["nuisance"][:, 0] for seed in seeds]
    assert len(np.unique(np.concatenate(drawn))) == 200 * len(seeds)


def test_another_world_has_another_folder(cache):
    assert world_pairs(dataclasses.replace(SMALL, seed=3), "choose", cache).parent.name == "world-3-8"


def test_an_unknown_split_is_refused(encoder, cache):
    with pytest.raises(ValueError, match="measure, choose"):
        world_report(encoder, SMALL, "test", cache=cache)
