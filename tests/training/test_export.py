import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from damage import DAMAGE, change_weights
from one_step import pictures
from PIL import Image
from small_models import write_transformers_clip
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from diva_lab.cli import main
from diva_lab.evaluation.features import prepare
from diva_lab.evaluation.pairs import read_pairs, score_pairs
from diva_lab.evaluation.results import COLUMNS, FACTS
from diva_lab.evaluation.table import open_encoder
from diva_lab.models.encoders import embed, load_encoder
from diva_lab.models.lora import visual_weights
from diva_lab.training.build import split_mix, tuned_encoder
from diva_lab.training.controls import perturb
from diva_lab.training.export import TANH, differences, export, model_card, save_encoder
from diva_lab.training.presets import preset
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.training.stages import tune
from diva_lab.world import World, write_pairs

TEXTS = ["a photo of a disc", "a photo of a red star"]


@pytest.fixture(scope="module")
def run(small_settings, tmp_path_factory) -> Run:
    """A short run that moved the encoder, evaluated twice."""
    scores = iter([{"zeroshot": 0.25}, {"zeroshot": 0.75}])
    settings = replace(small_settings, lr=1e-2, lora_dropout=0.0)
    return tune(settings, tmp_path_factory.mktemp("runs"), lambda encoder: next(scores))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "new"
    assert main(["export", str(run.folder), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def images():
    return pictures(5)


@pytest.fixture(scope="module")
def wanted(run, images):
    """The tuned encoder's embeddings of pictures and texts, which are not the original's."""
    encoder, original = tuned_encoder(run), load_encoder(run.settings["encoder"])
    found = encoder.encode_image(images.float() / 255), encoder.encode_text(TEXTS)
    assert (found[0] - original.encode_image(images.float() / 255)).abs().max() > 1e-2
    assert torch.equal(found[1], original.encode_text(TEXTS))
    return found


def same(image, text, wanted) -> None:
    for one, two in zip((image, text), wanted, strict=True):
        torch.testing.assert_close(F.normalize(one, dim=-1), two, atol=1e-5, rtol=0)


@torch.no_grad()
def test_open_clip_gives_the_tuned_embeddings(folder, images, wanted):
    name = f"local-dir:{folder / 'open_clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, require_pretrained=True)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (preprocess.transforms[-1].mean, preprocess.transforms[-1].std))
    model, pixels = model.eval(), (images / 255 - mean) / std
    same(model.encode_image(pixels), model.encode_text(open_clip.get_tokenizer(name)(TEXTS)), wanted)


@torch.no_grad()
def test_transformers_gives_the_tuned_embeddings(folder, images, wanted):
    home = folder / "transformers"
    model, processor = CLIPModel.from_pretrained(home).eval(), CLIPImageProcessor.from_pretrained(home)
    length = model.config.text_config.max_position_embeddings
    words = AutoTokenizer.from_pretrained(home)(
        TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    found = model.get_image_features(**processor(images, return_tensors="pt")), model.get_text_features(words.input_ids)
    same(*(getattr(x, "pooler_output", x) for x in found), wanted)


@pytest.mark.parametrize("format", ["open_clip", "transformers"])
def test_the_encoder_is_loaded_again_by_its_folder(format, folder, images, wanted):
    encoder = load_encoder(folder / format)
    same(encoder.encode_image(images.float() / 255), encoder.encode_text(TEXTS), wanted)


def test_the_card_names_every_setting_the_data_the_run_its_code_and_its_scores(run, folder):
    card = (folder / "README.md").read_text()
    for name, value in run.settings.items():
        assert f"| {name} | {value} |" in card
    for fact in (run.id, run.environment["git"], "on world", f"torch {torch.__version__.partition('+')[0]}"):
        assert fact in card
    assert "| measure | step 0 | step 4 |" in card and "| zeroshot | 0.2500 | 0.7500 |" in card


def test_a_random_push_is_exported_as_well_and_a_card_without_scores_says_so(run, images, tmp_path):
    pushed = perturb(run, images, root=tmp_path)
    card = (export(pushed, tmp_path / "new") / "README.md").read_text()
    assert "tuned by perturb-norm on world" in card and "Not evaluated." in card
    found = load_encoder(tmp_path / "new" / "transformers").encode_image(images.float() / 255)
    torch.testing.assert_close(found, tuned_encoder(pushed).encode_image(images.float() / 255), atol=1e-5, rtol=0)


def test_the_card_names_the_preset_that_the_run_is_of(run, tmp_path):
    settings = replace(preset("siglip-so400m-dcr", processes=4), projector="runs/align-0", images="elsewhere/*.tar")
    made = Run.open(asdict(settings) | {"stage": "tune"}, tmp_path)
    assert "Preset: siglip-so400m-dcr." in model_card(made, ["open_clip"])
    assert "Preset: none." in model_card(run, ["open_clip"])


def row(encoder: str, value: float, **changes) -> dict:
    same = {"encoder": encoder, "benchmark": "zero-shot", "set": "cifar10", "metric": "top-1", "category": "all"}
    numbers = {"n": 200, "value": value, "low": value - 0.05, "high": value + 0.05, "features": "global"}
    return dict.fromkeys(COLUMNS + FACTS) | same | numbers | changes


def test_rows_of_evaluates_table_that_are_of_the_run_are_on_the_card(run, tmp_path):
    rows = [row("tiny", 0.9), row(f"somewhere/{run.id}/", 0.75), row(str(run.folder), 0.5, metric="nmi", low=None)]
    rows.append(row(str(run.folder), 0.125, category="Orientation"))
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    assert main(["export", str(run.folder), str(tmp_path / "new"), "--scores", str(tmp_path / "results.csv")]) == 0
    card = (tmp_path / "new" / "README.md").read_text()
    assert "| zeroshot | 0.2500 | 0.7500 |" in card  # in training
    assert "| zero-shot | cifar10 | global | top-1 | 200 | 0.7500 | 0.7000 | 0.8000 |" in card
    assert "| zero-shot | cifar10 | global | nmi | 200 | 0.5000 |  | 0.5500 |" in card
    assert "0.9000" not in card and "0.1250" not in card


# --- where the libraries differ ---------------------------------------------------------------------------------


def squares(image: Image.Image, px: int) -> tuple[np.ndarray, np.ndarray]:
    """What transformers and we make of an image, px x px."""
    processor = CLIPImageProcessor(size={"shortest_edge": px}, crop_size=px, do_rescale=False, do_normalize=False)
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    return theirs.astype(int), prepare(image, px, "bicubic", squash=False).astype(int)


@pytest.mark.parametrize(("size", "px"), [((35, 32), 32), ((32, 39), 32), ((227, 224), 224), ((640, 427), 224)])
def test_transformers_crops_one_pixel_further_left_or_higher_where_the_card_says_so(size, px):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(*size[::-1], 3), dtype=np.uint8))
    theirs, ours = squares(image, px)
    if size[0] > size[1]:
        theirs, ours = theirs.swapaxes(0, 1), ours.swapaxes(0, 1)
    assert abs(theirs[1:] - ours[:-1]).max() <= 1 < abs(theirs - ours).mean()


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (34, 32), (36, 32), (37, 32), (32, 38), (64, 48)])
def test_transformers_crops_other_sizes_as_we_do(size):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(*size[::-1], 3), dtype=np.uint8))
    theirs, ours = squares(image, 32)
    assert abs(theirs - ours).max() <= 1


