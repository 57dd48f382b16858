"""The tiny language model: its questions are true, its vocabulary is whole, and the chain runs end to end."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tools.language as language
from diva_lab.cli import main
from diva_lab.llava import mmvp, naturalbench
from diva_lab.llava.conversations import read_conversations
from diva_lab.llava.folders import load_llava
from diva_lab.llava.prompts import render, tokenize
from diva_lab.world import ATTRIBUTES, DETAILS, World, draw_scenes
from tools.language import ASKED, LONGEST, write_conversations, write_questions


def test_what_a_training_conversation_says_is_true():
    rng, counts = np.random.default_rng(0), {"(a)": 0, "(b)": 0, "Yes": 0, "No": 0}
    for scene in draw_scenes(60, 1):
        for name, values in ATTRIBUTES.items():
            true = values[scene[name]]
            assert language.open_question(scene, name, rng) == (ASKED[name], true)
            question, answer = language.option_question(scene, name, rng)
            word, letter = answer.split()
            assert word == true
            assert f"{letter} {true}" in question.replace("\n", " ").replace(" (b)", " ; (b)")
            assert question.count(true) >= 1 and "(a)" in question and "(b)" in question
            question, answer = language.yes_question(scene, name, rng)
            word, answer = answer.split()
            assert word == true and (answer == "Yes") == question.startswith(language.statement_question(scene, name))
            counts[letter] += 1
            counts[answer] += 1
    assert min(counts.values()) > 200  # of 600: no answer is right by default


def test_questions_about_minimal_pairs_stand_in_both_layouts_and_need_the_image(tmp_path):
    folder = write_questions(tmp_path, World(), each=4)
    asked = mmvp.read(folder / "MMVP")
    assert len(asked) == 2 * 4 * len(DETAILS)
    for one, other in zip(asked[::2], asked[1::2], strict=True):
        assert one.text == other.text and {one.right, other.right} == {0, 1}
    assert {q.right for q in asked[::2]} == {0, 1}  # the order of the options is drawn
    cells = naturalbench.read(folder / "NaturalBench")
    assert [q.right for q in cells] == [0, 1, 1, 0] * (4 * len(DETAILS))
    blind = pd.DataFrame(naturalbench.score(cells, [0] * len(cells))).set_index("metric")["value"]
    assert blind["group"] == blind["question"] == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The whole chain, a step of each phase."""
    root = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "RUNS", root / "runs")
        phases = {name: phase | {"steps": 1, "batch": 2} for name, phase in language.PHASES.items()}
        language.pretrain_language(root / "llava", World(), 0, records=6, phases=phases)
    return root


def test_the_language_model_is_small_and_knows_every_word(tiny, tmp_path):
    llava = load_llava(tiny / "llava")
    text = [p for name, p in llava.model.named_parameters() if "vision_tower" not in name]
    assert sum(p.numel() for p in text) < 1_500_000 and llava.model.dtype == torch.float16
    files = write_conversations(tmp_path, World(), 40, 3).values()
    records = [record for file in files for record in read_conversations(file, tmp_path / "images")]
    write_questions(tmp_path, World(), each=2)
    asked = [[q.text] for q in mmvp.read(tmp_path / "MMVP") + naturalbench.read(tmp_path / "NaturalBench")]
    given = tokenize(llava, [render(llava, turns) for turns in [*(r.turns for r in records), *asked]])
    assert given["input_ids"].shape[1] < LONGEST
    assert not (given["input_ids"] == llava.processor.tokenizer.unk_token_id).any()


def test_the_start_is_a_plain_causal_language_model(tiny):
    (folder,) = (tiny / "runs" / "pretrain").glob("*/language")
    ids = AutoTokenizer.from_pretrained(folder)("What colour is it?", return_tensors="pt").input_ids
    assert AutoModelForCausalLM.from_pretrained(folder)(ids).logits.isfinite().all()
    assert json.loads((tiny / "llava" / "record.json").read_text())["phases"]["captions"]["steps"] == 1


def test_every_rung_is_made_and_asked(tiny, tmp_path, capsys):
    """Tower swapped, projector retrained, projector and LoRA; each asked about minimal pairs."""
    write_questions(tmp_path / "asked", World(), each=1)
    data = write_conversations(tmp_path / "data", World(), 4, 5)["conversations"]
    folders = [tmp_path / "swapped"]
    assert main(["llava", "swap", str(tiny / "llava"), "--encoder", "tiny", str(folders[0])]) == 0
    for trained in ("projector", "lora"):
        capsys.readouterr()
        places = ["--data", data, "--images", data.parent / "images", "--out", tmp_path / "runs"]
        args = ["llava", "train", folders[-1], *places, "--trained", trained, "--set"]
        small = ["steps=1", "batch=2", "lora_rank=2", "dialogue=chat", "warmup_share=0.0"]
        assert main([*map(str, args), *small]) == 0
        folders.append(capsys.readouterr().out.splitlines()[-1])
    args = ["llava", "evaluate", *(word for folder in folders for word in ("--llava", str(folder)))]
    args += ["--benchmarks", "mmvp,naturalbench", "--root", str(tmp_path / "asked"), "--out", str(tmp_path / "r.csv")]
    assert main(args) == 0
    table = pd.read_csv(tmp_path / "r.csv")
    rungs = ["tower swapped, nothing trained", "projector retrained", "projector and LoRA retrained"]
    assert list(dict.fromkeys(table["features"])) == rungs
    assert table.groupby("features", sort=False)["weights"].nunique().eq(1).all() and table["weights"].nunique() == 3
    assert len(list((tmp_path / "r.answers").iterdir())) == 3 * 2  # each asked anew
    assert {"pairs, by likelihood", "group, by rule"} <= set(table["metric"])
