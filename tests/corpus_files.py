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
from contextlib import suppress
from dataclasses import dataclass
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
from safetensors.torch import load_file
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
        assert lines[-1 if len(lines) == 1 else 0].startswith("error: ") and max(map(len, lines)) < 4500, err
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


def captioned(
    table: str | bytes | None, options: tuple[str, ...] = (), left_out: set[str] = frozenset(), **texts: bytes
):
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
    start = {
        "encoder": Case.clip,
        "denoiser": Case.diffusion,
        "projector": "new",
        "steps": 2,
        "batch": 2,
        "accumulate": 1,
    }
    start |= {"vae_px": 0, "precision": "no", "lora_rank": 2, "save_every": 1}
    return tuple(f"{name}={value}" for name, value in (start | dict(change.split("=", 1) for change in more)).items())


def train_small(source: str, *more: str) -> Run:
    """`diva-lab train` with small models; the run that it made."""
    run_in_process(
        ("train", "--preset", "openai-l14-dcr", "--shards", source, "--out", "runs", "--set", *small_settings(*more))
    )
    (folder,) = Path("runs").iterdir()
    return Run(folder)


def train_on(given: tuple) -> None:
    """All steps are trained, their loss is finite, and the run lists the images that were left out, each with a reason."""
    source, left_out, *more = given
    run = train_small(source, "batch=3", *(more[0] if more else ()))
    assert run.done and len(run.metrics()) == 2 and np.isfinite(run.metrics()["loss"]).all()
    skipped = run.skipped()
    names = (
        set()
        if skipped.empty
        else {name if ".tar: " in name else str(Path(name).relative_to(source)) for name in skipped["name"]}
    )
    left_out = {name.encode(errors="backslashreplace").decode() for name in left_out}
    assert names == left_out and (skipped.empty or skipped["reason"].str.len().gt(5).all())


# --- images to evaluate on --------------------------------------------------------------------------------------


def evaluate_small(encoder: str | Path, benchmark: str, root: Path) -> pd.DataFrame:
    """`diva-lab evaluate`; the rows that it wrote."""
    Path("r.csv").unlink(missing_ok=True)
    run_in_process(
        (
            "evaluate",
            "--encoder",
            str(encoder),
            "--benchmarks",
            benchmark,
            "--root",
            str(root),
            "--out",
            "r.csv",
            "--workers",
            "0",
        )
    )
    return pd.read_csv("r.csv")


def evaluate_on(given: tuple[str, Path, int]) -> None:
    """The table has finite values of so many images (pairs, captions)."""
    benchmark, root, n = given
    rows = evaluate_small(Case.clip, benchmark, root)
    assert rows["n"].max() == n and np.isfinite(rows["value"]).all() and len(rows)


def classes(change: Callable[[Path], object] = lambda root: None, n: int = 4, benchmark: str = "zero-shot"):
    """Two class folders of two images each, changed."""

    def make(folder: Path) -> tuple[str, Path, int]:
        root = write_folders(folder / "data" / "pets of ours", each=2, split="test")
        change(root)
        return benchmark, folder / "data", n

    return make


