"""Pictures that tests write: files, class folders, tars."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(i: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Noise of its own for each i, of so many rows and columns."""
    return Image.fromarray(np.random.default_rng(i).integers(256, size=(*size, 3), dtype=np.uint8))


def png(i: int) -> bytes:
    file = io.BytesIO()
    pixels(i).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_folders(root: Path, classes: tuple[str, ...] = ("big_cat", "dog"), each: int = 3, split: str = "") -> Path:
    for k, kind in enumerate(classes):
        (root / split / kind).mkdir(parents=True)
        for i in range(each):
            pixels(10 * k + i).save(root / split / kind / f"{i}.png")
    return root
