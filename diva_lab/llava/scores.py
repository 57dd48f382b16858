"""Any LLaVA folders on any of the benchmarks, into the table of `evaluate`: `diva-lab llava evaluate`.

A benchmark is a file with `is_here`, `read`, `rule` and `score`, and one line of `BENCHMARKS`. Each score stands twice,
`METRIC, by rule` and `METRIC, by likelihood`; `unread` is the share of answers in which the rule finds no choice. The
column `features` names the rung: what of the LLaVA was trained after the tower was put in.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import torch

from diva_lab import messages
from diva_lab.evaluation.image_sets import canonical_name
from diva_lab.evaluation.pairs import read_corrections
from diva_lab.evaluation.results import COLUMNS, FACTS, ResultFiles, versions_and_git
from diva_lab.evaluation.task import score_row
from diva_lab.llava import cvbench, mmvp, naturalbench, pope
from diva_lab.llava.answers import Answer, ask, fingerprint, read_answers, write_answers
from diva_lab.llava.folders import UNKNOWN, Llava, load_llava
from diva_lab.llava.questions import Question, candidates, check_images
from diva_lab.machine import default_device
from diva_lab.statistics import wilson

BENCHMARKS: dict[str, ModuleType] = {"mmvp": mmvp, "naturalbench": naturalbench, "pope": pope, "cv-bench": cvbench}


def evaluate_llava(
    models: Sequence[str | Path],
    benchmarks: Sequence[str],
    root: str | Path = ".",
    out: str | Path | None = None,
    answers: str | Path | None = None,
    corrections: str | Path | None = None,
    batch: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each model, benchmark, set, metric and category, as `evaluation.table.evaluate` has them.

    Args:
        models: LLaVA folders.
        benchmarks: keys of `BENCHMARKS`; each is run on the root or the folders in it that hold it.
        out: a csv that grows by each finished set, also one of `evaluate`.
        answers: folder for the answers, which are not asked for again; beside `out` by default, none without it.
        corrections: a csv of corrected labels of MMVP, see `pairs.read_corrections`; the score with them stands beside
            the official one, of the category `corrected by FILE`.
        batch: questions at a time.
        seed: of bootstraps.

    Raises:
        ValueError, FileNotFoundError: for a benchmark or an image that is not there, before anything is asked; for
            folders, files and answers that are damaged.
    """
    work = [task for name in benchmarks for task in _find(name, Path(root))]
    labels = {} if corrections is None else _corrections(Path(corrections), work)
    files = ResultFiles(out)
    if answers is None and out is not None:
        answers = Path(out).with_suffix(".answers")
    rows = []
    for folder in map(Path, models):
        device = default_device()
        llava = load_llava(folder, torch.float32 if device.type == "cpu" else "auto")
        llava.model.to(device)
        weights = fingerprint(folder)
        rung, precision = llava.record.get("rung", UNKNOWN), str(llava.model.dtype).removeprefix("torch.")
        facts = {"seed": seed, "features": rung, "precision": precision}
        facts |= {"strict": False, "max_images": 0, "weights": weights, **versions_and_git()}
        for name, label, questions in work:
            kept = answers and answer_file(answers, weights, name, label)
            said = _answers(llava, questions, kept, weights, batch)
            place = {"encoder": str(folder), "benchmark": name, "set": label}
            corrected = labels.get(label) if name == "mmvp" else None
            found = [{**place, **row, **facts} for row in score(name, questions, said, seed, corrected)]
            files.add_rows(found)
            rows += found
    return pd.DataFrame(rows, columns=COLUMNS + FACTS)


def answer_file(answers: str | Path, weights: str, benchmark: str, label: str) -> Path:
    """Where `evaluate_llava` keeps the answers of the model with these weights to a set of questions."""
    return Path(answers) / f"{weights}-{benchmark}-{label}.jsonl"


def _answers(llava: Llava, questions: list[Question], kept: Path | None, weights: str, batch: int) -> list[Answer]:
    """The answers that are kept in a file; else the model's, which are kept there then."""
    if kept and kept.is_file():
        return read_answers(kept, weights, questions)
    said = list(ask(llava, questions, batch))
    if kept:
        write_answers(kept, weights, questions, said)
    return said


def _find(name: str, root: Path) -> list[tuple[str, str, list[Question]]]:
    """(benchmark, label of the set, questions) for each folder of a benchmark, all images of which can be read."""
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; {messages.expected(name, BENCHMARKS)}")
    module = BENCHMARKS[name]
    folders = [folder for folder in candidates(root) if module.is_here(folder)]
    if not folders:
        expected = " ".join(module.__doc__.split("\n\n")[1].split())
        raise FileNotFoundError(f"{root}: no folder of {name} here or in a folder of it; expected: {expected}")
    work = []
    for folder in folders:
        questions = module.read(folder)
        check_images(questions, folder)
        work.append((name, canonical_name(folder.resolve().name), questions))
    return work


def _corrections(file: Path, work: Sequence[tuple]) -> dict[str, tuple[Path, dict[int, int]]]:
    """Set -> the file and its labels, for the sets of MMVP that it names."""
    by_set = read_corrections(file)
    sets = [label for name, label, _ in work if name == "mmvp"]
    if not by_set.keys() & set(sets):
        here = ", ".join(sets) or "none"
        raise ValueError(f"{file}: corrects {', '.join(by_set)}; expected a set that mmvp reads in this call: {here}")
    return {label: (file, by_set[label]) for label in sets if label in by_set}


def score(
    name: str,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    seed: int = 0,
    corrections: tuple[Path, dict[int, int]] | None = None,
) -> Iterator[dict]:
    """The rows of one benchmark: its scores by rule and by likelihood, with corrected labels too, and `unread`."""
    module = BENCHMARKS[name]
    by_rule = [module.rule(answer.text, question) for question, answer in zip(questions, answers, strict=True)]
    ways = {"rule": by_rule, "likelihood": [answer.likeliest for answer in answers]}
    for how, chosen in ways.items():
        for row in module.score(questions, chosen, seed):
            yield row | {"metric": f"{row['metric']}, by {how}"}
        if corrections:
            file, labels = corrections
            for row in module.score(module.correct(questions, labels, file), chosen, seed):
                yield row | {"metric": f"{row['metric']}, by {how}", "category": f"corrected by {file.name}"}
    unread, n = by_rule.count(None), len(by_rule)
    yield score_row("unread", unread / n, n, *wilson(unread, n), np.nan)