def add(name: str, data: bytes | str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return change


def link(name: str, target: str) -> Callable[[Path], object]:
    return lambda root: (root / name).symlink_to(target if target.startswith("/") else root / target)


def tars(members: dict[str, bytes], n: int, benchmark: str = "zero-shot", names: str | None = "cat\ndog\n"):
    def make(folder: Path) -> tuple[str, Path, int]:
        write_tar(folder / "data" / "wds_ours" / "test" / "0.tar", members)
        if names is not None:
            (folder / "data" / "wds_ours" / "classnames.txt").write_text(names, encoding="utf-8")
        return benchmark, folder / "data", n

    return make


LABELLED = {f"{k}.{end}": data for k in range(4) for end, data in (("png", png(k)), ("cls", b"%d" % (k % 2)))}
TEXTED = {f"{k}.{end}": data for k in range(4) for end, data in (("png", png(k)), ("txt", b"a cat\na dog %d" % k))}
EVALUATE_IMAGES = {
    **{name: (classes(add(f"test/dog/{name}", data), 5), "") for name, data in list(READABLE.items())[::2]},
    **{name: (classes(add(f"test/dog/{name}", data)), "not an image that can be read") for name, data in list(UNREADABLE.items())[::2]},
    **{name: (classes(add(f"test/dog/{name}", png(3))), "") for name in OTHERS[::3]},
    "knn without a train split": (classes(benchmark="knn"), "no train split"),
    "a pipe": (classes(lambda root: os.mkfifo(root / "test/dog/p.png")), "not a regular file"),
    "a device": (classes(link("test/dog/z.png", "/dev/zero")), "not a regular file"),
    "a link to nothing": (classes(link("test/dog/z.png", "/nothing")), "No such file"),
    "a loop": (classes(link("test/dog/loop", "test")), ""),
    "a loop as a class": (classes(link("test/loop", "test")), "loop: the same folder"),
    "an empty class": (classes(lambda root: (root / "test/cow").mkdir()), "cow: no image in this class"),
    "a class of broken images": (classes(add("test/cow/0.png", b"")), "not an image that can be read"),
    "a class of texts": (classes(add("test/cow/0.txt", b"x")), "cow: no image in this class"),
    "a hidden class": (classes(add("test/.cow/0.png", png(0))), ""),
    "one class": (classes(lambda root: shutil.rmtree(root / "test/dog")), "only class folder"),
    "no class": (classes(lambda root: [shutil.rmtree(root / "test" / kind) for kind in ("dog", "big_cat")]), "expected"),
    "an image beside the classes": (classes(add("test/0.png", png(0))), ""),
    "a class that links to another": (classes(link("test/again", "test/dog")), "the same folder as another class"),
    "a class that links elsewhere": (classes(lambda root: (shutil.move(root / "test/dog", root.parent.parent / "dog"), (root / "test/dog").symlink_to(root.parent.parent / "dog"))), ""),
    "a class with an odd name": (classes(add("test/$x$ {c} 猫/0.png", png(0)), 5), ""),
    "a class whose name is not UTF-8": (classes(add("test/\udcff/0.png", png(0)), 5), ""),
    "names": (classes(add("classnames.txt", "cat\ndog\n")), ""),
    "names of DOS with a mark of byte order": (classes(add("classnames.txt", "\ufeffcat\r\ndog\r\n\r\n")), ""),
    "names, one too many": (classes(add("classnames.txt", "cat\ndog\ncow\n")), "2 class folders, but 3 lines"),
    "names, one too few": (classes(add("classnames.txt", "cat")), "2 class folders, but 1 lines"),
    "names, an empty file": (classes(add("classnames.txt", "")), "line 1 is empty"),
    "names, an empty line": (classes(add("classnames.txt", "cat\n\ndog")), "line 2 is empty"),
    "names in Latin-1": (classes(add("classnames.txt", b"cat\nch\xe9")), "not UTF-8"),
    "names in UTF-16": (classes(add("classnames.txt", "cat\ndog".encode("utf-16"))), "not UTF-8"),
    "names twice, as ImageNet has missile": (classes(add("classnames.txt", "cat\ncat\n")), ""),
    "names of 200 kB": (classes(add("classnames.txt", f"cat\n{LONG}\n")), ""),
    "names with braces": (classes(add("classnames.txt", "{c}\n{0.__class__}\n")), ""),
    "names that are a pipe": (classes(lambda root: os.mkfifo(root / "classnames.txt")), "not a regular file"),
    "names that are a folder": (classes(lambda root: (root / "classnames.txt").mkdir()), "not a regular file"),
    "prompts": (classes(add("zeroshot_classification_templates.txt", "a {c}.\nmy {c}.\n")), ""),
    "prompts without a place": (classes(add("zeroshot_classification_templates.txt", "a photo\n")), "{c}"),
    "prompts with another place": (classes(add("zeroshot_classification_templates.txt", "a {} of {c.x} {0}\n")), "{c}"),
    "prompts, an open brace": (classes(add("zeroshot_classification_templates.txt", "a { {c}\n")), "{c}"),
    "tars": (tars(LABELLED, 4), ""),
    "tars, a class beyond the names": (tars(LABELLED | {"9.png": png(9), "9.cls": b"7"}, 0), "classes up to number 7, but 2"),
    **{f"tars, a class of {text!r:.20}": (tars(LABELLED | {"9.png": png(9), "9.cls": text}, 0), "9.cls")
       for text in (b"", b"cat", b"-1", b"1.0", b"\xff", b"0 1", b"\xb2", b"9" * 5000)},
    "tars, a class with a line break": (tars(LABELLED | {"9.png": png(9), "9.cls": b"1\n"}, 5), ""),
    "tars, without names": (tars(LABELLED, 0, names=None), "class names"),
    "tars, an image without a class": (tars(LABELLED | {"9.png": png(9)}, 0), "expected an image and .cls"),
    "tars, a class without an image": (tars(LABELLED | {"9.cls": b"1"}, 0), "expected an image and .cls"),
    "tars, a broken image": (tars(LABELLED | {"9.png": b"x", "9.cls": b"1"}, 0), "not an image that can be read"),
    "tars, empty": (tars({}, 0), "empty tar"),
    "tars, classes and captions": (tars(LABELLED | {"9.png": png(9), "9.txt": b"x"}, 0), "some images have a class"),
    "tars of captions": (tars(TEXTED, 8, "retrieval", None), ""),
    "tars of captions, an empty one": (tars(TEXTED | {"9.png": png(9), "9.txt": b" \n"}, 0, "retrieval", None), "9.txt"),
    "tars of captions in Latin-1": (tars(TEXTED | {"9.png": png(9), "9.txt": b"\xe9"}, 0, "retrieval", None), "not UTF-8"),
    "captions of classes": (classes(benchmark="retrieval"), "for retrieval"),
}  # fmt: skip


def pairs(questions: bytes | str, change: Callable[[Path], object] = lambda root: None, n: int = 1):
    """An MMVP-VLM folder of two images and a table of two questions."""

    def make(folder: Path) -> tuple[str, Path, int]:
        root = folder / "data" / "MMVP_VLM"
        for k in (1, 2):
            add(f"MLLM_VLM Images/State/{k}.jpg", picture("jpeg"))(root)
        (root / "Questions.csv").write_bytes(questions if isinstance(questions, bytes) else questions.encode())
        change(root)
        return "mmvp-vlm", folder / "data", n

    return make


HEAD, FIRST, SECOND = "Question ID,Type,Statement\n", "1,State,an open door\n", "2,State,a closed door\n"
ASKED = HEAD + FIRST + SECOND
PAIRS = {
    "good": (pairs(ASKED), ""),
    "in reverse": (pairs(HEAD + SECOND + FIRST), ""),
    "of DOS with a mark of byte order": (pairs("\ufeff" + ASKED.replace("\n", "\r\n")), ""),
    "with empty lines": (pairs(ASKED.replace("\n", "\n\n")), ""),
    "of 200 kB": (pairs(ASKED.replace("a closed door", LONG)), ""),
    "empty": (pairs(""), "not pairs"),
    "a header alone": (pairs(HEAD), "not pairs"),
    "no header": (pairs(FIRST + SECOND), "no header"),
    "another header": (pairs(ASKED.replace("Type", "Kind")), "the header"),
    "semicolons": (pairs(ASKED.replace(",", ";")), "the header"),
    "one question": (pairs(HEAD + FIRST), "not pairs"),
    "an id twice": (pairs(HEAD + FIRST + FIRST), "stands twice"),
    "ids 2 and 3": (pairs(HEAD + SECOND + SECOND.replace("2", "3")), "without its partner"),
    **{f"an id of {value!r:.20}": (pairs(ASKED.replace("2,", f"{value},")), "found") for value in ("0", "-2", "2.0", "two", "", "\u0662x", "²", "9" * 5000)},
    "no statement": (pairs(ASKED.replace("a closed door", "")), "no id, type and statement"),
    "a comma in a statement": (pairs(ASKED.replace("a closed", "a closed, red")), "no id, type and statement"),
    "an open quote": (pairs(ASKED.replace("an open", '"an open')), "found"),
    "Latin-1": (pairs(ASKED.replace("door", "dör").encode("latin-1")), "not UTF-8"),
    "UTF-16": (pairs(ASKED.encode("utf-16")), "not UTF-8"),
    "zero bytes": (pairs(ASKED.replace("door", "do\0or")), ""),
    "noise": (pairs(bytes(range(256)) * 20), "not UTF-8"),
    "a type that leads out": (pairs(ASKED.replace("State", "../../..")), "no image"),
    "a type that is a path": (pairs(ASKED.replace("State", "/tmp")), "no image"),
    "another type": (pairs(ASKED.replace("2,State", "2,Colour")), "no folder 'Colour'"),
    "an image missing": (pairs(ASKED, lambda root: (root / "MLLM_VLM Images/State/2.jpg").unlink()), "no image MLLM_VLM Images/State/2.jpg"),
    "an image broken": (pairs(ASKED, add("MLLM_VLM Images/State/2.jpg", b"x")), "not an image that can be read"),
    "no folder of images": (pairs(ASKED, lambda root: shutil.rmtree(root / "MLLM_VLM Images")), "no image folder"),
    "a pipe": (pairs("", lambda root: ((root / "Questions.csv").unlink(), os.mkfifo(root / "Questions.csv"))), "Questions.csv"),
    "a folder": (pairs("", lambda root: ((root / "Questions.csv").unlink(), (root / "Questions.csv").mkdir())), "Questions.csv"),
}  # fmt: skip


# --- folders of models ------------------------------------------------------------------------------------------


def four_images() -> Path:
    root = Path("four")
    return root if root.exists() else write_folders(root / "ours", each=2).parent


def measure_encoder(folder: Path) -> None:
    """An encoder of the corpus: evaluated as the small CLIP whose copy it is."""
    rows, expected = (evaluate_small(name, "zero-shot", four_images()) for name in (folder, Case.clip))
    assert (
        rows["weights"].tolist() == expected["weights"].tolist()
        and rows["value"].tolist() == expected["value"].tolist()
    )


def measure_other_encoder(folder: Path) -> None:
    """An encoder in transformers' format: evaluated, with finite values."""
    assert np.isfinite(evaluate_small(folder, "zero-shot", four_images())["value"]).all()


def train_through(given: tuple[str, ...]) -> None:
    """Settings of models that are as good as the small ones: the same losses."""
    expected = whole_run()
    assert train_small("world", *given).metrics()["loss"].tolist() == expected.metrics()["loss"].tolist()


def copy_of(kind: str) -> Path:
    if kind == "transformers":
        return write_transformers_clip(Path("model").absolute(), "clip", "gelu")
    return shutil.copytree(Case.clip if kind == "clip" else Case.diffusion, Path("model").absolute())


def model(kind: str, change: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], object]:
    """A changed copy of a model's folder, as the door of its kind takes it."""

    def make(_: Path) -> object:
        folder = copy_of(kind)
        change(folder)
        return (f"denoiser={folder}",) if kind == "diffusion" else folder

    return make


