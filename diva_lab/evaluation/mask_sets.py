"""Images with a class for every pixel, in the layouts in which three sets are published.

    VOC2012/           JPEGImages/ID.jpg, SegmentationClass/ID.png, ImageSets/Segmentation/train.txt, val.txt
    ADE20K/            images/training/, images/validation/, annotations/ with the same, objectInfo150.txt
    COCO-Stuff/        images/train2017/, images/val2017/, annotations/ with the same, labels.txt

A mask is a png of a palette or of 8 bits of grey, whose numbers are classes: VOC's 0 is the background, ADE20K's 0 is
none of its 150 classes, COCO-Stuff's are labels.txt's less 1; 255 counts nowhere.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diva_lab.evaluation.patches import IGNORED
from diva_lab.image_files import MAX_PIXELS, LeftOut, Place, find_images, open_picture, open_regular

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
# classes of COCO without a pixel in COCO-Stuff: 171 of the 182 are left
UNUSED = ("street sign", "hat", "shoe", "eye glasses", "plate", "mirror", "window", "desk", "door", "blender",
          "hair brush")  # fmt: skip
REFUSED = -1  # of `MaskSet.numbers`: no number of the set
SPLITS = {"voc": ("train", "val"), "ade20k": ("training", "validation"), "coco-stuff": ("train2017", "val2017")}
EXPECTED = (
    "expected VOC's layout (JPEGImages, SegmentationClass, ImageSets/Segmentation), ADE20K's (images and annotations "
    "with training and validation, objectInfo150.txt) or COCO-Stuff's (images and annotations with train2017 and "
    "val2017, labels.txt)"
)


@dataclass(frozen=True)
class MaskSet:
    """Images and their masks.

    Attributes:
        images, masks: n files each.
        classes: names.
        numbers: a mask's number [256] -> index of a class, `IGNORED` or `REFUSED`.
        rest: whether the first class is everything that is none of the others.
        left_out: masks without an image, and files that are no part of the set.
    """

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    classes: tuple[str, ...]
    numbers: np.ndarray
    rest: bool = False
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


def layout_of(folder: Path) -> str:
    """A key of `SPLITS`, by the folders of a set; "" where it has no layout that is known."""
    if (folder / "SegmentationClass").is_dir():
        return "voc"
    named = [
        name for name in ("ade20k", "coco-stuff") if any((folder / "annotations" / s).is_dir() for s in SPLITS[name])
    ]
    return named[0] if named else ""


def is_masks(folder: Path) -> bool:
    return layout_of(folder) != ""


def read_masks(folder: Path, split: str = "test") -> MaskSet:
    """A set's images and masks of the split `train`, or `test`, which is the published validation split.

    Raises:
        FileNotFoundError: where the folder has no known layout, no such split, or no names of its classes.
        ValueError: where images have no mask, or the lists and names cannot be read.
    """
    layout = layout_of(folder)
    if not layout:
        raise FileNotFoundError(f"{folder}: no masks in a layout that is known; {EXPECTED}")
    name = SPLITS[layout][split == "test"]
    if layout == "voc":
        images, masks, left_out = _voc_files(folder, name)
        numbers = np.array([*range(21), *[REFUSED] * 234, IGNORED])
        return MaskSet(images, masks, VOC_CLASSES, numbers, True, left_out)
    classes, numbers = _ade_classes(folder) if layout == "ade20k" else _coco_classes(folder)
    images, masks, left_out = _files_beside(folder, name)
    return MaskSet(images, masks, classes, numbers, False, left_out)


def _voc_files(folder: Path, name: str) -> tuple[tuple[Path, ...], tuple[Path, ...], tuple[LeftOut, ...]]:
    lines = [line.strip() for line in _lines(folder / "ImageSets" / "Segmentation" / f"{name}.txt")]
    ids = [line for line in lines if line]
    if not ids:
        raise ValueError(f"{folder}/ImageSets/Segmentation/{name}.txt: empty; expected the id of an image in each line")
    images = tuple(folder / "JPEGImages" / f"{key}.jpg" for key in ids)
    masks = tuple(folder / "SegmentationClass" / f"{key}.png" for key in ids)
    _refuse_missing(folder, [path for path in images + masks if not path.is_file()])
    return images, masks, ()


def _files_beside(folder: Path, name: str) -> tuple[tuple[Path, ...], tuple[Path, ...], tuple[LeftOut, ...]]:
    places = folder / "images" / name, folder / "annotations" / name
    if missing := [str(place) for place in places if not place.is_dir()]:
        raise FileNotFoundError(f"{folder}: no folder {' and none '.join(missing)}; {EXPECTED}")
    images, left_out = find_images(places[0])
    if not images:
        raise FileNotFoundError(f"{places[0]}: no image; expected the images whose masks lie in {places[1]}")
    masks = [places[1] / path.relative_to(places[0]).with_suffix(".png") for path in images]
    _refuse_missing(folder, [path for path in masks if not path.is_file()])
    alone = [
        LeftOut(str(path), "a mask without an image") for path in find_images(places[1])[0] if path not in set(masks)
    ]
    return tuple(images), tuple(masks), tuple(left_out + alone)


def _refuse_missing(folder: Path, missing: list[Path]) -> None:
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} files are missing, the first {missing[0]}; expected a .jpg and its .png of one "
            "name for each image of the split"
        )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it belongs to the set as it is published")
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); save it so") from error


def _ade_classes(folder: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The first of the names of each class, and its number."""
    path = folder / "objectInfo150.txt"
    rows = [line.split("\t") for line in _lines(path)[1:] if line.strip()]
    try:
        names = {int(row[0]): row[-1].split(",")[0].strip() for row in rows}
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected columns Idx, ..., Name between tabs, under a header") from error
    if not names or list(names) != list(range(1, len(names) + 1)) or len(names) > 254:
        raise ValueError(
            f"{path}: expected classes from 1 on, each once and in their order; found {list(names)[:3]} ..."
        )
    numbers = np.array([IGNORED, *range(len(names)), *[REFUSED] * (254 - len(names)), IGNORED])
    return tuple(names.values()), numbers


