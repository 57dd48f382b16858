"""Cases of the corpus whose input is files: images, folders of models, folders of runs.

A table has a name for each case; beside it a function that makes the files in the working folder, and words of the
error that is expected, or "" where the right result is. The doors train, evaluate, export and list small models by the
command line, and assert that a result is right: that of whole files, with all that was left out on the run's list.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from damage import DAMAGE, change_json, change_weights
from image_writers import pixels, png, write_folders, write_tar
from PIL import Image
from run_checks import Watch
from safetensors.torch import load_file, save_file
from small_models import write_transformers_clip

from diva_lab.cli import main
from diva_lab.training.presets import parse_changes
from diva_lab.training.runs import Run, list_runs
from diva_lab.training.stages import align, align_preset, tune

LONG = "x" * 200_000


@dataclass(frozen=True)
class Case:
    """What is `given` at a `door`, and words of the error that is expected; "" where the right result is."""

    door: str
    given: object
    error: str = ""

    def __str__(self) -> str:
        return re.sub(r"[^\w=.,+-]+", "-", f"{self.door}-{self.given}")[:60]


@dataclass(frozen=True)
class Files:
    """Files that `make` makes in the working folder; it returns what the door takes."""

    name: str
    make: Callable[[Path], object]

    def __call__(self, folder: Path) -> object:
        return self.make(folder)

    def __str__(self) -> str:
        return self.name


def cases_of(door: str, table: dict[str, tuple[Callable[[Path], object], str]]) -> list[Case]:
    return [Case(door, Files(name, make), error) for name, (make, error) in table.items()]


def run_in_process(argv: tuple[str, ...]) -> str:
    """Run `diva-lab` in this process, return what it printed; exit code 2 becomes the error that was printed."""
    Path("a.txt").write_text("no table, no run\n")
    try:
        code = main(list(argv))
    except SystemExit as stop:
        code = stop.code
    return report_exit(code, *Case.capture.readouterr())


def report_exit(code: int, out: str, err: str) -> str:
    assert code in (0, 2), err
    assert "Traceback" not in err
    if code == 2:
        lines = err.strip().splitlines()
        assert lines[-1 if len(lines) == 1 else 0].startswith("error: ") and max(map(len, lines)) < 4500
        assert all(line.startswith("- ") for line in lines[1:]), err
        raise ValueError(err.strip())
    assert out.strip()
    return out


# ruff: noqa: E501  (tables of cases)
# --- images to train on -----------------------------------------------------------------------------------------


def picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (32, 32), **options: object) -> bytes:
    file = BytesIO()
    pixels(7, size).convert(mode).save(file, kind, **options)
    return file.getvalue()


def deep(kind: str, dtype: type) -> bytes:
    """A grey image of more than 8 bits."""
    file = BytesIO()
    Image.fromarray(np.linspace(0, 60_000, 1024).reshape(32, 32).astype(dtype)).save(file, kind)
    return file.getvalue()


def animated(kind: str) -> bytes:
    return picture(kind, save_all=True, append_images=[pixels(8), pixels(9)])


def bitmap_header(width: int, height: int) -> bytes:
    sides = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return b"BM" + bytes(8) + b"\x36\0\0\0" + b"\x28\0\0\0" + sides + b"\x01\0\x18\0" + bytes(48)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture("jpeg", size=(16, 64), exif=exif)


READABLE: dict[str, bytes] = {  # name of a file -> its bytes, an image however odd
    "16-bit grey.png": deep("png", np.uint16), "cmyk.jpg": picture("jpeg", "CMYK"), "grey.jpg": picture("jpeg", "L"),
    "palette.png": picture("png", "P"), "palette with a hole.png": picture("png", "P", transparency=3),
    "alpha.png": picture("png", "RGBA"), "grey alpha.png": picture("png", "LA"), "one bit.png": picture("png", "1"),
    "a gif called.png": animated("gif"), "animated.png": animated("png"), "animated.webp": animated("webp"),
    "a tiff called.jpg": picture("tiff"), "a jpeg called.bmp": picture("jpeg"), "turned.jpg": turned(),
    "1 x 1.png": picture("png", size=(1, 1)), "1 x 3000.png": picture("png", size=(1, 3000)),
    "lossless.webp": picture("webp", lossless=True), "progressive.jpg": picture("jpeg", progressive=True),
    "CAPITALS.JPEG": picture("jpeg"), "two.dots.jpg": picture("jpeg"), "a\nb.png": png(3), " .png": png(3), "猫 🙂.png": png(3),
    "$(touch pwned);'\".png": png(3), "%s {x}.png": png(3), "-rf.png": png(3), "\udcff.png": png(3), "x" * 250 + ".png": png(3),
    "with bytes behind.png": png(3) + bytes(1000), "unclean exif.jpg": picture("jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
}  # fmt: skip
UNREADABLE: dict[str, bytes] = {
    "empty.png": b"", "cut.png": png(3)[:900], "cut.jpg": picture("jpeg")[:500], "only a header.png": png(3)[:33],
    "text.jpg": b"no image", "html.jpg": b"<html>404</html>", "zeros.png": bytes(5000), "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a bit flipped.png": png(3)[:200] + bytes([png(3)[200] ^ 255]) + png(3)[201:], "32 bits.png": deep("tiff", np.int32),
    "floats.jpg": deep("tiff", np.float32), "40000 x 40000.bmp": bitmap_header(40_000, 40_000), "0 x 0.bmp": bitmap_header(0, 0),
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "pickle.png": b"\x80\x04cos\nsystem\n",
    "\udcfe.png": b"x", "a\nb.jpg": b"x",
}  # fmt: skip
OTHERS = (".hidden.png", "._0.png", "x.gif", "x.tif", "x.heic", "x.avif", "x.svg", "x.tar")  # left out by their names


def place_images(folder: Path, files: dict[str, bytes], good: int = 3) -> Path:
    """Good images in a folder, and `files` beside them."""
    root = folder / "images"
    root.mkdir()
    for name, data in ({f"{k}.png": png(k) for k in range(good)} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def folder_with(name: str, data: bytes, left_out: bool) -> Callable[[Path], tuple]:
    return lambda folder: (str(place_images(folder, {name: data})), {name} if left_out else set())


def tar_with(name: str, data: bytes, left_out: bool) -> Callable[[Path], tuple]:
    def make(folder: Path) -> tuple:
        write_tar(folder / "t.tar", {f"{k}.png": png(k) for k in range(3)} | {name: data})
        return str(folder / "t.tar"), {f"{folder / 't.tar'}: {name}"} if left_out else set()

    return make


def special(kind: str, left_out: bool = True) -> Callable[[Path], tuple]:
    """A folder of images that holds a pipe, a device, or a link that leads nowhere or in a circle."""

    def make(folder: Path) -> tuple:
        root = place_images(folder, {})
        makers = {
            "pipe.png": lambda path: os.mkfifo(path), "zero.png": lambda path: path.symlink_to("/dev/zero"),
            "nowhere.png": lambda path: path.symlink_to("nothing"), "itself.png": lambda path: path.symlink_to(path),
            "folder.png": lambda path: path.mkdir(), "loop": lambda path: path.symlink_to(root),
            "up": lambda path: path.symlink_to(folder), "link.png": lambda path: path.symlink_to(root / "0.png"),
            "memory.png": lambda path: path.symlink_to("/proc/self/mem"), "version.png": lambda path: path.symlink_to("/proc/version"),
        }  # fmt: skip
        makers[kind](root / kind)
        return str(root), {kind} if left_out else set()

    return make


def source_of(**files: bytes) -> Callable[[Path], tuple]:
    """A folder `images` with these files alone."""
    return lambda folder: (str(place_images(folder, files, good=0)), set())


def captioned(table: str | bytes | None, options: tuple[str, ...] = (), left_out: set[str] = frozenset(), **texts: bytes):
    """Three images whose captions lie in `captions.csv`, or in .txt files where the table is None."""

    def make(folder: Path) -> tuple:
        root = place_images(folder, {name.replace("_", "."): data for name, data in texts.items()})
        if table is not None:
            (root / "captions.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
        return str(root), set(left_out), ("objective=caption-contrast", *options)

    return make


def file_at(name: str, data: bytes) -> Callable[[Path], tuple]:
    def make(folder: Path) -> tuple:
        (folder / name).write_bytes(data)
        return str(folder / name), set()

    return make


def pipe_at(name: str) -> Callable[[Path], tuple]:
    return lambda folder: (os.mkfifo(folder / name), (str(folder / name), set()))[1]


ROWS = "image,caption\n0.png,a cat\n1.png,a dog\n2.png,a cow\n"
TRAIN_IMAGES = {
    **{name: (folder_with(name, data, False), "") for name, data in READABLE.items()},
    **{name: (folder_with(name, data, True), "") for name, data in UNREADABLE.items()},
    **{name: (folder_with(name, png(3), True), "") for name in OTHERS},
    **{f"in a tar, {name}": (tar_with(name, data, False), "") for name, data in READABLE.items()
       if "." not in Path(name).stem.strip() and Path(name).stem.strip() and name.isprintable() and len(name) < 99},
    **{f"in a tar, {name}": (tar_with(name, data, True), "") for name, data in UNREADABLE.items() if name.isprintable()},
    **{name: (special(name), "") for name in ("pipe.png", "zero.png", "nowhere.png", "itself.png", "loop", "up", "memory.png", "version.png")},
    **{name: (special(name, False), "") for name in ("folder.png", "link.png")},
    "nothing": (source_of(), "no image in this folder"),
    "hidden files alone": (source_of(**{".0.png": png(0)}), "1 left out, the first"),
    "texts alone": (source_of(**{"0.txt": b"words"}), "no image in this folder"),
    "broken images alone": (source_of(**{"0.png": b"", "1.jpg": b"x"}), "100 samples in a row"),
    "one image": (source_of(**{"0.png": png(0)}), ""),
    "an empty folder within": (lambda folder: ((place_images(folder, {}) / "empty").mkdir(), (str(folder / "images"), set()))[1], ""),
    "a file for a folder": (file_at("x.png", png(0)), "a file, not a folder"),
    "a pipe for a folder": (pipe_at("p"), "a file, not a folder"),
    "an empty tar": (file_at("x.tar", b""), "whole tar"),
    "a tar of zeros": (file_at("x.tar", bytes(10_240)), "no image"),
    "a tar of noise": (file_at("x.tar", bytes(range(256)) * 40), "whole tar"),
    "a compressed tar": (file_at("x.tar", b"\x1f\x8b" + bytes(100)), "compressed (gzip)"),
    "a tar that is an image": (file_at("x.tar", png(0)), "whole tar"),
    "a pipe for a tar": (pipe_at("x.tar"), "not a regular file"),
    "a tar of texts": (lambda folder: (write_tar(folder / "x.tar", {"0.txt": b"x"}), (str(folder / "x.tar"), set()))[1], "no image"),
    "a link to itself": (lambda folder: ((folder / "l").symlink_to("l"), ("l", set()))[1], "no such folder"),
}  # fmt: skip
CAPTIONS = {
    "a table": (captioned(ROWS), ""),
    "a table with a mark of byte order": (captioned("\ufeff" + ROWS), ""),
    "a table with lines of DOS": (captioned(ROWS.replace("\n", "\r\n")), ""),
    "a table with quotes and line breaks": (captioned(ROWS.replace("a cat", '"a ""cat"",\nand a dog"')), ""),
    "a table with other columns": (captioned("id,image,caption\n1,0.png,a\n2,1.png,b\n3,2.png,c\n"), ""),
    "a table in another order of columns": (captioned("caption,image\na,0.png\nb,1.png\nc,2.png\n"), ""),
    "an image without a row": (captioned(ROWS.replace("2.png,a cow\n", ""), left_out={"2.png"}), ""),
    "an empty caption": (captioned(ROWS.replace("a cow", " "), left_out={"2.png"}), ""),
    "an empty table": (captioned(""), "captions.csv: expected rows"),
    "a header alone": (captioned("image,caption\n"), "captions.csv: expected rows"),
    "no header": (captioned("0.png,a cat\n1.png,a dog\n"), "captions.csv: expected rows"),
    "other names of columns": (captioned(ROWS.replace("caption", "text", 1)), "captions.csv: expected rows"),
    "semicolons": (captioned(ROWS.replace(",", ";")), "captions.csv: expected rows"),
    "an image that is not there": (captioned(ROWS + "9.png,x\n"), "no image '9.png'"),
    "an image twice": (captioned(ROWS + "0.png,x\n"), "a second caption of '0.png'"),
    "an image twice by two paths": (captioned(ROWS + "./../images/0.png,x\n"), "none of the images that are read"),
    "a file that is no image of the source": (captioned(ROWS + "captions.csv,x\n"), "none of the images that are read"),
    "a name with a zero byte": (captioned(ROWS + "a\0b.png,x\n"), "captions.csv"),
    "a name of 200 kB": (captioned(ROWS + LONG + ",x\n"), "captions.csv"),
    "a caption of 200 kB": (captioned(ROWS.replace("a cow", LONG)), ""),
    "a cell too many": (captioned(ROWS.replace("a cow", "a,cow")), "row 4: more cells than the header"),
    "a cell too few": (captioned(ROWS.replace(",a cow", ""), left_out={"2.png"}), ""),
    "an open quote": (captioned(ROWS.replace("a cat", '"a cat')), "captions.csv"),
    "bytes that are no text": (captioned(bytes(range(256))), "captions.csv"),
    "UTF-16": (captioned(ROWS.encode("utf-16")), "captions.csv"),
    "Latin-1": (captioned(ROWS.replace("cat", "chaté").encode("latin-1")), "captions.csv"),
    "captions all empty": (captioned("image,caption\n0.png,\n"), "no captions"),
    "texts": (captioned(None, **{"0_txt": b"a cat", "1_txt": b"a dog", "2_txt": b"a cow"}), ""),
    "texts with odd signs": (captioned(None, **{"0_txt": b"\xef\xbb\xbfa\tcat\r\n\n", "1_txt": "猫".encode(), "2_txt": b"x" * 200_000}), ""),
    "a text that is no UTF-8": (captioned(None, left_out={"0.png"}, **{"0_txt": b"\xff\xfe", "1_txt": b"a dog", "2_txt": b"a cow"}), ""),
    "one text is missing": (captioned(None, left_out={"2.png"}, **{"0_txt": b"a cat", "1_txt": b"a dog"}), ""),
    "texts all empty": (captioned(None, **{"0_txt": b"", "1_txt": b" \n"}), "no captions"),
    "no captions": (captioned(None), "no captions"),
    "a name of a column": (captioned(ROWS, ("captions=caption",)), "has no columns"),
}  # fmt: skip


def small_settings(*more: str) -> tuple[str, ...]:
    """Settings of two short steps of the small models, for `--set`; what stands in `more` takes their place."""
    start = {"encoder": Case.clip, "denoiser": Case.diffusion, "projector": "new", "steps": 2, "batch": 2, "accumulate": 1}
    start |= {"vae_px": 0, "precision": "no", "lora_rank": 2, "save_every": 1}
    return tuple(f"{name}={value}" for name, value in (start | dict(change.split("=", 1) for change in more)).items())


def train_small(source: str, *more: str) -> Run:
    """`diva-lab train` with small models; the run that it made."""
    run_in_process(("train", "--preset", "openai-l14-dcr", "--shards", source, "--out", "runs", "--set", *small_settings(*more)))
    (folder,) = Path("runs").iterdir()
    return Run(folder)


def train_on(given: tuple) -> None:
    """All steps are trained, their loss is finite, and the run lists the images that were left out, each with a reason."""
    source, left_out, *more = given
    run = train_small(source, "batch=3", *(more[0] if more else ()))
    assert run.done and len(run.metrics()) == 2 and np.isfinite(run.metrics()["loss"]).all()
    skipped = run.skipped()
    names = set() if skipped.empty else {name if ".tar: " in name else str(Path(name).relative_to(source)) for name in skipped["name"]}
    left_out = {name.encode(errors="backslashreplace").decode() for name in left_out}
    assert names == left_out and (skipped.empty or skipped["reason"].str.len().gt(5).all())


FILE_DOORS: dict[str, Callable[[object], None]] = {"train": train_on, "captions": train_on}
FILES = [*cases_of("train", TRAIN_IMAGES), *cases_of("captions", CAPTIONS)]