def at(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    """`change` of the file `name` in a folder."""
    return lambda folder: change(folder / name)


def damage_weights(name: str, damage: str) -> Callable[[Path], object]:
    return at(name, lambda path: change_weights(path, DAMAGE[damage][0]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def flip(path: Path) -> None:
    """Damage the header of a file."""
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 255]) + data[1:])


def turn_into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def rename(path: Path) -> None:
    path.rename(path.with_name(f"old_{path.name}"))


def change_part(part: str, **changes: object) -> Callable[[Path], object]:
    """Change the object `part` in a JSON file."""
    return lambda path: change_json(path, **{part: json.loads(path.read_text())[part] | changes})


BROKEN: dict[str, Callable[[Path], object]] = {  # what is done to a file that is needed
    "gone": Path.unlink, "empty": lambda path: path.write_bytes(b""), "cut": cut, "flipped": flip, "renamed": rename,
    "a folder": turn_into_folder, "text": lambda path: path.write_text("<html>404</html>"), "a pipe": turn_into_pipe,
    "of git-lfs": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
}  # fmt: skip
BAD_JSON = {
    "a list": "[1]",
    "null": "null",
    "an empty object": "{}",
    "deep": "[" * 100_000,
    "NaN": "NaN",
    "two": "{} {}",
}
CLIP_WEIGHTS, CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
DIFFUSION_FILES = ("unet/diffusion_pytorch_model.safetensors", "vae/config.json", "scheduler/scheduler_config.json",
                   "text_encoder/model.safetensors", "text_encoder/config.json")  # fmt: skip


