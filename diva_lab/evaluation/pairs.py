"""MMVP-VLM by its published rule: two images, two statements, and both statements must find their image.

Tong et al., "Eyes Wide Shut?" (arXiv 2401.06209). Faults of the official script are not copied: here the
category is the CSV's type and not the row's number, each image lies in the folder of its own type, ties are counted,
and similarities are float32.
"""

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from diva_lab.evaluation.image_sets import IMAGE_FOLDERS, canonical_name, decode_image
from diva_lab.evaluation.task import Task, benchmark, paired_rows, score_row
from diva_lab.image_files import Place
from diva_lab.models.encoders import embed
from diva_lab.statistics import bootstrap_mean, mcnemar_p, wilson
from diva_lab.world import PATTERNS

csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 kB, ends in an error that names no file
PAIR_SUFFIXES = (".jpg", ".jpeg", ".png")
PREFIX = "a photo of "
EXPECTED = (
    "expected Questions.csv (a header, then id, type, statement; ids 2k-1 and 2k are one pair) beside one of the "
    f"folders {', '.join(map(repr, IMAGE_FOLDERS))}, which holds <type>/<id>.jpg (or .jpeg, .png)"
)
HEADER = ("id", "type", "statement")  # words of Questions.csv's columns: Question ID, Type, Statement
TABLE = ("image1", "image2", "text1", "text2", "pattern")  # columns of pairs of one's own
CORRECTIONS = ("set", "id", "label", "source")  # columns of corrected labels
LABELS = {"1": 1, "2": 2, "a": 1, "b": 2, "(a)": 1, "(b)": 2}  # of a correction: an image, or MMVP's option
PER_TYPE = 15  # pairs of a pattern, by which the official script tells it
DISPLAY = {name.partition(" ")[0].lower(): name for name in PATTERNS.values()}  # first word of a type -> pattern
DISPLAY |= {"spatial": PATTERNS["position"], "text": PATTERNS["text"], "camera": PATTERNS["viewpoint"]}


def display_names(kinds: Iterable[str]) -> dict[str, str]:
    """Type -> MMVP's own name of the pattern, where its first word is known (`Spatial`, `Camera_Perspective`).

    Types that would share a name, such as `Text size` and `Text colour`, keep their own.
    """
    names = {kind: DISPLAY.get(kind.replace("_", " ").partition(" ")[0].lower(), kind) for kind in kinds}
    taken = Counter(names.values())
    return {kind: name if taken[name] == 1 else kind for kind, name in names.items()}


