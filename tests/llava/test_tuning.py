"""Both steps of LLaVA's training: what is trained moves, the rest stays, and a stopped run goes on to the same bits."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_checks import same_records, same_weights
from transformers import LlavaForConditionalGeneration
from two_processes import launch

from diva_lab.cli import main
from diva_lab.llava.conversations import Dialogues, read_conversations
from diva_lab.llava.folders import load_llava
from diva_lab.llava.prompts import SILENT, render, render_plain, tokenize
from diva_lab.llava.tuning import LlavaSettings, llava_settings, train_llava
from diva_lab.models.weights import load_weights
from diva_lab.paths import DATA
from diva_lab.training import loop
from diva_lab.training.runs import Run


def record(k: int, *turns: str, image: bool = True) -> dict:
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    said[0]["value"] = f"<image>\n{said[0]['value']}" if image else said[0]["value"]
    return {"id": str(k), "conversations": said} | ({"image": f"a/{k}.png"} if image else {})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A JSON of five conversations, one of them without image, beside their images."""
    root = tmp_path_factory.mktemp("data")
    (root / "a").mkdir()
    for k in range(4):
        pixels = np.random.default_rng(k).integers(256, size=(36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "a" / f"{k}.png")
    rows = [record(k, "is the star red ?", "yes") for k in range(3)]
    rows.append(record(3, "how many dots ?", "two dots", "is the star green ?", "no"))
    rows.append(record(4, "red ?", "no", image=False))
    (root / "mix.json").write_text(json.dumps(rows))
    (root / "captions.json").write_text(json.dumps(rows[:3]))
    return root


def settings(llava, data, trained="projector", **changes) -> LlavaSettings:
    small = {"steps": 3, "batch": 2, "accumulate": 2, "lr": 0.01, "precision": "no", "lora_rank": 4, "save_every": 1}
    name = "captions.json" if trained == "projector" else "mix.json"
    return LlavaSettings(str(llava), str(data / name), str(data), trained, **small | changes)


# --- what is said -----------------------------------------------------------------------------------------------


def test_what_the_assistant_says_and_the_end_of_it_is_what_is_learned(llava):
    model = load_llava(llava)
    prompts = [render(model, ["how many dots ?", "two dots", "is it red ?", "no"]), render_plain(model, "a red star")]
    given = tokenize(model, prompts)
    words = model.processor.tokenizer
    said = [words.decode(row[row != SILENT]) for row in given["labels"]]
    assert said == ["two dots </s> no </s>", "a red star"]
    assert ((given["labels"] == SILENT) | (given["labels"] == given["input_ids"])).all()
    for row in given["input_ids"]:
        assert (row == model.model.config.image_token_id).sum() == 16


def test_the_tokens_of_a_prompt_are_those_of_the_processor(llava):
    model = load_llava(llava)
    content = [{"type": "image"}, {"type": "text", "text": "how many dots ?"}]
    text = model.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    theirs = model.processor(images=Image.new("RGB", (40, 36)), text=text, return_tensors="pt")
    ours = tokenize(model, [render(model, ["how many dots ?"])])
    assert torch.equal(ours["input_ids"], theirs.input_ids)


def test_a_template_that_does_not_end_answers_gets_the_end_and_one_that_rewrites_is_refused(llava):
    model = load_llava(llava)
    template = model.processor.chat_template
    model.processor.chat_template = template.replace("'</s>'", "' '")  # as llava-hf's
    given = tokenize(model, [render(model, ["red ?", "yes", "green ?", "no"])])["labels"]
    assert model.processor.tokenizer.decode(given[given != SILENT]) == "yes </s> no </s>"
    model.processor.chat_template = "{{ messages | length }}" + template
    with pytest.raises(ValueError, match="does not append turns"):
        render(model, ["red ?", "yes"])


# --- conversations ----------------------------------------------------------------------------------------------


def test_every_record_is_drawn_once_an_epoch_in_an_order_of_its_own_and_by_one_process(llava, data):
    records = read_conversations(data / "mix.json", data)
    model = load_llava(llava)

    def draws(batches: Dialogues, n: int) -> list:
        return [batches._record(k) for k in range(n)]

    one = draws(Dialogues(model, records, False, 1, 0, seed=0), 10)
    assert set(one[:5]) == set(one[5:]) == set(records) and one[:5] != one[5:]
    assert draws(Dialogues(model, records, False, 1, 0, seed=1), 10) != one
    seen = {}
    for rank in (0, 1):
        batches = Dialogues(model, records[:4], False, 2, 0, 0, 0, rank, 2)
        seen[rank] = next(batches)["input_ids"].tolist()
        assert batches.position == 2
    whole = Dialogues(model, records[:4], False, 2, 0, 0)
    assert [next(whole)["input_ids"].tolist() for _ in range(2)] == [seen[0], seen[1]]


def test_conversations_that_are_none_are_one_clear_line(data, tmp_path):
    path = tmp_path / "c.json"

    def refuses(expected: str, rows, error=ValueError):
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        with pytest.raises(error, match=expected) as told:
            read_conversations(path, data)
        assert str(path) in str(told.value) and "\n" not in str(told.value)

    good = record(0, "red ?", "yes")
    refuses("cut off", json.dumps([good])[:-5])
    refuses("expected a list of records", {"a": 1})
    refuses("expected a list of records, found list of 0", [])
    refuses("none of its 1 records has an image", [record(0, "red ?", "yes", image=False)])
    refuses("record 2.*human and gpt by turns", [good, {"id": "1", "image": "a/1.png"}])
    refuses("record 1.*human and gpt by turns", [record(0, "red ?")])
    refuses("record 1: image 'None' and 1 times <image>", [{**good, "image": None}])
    refuses("1 of 2 images are not there, as .*9.png", [good, record(9, "red ?", "yes")], FileNotFoundError)


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["projector", "all", "lora"])
def test_only_what_is_trained_moves_and_the_run_ends_with_a_plain_llava_folder(trained, llava, data, tmp_path):
    run = train_llava(settings(llava, data, trained), tmp_path)
    before, after = (LlavaForConditionalGeneration.from_pretrained(f) for f in (llava, run.folder / "llava"))
    moved = {n for n, w in after.state_dict().items() if not torch.equal(w, before.state_dict()[n])}
    parts = {name.split(".")[1] if name.startswith("model.") else name for name in moved}
    expected = {"multi_modal_projector"} | ({"language_model"} if trained != "projector" else set())
    assert parts == expected | ({"lm_head.weight"} if trained == "all" else set())
    rungs = {"projector": "projector retrained", "lora": "projector and LoRA retrained"}
    record = json.loads((run.folder / "llava" / "diva-lab.json").read_text())
    assert record["rung"] == rungs.get(trained, "projector and language model retrained")
    assert record["run"] == run.id and list(run.metrics()["step"]) == [0, 1, 2]
    assert train_llava(settings(llava, data, trained), tmp_path).folder == run.folder