def breaks(kind: str, file: str, words: str = "") -> dict[str, tuple]:
    """A case for each kind of damage to a file that is needed; the error has `words`, or the folder's name."""
    texts = {name: lambda path, text=text: path.write_text(text) for name, text in BAD_JSON.items()}
    all_of = BROKEN | (texts if file.endswith(".json") else {})
    return {f"{file} {name}": (model(kind, at(file, change)), words or "model") for name, change in all_of.items()}


ENCODERS = {
    "a copy": (model("clip"), ""),
    "with other files beside": (model("clip", lambda folder: (add("notes.txt", "x")(folder), add("optimizer.pt", b"x")(folder), add(".DS_Store", b"x")(folder))), ""),
    **breaks("clip", CLIP_WEIGHTS), **breaks("clip", CLIP_CONFIG),
    **{f"{damage}": (model("clip", damage_weights(CLIP_WEIGHTS, damage)), DAMAGE[damage][1].split("|")[-1] if "|" in DAMAGE[damage][1] else DAMAGE[damage][1])
       for damage in DAMAGE},
    **{f"a width of {width!r:.10}": (model("clip", at(CLIP_CONFIG, change_part("model_cfg", embed_dim=width))), "model") for width in (0, -1, 49, "48", None, 1e9, [48])},
    "an unknown setting": (model("clip", at(CLIP_CONFIG, change_part("model_cfg", auto_map={"x": "y"}))), "auto_map"),
    "no tower": (model("clip", at(CLIP_CONFIG, change_part("model_cfg", vision_cfg=None))), "model"),
    **{f"a mean of {mean!r:.20}": (model("clip", at(CLIP_CONFIG, change_part("preprocess_cfg", mean=mean))), "mean") for mean in ([0.5], "x", [float("nan")] * 3)},
    "a deviation of 0": (model("clip", at(CLIP_CONFIG, change_part("preprocess_cfg", std=[0, 0, 0]))), "std"),
    "words gone": (model("clip", at("tokenizer.json", Path.unlink)), "model"),
    "words cut": (model("clip", at("tokenizer.json", cut)), "model"),
}  # fmt: skip
OTHER_ENCODERS = {
    "a copy": (model("transformers"), ""),
    **breaks("transformers", "model.safetensors"), **breaks("transformers", "config.json"),
    "NaN": (model("transformers", damage_weights("model.safetensors", "NaN")), "NaN or infinite"),
    "another model": (model("transformers", at("config.json", lambda path: change_json(path, model_type="llama"))), "model_type"),
    "foreign code": (model("transformers", at("config.json", lambda path: change_json(path, auto_map={"AutoModel": "m.M"}))), ""),
    "no processor": (model("transformers", at("preprocessor_config.json", Path.unlink)), "preprocessor_config.json"),
    "a processor cut": (model("transformers", at("preprocessor_config.json", cut)), "preprocessor_config.json"),
}  # fmt: skip
DENOISERS = {
    "a copy": (model("diffusion"), ""),
    **{name: case for file in DIFFUSION_FILES for name, case in breaks("diffusion", file, "denoiser").items()},
    **{f"{part}, {damage}": (model("diffusion", damage_weights(file, damage)), DAMAGE[damage][1].split("|")[0])
       for part, file in (("unet", DIFFUSION_FILES[0]), ("text_encoder", DIFFUSION_FILES[3])) for damage in ("NaN", "other names", "one missing")},
    "another prediction": (model("diffusion", at(DIFFUSION_FILES[2], lambda path: change_json(path, prediction_type="sample"))), "prediction_type"),
    "betas beyond": (model("diffusion", at(DIFFUSION_FILES[2], lambda path: change_json(path, beta_end=2.0))), "beta"),
    "steps of 0": (model("diffusion", at(DIFFUSION_FILES[2], lambda path: change_json(path, num_train_timesteps=0))), "num_train_timesteps"),
    "a scale of 0": (model("diffusion", at(DIFFUSION_FILES[1], lambda path: change_json(path, scaling_factor=0))), "scaling_factor"),
    "a part gone": (model("diffusion", lambda folder: shutil.rmtree(folder / "vae")), "vae"),
}  # fmt: skip