def read_pairs(folder: str | Path, strict: bool = False) -> pd.DataFrame:
    """One row a pair of an MMVP-VLM folder: pattern, and id_i, statement_i, image_i (a Path) for i = 1, 2.

    Ids 2k-1 and 2k are a pair and the odd one is image 1, in whatever order the rows stand; the pattern is image 1's
    type, by `display_names`. With `strict` the pairs are what the official script makes of the rows: two that follow
    each other are a pair, the first image 1 whatever its id; the k-th fifteen pairs are of the k-th of `PATTERNS`,
    whatever their types; and both images are looked for in the folder of the first's type. So there must be 135.

    A csv with the columns `TABLE` may stand for the folder: a pair a row, its images relative to the csv. Row k has
    the ids 2k-1 and 2k. `strict` changes nothing then, because the official script reads no such csv.

    Raises one error that lists everything wrong with the folder: FileNotFoundError where files are missing and
    nothing else is wrong, ValueError otherwise. Images are opened only where there is something to tell already;
    those that cannot be read are then told too, else they are where they are embedded.
    """
    folder = Path(folder)
    if folder.suffix == ".csv":
        return _read_table(folder)
    images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    questions, wrong, missing, paths = {}, [], [], {}
    if (folder / "Questions.csv").is_file():
        questions, wrong = _read_questions(folder / "Questions.csv")
    else:
        missing.append("no Questions.csv" + _near(folder, ["Questions.csv"]))
    if images is None:
        missing.append("no image folder" + _near(folder, IMAGE_FOLDERS))
    else:
        if strict:
            rows = list(questions.items())
            questions = {i: (rows[k - k % 2][1][0], statement) for k, (i, (_, statement)) in enumerate(rows)}
        kinds = dict.fromkeys(kind for kind, _ in questions.values())
        absent = [kind for kind in kinds if not (images / kind).is_dir()]
        missing += [f"no folder {kind!r} in {images.name}" + _near(images, [kind]) for kind in absent]
        for i, (kind, _) in questions.items():
            files = (images / kind / f"{i}{suffix}" for suffix in PAIR_SUFFIXES)
            paths[i] = next((file for file in files if file.is_file()), None)
            if paths[i] is None and kind not in absent:
                missing.append(f"no image {images.name}/{kind}/{i}.jpg")
    if strict and len(questions) != 2 * PER_TYPE * len(PATTERNS):
        wrong.append(
            f"{len(questions) // 2} pairs, where the official script's list has {len(PATTERNS)} patterns of {PER_TYPE} "
            "pairs each; without --strict-official any number is counted"
        )
    if missing or wrong:
        wrong += _unreadable(filter(None, paths.values()))
        problems = "".join(f"\n- {problem}" for problem in (*missing, *wrong))
        raise (ValueError if wrong else FileNotFoundError)(f"{folder}: {EXPECTED}; found{problems}")

    ids_in_order = list(questions) if strict else sorted(questions)
    names = display_names(kind for kind, _ in questions.values())
    kinds = [names[questions[i][0]] for i in ids_in_order[::2]]
    pairs = pd.DataFrame({"pattern": np.repeat(list(PATTERNS.values()), PER_TYPE) if strict else kinds})
    for n in (1, 2):
        ids = ids_in_order[n - 1 :: 2]
        pairs[f"id_{n}"] = ids
        pairs[f"statement_{n}"] = [questions[i][1] for i in ids]
        pairs[f"image_{n}"] = [paths[i] for i in ids]
    return pairs


def _near(folder: Path, names: Sequence[str]) -> str:
    """A hint where a name under `folder` differs from a wanted one in case, or by `_` for a space, alone."""
    like = {name.lower().replace(" ", "_") for name in names}
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    near = sorted(name for name in found if name.lower().replace(" ", "_") in like)
    return "".join(f"; rename {name!r}, whose case differs" for name in near)


