"""POPE: is there such a thing in the image? Asked of things that are there, and of things that are often beside them.

Li et al. (arXiv 2305.10355). `coco_pope_SPLIT.json` with a JSON object a line (question_id, image, text, label), the
splits random, popular and adversarial, beside the images of COCO's val2014, in a folder of that name or any other. As
in the authors' code an answer is no if its first sentence has `no` or `not`, and else yes; "yes" is the positive class.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from diva_lab.evaluation.row_files import read_rows
from diva_lab.evaluation.task import score_row
from diva_lab.image_files import Place, visible
from diva_lab.llava.questions import Question
from diva_lab.statistics import bootstrap_counts

COLUMNS = ("question_id", "image", "text", "label")
LABELS = ("yes", "no")
ASK = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's words


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in visible(folder) if "_pope_" in path.name and path.suffix in (".json", ".jsonl"))


def is_here(folder: Path) -> bool:
    return bool(_files(folder))


def read(folder: Path) -> list[Question]:
    """The questions of all splits that are there."""
    folders = [folder, *sorted(path for path in visible(folder) if path.is_dir())]
    questions = []
    for path in _files(folder):
        split = path.stem.rpartition("_")[2]
        for k, row in enumerate(read_rows(path, COLUMNS)):
            if row["label"] not in LABELS:
                raise ValueError(f"{path}, row {k + 1}: label {row['label']!r}; expected yes or no")
            files = [place / row["image"] for place in folders]
            image = Place(str(next((file for file in files if file.is_file()), files[-1])))
            place = {"split": split, "image": row["image"]}
            right = LABELS.index(row["label"])
            text = row["text"] + ASK
            questions.append(Question(f"{split}-{row['question_id']}", image, text, ("Yes", "No"), right, (), place))
    if len({q.id for q in questions}) < len(questions):
        raise ValueError(f"{folder}: a question_id stands twice in a split; expected each once")
    return questions


def rule(answer: str, question: Question) -> int:
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return int(any(word in words for word in ("No", "not", "no")))


def _f1(counts: np.ndarray) -> np.ndarray:
    """F1 of "yes" from sums [..., 4] of true and false yes, true and false no; 0 where nothing is yes."""
    hit, false, _, missed = np.moveaxis(counts, -1, 0)
    return np.divide(2 * hit, total := 2 * hit + false + missed, out=np.zeros_like(total), where=total > 0)


RATES = {  # metric -> of sums [..., 4]
    "f1": _f1,
    "accuracy": lambda counts: (counts[..., 0] + counts[..., 2]) / counts.sum(-1),
    "yes": lambda counts: (counts[..., 0] + counts[..., 1]) / counts.sum(-1),
}


def score(questions: Sequence[Question], chosen: Sequence[int | None], seed: int = 0) -> Iterator[dict]:
    """Rows of each split and of their mean; intervals resample images, which the splits share."""
    splits = sorted({q.place["split"] for q in questions})
    images = {name: k for k, name in enumerate(dict.fromkeys(q.place["image"] for q in questions))}
    counts = np.zeros((len(images), len(splits), 4))
    for q, c in zip(questions, chosen, strict=True):
        said_yes = c == 0
        cell = (0 if q.right == 0 else 1) if said_yes else (2 if q.right == 1 else 3)
        counts[images[q.place["image"]], splits.index(q.place["split"]), cell] += 1
    for metric, rate in RATES.items():
        chance = 0.5 if metric == "accuracy" else np.nan
        for s, split in enumerate(splits):
            n = int(counts[:, s].sum())
            value, low, high = bootstrap_counts(counts[:, s], rate, seed=seed)
            yield score_row(metric, value, n, low, high, chance, split)
        value, low, high = bootstrap_counts(counts, lambda sums, rate=rate: rate(sums).mean(-1), seed=seed)
        yield score_row(metric, value, int(counts.sum()), low, high, chance)