def _coco_classes(folder: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The names without `-other` and `-stuff`, `-` being a space, of the classes with pixels, and their numbers."""
    path = folder / "labels.txt"
    rows = [line.partition(":") for line in _lines(path) if line.strip()]
    if wrong := [
        number for number, (key, _, name) in enumerate(rows) if key.strip() != str(number) or not name.strip()
    ]:
        raise ValueError(f"{path}: line {wrong[0] + 1}; expected '{wrong[0]}: NAME', as in the published file")
    named = {number - 1: name.strip() for number, (_, _, name) in enumerate(rows) if number}
    used = [number for number, name in named.items() if name not in UNUSED]
    if not 2 <= len(used) <= 254 or max(used) > 254:
        raise ValueError(f"{path}: {len(used)} classes; expected the 182 of the published file")
    numbers = np.full(256, REFUSED)
    numbers[used], numbers[IGNORED] = range(len(used)), IGNORED
    return tuple(
        named[number].removesuffix("-other").removesuffix("-stuff").replace("-", " ") for number in used
    ), numbers


# --- pixels -----------------------------------------------------------------------------------------------------


def load_masks(
    found: MaskSet, prepare: Callable[[Image.Image, str | None], np.ndarray], chosen: np.ndarray
) -> tuple[UInt8[np.ndarray, "n px px 3"], UInt8[np.ndarray, "n px px"]]:
    """The chosen images at a model's size, and their masks cut in the same way, as indices of classes.

    Args:
        prepare: of an image and an interpolation, None for the model's own.

    Raises:
        ValueError: listing every image and mask that cannot be used: one that is not readable, a mask of another size
            than its image, of colours, or with a number that the set does not have.
    """
    loaded, wrong = [], []
    for i in chosen:
        try:
            loaded.append(_load_one(found.images[i], found.masks[i], found.numbers, prepare))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n- ".join([f"{len(wrong)} of {len(chosen)} images or their masks cannot be used:", *wrong]))
    images, maps = zip(*loaded, strict=True)
    return np.stack(images), np.stack(maps)


def _load_one(path: Path, mask: Path, numbers: np.ndarray, prepare: Callable) -> tuple[np.ndarray, np.ndarray]:
    classes = _open_mask(mask, numbers)
    try:
        with open_picture(Place(str(path))) as image:
            pixels, size = prepare(image, None), image.size
    except ValueError as error:
        raise ValueError(f"{path}: not an image that can be read ({error})") from error
    if size != classes.size:
        sizes = [f"{width} x {height}" for width, height in (classes.size, size)]
        raise ValueError(f"{mask}: {sizes[0]} pixels; expected {sizes[1]}, as its image")
    return pixels, prepare(classes, "nearest")


def _open_mask(path: Path, numbers: np.ndarray) -> Image.Image:
    """A mask's indices of classes as an 8-bit image."""
    try:
        with Image.open(io.BytesIO(Place(str(path)).read()), formats=("PNG",)) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(f"mode {image.mode}; expected a palette or 8 bits of grey, whose numbers are classes")
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; expected at most {MAX_PIXELS} in all")
            classes = numbers[np.asarray(image)]
    except Exception as error:  # Pillow's readers let through whatever a broken file makes them raise
        reason = str(error).partition(" <_io.")[0]
        raise ValueError(f"{path}: not a mask that can be read ({reason})") from error
    if (classes == REFUSED).any():
        unknown = np.unique(np.asarray(image)[classes == REFUSED]).tolist()
        known = np.flatnonzero(numbers != REFUSED)
        raise ValueError(
            f"{path}: number {unknown[0]}, which is no class; expected some of {known[0]} to {known[-2]}, or 255"
        )
    return Image.fromarray(classes.astype(np.uint8))