def test_what_a_pixel_does_to_the_tiny_clip_is_as_the_card_says(tmp_path):
    folder, encoder = write_pairs(tmp_path, World(), 12, seed=3), load_encoder("tiny")

    def crop(side):
        def embed_wide(files):
            wide = [np.pad(np.array(Image.open(file)), ((0, 0), (1, 2), (0, 0)), mode="edge") for file in files]
            pixels = np.stack([squares(Image.fromarray(image), 32)[side] for image in wide])
            return embed(encoder, torch.from_numpy(pixels.astype(np.uint8)).permute(0, 3, 1, 2))

        return embed_wide

    theirs, ours = (score_pairs(encoder, folder, crop(side)) for side in (0, 1))
    files = read_pairs(folder)["image_1"]
    cosine = (crop(0)(files) * crop(1)(files)).sum(1).mean()
    assert float(cosine) == pytest.approx(0.84, abs=0.06)
    assert (theirs["correct"] != ours["correct"]).mean() == pytest.approx(0.23, abs=0.1)
    assert 0 < theirs["correct"].mean() - ours["correct"].mean() < 0.15


def test_the_card_of_a_clip_tells_of_the_crop_and_that_of_a_siglip_of_its_gelu(folder, tmp_path):
    models = {"tanh": "gelu_pytorch_tanh", "exact": "gelu"}
    cards = {"clip": (folder / "README.md").read_text()}
    for name, act in models.items():
        source = write_transformers_clip(tmp_path / "models" / name, "siglip", act)
        run = Run.open(asdict(Settings(encoder=str(source), objective="none")) | {"stage": "tune"}, tmp_path).finish()
        cards[name] = (export(run, tmp_path / name) / "README.md").read_text()
    assert {name for name, card in cards.items() if "an image of 35 x 32 here" in card} == {"clip"}
    assert {name for name, card in cards.items() if TANH in card} == {"tanh"}