# --- projectors and folders of runs -----------------------------------------------------------------------------


def preset_settings():
    changes = parse_changes(list(small_settings())) | {"images": "world"}
    return align_preset("openai-l14-dcr", "", 1, changes, changes)  # no stage 1: the projector is new


@cache
def stage_one() -> Run:
    """A finished run of stage 1."""
    return align(preset_settings(), Case.clip.parent / "stage1")


@cache
def whole_run() -> Run:
    """A finished run of two steps."""
    return tune(preset_settings(), Case.clip.parent / "whole")


@cache
def stopped_run() -> Run:
    """The same run, stopped after one step."""
    with suppress(KeyboardInterrupt):
        tune(preset_settings(), Case.clip.parent / "stopped", Watch(stop=2))
    (folder,) = (Case.clip.parent / "stopped").iterdir()
    return Run(folder)


def run_copy(made: Callable[[], Run], change: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], Path]:
    """A changed copy of a run's folder, under `runs`."""

    def make(folder: Path) -> Path:
        run = made()
        copy = shutil.copytree(run.folder, folder / "runs" / run.folder.name)
        change(copy)
        return copy

    return make


def project(change: Callable[[Path], object], file: bool = False) -> Callable[[Path], tuple[str]]:
    """The setting `projector`: a changed run of stage 1, or its file of weights alone."""

    def make(folder: Path) -> tuple[str]:
        run = run_copy(stage_one, change)(folder)
        run.rename(folder / "stage1")  # `runs` is to hold one run alone
        return (f"projector={folder / 'stage1' / (WEIGHTS if file else '')}",)

    return make


