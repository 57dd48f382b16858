"""Labelled or captioned images on disk: class folders, or webdataset tars as CLIP_benchmark has them.

A set is a folder under the data root, and its kind is read from what lies in it:

    NAME/[test/]CLASS/*.jpg                   any images, a folder for each class
    NAME/test/*.tar, NAME/classnames.txt      CLIP_benchmark's wds_NAME; .cls or .txt beside each image

`val` does for `test`, as ImageNet has it. Images are read when they are needed, by place, so that workers can share
them.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diva_lab.image_files import (
    END,
    SUFFIXES,
    LeftOut,
    Place,
    TarImage,
    choose_images,
    find_images,
    keyed_members,
    open_picture,
    open_regular,
    tar_members,
    visible,
)

DEFAULT_TEMPLATES = ("a photo of a {c}.",)  # for sets that CLIP_benchmark does not know
PREFIXES = ("wds_", "vtab-")  # what CLIP_benchmark's folders carry before a set's name
SPLIT_FOLDERS = {"test": ("test", "val"), "train": ("train",)}  # split -> the folders that hold it, the first found
SPLIT_WORDS = ("train", "val", "valid", "validation", "test")  # which are no classes, unless within a split
IMAGE_FOLDERS = ("MLLM_VLM Images", "MLLM_VLM_Images", "MMVP_VLM_Images")  # MMVP-VLM's, which are no classes
EXPECTED_MEMBERS = "expected an image and .cls or .txt beside it"
MULTILABEL = (
    "several classes for one image, for which mean average precision is not implemented; the single-label version is "
    "scored: CLIP_benchmark's voc2007, each object cut out, in folders or as .cls"
)


class Convention(NamedTuple):
    """How large a set is, and how it is called elsewhere, scored and prompted."""

    classes: int  # (Caltech-101 may have its background as one more)
    aliases: tuple[str, ...] = ()  # other names, in lower case without - _ . and spaces
    score: str = "top-1"  # or "mean per class": CLIP's paper has it so for four sets
    templates: str = ""  # the set whose prompts CLIP_benchmark uses; "" for its own
    order: str = ""  # of CLIP_benchmark's class names: the published folders' `names`, or `numbers` in their place


# the 27 classification sets, as EVA-CLIP lists them, by CLIP_benchmark's names
CLASSIFICATION_SETS = {
    "imagenet1k": Convention(1000, ("imagenet", "ilsvrc2012"), order="numbers"),
    "imagenet-a": Convention(200, templates="imagenet1k"),
    "imagenet-r": Convention(200, templates="imagenet1k"),
    "imagenet_sketch": Convention(1000, templates="imagenet1k"),
    "imagenetv2": Convention(1000, ("imagenetv2matchedfrequency",), templates="imagenet1k", order="numbers"),
    "objectnet": Convention(113, templates="imagenet1k"),
    "sun397": Convention(397),
    "voc2007": Convention(20, ("pascalvoc2007",)),
    "birdsnap": Convention(500, templates="imagenet1k"),
    "caltech101": Convention(101, ("caltech101vtab",), "mean per class", order="names"),
    "cars": Convention(196, ("stanfordcars",)),
    "cifar10": Convention(10),
    "cifar100": Convention(100),
    "country211": Convention(211, order="names"),
    "dtd": Convention(47, ("describabletextures",)),
    "eurosat": Convention(10, ("eurosatrgb",), order="names"),
    "fer2013": Convention(7, order="names"),
    "fgvc_aircraft": Convention(100, ("aircraft", "fgvcaircraft2013b"), "mean per class"),
    "flowers": Convention(102, ("flowers102", "oxfordflowers", "oxfordflowers102"), "mean per class", order="numbers"),
    "food101": Convention(101),
    "gtsrb": Convention(43, order="numbers"),
    "mnist": Convention(10, order="numbers"),
    "pets": Convention(37, ("oxfordpets", "oxfordiiitpet", "oxfordiiitpets"), "mean per class"),
    "stl10": Convention(10),
    "resisc45": Convention(45, ("nwpuresisc45",)),
    "pcam": Convention(2, ("patchcamelyon",), order="numbers"),
    "renderedsst2": Convention(2, ("sst2",)),
}
CLUSTERED = ("mnist", "cifar10", "imagenet1k", "caltech101", "dtd", "eurosat")  # the six whose clusters DCR scores
_PLAIN = {
    re.sub(r"[-_. ]", "", alias): name for name, own in CLASSIFICATION_SETS.items() for alias in (name, *own.aliases)
}


@dataclass(frozen=True)
class ImageSet:
    """Images with classes, captions, or neither.

    Attributes:
        name: of the set, as CLIP_benchmark calls it where it knows it.
        places: of the n images.
        labels: [n], indices into `classes`; empty where there are none.
        classes, templates: names, and prompts with `{c}` for a name.
        captions: of each image, for retrieval.
        left_out: images that the set holds and that are no part of it, and why.
    """

    name: str
    places: Sequence[Place]
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    captions: tuple[tuple[str, ...], ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    def draw(self, n: int, seed: int) -> "ImageSet":
        """`n` of the images without replacement, in their order; all where n is 0 or there are no more."""
        if not 0 < n < len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))
        labels = self.labels[chosen] if len(self.labels) else self.labels
        captions = tuple(self.captions[i] for i in chosen) if self.captions else ()
        return replace(self, places=[self.places[i] for i in chosen], labels=labels, captions=captions)


def decode_image(place: Place, prepare: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """An image as RGB, prepared.

    Raises:
        ValueError: where it cannot be read; names it.
    """
    try:
        with open_picture(place) as image:
            return prepare(image)
    except ValueError as error:
        raise ValueError(f"{place}: not an image that can be read ({error})") from error


def _known(kind: str, name: str) -> tuple[str, ...]:
    """CLIP_benchmark's class names or templates of a set; empty where it has none."""
    table = json.loads((files("clip_benchmark") / "datasets" / f"en_{kind}.json").read_text(encoding="utf-8"))
    return tuple(table.get(name, ()))