def train_until(step_of_the_fault, chosen, root, monkeypatch):
    """Train to the step before, then raise; what was saved stays."""
    take_step = loop.Trainer.take_step

    def stops(self, step):
        if step == step_of_the_fault:
            raise OSError("the power is gone")
        return take_step(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "take_step", stops)
        with pytest.raises(OSError, match="power"):
            train_llava(chosen, root)


def test_a_stopped_run_goes_on_to_the_same_bits(llava, data, tmp_path, monkeypatch):
    chosen = settings(llava, data, "lora", lora_dropout=0.3)
    whole = train_llava(chosen, tmp_path / "whole")
    train_until(2, chosen, tmp_path / "stopped", monkeypatch)
    stopped = train_llava(chosen, tmp_path / "stopped")
    assert stopped.id == whole.id
    assert same_weights(stopped, whole)
    same_records(stopped, whole)
    one, other = (run.folder / "llava" / "model.safetensors" for run in (whole, stopped))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_run_that_was_stopped_in_one_process_goes_on_in_two(llava, data, tmp_path, monkeypatch):
    images, captions, root = str(data), str(data / "captions.json"), tmp_path / "runs"
    changes = ("steps=3", "save_every=1", "batch=2", "accumulate=2", "precision=no")
    train_until(2, llava_settings(llava, captions, images, "projector", changes), root, monkeypatch)
    words = ["llava", "train", str(llava), "--data", captions, "--images", images, "--out", str(root)]
    done = launch("-m", "diva_lab", *words, "--trained", "projector", "--set", *changes)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = root.iterdir()
    run = Run(folder)
    assert run.done and (folder / "llava" / "model.safetensors").exists()
    assert run.processes().to_dict("records") == [{"step": 2, "processes": 2, "accumulate": 1}]
    assert run.settings["accumulate"] == 2 and list(run.metrics()["step"]) == [0, 1, 2]


def test_training_lowers_the_loss_of_what_it_is_trained_on(llava, data, tmp_path):
    run = train_llava(settings(llava, data, "all", steps=25, accumulate=1, batch=5, warmup_share=0.0), tmp_path)
    losses = run.metrics()["loss"]
    assert losses.iloc[-1] < 0.3 * losses.iloc[0]


