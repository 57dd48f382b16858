"""Pairs of one's own images to which an encoder is blind: `diva-lab blind-pairs`, as MMVP's pairs were found.

Tong et al., "Eyes Wide Shut?" (arXiv 2401.06209): pairs that CLIP's embedding takes for the same (cosine above .95) and
that of an encoder without text, DINOv2, tells apart (below .6). What differs in a pair is then said by people.

    FOLDER/Questions.csv                       MMVP-VLM's layout, with empty statements
    FOLDER/MLLM_VLM Images/unsorted/ID.jpg
    FOLDER/sources.csv                         each image's file and the two cosines of its pair
    FOLDER/contact-1.png, ...                  all pairs at a glance
"""

import csv
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diva_lab.evaluation.features import FeatureStore
from diva_lab.evaluation.pairs import PAIR_SUFFIXES
from diva_lab.evaluation.table import open_encoder
from diva_lab.image_files import Place, decode_square, find_images, open_picture
from diva_lab.machine import default_device
from diva_lab.models.vision import load_vision
from diva_lab.training.export import new_folder

UNSORTED = "unsorted"  # type of pairs until somebody says what differs
SIMILAR, APART, MOST = 0.95, 0.6, 150
BLOCK, KEPT = 4096, 100_000  # images of a product; candidates that are held
COLUMNS = ["first", "second", "similar", "apart"]
ROWS, COLUMNS_OF_PAIRS, PX = 10, 3, 160  # of a contact sheet; side of its images in pixels


def find_blind_pairs(
    blind: Float[Tensor, "n d"],
    seeing: Float[Tensor, "n e"],
    similar: float = SIMILAR,
    apart: float = APART,
    most: int = MOST,
    block: int = BLOCK,
) -> pd.DataFrame:
    """Pairs of n images that are alike in one embedding and unlike in another, both of unit length.

    The pairs with the largest difference of the cosines come first, and no image is in two of them. Memory is that of
    a block x block product, whatever n is.

    Returns:
        `first` and `second`, the images' indices; `similar` and `apart`, their cosines in `blind` and in `seeing`.
    """
    held = pd.DataFrame(columns=COLUMNS)
    for part in _candidates(blind, seeing, similar, apart, block):
        held = pd.concat([held, part]) if len(held) else part
        held = held.iloc[(held["apart"] - held["similar"]).argsort(kind="stable")[:KEPT]]
    rows, taken = [], set()
    for row in held.itertuples(index=False):
        if len(rows) < most and not {row.first, row.second} & taken:
            taken |= {row.first, row.second}
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def _candidates(blind: Tensor, seeing: Tensor, similar: float, apart: float, block: int) -> Iterator[pd.DataFrame]:
    """All pairs within the two bounds, of two blocks of images at a time."""
    for i in range(0, len(blind), block):
        for j in range(i, len(blind), block):
            cosines = blind[i : i + block] @ blind[j : j + block].T
            alike = cosines >= similar
            first, second = (alike.triu(1) if i == j else alike).nonzero(as_tuple=True)
            other = (seeing[first + i] * seeing[second + j]).sum(1)
            kept = other <= apart
            columns = (first[kept] + i, second[kept] + j, cosines[first, second][kept], other[kept])
            yield pd.DataFrame(dict(zip(COLUMNS, (column.tolist() for column in columns), strict=True)))


def write_blind_pairs(
    images: str | Path, encoder: str, against: str, out: str | Path, most: int = MOST, **bounds: float
) -> pd.DataFrame:
    """Find blind pairs among the images of a folder and write them; returns them.

    Args:
        images: searched with its folders.
        encoder: the blind one, as `evaluation.table.open_encoder` takes it.
        against: the seeing one, as `models.vision.load_vision` takes it.
        out: a new folder.
        bounds: `similar` and `apart` of `find_blind_pairs`.

    Raises:
        ValueError: where no pair is found, for images that cannot be read; FileExistsError: where `out` exists.
    """
    for name, value in bounds.items():
        if not -1 <= value <= 1:
            raise ValueError(f"{name} {value}: expected a cosine, from -1 to 1")
    out = new_folder(Path(out))
    files, left_out = find_images(Path(images))
    if left_out:
        print(f"{images}: {len(left_out)} left out, the first: {', '.join(left_out[0])}", flush=True)
    if len(files) < 2:
        raise ValueError(f"{images}: {len(files)} images; expected a folder with at least two")
    places, device = [Place(str(file)) for file in files], default_device()
    blind = FeatureStore(open_encoder(encoder, device))(places)
    seeing = FeatureStore(load_vision(against, device))(places)
    pairs = find_blind_pairs(blind, seeing, most=most, **bounds)
    if pairs.empty:
        raise ValueError(
            f"{images}: none of {len(files)} images has a partner that {encoder} takes for the same and {against} "
            "tells apart; expected more images, or other bounds (--similar, --apart)"
        )
    _write(out, files, pairs)
    return pairs


def _write(out: Path, files: Sequence[Path], pairs: pd.DataFrame) -> None:
    """The folder; Questions.csv, which makes it one of pairs, comes last."""
    folder, rows, sources = out / "MLLM_VLM Images" / UNSORTED, [], []
    folder.mkdir(parents=True)
    for row in pairs.itertuples(index=False):
        for file in (files[row.first], files[row.second]):
            rows.append((len(rows) + 1, UNSORTED, ""))
            sources.append((len(rows), str(file), row.similar, row.apart))
            _copy(file, folder / str(len(rows)))
    pd.DataFrame(sources, columns=["id", "file", "similar", "apart"]).to_csv(out / "sources.csv", index=False)
    per_sheet = ROWS * COLUMNS_OF_PAIRS
    for number, start in enumerate(range(0, len(pairs), per_sheet), 1):
        part = pairs[["first", "second"]].iloc[start : start + per_sheet].to_numpy()
        _contact_sheet([[files[k] for k in pair] for pair in part]).save(out / f"contact-{number}.png")
    with open(out / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *rows])


def _copy(file: Path, target: Path) -> None:
    """An image under another name; one that no reader of MMVP-VLM expects becomes a PNG."""
    if file.suffix.lower() in PAIR_SUFFIXES:
        shutil.copyfile(file, target.with_suffix(file.suffix.lower()))
        return
    with open_picture(Place(str(file))) as image:
        image.convert("RGB").save(target.with_suffix(".png"))


def _contact_sheet(pairs: Sequence[Sequence[Path]]) -> Image.Image:
    """Pairs of images side by side, in the order of their ids: along the rows."""
    gap, rows = PX // 16, -(-len(pairs) // COLUMNS_OF_PAIRS)
    sheet = np.full((rows * (PX + gap), COLUMNS_OF_PAIRS * (2 * PX + gap), 3), 255, np.uint8)
    for k, pair in enumerate(pairs):
        row, column = divmod(k, COLUMNS_OF_PAIRS)
        top, left = row * (PX + gap), column * (2 * PX + gap)
        sheet[top : top + PX, left : left + 2 * PX] = np.hstack([decode_square(file, PX) for file in pair])
    return Image.fromarray(sheet)