@pytest.mark.parametrize(
    ("config", "formats", "notes"),
    [({"resize_mode": "shortest"}, ["open_clip", "transformers"], 1), ({}, ["open_clip", "transformers"], 1),
     ({"resize_mode": "squash"}, ["open_clip", "transformers"], 0), ({"resize_mode": "shortest"}, ["open_clip"], 0)],
)  # fmt: skip
def test_the_crop_is_told_only_where_transformers_crops(config, formats, notes):
    whole = {"model_cfg": {"vision_cfg": {"image_size": 224}}, "preprocess_cfg": config}
    assert len(differences(whole, formats)) == notes


def test_a_tanh_siglip_differs_in_plain_open_clip_by_as_much_as_the_card_says(images, tmp_path):
    encoder = load_encoder(write_transformers_clip(tmp_path / "siglip", "siglip", "gelu_pytorch_tanh"))
    written = save_encoder(encoder, tmp_path / "out")["open_clip"]
    plain = open_clip.create_model(f"local-dir:{written}", require_pretrained=True).eval()
    with torch.no_grad():
        found = plain.encode_image(encoder.preprocess(images.float() / 255), normalize=True)
    assert 4e-5 < (found - encoder.encode_image(images.float() / 255)).abs().max() < 2e-4


# --- between the original and the tuned encoder -----------------------------------------------------------------


def test_a_mix_lies_between_the_original_and_the_tuned_weights(run):
    ends = visual_weights(load_encoder(run.settings["encoder"])), visual_weights(tuned_encoder(run))
    for mix in (0.0, 0.3, 0.75, 1.0):
        for name, weight in visual_weights(tuned_encoder(run, mix=mix)).items():
            expected = (1 - mix) * ends[0][name] + mix * ends[1][name]
            torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5)
            assert mix not in (0, 1) or torch.equal(weight, ends[int(mix)][name])
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_is_exported_and_opened_at_a_mix(run, images, tmp_path):
    name, scores, new = f"{run.folder}:0.25", tmp_path / "results.csv", tmp_path / "new"
    pd.DataFrame([row(str(run.folder), 0.5), row(name, 0.75)]).to_csv(scores, index=False)
    assert main(["export", name, str(new), "--scores", str(scores)]) == 0
    wanted = tuned_encoder(run, mix=0.25).encode_image(images.float() / 255)
    assert torch.equal(open_encoder(name).encode_image(images.float() / 255), wanted)
    for folder in ("open_clip", "transformers"):
        found = load_encoder(new / folder).encode_image(images.float() / 255)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    card = (new / "README.md").read_text()
    assert "original + 0.25 (tuned - original)" in card and "| top-1 | 200 | 0.7500 |" in card
    assert "0.5000" not in card and "| zeroshot |" not in card  # scores of the run as it was tuned


