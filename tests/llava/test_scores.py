"""The four benchmarks, from small files of their published layouts, against answers counted by hand."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diva_lab.cli import main
from diva_lab.llava import cvbench, mmvp, naturalbench, pope
from diva_lab.llava.answers import Answer, ask, read_answers, write_answers
from diva_lab.llava.folders import load_llava
from diva_lab.llava.questions import check_images, first_word, read_letter
from diva_lab.llava.scores import evaluate_llava, score


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(36, 36, 3), dtype=np.uint8))


def packed(seed: int) -> dict:
    """An image as the parquet files of the hub hold it."""
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{seed}.png"}


def write_mmvp(root: Path) -> Path:
    folder = root / "MMVP"
    (folder / "MMVP Images").mkdir(parents=True)
    rows = ["Index,Question,Options,Correct Answer"]
    for i, answer in enumerate("abab", 1):
        rows.append(f"{i},Is the star red?,(a) Yes (b) No,({answer})")
        picture(i).save(folder / "MMVP Images" / f"{i}.jpg")
    (folder / "Questions.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_naturalbench(root: Path) -> Path:
    folder = root / "NaturalBench"
    (folder / "data").mkdir(parents=True)
    rows = []
    for k, (kind, words) in enumerate([("yes_no", ("Yes", "No")), ("multiple_choice", ("A", "B"))]):
        answers = {f"Image_{i}_Question_{j}": words[i ^ j] for i in (0, 1) for j in (0, 1)}
        texts = {"Question_0": "Is it red?", "Question_1": "Is it green?", "Question_Type": kind, "Index": k}
        rows.append({"Image_0": packed(2 * k), "Image_1": packed(2 * k + 1), **texts, **answers})
    pd.DataFrame(rows).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def write_pope(root: Path) -> Path:
    folder = root / "pope"
    (folder / "val2014").mkdir(parents=True)
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": k, "image": f"{k % 2}.jpg", "text": "Is there a dog in the image?", "label": label}
            for k, label in enumerate(["yes", "yes", "no", "no"], 1)
        ]
        (folder / f"coco_pope_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for k in (0, 1):
        picture(k).save(folder / "val2014" / f"{k}.jpg")
    return folder


def write_cvbench(root: Path) -> Path:
    folder = root / "CV-Bench"
    (folder / "img").mkdir(parents=True)
    kinds = [
        ("2d", "ADE20K", "Count"),
        ("2d", "ADE20K", "Count"),
        ("2d", "COCO", "Relation"),
        ("3d", "Omni3D", "Depth"),
    ]
    prompt = "How many stars? Select from the following choices.\n(A) 1\n(B) 2\n(C) 3"
    for k, (part, source, task) in enumerate(kinds):
        picture(k).save(folder / "img" / f"{k}.png")
        row = {"idx": k, "type": part.upper(), "task": task, "question": "How many stars?", "choices": ["1", "2", "3"]}
        row |= {"answer": "(B)", "source": source, "filename": f"img/{k}.png", "prompt": prompt}
        with open(folder / f"test_{part}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    return folder


WRITERS = {"mmvp": write_mmvp, "naturalbench": write_naturalbench, "pope": write_pope, "cv-bench": write_cvbench}


@pytest.fixture
def root(tmp_path) -> Path:
    for write in WRITERS.values():
        write(tmp_path / "data")
    return tmp_path / "data"


def values(rows) -> dict[str, float]:
    return {(row["metric"], row["category"]): row["value"] for row in rows}


# --- counted by hand --------------------------------------------------------------------------------------------


def test_a_pair_of_mmvp_counts_only_if_both_are_right(tmp_path):
    questions = mmvp.read(write_mmvp(tmp_path))
    assert [q.right for q in questions] == [0, 1, 0, 1] and questions[0].options == ("Yes", "No")
    assert questions[0].text.startswith("Is the star red? (a) Yes (b) No\n")
    found = values(mmvp.score(questions, [0, 1, 0, 0]))  # the first pair, and one half of the second
    assert found == {("pairs", "all"): 0.5, ("questions", "all"): 0.75}
    assert values(mmvp.score(questions, [0, None, 1, 1]))["pairs", "all"] == 0


def test_corrected_labels_of_mmvp_stand_beside_the_official_score(tmp_path):
    questions = mmvp.read(write_mmvp(tmp_path))
    answers = [Answer(text, (0.0, -1.0)) for text in ("(a)", "(b)", "(a)", "(a)")]
    rows = list(score("mmvp", questions, answers, corrections=(tmp_path / "c.csv", {4: 1})))
    found = values(rows)
    assert found["pairs, by rule", "all"] == 0.5 and found["pairs, by rule", "corrected by c.csv"] == 1
    assert found["pairs, by likelihood", "all"] == 0 and found["pairs, by likelihood", "corrected by c.csv"] == 0.5
    for labels, expected in (({9: 1}, "id 9 is not in the set"), ({1: 1}, r"id 1 says \(a\) as the set does")):
        with pytest.raises(ValueError, match=expected):
            mmvp.correct(questions, labels, tmp_path)


def test_naturalbench_counts_questions_images_and_groups(tmp_path):
    questions = naturalbench.read(write_naturalbench(tmp_path))
    assert [q.right for q in questions] == [0, 1, 1, 0] * 2
    chosen = [0, 1, 1, 0, 0, 1, 0, 0]  # the second group: question 0 is wrong on image 1
    found = values(naturalbench.score(questions, chosen))
    assert found == {
        ("group", "all"): 1 / 2, ("image", "all"): 3 / 4, ("question", "all"): 3 / 4, ("answers", "all"): 7 / 8,
    }  # fmt: skip
    always = values(naturalbench.score(questions, [0] * 8))  # whoever always says yes
    assert (always["question", "all"], always["image", "all"], always["answers", "all"]) == (0, 0, 0.5)


def test_pope_counts_f1_of_yes_and_its_share_in_each_split_and_on_average(tmp_path):
    questions = pope.read(write_pope(tmp_path))
    assert [q.place["split"] for q in questions[::4]] == ["adversarial", "popular", "random"]
    chosen = [0, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1]  # right yes and no: one each; all; never yes
    found = values(pope.score(questions, chosen))
    f1 = [found["f1", split] for split in ("adversarial", "popular", "random")]
    assert f1 == [0.5, 1, 0] and found["f1", "all"] == 0.5
    assert [found["accuracy", s] for s in ("adversarial", "popular", "random")] == [0.5, 1, 0.5]
    assert [found["yes", s] for s in ("adversarial", "popular", "random")] == [0.5, 0.5, 0]
    assert found["yes", "all"] == pytest.approx(1 / 3)


def test_an_interval_of_pope_resamples_images_with_all_their_questions(tmp_path):
    questions = pope.read(write_pope(tmp_path))
    rows = [row for row in pope.score(questions, [q.right for q in questions]) if row["metric"] == "f1"]
    assert [(row["low"], row["high"]) for row in rows] == [(1, 1)] * 4
    half = [q.right if q.place["image"] == "0.jpg" else 1 - q.right for q in questions]  # one image all wrong
    (row,) = [r for r in pope.score(questions, half) if r["metric"] == "accuracy" and r["category"] == "all"]
    assert (row["value"], row["low"], row["high"]) == (0.5, 0, 1)


def test_cv_bench_2d_is_the_mean_of_its_sources(tmp_path):
    questions = cvbench.read(write_cvbench(tmp_path))
    found = values(cvbench.score(questions, [1, 0, 1, 2]))  # ADE20K 1 of 2, COCO 1 of 1, Omni3D 0 of 1
    assert found["2D", "all"] == 0.75 and found["3D", "all"] == 0
    assert found["accuracy", "Count"] == 0.5 and found["accuracy", "Relation"] == 1
    with pytest.raises(ValueError, match="no question of COCO"):
        list(cvbench.score(questions[:2], [0, 0]))


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("(b)", 1), ("b", 1), ("B.", 1), ("(a) Open", 0), ("The answer is (b).", 1), ("A dog that is shut", 1),
        ("open", 0), ("a: shut", 0), ("open or shut", None), ("", None), ("(c)", None), ("opened", None),
    ],
)  # fmt: skip
def test_an_option_is_read_by_its_letter_or_by_its_words(answer, expected, tmp_path):
    question = mmvp.Question("1", b"", "", ("(a)", "(b)"), 0, ("open", "shut"))
    assert read_letter(answer, question) == expected


def test_yes_and_no_are_read_as_the_authors_code_reads_them():
    assert [first_word(text, ("Yes", "No")) for text in ("no, yes", "Yes.", "nothing", "")] == [1, 0, None, None]
    question = mmvp.Question("1", b"", "", ("Yes", "No"), 0)
    said = {"No": 1, "There is no dog. yes": 1, "Yes. There is no cat": 0, "it is not": 1, "Nobody": 0, "no,": 1}
    assert {text: pope.rule(text, question) for text in said} == said


# --- a model ----------------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_the_batch_and_likelihoods_are_those_of_plain_transformers(llava, tmp_path):
    questions = mmvp.read(write_mmvp(tmp_path)) + naturalbench.read(write_naturalbench(tmp_path))
    model = load_llava(llava, torch.float32)
    whole, one = (list(ask(model, questions, batch)) for batch in (5, 1))
    assert [a.text for a in whole] == [a.text for a in one]
    for question, answer in zip(questions, whole, strict=True):
        for choice, likelihood in zip(question.choices, answer.likelihoods, strict=True):
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            messages = [{"role": "user", "content": content}]
            prompt = model.processor.apply_chat_template(messages, add_generation_prompt=True)
            inside = isinstance(question.image, bytes)
            image = Image.open(io.BytesIO(question.image) if inside else question.image.path)
            ends = ("", f" {choice}")
            given = [model.processor(images=image, text=prompt + end, return_tensors="pt") for end in ends]
            logs = model.model(**given[1]).logits.log_softmax(-1)[0]
            ids, first = given[1].input_ids[0], given[0].input_ids.shape[1]
            expected = sum(logs[k - 1, ids[k]].item() for k in range(first, len(ids)))
            assert likelihood == pytest.approx(expected, abs=1e-4)


def test_every_benchmark_runs_on_a_folder_and_answers_are_kept(llava, root, tmp_path, capsys, monkeypatch):
    args = ["llava", "evaluate", "--llava", llava, "--benchmarks", ",".join(WRITERS), "--root", root]
    args = [*map(str, [*args, "--out", tmp_path / "r.csv"])]
    assert main(args) == 0
    table = pd.read_csv(tmp_path / "r.csv")
    assert set(table["benchmark"]) == set(WRITERS) and set(table["features"]) == {"assembled, nothing trained"}
    for metric in ("pairs", "group", "f1", "2D"):
        assert {f"{metric}, by rule", f"{metric}, by likelihood"} <= set(table["metric"])
    assert len(list((tmp_path / "r.answers").iterdir())) == 4
    monkeypatch.setattr("diva_lab.llava.scores.ask", None)  # nothing is asked again
    assert main(args) == 0
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "r.csv"), table)


def test_damaged_input_is_one_clear_line(llava, root, tmp_path, capsys):
    begin = ["llava", "evaluate", "--llava", str(llava), "--out", str(tmp_path / "r.csv")]

    def told(name: str, *more) -> str:
        args = [*begin, "--benchmarks", name, "--root", root, *more]
        assert main([str(arg) for arg in args]) == 2
        text = capsys.readouterr().err.strip()
        assert "\n" not in text and "Traceback" not in text
        return text

    assert main([*begin, "--benchmarks", "mmvp", "--root", str(root)]) == 0
    capsys.readouterr()
    (kept,) = (tmp_path / "r.answers").iterdir()
    whole = kept.read_text()
    kept.write_text(whole[: len(whole) - 20])
    assert "line 5" in (text := told("mmvp")) and "cut off" in text and "delete it" in text
    kept.write_text("".join(whole.splitlines(keepends=True)[:3]))
    assert "2 answers to 4 questions; delete it" in told("mmvp")
    kept.write_text(whole)
    assert "expected a set that mmvp reads" in told("mmvp", "--corrections", corrections(tmp_path, "other,1,b,me"))
    assert "id 1 says (a) as the set does" in told("mmvp", "--corrections", corrections(tmp_path, "mmvp,1,a,me"))
    (root / "MMVP" / "MMVP Images" / "3.jpg").unlink()
    assert "1 of 4 images are not there" in (text := told("mmvp")) and "3.jpg" in text
    (root / "CV-Bench" / "img" / "1.png").write_bytes(b"half")
    assert "1.png cannot be read" in told("cv-bench")
    file = root / "pope" / "coco_pope_random.json"
    file.write_text(file.read_text()[:-9])
    assert "coco_pope_random.json, line 4" in told("pope")
    (file := next((root / "NaturalBench" / "data").iterdir())).write_bytes(file.read_bytes()[:-9])
    assert "test-00000-of-00001.parquet: not a parquet file" in told("naturalbench")
    assert "unknown benchmark 'mmpv'; did you mean 'mmvp'? expected one of mmvp" in told("mmpv")
    assert "no folder of pope" in told("pope", "--root", tmp_path / "r.answers")


def corrections(folder: Path, row: str) -> Path:
    (folder / "c.csv").write_text(f"set,id,label,source\n{row}\n")
    return folder / "c.csv"


def test_answers_of_other_weights_or_questions_are_not_scored(tmp_path):
    questions = mmvp.read(write_mmvp(tmp_path))
    answers = [Answer("(a)", (0.0, -1.0))] * 4
    write_answers(tmp_path / "a.jsonl", "abc", questions, answers)
    assert read_answers(tmp_path / "a.jsonl", "abc", questions) == answers
    with pytest.raises(ValueError, match="weights = 'abc', and here it is 'other'"):
        read_answers(tmp_path / "a.jsonl", "other", questions)
    with pytest.raises(ValueError, match="questions = "):
        read_answers(tmp_path / "a.jsonl", "abc", questions[:2])


def test_a_table_without_the_right_columns_is_refused(tmp_path):
    folder = write_mmvp(tmp_path)
    rows = "1,Is it?,(a) Yes (b) No,(c)\n2,Is it?,x,(a)\n"
    (folder / "Questions.csv").write_text(f"{','.join(mmvp.COLUMNS)}\n{rows}")
    with pytest.raises(ValueError, match=r"row 1: .*'\(c\)'; expected a number, two options"):
        mmvp.read(folder)
    with pytest.raises(FileNotFoundError, match="images are not there"):
        check_images([mmvp.Question("1", mmvp.Place("none.jpg"), "", ("a", "b"), 0)], folder)
    assert evaluate_llava([], ["mmvp"], write_mmvp(tmp_path / "whole")).empty