WEIGHTS, STATE = "checkpoint/weights.safetensors", "checkpoint/optimizer.pt"


def train_projector(given: tuple[str]) -> None:
    assert np.isfinite(train_small("world", *given).metrics()["loss"]).all()


PROJECTORS = {
    "a run": (project(lambda folder: None), ""),
    "its file": (project(lambda folder: None, True), ""),
    "a run that is not done": (project(at("done", Path.unlink)), "finished"),
    "a run without settings": (project(at("settings.json", Path.unlink)), ""),
    **{f"weights {name}": (project(at(WEIGHTS, change), name == "cut"), "projector" if name in ("gone", "renamed", "a folder", "a pipe") else WEIGHTS)
       for name, change in BROKEN.items()},
    **{damage: (project(damage_weights(WEIGHTS, damage)), "does not fit" if damage != "one too many" else "") for damage in DAMAGE},
    "of stage 2": (lambda folder: (f"projector={whole_run().folder}",), "projector"),
}  # fmt: skip


def resume_run(folder: Path) -> None:
    """A stopped run goes on to the losses of one that was never stopped."""
    run = train_small("world")
    assert run.folder.name == folder.name and run.done
    assert run.metrics()["loss"].tolist() == whole_run().metrics()["loss"].tolist()
    weights, expected = run.weights(), whole_run().weights()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