def _unreadable(paths: Iterable[Path]) -> list[str]:
    """What is wrong with each image that cannot be decoded."""
    wrong = []
    for path in paths:
        try:
            decode_image(Place(str(path)), np.asarray)
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def is_pairs(path: Path) -> bool:
    """Whether a folder or csv is meant as pairs, be it right or not: by its name, its image folder, or its columns."""
    if path.is_file() and path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            header = file.readline(10_000)  # a csv may be one line of gigabytes
        return len({cell.strip().lower() for cell in next(csv.reader([header]), [])} & set(TABLE)) > 2
    like = {name.lower().replace(" ", "_") for name in ("Questions.csv", *IMAGE_FOLDERS)}
    return path.is_dir() and any(inside.name.lower().replace(" ", "_") in like for inside in path.iterdir())


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The rows of a csv that has `columns`, as strings without space around them."""
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path}: not a csv in UTF-8: {' '.join(str(error).split())}") from error
    if not set(columns) <= set(rows.columns) or rows.empty:
        raise ValueError(f"{path}: expected rows under {', '.join(columns)}; found {len(rows)} under {', '.join(rows)}")
    if not isinstance(rows.index, pd.RangeIndex):  # pandas takes the first cells for names of the rows
        raise ValueError(f"{path}: its rows have more cells than its header; expected a cell with commas in quotes")
    return rows.map(str.strip)


def _read_table(path: Path) -> pd.DataFrame:
    rows = read_csv(path, TABLE)
    pairs = pd.DataFrame({"pattern": rows["pattern"].map(display_names(rows["pattern"]))})
    for n in (1, 2):
        pairs[f"id_{n}"] = [2 * k + n for k in range(len(rows))]
        pairs[f"statement_{n}"] = rows[f"text{n}"]
        pairs[f"image_{n}"] = [path.parent / name for name in rows[f"image{n}"]]
    empty = [f"row {k + 1}: an empty cell" for k in range(len(rows)) if not rows.loc[k, list(TABLE)].all()]
    images = [*pairs["image_1"], *pairs["image_2"]]
    missing = [f"no image {image}" for image in dict.fromkeys(images) if not image.is_file()]
    if empty or missing:
        wrong = [*empty, *_unreadable(image for image in dict.fromkeys(images) if image.is_file())]
        raise (ValueError if wrong else FileNotFoundError)("\n- ".join([f"{path}: found", *wrong, *missing]))
    return pairs


def read_corrections(path: str | Path) -> dict[str, dict[int, int]]:
    """Set -> id -> label, from a csv with the columns `CORRECTIONS`.

    The label says which image of its pair the statement of that id describes: 1 for the one with the odd id, else 2. Of
    MMVP's questions it is the letter of the right option; (a) is kept as 1, (b) as 2. The set is named as in the table
    of `evaluate`. The source says who found the error, and where.

    Raises:
        ValueError: names the first row that is wrong.
    """
    found: dict[str, dict[int, int]] = {}
    rows = read_csv(Path(path), CORRECTIONS)
    for k, (name, i, label, source) in enumerate(rows[list(CORRECTIONS)].itertuples(index=False), 1):
        labels = found.setdefault(canonical_name(name), {})
        if not name or not source:
            wrong = "no set or no source; expected both"
        elif not re.fullmatch("[0-9]{1,9}", i) or int(i) in labels:
            wrong = f"id {i!r}; expected the number of a question, each once in a set"
        elif label not in LABELS:
            wrong = f"label {label!r}; expected 1 or 2, the image of the pair that the statement describes, or a letter"
        elif label.isdecimal() and int(label) == official_image(int(i)):
            wrong = f"label {label} is what the rule says of id {i} already; expected the other one"
        else:
            labels[int(i)] = LABELS[label]
            continue
        raise ValueError(f"{path}, row {k}: {wrong}")
    return found


def official_image(question: int) -> int:
    """The image of its pair, 1 or 2, that a question's statement describes by the rule."""
    return 1 if question % 2 else 2


def correct_pairs(
    similarity: Float[np.ndarray, "n 2 2"], ids: Int[np.ndarray, "n 2"], corrections: Mapping[int, int] | None = None
) -> Bool[np.ndarray, " n"]:
    """Whether both texts of each pair choose the image that their ids stand for, or that `corrections` says of them.

    Raises:
        ValueError: for a correction of an id that is not there.
    """
    corrections = corrections or {}
    if absent := corrections.keys() - set(ids.flatten().tolist()):
        raise ValueError(f"corrects id {min(absent)}; expected ids of this set, from {ids.min()} to {ids.max()}")
    expected = [[corrections.get(i, official_image(i)) for i in pair] for pair in ids.tolist()]
    return (pair_decisions(similarity)["chosen"] == np.array(expected)).all(axis=1)