def _lines(path: Path) -> tuple[str, ...]:
    """The lines of a file, without empty ones at its end; none where there is no file.

    An empty line between others is refused: without it all names behind it would be of other classes.
    """
    if not os.path.lexists(path):
        return ()
    with open_regular(path) as file:
        lines = [line.strip() for line in _utf8(file.read(), path).rstrip().splitlines()]
    if "" in lines or not lines:
        number = lines.index("") + 1 if lines else 1
        raise ValueError(f"{path}: line {number} is empty; expected a name or a prompt in every line")
    return tuple(lines)


def _prompts(path: Path) -> tuple[str, ...]:
    """The prompts in a file; refused where one has not one `{c}` for a class's name, and no other brace."""
    prompts = _lines(path)
    for number, prompt in enumerate(prompts, 1):
        if prompt.count("{c}") != 1 or re.search("[{}]", prompt.replace("{c}", "")):
            raise ValueError(
                f"{path}: line {number} is {prompt!r}; expected {{c}} once, for the class, and no other brace"
            )
    return prompts


def _utf8(data: bytes, where: Path | str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}); save it so") from error


def canonical_name(folder: str) -> str:
    """CLIP_benchmark's name of a set, from a folder's; a folder that is none of `SETS` in lower case, prefix gone."""
    name = folder.lower()
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return _PLAIN.get(re.sub(r"[-_. ]", "", name), name)


def _known_classes(name: str, by_letter: bool) -> tuple[str, ...]:
    """CLIP_benchmark's class names of a set; it has two orders of Caltech-101's, of which one is by letter."""
    shared = {"imagenetv2": "imagenet1k", "imagenet_sketch": "imagenet1k"}
    return _known("classnames", "caltech101_vtab" if by_letter and name == "caltech101" else shared.get(name, name))


def _class_names(name: str, folders: list[str]) -> tuple[str, ...]:
    """Names of class folders: by WordNet's ids, or by CLIP_benchmark's order of a set it knows; else their own."""
    if all(re.fullmatch(r"n\d{8}", kind) for kind in folders):
        from clip_benchmark.datasets.builder import all_imagenet_wordnet_ids as ids

        names = dict(zip(ids, _known("classnames", "imagenet1k"), strict=True))
        if unknown := [kind for kind in folders if kind not in names]:
            raise ValueError(
                f"{len(unknown)} class folders are WordNet ids that ImageNet-1K does not have "
                f"({', '.join(unknown[:3])}); expected their names in classnames.txt, one a line"
            )
        return tuple(names[kind] for kind in folders)
    known = _known_classes(name, not folders[0].lower().startswith("background"))
    order = "numbers" if all(kind.isdecimal() for kind in folders) else "names"
    if name in CLASSIFICATION_SETS and CLASSIFICATION_SETS[name].order == order and len(known) == len(folders):
        return known
    return tuple(kind.replace("_", " ") for kind in folders)


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in visible(folder) if path.is_dir())


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in visible(folder) if path.suffix == ".tar")


