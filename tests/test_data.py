"""What ships in data/: whole, within its bounds, and what its records say of it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import CLIPTokenizer

from diva_lab.analysis.readability import decide, world_pairs_in_memory
from diva_lab.evaluation.pairs import read_pairs
from diva_lab.images import augment
from diva_lab.machine import generator
from diva_lab.models.encoders import load_encoder
from diva_lab.models.registry import load_denoiser
from diva_lab.models.vision import load_vision
from diva_lab.objectives.diva import reconstruction
from diva_lab.paths import DATA
from diva_lab.provenance import sha256
from diva_lab.training.build import build_conditioner
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.world import ATTRIBUTES, DETAILS, PATTERNS, World, captions, draw_scenes, vocabulary, write_pairs
from tools.pretrain import CONTEXT, save_tokenizer
from tools.study import PLATEAU, ROWS

RECORDS = (
    "tiny/clip",
    "tiny/diffusion",
    "tiny/diffusion/vae",
    "tiny/llava",
    "tiny/unclip",
    "tiny/vision",
    "world",
    "world/questions",
)


@pytest.mark.parametrize("folder", RECORDS)
def test_every_file_is_the_one_that_its_record_names(folder):
    record = json.loads((DATA / folder / "record.json").read_text())
    assert record["sha256"] and {"seed", "git", "versions", "time"} <= set(record)
    for name, digest in record["sha256"].items():
        assert sha256(DATA / folder / name) == digest, name


@pytest.mark.parametrize("condition", ["global", "recap"])
def test_a_shipped_projector_is_the_one_that_its_record_names_and_says_something(condition):
    record = json.loads((DATA / "tiny" / "projectors" / f"{condition}.json").read_text())
    assert sha256(DATA / "tiny" / "projectors" / f"{condition}.safetensors") == record["sha256"]
    assert record["settings"]["condition"] == condition
    assert record["rounds"][-1]["recovered"] > 0.15


@pytest.mark.parametrize("name, anchor", [("anchored", "captions"), ("unpaired", "text")])
def test_an_anchored_projector_is_the_one_of_its_record_and_reads_captions(name, anchor):
    path = DATA / "tiny" / "projectors" / f"global-{name}.safetensors"
    record = json.loads(path.with_suffix(".json").read_text())
    assert sha256(path) == record["sha256"] and record["settings"]["anchor"] == anchor
    assert record["evaluations"]["recovered"][-1] > 0.12
    conditioner = build_conditioner(Settings(projector=name), load_encoder("tiny"), load_denoiser("tiny"))
    assert 0.1 < conditioner.gap.norm() < 2


def test_the_run_of_dcr_is_the_one_on_record():
    run = Run(DATA / "results" / "tuned" / "dcr")
    records = [json.loads(path.read_text()) for path in (DATA / "results" / "records").glob("tune-dcr-*.json")]
    (record,) = [each for each in records if each["row"] == "dcr/anchored" and each["settings"]["seed"] == 0]
    assert run.done and run.settings == record["settings"]
    assert sha256(run.folder / "checkpoint" / "weights.safetensors") == record["weights"]


def test_the_projector_of_the_study_has_converged():
    last = json.loads((DATA / "tiny" / "projectors" / "global.json").read_text())["rounds"][-1]
    assert last["gained"] < PLATEAU * last["steps"] / 1000


def test_the_tiny_models_keep_to_sixteen_million_weights_and_33_megabytes():
    files = list((DATA / "tiny").rglob("*.safetensors"))
    weights = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                weights += size
    assert weights <= 16_000_000  # a million and a half in the language model and its tower, four in the rivals'
    assert sum(file.stat().st_size for file in (DATA / "tiny").rglob("*") if file.is_file()) <= 33e6


def test_the_decoder_draws_an_image_from_its_own_embedding_rather_than_from_anothers():
    encoder, decoder = load_encoder("tiny"), load_denoiser("unclip-tiny")
    images = torch.from_numpy(World().render(draw_scenes(64, 3))).permute(0, 3, 1, 2).float() / 255
    random = torch.Generator().manual_seed(0)
    x0 = decoder.latents(images)
    t, noise, own = torch.full((64,), 800), torch.randn(x0.shape, generator=random), torch.zeros(64, encoder.dim)
    with torch.no_grad():
        f = encoder.features(images).embedding
        losses = [
            reconstruction(
                decoder.predict(decoder.add_noise(x0, noise, t), t, torch.zeros(64, 1, decoder.width), "native",
                                decoder.labels(embedding, 0, own)),
                decoder.target("velocity", x0, noise, t),
            )
            for embedding in (f, f.roll(1, 0))
        ]  # fmt: skip
    assert (losses[0] < losses[1]).float().mean() > 0.9


def test_the_teacher_sees_details_that_clip_does_not():
    pairs = world_pairs_in_memory(8, 5)
    images = pairs.images.float() / 255  # [n, 2, 3, h, w]
    right = {}
    for name in ("tiny-vision", "tiny"):
        model = load_vision(name)
        with torch.no_grad():
            own = torch.stack([model.encode_image(part) for part in images.unbind(1)], dim=1)  # [n, 2, d]
            view = torch.stack(
                [model.encode_image(augment(part, generator("view", k), flips=False))
                 for k, part in enumerate(images.unbind(1))], dim=1
            )  # fmt: skip
        right[name] = decide((view * (own - own.flip(1))).sum(2)).mean()
    assert right["tiny-vision"] > right["tiny"] + 0.05


def test_the_denoiser_reads_captions_with_clips_own_text_tower():
    encoder, denoiser = load_encoder("tiny"), load_denoiser("tiny")
    texts = captions(draw_scenes(16, 1), 1.0, np.random.default_rng(1))
    length = [len(denoiser.tokenizer(text).input_ids) for text in texts]
    last = torch.stack([hidden[n - 1] for hidden, n in zip(denoiser.encode_text(texts), length, strict=True)])
    expected = encoder.encode_text(texts)
    assert torch.allclose(F.normalize(last @ encoder.model.text_projection, dim=1), expected, atol=2e-3)


def test_the_denoiser_draws_what_it_is_asked_for():
    quality = pd.read_csv(DATA / "results" / "quality.csv").set_index("attribute")
    assert list(quality.index) == list(ATTRIBUTES) and (quality["n"] >= 256).all()
    assert quality["classifier"].min() >= 0.95
    assert quality["share"]["class"] >= 0.8 and quality["share"][list(DETAILS)].min() >= 0.6


def test_shipped_pairs_are_those_of_the_world(tmp_path):
    shipped = read_pairs(DATA / "world" / "pairs")
    assert len(shipped) == 15 * len(PATTERNS) and set(shipped["pattern"]) == set(PATTERNS.values())
    write_pairs(tmp_path, World(), 15, seed=0)
    again = read_pairs(tmp_path)
    assert shipped["statement_1"].tolist() == again["statement_1"].tolist()
    assert shipped["statement_2"].tolist() == again["statement_2"].tolist()


def test_a_word_is_a_token_and_a_full_caption_fits(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary())
    texts = captions(draw_scenes(300, 0), 1.0, np.random.default_rng(0))
    assert max(len(tokenizer(text).input_ids) for text in texts) <= CONTEXT


def test_the_ceiling_leaves_room_in_every_pattern():
    ceiling = pd.read_csv(DATA / "results" / "ceiling.csv").set_index("detail")
    assert list(ceiling.index) == list(DETAILS)
    gain = ceiling["after"] - ceiling["before"]
    assert ceiling["before"].mean() <= 0.35 and gain.mean() >= 0.25 and gain.min() >= 0.10


def test_results_are_paired_over_at_least_three_seeds():
    results = pd.read_csv(DATA / "results" / "objectives.csv")
    seeds = results.groupby("objective")["seed"].apply(lambda column: tuple(sorted(column)))
    assert seeds.nunique() == 1 and len(seeds.iloc[0]) >= 3
    assert {"none", "perturb-norm", "perturb-drift", *ROWS["objectives"]} == set(seeds.index)
    assert results["run"].notna().all() and results["git"].notna().all()


def test_every_replication_has_a_source_and_repeats_what_was_published():
    published, again = (pd.read_csv(DATA / "published" / f"{name}.csv") for name in ("results", "replications"))
    known = ["benchmark", "set", "metric", "category", "backbone", "method", "finding", "source"]
    assert again[known].notna().all(axis=None) and again.drop(columns=[*known, "percent"]).isna().all(axis=None)
    issues = [("baaivision/DIVA", 11), ("baaivision/DIVA", 12), ("tsb0601/MMVP", 5), ("mashijie1028/GenHancer", 3)]
    assert set(again["source"]) == {f"{name} issue {number}" for name, number in issues}
    keys = ["benchmark", "set", "metric", "backbone"]
    assert set(map(tuple, again[keys].to_numpy())) <= set(map(tuple, published[keys].to_numpy()))
    assert set(again[again["percent"].isna()]["method"]) == {"diva", "genhancer"}  # whose numbers are not known
    for source, rows in again.dropna(subset="percent").groupby("source"):
        one = rows.set_index("category")["percent"]
        assert set(one.index) == {"all", *PATTERNS.values()}, source
        assert one["all"] == pytest.approx(one.drop("all").mean(), abs=0.05)


def test_every_published_number_has_a_source_and_stands_once():
    published = pd.read_csv(DATA / "published" / "results.csv")
    assert published.notna().all(axis=None) and published["percent"].between(0, 100, inclusive="neither").all()
    assert published["source"].str.fullmatch(r"arXiv \d{4}\.\d{5}( \(second hand\))?").all()
    assert not published.duplicated(["benchmark", "set", "metric", "backbone", "method"]).any()
    kinds = {"mmvp-vlm", "clustering", "zero-shot", "retrieval", "mllm", "segmentation", "ablation"}
    assert set(published["benchmark"]) == kinds
    second = published[published["benchmark"] != "mmvp-vlm"]["source"]
    assert second.str.endswith("(second hand)").all()