@pytest.mark.parametrize("mix", ["1.5", "-0.1", "nan"])
def test_a_mix_outside_its_range_is_refused(run, mix, tmp_path, capsys):
    assert "from 0 (the original encoder) to 1" in refused(capsys, f"{run.folder}:{mix}", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_whose_name_ends_like_a_mix_is_that_folder(tmp_path):
    (tmp_path / "run:0.5").mkdir()
    assert split_mix(tmp_path / "run:0.5") == (tmp_path / "run:0.5", 1.0)
    assert split_mix("no/run:0.5") == (Path("no/run:0.5"), 1.0)


# --- what is refused --------------------------------------------------------------------------------------------


def refused(capsys, *arguments) -> str:
    """What the command says, on one line, before it stops."""
    assert main(["export", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and said.err.startswith("error: ")
    return said.err


def test_a_folder_that_holds_no_run_is_refused(tmp_path, capsys):
    assert str(tmp_path / "nowhere") in refused(capsys, tmp_path / "nowhere", tmp_path / "new")
    assert "settings.json" in refused(capsys, tmp_path, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_and_one_of_stage_1_are_refused(run, tmp_path, capsys):
    unfinished = Run.open(run.settings, tmp_path / "runs")
    stage1 = Run.open(run.settings | {"stage": "align"}, tmp_path / "runs").finish()
    for other in (unfinished, stage1):
        assert "finished run of tune()" in refused(capsys, other.folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_whose_encoder_is_no_more_is_refused_by_its_name(run, tmp_path, capsys):
    gone = Run.open(run.settings | {"encoder": str(tmp_path / "gone")}, tmp_path).finish()
    assert str(tmp_path / "gone") in refused(capsys, gone.folder, tmp_path / "new")


@pytest.mark.parametrize("damage", sorted(set(DAMAGE) - {"one too many"}))  # a run may keep more than the encoder
def test_a_checkpoint_whose_weights_do_not_fit_is_not_exported(damage, run, tmp_path, capsys):
    broken = shutil.copytree(run.folder, tmp_path / run.id)
    change, message = DAMAGE[damage]
    change_weights(broken / "checkpoint" / "weights.safetensors", change)
    text = refused(capsys, str(broken), str(tmp_path / "new"))
    assert any(part in text for part in message.split("|")) and run.id in text and not (tmp_path / "new").exists()


def test_scores_that_are_not_of_the_run_are_refused_before_anything_is_written(run, tmp_path, capsys):
    pd.DataFrame([row("tiny", 0.9)]).to_csv(tmp_path / "others.csv", index=False)
    (tmp_path / "words.csv").write_text("encoder,words\n")
    for name, words in (
        ("others.csv", f"no row of encoder {run.id}"), ("words.csv", "no column benchmark"), ("gone.csv", "gone.csv"),
    ):  # fmt: skip
        assert words in refused(capsys, run.folder, tmp_path / "new", "--scores", tmp_path / name)
    assert not (tmp_path / "new").exists()


def test_what_is_there_already_is_not_written_to(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    for mine in (tmp_path / "full" / "mine.txt", tmp_path / "file"):
        mine.write_text("precious")
    for place in ("full", "file"):
        assert "is not empty" in refused(capsys, run.folder, tmp_path / place)
    kept = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {"full/mine.txt": "precious", "file": "precious"}