def _no_class(kind: Path, inside: bool) -> str:
    """Why a folder among classes is none; "" where it is one. Within a split a class of images may be a `train`."""
    if kind.name.lower().replace(" ", "_") in {name.lower().replace(" ", "_") for name in IMAGE_FOLDERS}:
        return f"{kind.name!r} holds MMVP-VLM's images, which are no class; expected Questions.csv beside it"
    named = kind.name.lower() in SPLIT_WORDS
    if not named or (inside and any(path.suffix.lower() in SUFFIXES for path in visible(kind))):
        return ""
    return f"{kind.name!r} is a split's name and no class; expected the classes in test/ (or val/), and train/ beside"


def _from_folders(name: str, folder: Path, root: Path, templates: tuple[str, ...]) -> ImageSet:
    classes = _subfolders(folder)
    if all(kind.isdecimal() for kind in classes):
        classes.sort(key=int)
    _refuse(folder, list(filter(None, (_no_class(folder / kind, folder != root) for kind in classes))))
    places, labels = [], []
    left_out = [LeftOut(str(path), "beside the class folders, of no class") for path in visible(folder)
                if path.suffix.lower() in SUFFIXES and not path.is_dir()]  # fmt: skip
    read = {folder.resolve(), *folder.resolve().parents}
    wrong = [] if len(classes) > 1 else [f"{classes[0]!r} is the only class folder; expected two or more"]
    for label, kind in enumerate(classes):
        found, beside = find_images(folder / kind)
        left_out += beside
        if (real := (folder / kind).resolve()) in read:
            wrong.append(f"{kind}: the same folder as another class, or one that holds it ({real})")
        read.add(real)
        if not found:
            wrong.append(f"{kind}: no image in this class; expected {', '.join(SUFFIXES)} files")
        places += [Place(str(path)) for path in found]
        labels += [label] * len(found)
    named = _lines(folder / "classnames.txt") or _lines(root / "classnames.txt")
    if named and len(named) != len(classes):
        wrong.append(f"{len(classes)} class folders, but {len(named)} lines in classnames.txt")
    _refuse(folder, wrong)
    try:
        names = named or _class_names(name, classes)
        return ImageSet(name, places, np.array(labels), names, templates, left_out=tuple(left_out))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _refuse(folder: Path, wrong: list[str]) -> None:
    if wrong:
        raise ValueError(f"{folder}: " + (wrong[0] if len(wrong) == 1 else "\n- ".join(["found", *wrong])))


def _tar_images(path: Path) -> tuple[list[TarImage], list[str], list[LeftOut]]:
    """The images of one tar, what is wrong with it, and what is left out."""
    keys: dict[str, list[tuple[str, Place]]] = {}
    images, wrong, left_out = [], [], []
    try:
        with open_regular(path) as file:
            for key, end, place in keyed_members(file, left_out):
                keys.setdefault(key, []).append((end, place))
    except (ValueError, OSError) as error:
        return [], [f"{path}: {error}"], []
    wrong += [f"{path}: {name}: {reason}" for name, reason in left_out if name == END]
    if not keys:
        wrong.append(f"{path}: an empty tar")
    for key, members in keys.items():
        chosen, beside = choose_images(key, members)
        images += chosen or [TarImage(f"{key}.none", ValueError(EXPECTED_MEMBERS), dict(members))]
        left_out += beside
    named = (image._replace(name=f"{path}/{image.name}") for image in images)
    return list(named), wrong, [LeftOut(f"{path}: {name}", reason) for name, reason in left_out]


def _from_tars(name: str, tars: list[Path], root: Path, templates: tuple[str, ...]) -> ImageSet:
    images, wrong, left_out = (list(itertools.chain(*parts)) for parts in zip(*map(_tar_images, tars), strict=True))
    labels, captions = [], []
    for image in images:
        key, found = image.name.rpartition(".")[0], ", ".join(image.parts)
        try:
            if "npy" in image.parts and "cls" not in image.parts:
                raise ValueError(f"{key}: {MULTILABEL}")
            if isinstance(image.place, ValueError):
                raise ValueError(f"{key}: {image.place}; found {found}")
            if "cls" in image.parts:
                labels.append(_number(image.parts["cls"].read(), f"{key}.cls"))
            elif "txt" in image.parts:
                captions.append(_texts(image.parts["txt"].read(), f"{key}.txt"))
            else:
                raise ValueError(f"{key}: {EXPECTED_MEMBERS}; found {found}")
        except ValueError as error:
            wrong.append(str(error))
    if labels and captions:
        wrong.append("some images have a class (.cls), others captions (.txt)")
    names = _lines(root / "classnames.txt") or _known_classes(name, "vtab" in root.name.lower())
    if labels and max(labels) >= len(names):
        wrong.append(
            f"classes up to number {max(labels)}, but {len(names)} class names; expected one a line in "
            f"{root / 'classnames.txt'}"
        )
    _refuse(root, wrong)
    places, left_out = [image.place for image in images], tuple(left_out)
    if captions:
        return ImageSet(name, places, templates=templates, captions=tuple(captions), left_out=left_out)
    return ImageSet(name, places, np.array(labels), names, templates, left_out=left_out)