def test_a_step_of_training_has_the_gradient_of_plain_transformers_loss(llava, data, tmp_path, monkeypatch):
    chosen = settings(llava, data, steps=1, batch=3, accumulate=1, clip=0.0, optimizer="sgd", warmup_share=0.0)
    run = train_llava(replace(chosen, lr=1.0, schedule="constant"), tmp_path)
    model = load_llava(llava, torch.float32)
    given = next(Dialogues(model, read_conversations(chosen.data, data), False, 3, 0, 0))
    loss = model.model(**given).loss
    assert run.metrics()["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for name, weight in run.weights().items():
        p = dict(model.model.named_parameters())[name.removeprefix("llava.")]
        torch.testing.assert_close(weight, (p - p.grad).detach(), atol=1e-5, rtol=1e-4)


def test_the_projector_learns_at_its_own_rate(llava, data, tmp_path):
    chosen = settings(llava, data, "lora", steps=1, optimizer="sgd", clip=0.0, warmup_share=0.0)
    runs = [train_llava(replace(chosen, projector_lr=lr), tmp_path / str(lr)) for lr in (0.0, 0.001)]
    start = load_llava(llava).model.state_dict()
    for name in runs[0].weights():
        own, ten = (run.weights()[name] - start.get(name.removeprefix("llava."), 0) for run in runs)
        if "multi_modal_projector" in name:
            torch.testing.assert_close(own, 10 * ten, atol=1e-6, rtol=1e-2)
        elif "lora_A" in name:
            assert torch.equal(own, ten)


def test_other_weights_or_conversations_are_another_run(llava, data, tmp_path):
    other = shutil.copytree(llava, tmp_path / "other")
    first = train_llava(settings(other, data, steps=1), tmp_path / "runs")
    model = load_llava(other)
    load_weights(model.model, {n: w + 0.01 for n, w in model.model.state_dict().items()}, other)
    model.save(other)
    second = train_llava(settings(other, data, steps=1), tmp_path / "runs")
    assert first.id != second.id


def test_the_command_trains_both_steps_one_after_the_other(llava, data, tmp_path, capsys):
    def arguments(folder, name):
        return ["llava", "train", *map(str, (folder, "--data", data / name, "--images", data, "--out", tmp_path))]

    def trains(folder, trained, name):
        small = ("steps=1", "batch=2", "lora_rank=2", "precision=no")
        assert main([*arguments(folder, name), "--trained", trained, "--set", *small]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    first = trains(llava, "projector", "captions.json")
    assert main(["llava", "swap", str(llava), "--encoder", str(Path(first).parent), str(tmp_path / "x")]) == 2
    assert "which trains no encoder" in capsys.readouterr().err  # and is not taken for one
    last = trains(first, "lora", "mix.json")
    assert load_llava(last).record["rung"] == "projector and LoRA retrained"
    args = arguments(llava, "mix.json")
    assert main([*args, "--trained", "projector"]) == 2
    assert "1 of 5 records have no image" in capsys.readouterr().err
    assert main([*args, "--trained", "all", "--set", "lrate=1"]) == 2
    assert "expected NAME=VALUE; for the name expected one of llava" in capsys.readouterr().err


TABLE = [row for row in csv.DictReader((DATA / "published" / "recipes.csv").read_text().splitlines()) if
         row["recipe"].startswith("llava")]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['recipe']}-{row['stage']}")
def test_the_recipe_has_the_published_numbers(row):
    trained = {"1": "projector", "2": "lora" if "lora" in row["recipe"] else "all"}[row["stage"]]
    found = llava_settings("llava", "data.json", "images", trained, processes=int(row["processes"]))
    whole = replace(found, steps=int(row["steps"]))
    for name in ("lr", "weight_decay", "warmup", "batch", "accumulate", "clip"):
        assert getattr(whole, name) == float(row[name]), name
    for name in ("optimizer", "schedule"):
        assert getattr(whole, name) == row[name], name
    if trained == "lora":
        assert (found.lora_rank, found.lora_alpha, found.lora_dropout, found.projector_lr) == (128, 256, 0.05, 2e-5)
        assert (row["lora_rank"], row["lora_alpha"], row["lora_dropout"]) == ("128", "256", "0.05")
    four = llava_settings("llava", "data.json", "images", trained, processes=4)
    assert four.batch * four.accumulate * 4 == found.batch * found.accumulate * 8
    with pytest.raises(ValueError, match="3 processes of batch"):
        llava_settings("llava", "data.json", "images", trained, processes=3)


def test_there_is_a_published_recipe_of_each_kind():
    assert len(TABLE) == 3