def export_run(folder: Path) -> None:
    """The exported weights are those of the whole run."""
    run_in_process(("export", str(folder), "out"))
    run_in_process(("export", str(whole_run().folder), "expected"))
    ours, expected = (load_file(Path(name, "open_clip", CLIP_WEIGHTS)) for name in ("out", "expected"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    assert whole_run().folder.name in Path("out/README.md").read_text(encoding="utf-8")


def evaluate_run(folder: Path) -> None:
    """The embeddings are those of the whole run's encoder."""
    rows, expected = (evaluate_small(name, "zero-shot", four_images()) for name in (folder, whole_run().folder))
    assert rows["weights"].tolist() == expected["weights"].tolist()


def list_run(folder: Path) -> None:
    """The run stands in the list; the error of a damaged one is raised."""
    rows = list_runs(folder.parent).to_dict("records")
    if not (folder / "settings.json").exists():  # no run
        assert not rows
        return
    (row,) = rows
    if isinstance(row["error"], str):
        raise ValueError(row["error"])
    assert row["run"] == folder.name and row["done"] == (folder / "done").exists()


def change_line(name: str, number: int, text: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        lines = path.read_text().splitlines()
        path.write_text("".join(f"{line}\n" for line in [*lines[:number], text, *lines[number + 1 :]]))

    return at(name, change)


def change_state(**changes: object) -> Callable[[Path], object]:
    return at(STATE, lambda path: torch.save(torch.load(path, weights_only=True) | changes, path))


def append(name: str, text: str) -> Callable[[Path], object]:
    return at(name, lambda path: path.write_text((path.read_text() if path.exists() else "") + text))


RUN_FILES = ("settings.json", "environment.json", "metrics.jsonl", WEIGHTS, STATE)
EDITS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: None,
    "notes beside": add("notes.txt", "x"),
    "another learning rate": at("settings.json", lambda path: change_json(path, lr=0.5)),
    "an unknown setting": at("settings.json", lambda path: change_json(path, zeal=3)),
    "a setting of another type": at("settings.json", lambda path: change_json(path, steps="many")),
    "no stage": at("settings.json", lambda path: change_json(path, stage=None)),
    "another encoder": at("settings.json", lambda path: change_json(path, encoder="tiny")),
    "an encoder that is not there": at("settings.json", lambda path: change_json(path, encoder="/nowhere")),
    "no versions": at("environment.json", lambda path: change_json(path, versions=None)),
    "other weights at the start": at(
        "environment.json", lambda path: change_json(path, weights={"encoder": {CLIP_WEIGHTS: "0"}})
    ),
    "hashes of another type": at("environment.json", lambda path: change_json(path, weights=[1])),
    "a line of words": change_line("metrics.jsonl", 0, "words"),
    "a line of another step": change_line("metrics.jsonl", 0, '{"step": 7, "loss": 1}'),
    "a line of a step that is text": change_line("metrics.jsonl", 0, '{"step": "0", "loss": 1}'),
    "half a last line": append("metrics.jsonl", '{"step": 2, "lo'),
    "a line too many": append("metrics.jsonl", '{"step": 1, "loss": 1}\n'),
    "a broken list of skipped images": append("skipped.jsonl", "\xff\n{}\n"),
    "a list of skipped images that is a folder": lambda folder: (folder / "skipped.jsonl").mkdir(),
    "state of step -1": change_state(step=-1),
    "state of step 9": change_state(step=9),
    "state of step one": change_state(step="one"),
    "state of two processes": change_state(positions=[2, 2]),
    "state without an optimizer": change_state(optimizer={}),
    "state of another optimizer": change_state(optimizer={"state": {}, "param_groups": []}),
    "state that lacks seconds": at(
        STATE, lambda path: torch.save({k: v for k, v in torch.load(path).items() if k != "seconds"}, path)
    ),
    "positions of text": change_state(positions=["x"]),
    "weights of another run": at(WEIGHTS, lambda path: shutil.copy(stage_one().folder / WEIGHTS, path)),
    "NaN": damage_weights(WEIGHTS, "NaN"),
    "another shape": damage_weights(WEIGHTS, "another shape"),
    "one missing": damage_weights(WEIGHTS, "one missing"),
    "one too many": damage_weights(WEIGHTS, "one too many"),
    "no checkpoint": lambda folder: shutil.rmtree(folder / "checkpoint"),
    "an empty checkpoint": lambda folder: (shutil.rmtree(folder / "checkpoint"), (folder / "checkpoint").mkdir()),
    "a checkpoint that is a file": lambda folder: (
        shutil.rmtree(folder / "checkpoint"),
        (folder / "checkpoint").write_text("x"),
    ),
    "a checkpoint half renamed": lambda folder: (folder / "checkpoint").rename(folder / "checkpoint.old"),
    "a new checkpoint half written": add("checkpoint.new/weights.safetensors", b"x"),
    "a lock of another process": lambda folder: (folder / "lock").write_text("process 1 on elsewhere"),
    "a lock that is a folder": lambda folder: ((folder / "lock").unlink(), (folder / "lock").mkdir()),
    "a lock that is a pipe": at("lock", turn_into_pipe),
}
ALL_EDITS = {**{f"{file} {name}": at(file, change) for file in RUN_FILES for name, change in BROKEN.items()}, **EDITS}
UNREAD = r"(metrics.jsonl|checkpoint/optimizer.pt) .*|n.* beside|a(n unknown| line| list| new| lock).*|other weights.*|(state|positions) .*"
HARMLESS = {  # door -> the edits that it does not heed, or mends
    "resume": r"settings.json (gone|renamed)|nothing|notes beside|half a last line|a line too many|"
              r"a broken list.*|no checkpoint|a checkpoint half renamed|a new .*|a lock of another process",
    "list": r"settings.json (gone|renamed)|metrics.jsonl (gone|empty|renamed)|checkpoint/.*|no(thing|tes.*| stage| check.*)|"
            r"another .*|an? (unknown|setting|encoder|empty|checkpoint|new|lock).*|other weights.*|a line (of another|too).*|"
            r"(state|positions|weights|one) .*|NaN",
    "export": UNREAD, "evaluate run": UNREAD + r"|environment.json .*",
}  # fmt: skip
WORDS = {  # edit -> words of its error
    "no stage": "edited|finished run", "an encoder that is not there": "/nowhere", "no versions": "environment.json",
    "hashes of another type": "environment.json", "other weights at the start": "encoder has other weights",
    "state of two processes": "2 processes", "an empty checkpoint": "optimizer.pt", "no checkpoint": "no checkpoint in",
    "a checkpoint that is a file": "checkpoint", "a lock that is a folder": "lock", "a lock that is a pipe": "cannot be written",
    **dict.fromkeys(("another learning rate", "an unknown setting", "a setting of another type", "another encoder"), "it was edited"),
    **dict.fromkeys(("a line of words", "a line of another step", "a line of a step that is text", "half a last line"), "metrics.jsonl"),
    **dict.fromkeys(("a broken list of skipped images", "a list of skipped images that is a folder"), "skipped.jsonl"),
    **dict.fromkeys(("NaN", "another shape", "one missing", "one too many", "weights of another run"), "weights"),
    **dict.fromkeys((name for name in EDITS if re.match("state (?!of two)|positions", name)), "optimizer"),
}  # fmt: skip


def run_cases(door: str, made: Callable[[], Run], every: int = 1) -> list[Case]:
    """The edits at a door, or every second or fourth of them; an error names the file that is broken."""
    table = {}
    for name, change in list(ALL_EDITS.items())[::every]:
        words = WORDS.get(name) or Path(name.partition(" ")[0]).name
        if door == "evaluate run" and name in ("settings.json gone", "settings.json renamed"):
            words = "unknown encoder"  # no run any more
        words = words.partition("|")[0 if door == "resume" else 2] or words
        table[name] = run_copy(made, change), "" if re.fullmatch(HARMLESS[door], name) else words
    return cases_of(door, table)


FILE_DOORS: dict[str, Callable[[object], None]] = {
    "train": train_on, "captions": train_on, "evaluate": evaluate_on, "pairs": evaluate_on, "encoder": measure_encoder,
    "other encoder": measure_other_encoder, "denoiser": train_through, "projector": train_projector,
    "resume": resume_run, "export": export_run, "evaluate run": evaluate_run, "list": list_run,
}  # fmt: skip
FILES = [
    *cases_of("train", TRAIN_IMAGES), *cases_of("captions", CAPTIONS), *cases_of("evaluate", EVALUATE_IMAGES),
    *cases_of("pairs", PAIRS), *cases_of("encoder", ENCODERS), *cases_of("other encoder", OTHER_ENCODERS),
    *cases_of("denoiser", DENOISERS), *cases_of("projector", PROJECTORS),
    *run_cases("resume", stopped_run), *run_cases("list", whole_run), *run_cases("export", whole_run, 2),
    *run_cases("evaluate run", whole_run, 4),
]  # fmt: skip
QUICK = {  # faults that were once silent, without an end, or a traceback: never left out
    "a cell too many", "an open quote", "Latin-1", "a text that is no UTF-8", "an image twice by two paths", "a caption of 200 kB",
    "\udcfe.png", "names that are a pipe", "prompts without a place", "prompts with another place", "a class that links to another",
    "a loop as a class", "an image beside the classes", "tars of captions, an empty one", "a deviation of 0", "a mean of 'x'",
    "open_clip_config.json deep", "betas beyond", "a scale of 0", "text_encoder/config.json a pipe", "a run that is not done",
    "weights a pipe", "hashes of another type", "state of another optimizer", "positions of text", "a\nb.jpg",
}  # fmt: skip