def _number(data: bytes, where: str) -> int:
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", data):
        raise ValueError(f"{where}: {data[:20]!r}; expected the number of a class, from 0 on")
    return int(data)


def _texts(data: bytes, where: str) -> tuple[str, ...]:
    texts = tuple(line for line in _utf8(data, where).splitlines() if line.strip())
    if not texts:
        raise ValueError(f"{where}: no caption in it")
    return texts


def _split(folder: Path, split: str) -> Path:
    """Where a split lies: its folder, or for a test split without any the set's own."""
    names = SPLIT_FOLDERS.get(split, (split,))
    found = [folder / name for name in names if (folder / name).is_dir()]
    whole = [where for where in found if _subfolders(where) or _tars(where)]
    if found:
        return (whole or found)[0]
    inside = _subfolders(folder)
    if split != "test" or (inside and all(kind.lower() in SPLIT_WORDS for kind in inside)):
        expected = " or ".join(str(folder / name) for name in names)
        raise FileNotFoundError(f"{folder}: no {split} split; expected {expected}; found {', '.join(inside)}")
    return folder


def has_captions(folder: Path) -> bool | None:
    """Whether a set is of captioned images, by the first members of its first tar; None where that is broken."""
    try:
        tars = _tars(_split(folder, "test"))
    except FileNotFoundError:
        return False
    try:
        with open_regular(tars[0]) as file:
            ends = [Path(name).suffix.lower() for name, _ in itertools.islice(tar_members(file), 8)]
    except (OSError, ValueError):
        return None
    except IndexError:
        return False
    return ".txt" in ends and ".cls" not in ends


def is_set(folder: Path) -> bool:
    """Whether a folder is itself a set: it has a test split of classes or tars, or its folders hold images only."""
    inside = [folder / kind for kind in _subfolders(folder)]
    if any(kind.name in SPLIT_FOLDERS["test"] for kind in inside):
        return True
    heads = [list(itertools.islice(visible(kind), 64)) for kind in inside]  # a look is enough, classes may be large
    flat = all(not path.is_dir() and path.suffix != ".tar" for head in heads for path in head)
    return flat and any(path.suffix.lower() in SUFFIXES for head in heads for path in head)


def read_set(folder: str | Path, split: str = "test") -> ImageSet:
    """The set in a folder, its classes and prompts.

    Templates are those of `zeroshot_classification_templates.txt` beside the images, else CLIP_benchmark's for a set of
    this name (ImageNet-1K's for those of `CLASSIFICATION_SETS` that have none of their own), else `DEFAULT_TEMPLATES`.
    Class names are those of `classnames.txt` (in the order of the sorted class folders, or of the numbers in .cls),
    else CLIP_benchmark's: by ImageNet's WordNet ids, or in their order where a set of `CLASSIFICATION_SETS` has as many
    folders as classes; else the folders' own with `_` as a space.

    Raises:
        FileNotFoundError: where there is no such folder, no such split, or nothing in it is a set; says what was
            expected.
        ValueError: for a set whose parts do not agree, listing them all: fewer than two classes, folders that are
            splits and no classes, classes without images, broken tars, several classes for one image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a set of images")
    name = canonical_name(folder.resolve().name)
    kind = folder / "dataset_type.txt"
    if "multilabel" in name or (kind.is_file() and "multilabel" in kind.read_text(errors="replace", encoding="utf-8")):
        raise ValueError(f"{folder}: {MULTILABEL}")
    if name == "voc2007" and any(any(folder.glob(f"{deep}JPEGImages")) for deep in ("", "*/", "*/*/")):
        raise ValueError(f"{folder}: VOC's own layout, {MULTILABEL}")
    where = _split(folder, split)
    templates = _prompts(folder / "zeroshot_classification_templates.txt")
    prompted = CLASSIFICATION_SETS[name].templates if name in CLASSIFICATION_SETS else ""
    templates = templates or _known("zeroshot_classification_templates", prompted or name) or DEFAULT_TEMPLATES
    if tars := _tars(where):
        return _from_tars(name, tars, folder, templates)
    if _subfolders(where):
        return _from_folders(name, where, folder, templates)
    raise FileNotFoundError(
        f"{folder}: no set of images; expected a folder for each class, or {split}/*.tar with classnames.txt as "
        "CLIP_benchmark has them"
    )
