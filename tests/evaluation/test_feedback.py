"""Readability as a benchmark: rows by pattern and bin, and which projector and denoiser they are of."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diva_lab.analysis.readability import world_pairs_in_memory
from diva_lab.evaluation import feedback
from diva_lab.evaluation.features import FeatureStore
from diva_lab.evaluation.feedback import open_instrument, probe_pairs, read_minimal_pairs
from diva_lab.evaluation.table import evaluate
from diva_lab.evaluation.task import Task
from diva_lab.models.encoders import load_encoder
from diva_lab.training.stages import align
from diva_lab.world import PATTERNS, World, write_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two minimal pairs a pattern, in MMVP-VLM's layout."""
    root = tmp_path_factory.mktemp("data")
    write_pairs(root / "mmvp", World(), 2, seed=3)
    return root


@pytest.fixture(scope="module", autouse=True)
def little(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "PAIRS", 1)
        patch.setattr(feedback, "DRAWS", 1)
        yield


def test_a_folder_has_a_row_a_measure_bin_and_pattern_and_names_the_projector(folder):
    table = evaluate(["tiny"], ["readability"], folder, cache=None)
    assert set(table["set"]) == {"mmvp through shipped"}
    whole = table[table["category"] == "all"].set_index("metric")
    measures = {"known", "readable: diva", "norm: diva", "said", "seen", "distance"}
    assert (
        measures < set(whole.index)
        and "known, bin 1 of 5" in whole.index
        and not any("class" in m for m in whole.index)
    )
    assert (whole["n"] == 9).all() and set(table["category"]) == {"all", *PATTERNS.values()}
    assert whole.loc["known", "chance"] == 0.5 and np.isnan(whole.loc["distance", "chance"])
    again = evaluate(["tiny"], ["readability"], folder, cache=None)
    assert again["value"].equals(table["value"])


def test_the_world_has_class_and_a_probe_beside(folder):
    table = evaluate(["tiny"], ["world-readability"], folder, cache=None).set_index(["metric", "category"])["value"]
    assert {"class: diva", "probe", "seen"} <= {metric for metric, _ in table.index}


def test_a_projector_that_is_a_run_brings_its_denoiser(small_settings, folder, tmp_path):
    run = align(replace(small_settings, anchor="captions", anchor_share=0.5, steps=1), tmp_path)
    encoder = load_encoder(small_settings.encoder)
    task = Task(encoder, FeatureStore(encoder, None), folder / "mmvp", projector=str(run.folder))
    instrument = open_instrument(task)
    assert instrument.settings.denoiser == small_settings.denoiser and instrument.conditioner.gap is not None
    assert list(feedback.readability_benchmark(task))


def test_a_projector_that_is_not_there_or_does_not_fit_is_one_error(folder, small_settings):
    with pytest.raises(ValueError, match=r"(?s)failed.*no nowhere/checkpoint"):
        evaluate(["tiny"], ["readability"], folder, cache=None, projector="nowhere")
    with pytest.raises(ValueError, match=r"(?s)failed.*does not fit encoder"):
        evaluate([small_settings.encoder], ["readability"], folder, cache=None)


def test_pairs_are_seen_as_in_training_and_the_first_of_each_pattern_are_taken(folder):
    pairs = read_minimal_pairs(folder / "mmvp", 16)
    assert len(pairs) == 9 and pairs.images.shape == (9, 2, 3, 16, 16) and pairs.images.dtype == torch.uint8
    assert all(text.startswith("a photo of ") for both in pairs.statements for text in both)


def test_a_probe_of_the_pixels_tells_colours_apart(tiny_pixels):
    pairs = world_pairs_in_memory(1, 1000)
    right = probe_pairs(tiny_pixels, pairs, 1000)
    assert right.shape == (9,) and set(right) <= {0.0, 0.5, 1.0} and right.mean() > 0.5


@pytest.fixture
def tiny_pixels():
    """An encoder whose embedding is the image itself, four pixels to one."""

    class Pixels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def encode_image(self, images):
            return torch.nn.functional.normalize(torch.nn.functional.avg_pool2d(images, 4).flatten(1), dim=1)

    return Pixels()