def _read_questions(path: Path) -> tuple[dict[int, tuple[str, str]], list[str]]:
    """id -> (type, statement), and all that is wrong with the table."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    questions, wrong = {}, []
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if any(map(str.strip, row))]
    except csv.Error as error:
        return {}, [f"Questions.csv is not a csv ({error})"]
    if "\N{REPLACEMENT CHARACTER}" in text:
        wrong.append("Questions.csv is not UTF-8")
    if rows and rows[0][0].isdecimal():
        wrong.append(f"no header: the first row is already question {rows[0][0]}")
    else:
        header, rows = rows[0] if rows else [], rows[1:]
        if len(header) != 3 or any(word not in cell.lower() for word, cell in zip(HEADER, header, strict=True)):
            wrong.append(f"the header {','.join(header)!r}; expected id, type and statement, in this order")
    if not rows or len(rows) % 2:
        wrong.append(f"{len(rows)} questions, which are not pairs")
    if unsaid := sum(len(row) == 3 and all(row[:2]) and not row[2] for row in rows):
        wrong.append(f"{unsaid} questions without a statement; write what each image shows")
        return questions, wrong
    for row in rows:
        if len(row) != 3 or not all(row) or not re.fullmatch(r"\d{1,9}", row[0]) or int(row[0]) < 1:
            wrong.append(f"no id, type and statement in the row {','.join(row)!r}")
        elif int(row[0]) in questions:
            wrong.append(f"id {int(row[0])} stands twice")
        else:
            questions[int(row[0])] = (row[1], row[2])
    partners = {i: i + 1 if i % 2 else i - 1 for i in questions}
    wrong += [f"id {i} without its partner {partner}" for i, partner in partners.items() if partner not in questions]
    return questions, wrong


def pair_decisions(
    similarity: Float[np.ndarray, "n 2 2"],
) -> dict[str, Int[np.ndarray, "n 2"] | Bool[np.ndarray, " n"]]:
    """The official decisions from `similarity` [n pairs, 2 texts, 2 images].

    Each text takes the softmax over the two images and chooses image 1 where p > .5, else image 2: whatever the
    scale of the logits that is s_1 > s_2, and a tie counts for image 2.

    Returns "chosen" [n, 2] (image 1 or 2, for each text), "correct" [n] (text -> image: both right, the score),
    "tie" [n] (either text cannot tell the images apart), "image_to_text" [n] (the same rule with images and texts
    exchanged) and "group" [n] (right both ways); the last two are not part of the benchmark. Raises ValueError where a
    similarity is not finite.
    """
    if not np.isfinite(similarity).all():
        raise ValueError("a similarity is not finite: nothing can be decided")
    chosen = np.where(similarity[:, :, 0] > similarity[:, :, 1], 1, 2)  # [n, texts]
    text_chosen = np.where(similarity[:, 0, :] > similarity[:, 1, :], 1, 2)  # [n, images]
    correct, image_to_text = ((side == (1, 2)).all(axis=1) for side in (chosen, text_chosen))
    return {
        "chosen": chosen,
        "correct": correct,
        "tie": (similarity[:, :, 0] == similarity[:, :, 1]).any(axis=1),
        "image_to_text": image_to_text,
        "group": correct & image_to_text,
    }


@torch.no_grad()
def score_pairs(
    encoder, folder: str | Path, features: Callable[[Sequence[Path]], Tensor] | None = None, strict: bool = False
) -> pd.DataFrame:
    """One row a pair: pattern, id_1, id_2, the cosines t1i1, t1i2, t2i1, t2i2, correct, tie, image_to_text, group.

    Every text ("a photo of " + statement) and every image of `folder` (see `read_pairs`) is encoded once.

    Args:
        features: files -> unit vectors [n, D], as a `features.FeatureStore`; the encoder's embeddings if None.
        strict: as `read_pairs`.
    """
    pairs = read_pairs(folder, strict)
    features = features or (lambda files: embed_files(encoder, files))
    statements = sorted({*pairs["statement_1"], *pairs["statement_2"]})
    texts = encoder.encode_text([PREFIX + statement for statement in statements]).float().cpu()  # [m, D]
    row = {statement: i for i, statement in enumerate(statements)}
    texts = torch.stack([texts[[row[s] for s in pairs[f"statement_{n}"]]] for n in (1, 2)], dim=1)  # [n, 2, D]
    images = features([*pairs["image_1"], *pairs["image_2"]]).unflatten(0, (2, -1)).transpose(0, 1)  # [n, 2, D]
    similarity = (texts @ images.transpose(1, 2)).numpy()  # [n, texts, images]
    decisions = pair_decisions(similarity)
    if strict:  # an odd id expects image 1, also where it stands second
        decisions["correct"] = correct_pairs(similarity, pairs[["id_1", "id_2"]].to_numpy())
        decisions["group"] = decisions["correct"] & decisions["image_to_text"]
    cosines = {f"t{t + 1}i{i + 1}": similarity[:, t, i] for t in (0, 1) for i in (0, 1)}
    chosen = {key: decisions[key] for key in ("correct", "tie", "image_to_text", "group")}
    return pairs[["pattern", "id_1", "id_2"]].assign(**cosines, **chosen)


def strict_differences(folder: str | Path, own: pd.DataFrame, strict: pd.DataFrame) -> list[str]:
    """Where the official script's count of a folder leaves the rule, a line each: the scores of `score_pairs`
    without and with `strict` (their means over the patterns), and the ids of the pairs concerned."""
    right, counted = read_pairs(folder), read_pairs(folder, strict=True)
    files = {row[f"id_{n}"]: row[f"image_{n}"] for _, row in right.iterrows() for n in (1, 2)}
    kind = {row[f"id_{n}"]: row["pattern"] for _, row in right.iterrows() for n in (1, 2)}
    moved = counted["id_1"][[kind[i] != name for i, name in zip(counted["id_1"], counted["pattern"], strict=True)]]
    elsewhere = [i for n in (1, 2) for i, file in zip(counted[f"id_{n}"], counted[f"image_{n}"], strict=True)
                 if files[i] != file]  # fmt: skip
    order = counted["id_1"][(counted["id_1"] % 2 == 0) | (counted["id_2"] != counted["id_1"] + 1)].tolist()
    ties = strict["id_1"][strict["tie"]].tolist()
    means = [float(table.groupby("pattern")["correct"].mean().mean()) for table in (strict, own)]
    return [
        f"as the script counts {means[0]:.4f}, by the rule {means[1]:.4f}",
        f"by position {len(moved)} pairs are of another category than the CSV says: {moved.tolist()}",
        f"{len(ties)} pairs with a tie, which counts for image 2: {ties}",
        f"{len(elsewhere)} images taken from the folder of the first row's type: {elsewhere}",
        f"{len(order)} pairs whose rows stand in another order than their ids: {order}",
    ]


def embed_files(encoder, paths: Iterable[Path]) -> Float[Tensor, "n d"]:
    """Embeddings of image files in their own sizes; neighbours of one size share a batch.

    Raises ValueError naming every image that cannot be read.
    """
    parts, wrong = [], []
    for _, run in itertools.groupby(map(_read, paths), key=lambda read: getattr(read, "shape", None)):
        run = list(run)
        if isinstance(run[0], str):
            wrong += run
        elif not wrong:
            parts.append(embed(encoder, torch.stack(run), batch=64))
    if wrong:
        raise ValueError(wrong[0] if len(wrong) == 1 else "\n- ".join([f"{len(wrong)} images:", *wrong]))
    return torch.cat(parts)


def _read(path: Path) -> UInt8[Tensor, "3 h w"] | str:
    try:
        return torch.from_numpy(decode_image(Place(str(path)), np.array)).permute(2, 0, 1)
    except ValueError as error:
        return str(error)


def summarise(scores: pd.DataFrame, level: float = 0.95, seed: int = 0) -> dict[str, float]:
    """Accuracy of each pattern with its Wilson interval, and the score: the mean of the patterns' accuracies.

    Keys NAME, NAME/low and NAME/high for each pattern and for "mean" (bootstrap over the pairs within patterns);
    "ties", "image_to_text" and "group" are such means too.
    """
    groups = dict(list(scores.groupby("pattern", sort=False)))
    report = {}
    for name, group in groups.items():
        report[name] = float(group["correct"].mean())
        report[f"{name}/low"], report[f"{name}/high"] = wilson(int(group["correct"].sum()), len(group), level)
    means = {"mean": "correct", "ties": "tie", "image_to_text": "image_to_text", "group": "group"}
    for key, column in means.items():
        values = [group[column].to_numpy(float) for group in groups.values()]
        report[key] = float(np.mean([value.mean() for value in values]))
        report[f"{key}/low"], report[f"{key}/high"] = bootstrap_mean(values, level, seed)
    return report


def compare_pairs(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, list[int] | float]:
    """Two encoders on the same pairs: "gained" and "lost" (the pairs' odd ids), and "p" of McNemar's exact test.

    Raises:
        ValueError: where the pairs are not the same.
    """
    if before["id_1"].tolist() != after["id_1"].tolist():
        raise ValueError("these are scores of different pairs; expected two encoders on one folder")
    old, new = before["correct"].to_numpy(), after["correct"].to_numpy()
    gained, lost = before["id_1"][new & ~old].tolist(), before["id_1"][old & ~new].tolist()
    return {"gained": gained, "lost": lost, "p": mcnemar_p(len(gained), len(lost))}


def pair_changes(before: pd.DataFrame, after: pd.DataFrame, seed: int) -> tuple[list[dict], list[dict]]:
    """Rows of the difference of the share of all pairs, and the pairs that were gained or lost."""
    ids = compare_pairs(before, after)
    listed = after[["pattern", "id_1", "id_2"]].to_dict("records")
    changed = [pair | {"change": name} for name in ("gained", "lost") for pair in listed if pair["id_1"] in ids[name]]
    return paired_rows("pairs", len(ids["gained"]), len(ids["lost"]), len(after)), changed


def _correct_again(scores: pd.DataFrame, file: Path, labels: Mapping[int, int]) -> Bool[np.ndarray, " n"]:
    similarity = scores[["t1i1", "t1i2", "t2i1", "t2i2"]].to_numpy().reshape(-1, 2, 2)
    try:
        return correct_pairs(similarity, scores[["id_1", "id_2"]].to_numpy(), labels)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


@benchmark(data="pairs", heeds=("strict",), compare=pair_changes)
def mmvp_vlm(task: Task) -> Iterator[dict]:
    """The official score and each pattern's; beside it image to text, the group score, ties, and corrected labels."""
    scores = score_pairs(task.encoder, task.folder, task.embed_files, task.strict)
    task.answers.append(scores)
    report = summarise(scores, seed=task.seed)
    for name, group in [("all", scores), *scores.groupby("pattern", sort=False)]:
        key = "mean" if name == "all" else name
        yield score_row("pairs", report[key], len(group), report[f"{key}/low"], report[f"{key}/high"], 0.25, name)
    for key, chance in (("image_to_text", 0.25), ("group", 1 / 6), ("ties", np.nan)):
        yield score_row(key, report[key], len(scores), report[f"{key}/low"], report[f"{key}/high"], chance)
    if task.corrections:
        file, labels = task.corrections
        corrected = scores.assign(correct=_correct_again(scores, file, labels))
        report = summarise(corrected, seed=task.seed)
        row = [report[f"mean{end}"] for end in ("", "/low", "/high")]
        yield score_row("pairs", row[0], len(scores), *row[1:], 0.25, f"corrected by {file.name}")
    if task.strict and task.draw == 0:
        try:
            own = score_pairs(task.encoder, task.folder, task.embed_files)
            said = strict_differences(task.folder, own, scores)
        except (ValueError, OSError) as error:
            said = [f"only as the script counts can it be read: {error}"]
        print("\n- ".join([f"{task.folder.name}, strictly:", *said]))
