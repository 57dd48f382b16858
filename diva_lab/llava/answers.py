"""What a LLaVA answers: what it generates, and how likely it finds each choice; kept in a file for each set.

    ANSWERS/WEIGHTS-BENCHMARK-SET.jsonl    named by a hash of the weights; first which weights and questions it is of,
                                           then one line a question: id, answer, likelihoods

A file is put in place when it is whole. There it is scored without asking again; one that is of other weights or
questions, or was cut off, is an error.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from diva_lab.evaluation.row_files import read_lines
from diva_lab.image_files import open_picture
from diva_lab.llava.folders import Llava
from diva_lab.llava.prompts import SILENT, read_images, render, tokenize
from diva_lab.llava.questions import Question
from diva_lab.models.weights import weight_files
from diva_lab.provenance import sha256

NEW_TOKENS = 16  # that are generated; every benchmark asks for a word or a letter


class Answer(NamedTuple):
    """What was generated, and the log probability of each of the question's choices."""

    text: str
    likelihoods: tuple[float, ...]

    @property
    def likeliest(self) -> int:
        return max(range(len(self.likelihoods)), key=self.likelihoods.__getitem__)


def fingerprint(folder: Path) -> str:
    """A hash of the folder's weights."""
    hashes = [sha256(file) for file in weight_files(folder).values()]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]


def _hash(questions: Sequence[Question]) -> str:
    told = [(q.id, q.text, q.choices, str(q.image) if not isinstance(q.image, bytes) else "") for q in questions]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


@torch.inference_mode()
def ask(llava: Llava, questions: Sequence[Question], batch: int = 8) -> Iterator[Answer]:
    """Answer questions, so many at a time: greedily generated, and by likelihood."""
    for first in range(0, len(questions), batch):
        group = questions[first : first + batch]
        images = []
        for question in group:
            with open_picture(question.image) as image:
                images.append(image.copy())
        pixels = read_images(llava, images)
        texts = _generate(llava, group, pixels)
        for k, question in enumerate(group):
            yield Answer(texts[k], _likelihoods(llava, question, pixels[k : k + 1]))


def _generate(llava: Llava, questions: Sequence[Question], pixels: torch.Tensor) -> list[str]:
    given = tokenize(llava, [render(llava, [q.text]) for q in questions], left=True)
    del given["labels"]
    tokenizer = llava.processor.tokenizer
    said = llava.model.generate(
        **given, pixel_values=pixels, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, temperature=None,
        top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    new = said[:, given["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _likelihoods(llava: Llava, question: Question, pixels: torch.Tensor) -> tuple[float, ...]:
    """log p(choice | image, question) of each choice: the sum over its tokens."""
    prompts = [render(llava, [question.text, choice]).narrow(choice) for choice in question.choices]
    given = tokenize(llava, prompts)
    labels = given.pop("labels")[:, 1:]
    logits = llava.model(**given, pixel_values=pixels.expand(len(prompts), -1, -1, -1)).logits[:, :-1]
    logs = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return tuple((logs * (labels != SILENT)).sum(1).tolist())


def write_answers(path: Path, weights: str, questions: Sequence[Question], answers: Sequence[Answer]) -> None:
    lines = [{"weights": weights, "questions": _hash(questions), "n": len(questions)}]
    lines += [
        {"id": q.id, "answer": a.text, "likelihoods": a.likelihoods} for q, a in zip(questions, answers, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.new")
    draft.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    draft.replace(path)


def read_answers(path: Path, weights: str, questions: Sequence[Question]) -> list[Answer]:
    """The answers in a file that `write_answers` wrote.

    Raises:
        ValueError: where it was cut off, edited, or is of other weights or questions; says what to do.
    """
    again = "delete it, and the model is asked again"
    try:
        head, *rows = read_lines(path) or [{}]
        facts = {"weights": weights, "questions": _hash(questions), "n": len(questions)}
        for name, value in facts.items():
            if head.get(name) != value:
                raise ValueError(f"{path}: {name} = {head.get(name)!r}, and here it is {value!r}")
        if len(rows) != len(questions):
            raise ValueError(f"{path}: {len(rows)} answers to {len(questions)} questions")
        for row, question in zip(rows, questions, strict=True):
            numbers = row.get("likelihoods")
            whole = isinstance(row.get("answer"), str) and isinstance(numbers, list)
            whole = whole and len(numbers) == len(question.choices) and all(isinstance(x, float) for x in numbers)
            if row.get("id") != question.id or not whole:
                raise ValueError(f"{path}: no whole answer to question {question.id}")
    except ValueError as error:
        raise ValueError(f"{error}; {again}") from error
    return [Answer(row["answer"], tuple(row["likelihoods"])) for row in rows]
