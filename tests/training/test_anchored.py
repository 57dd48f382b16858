"""Stage 1 anchored in captions: its gap, its runs, and what is refused."""

import csv
from dataclasses import replace

import pytest
import torch
from one_step import pictures
from PIL import Image
from run_checks import Watch, kill_and_resume, same_records, same_weights

from diva_lab.captions import open_captions
from diva_lab.images import open_images
from diva_lab.models.encoders import embed, load_encoder
from diva_lab.models.registry import load_denoiser
from diva_lab.training import batches
from diva_lab.training.batches import Batches, estimate_gap
from diva_lab.training.build import build_conditioner
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.training.stages import align, tune

ANCHORS = pytest.mark.parametrize("anchor", ["captions", "text", "shuffled"])


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(batches, "GAP_IMAGES", 128)


@pytest.fixture
def settings(small_settings) -> Settings:
    return replace(small_settings, objective="diva", anchor="captions", lr=1e-2, draws=1)


@pytest.fixture
def captioned(tmp_path):
    """A folder of captioned images, of which two cannot be read and one has no caption."""
    rows = []
    for k, pixels in enumerate(pictures(10)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.png")
        rows.append((f"{k}.png", f"a photo of a disc {k}"))
    for k in (10, 11):
        (tmp_path / f"{k}.png").write_bytes(b"words")
        rows.append((f"{k}.png", "a photo of nothing"))
    with open(tmp_path / "captions.csv", "w", newline="") as table:
        csv.writer(table).writerows([("image", "caption"), *rows[1:]])
    return tmp_path


# --- runs -------------------------------------------------------------------------------------------------------


@ANCHORS
@pytest.mark.parametrize("source", ["world", "folder"])
def test_a_killed_anchored_run_resumes_to_the_bit(settings, captioned, tmp_path_factory, anchor, source):
    root = tmp_path_factory.mktemp("runs")
    settings = replace(settings, anchor=anchor, steps=5, save_every=2, evaluate_every=1)
    if source == "folder":
        settings = replace(settings, images=str(captioned))
    whole, resumed = kill_and_resume(align, settings, root, stop=4)
    assert same_weights(whole, resumed)
    same_records(whole, resumed)
    if source == "folder":
        reasons = set(whole.skipped()["reason"])
        assert ("no caption, or none in UTF-8" in reasons) == (anchor != "text") and len(reasons) > 1 - (
            anchor == "text"
        )


def test_a_resumed_anchored_run_takes_its_gap_from_the_checkpoint(settings, tmp_path, monkeypatch):
    settings = replace(settings, save_every=1, evaluate_every=1)
    with pytest.raises(KeyboardInterrupt):
        align(settings, tmp_path, Watch(stop=3))
    (folder,) = tmp_path.iterdir()
    gap = Run(folder).weights()["conditioner.gap"]
    monkeypatch.setattr("diva_lab.training.stages.estimate_gap", lambda *_: pytest.fail("estimated again"))
    assert torch.equal(align(settings, tmp_path, Watch()).weights()["conditioner.gap"], gap) and gap.any()


def test_with_share_zero_stage_1_is_the_published_one_to_the_bit(settings, tmp_path):
    ours = align(replace(settings, anchor_share=0.0), tmp_path)
    published = align(replace(settings, anchor="none"), tmp_path)
    assert ours != published and same_weights(ours, published)


@ANCHORS
def test_the_projector_alone_is_trained_and_stage_2_reads_its_gap(settings, tmp_path, anchor):
    run = align(replace(settings, anchor=anchor), tmp_path)
    encoder, denoiser = load_encoder(settings.encoder), load_denoiser(settings.denoiser)
    second = replace(settings, anchor="none", projector=str(run.folder), steps=1)
    conditioner = build_conditioner(second, encoder, denoiser)
    assert set(run.weights()) == {f"conditioner.{name}" for name in conditioner.state_dict()}
    assert torch.equal(conditioner.gap, run.weights()["conditioner.gap"])
    features = encoder.features(pictures(2).float() / 255)
    longer = replace(features, embedding=7 * features.embedding)
    contexts = [conditioner(each, denoiser.empty) for each in (features, longer)]
    torch.testing.assert_close(*contexts, rtol=1e-4, atol=1e-6)
    assert tune(second, tmp_path).done


def test_an_unanchored_projector_has_no_gap(settings):
    encoder, denoiser = load_encoder(settings.encoder), load_denoiser(settings.denoiser)
    conditioner = build_conditioner(settings, encoder, denoiser)
    assert conditioner.gap is None and not any("gap" in name for name in conditioner.state_dict())


# --- the gap ----------------------------------------------------------------------------------------------------


def test_the_gap_is_the_difference_of_the_datas_means(settings):
    encoder = load_encoder(settings.encoder)
    stream = open_images("world", encoder.px, 64, settings.seed + batches.GAP_SEED, captions="")
    images, texts = [], []
    for _ in range(2):
        images.append(embed(encoder, next(stream)))
        texts.append(encoder.encode_text(stream.captions))
    expected = torch.cat(images).mean(0) - torch.cat(texts).mean(0)
    torch.testing.assert_close(estimate_gap(settings, encoder), expected, rtol=1e-5, atol=1e-6)


def test_without_shift_the_gap_is_zero(settings):
    encoder = load_encoder(settings.encoder)
    assert torch.equal(estimate_gap(replace(settings, anchor_shift=False), encoder), torch.zeros(encoder.dim))


# --- what comes in ----------------------------------------------------------------------------------------------


def test_unpaired_captions_are_of_a_text_file_or_of_other_images(settings, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    given = Batches(replace(settings, anchor="text", captions=str(tmp_path / "prompts.txt")), 32)
    assert sorted(next(given)[1]) == ["one", "three", "two"]
    images, texts = next(Batches(replace(settings, anchor="text"), 32))
    paired_images, paired = next(Batches(settings, 32))
    assert torch.equal(images, paired_images) and texts != paired
    assert texts == next(open_captions("world", settings.batch, settings.seed))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"condition": "recap"}, "takes condition='global'"),
        ({"align_by": "dcr"}, "takes align_by='rec'"),
        ({"objective": "genhancer"}, "reads no captions"),
        ({"anchor": "words"}, "unknown anchor 'words'"),
        ({"anchor_share": 1.5}, "from 0 to 1"),
        ({"mentions": -0.1}, "from 0 to 1"),
        ({"anchor_noise": -1.0}, "from 0 to 1000"),
    ],
)
def test_settings_that_no_anchored_stage_can_have_are_refused(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **changes)


@ANCHORS
def test_a_source_without_captions_is_refused_before_a_run_is_begun(settings, tmp_path, anchor):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    with pytest.raises((FileNotFoundError, ValueError), match="no captions"):
        align(replace(settings, anchor=anchor, images=str(tmp_path / "images")), tmp_path / "runs")
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))
