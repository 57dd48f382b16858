"""Files as people have them: what is an image of a source, what is left out and said, and what is never opened."""

import gzip
import io
import itertools
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from image_writers import png, write_tar
from PIL import Image

from diva_lab import image_files
from diva_lab.image_files import (
    MAX_PIXELS,
    Place,
    choose_images,
    content_hash,
    decode_square,
    find_images,
    find_tars,
    open_picture,
    tar_images,
)
from diva_lab.images import Images, open_images


def file_of(image: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def take(source: str | Path, batches: int = 1, n: int = 1, **options) -> Images:
    """A source after so many batches."""
    stream = open_images(source, 16, n, seed=0, **options)
    for _ in range(batches):
        next(stream)
    return stream


def names_of(tar: Path) -> list[str]:
    """The names of a tar's images; of one that cannot be used with its reason."""
    return [
        sample.name.removeprefix(f"{tar}: ") + (f" ({sample.data})" if isinstance(sample.data, ValueError) else "")
        for sample in tar_images(str(tar))
    ]


def left_out_of(tar: Path) -> dict[str, str]:
    """Name and reason of what is left out of a tar."""
    listed = itertools.chain(*(sample.left_out for sample in tar_images(str(tar))))
    return {name.removeprefix(f"{tar}: "): reason for name, reason in listed}


# --- no foreign code --------------------------------------------------------------------------------------------


def test_no_name_of_a_tar_is_run_as_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(Path("good.tar"), {"0.png": png(0)})
    Path("pipe:id > pwned; cat good.tar").write_bytes(Path("good.tar").read_bytes())
    Path("-").write_bytes(b"")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"started {args}"))
    shards = find_tars("*.tar")
    assert sorted(shards) == ["good.tar", "pipe:id > pwned; cat good.tar"]
    assert take("*.tar", 4).skipped == []
    for name in ("pipe:id > pwned; cat good.tar", "./pipe:id > pwned; cat good.tar"):
        take(name)  # a file of this name
    for name in ("pipe:cat good.tar", "file:good.tar", "http://localhost/good.tar", "{pipe:cat ,}x.tar"):
        with pytest.raises(FileNotFoundError, match="no such tar"):
            take(name)
    assert not Path("pwned").exists()


def test_no_code_in_a_dataset_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    code = f"open({str(tmp_path / 'pwned')!r}, 'w')\n"

    class Planted:
        def __reduce__(self):
            return exec, (code,)

    for name in ("script", "pandas"):  # the second is also the name of a reader of pickles
        Path(name).mkdir()
        (Path(name) / f"{name}.py").write_text(code)
        (Path(name) / "train.pkl").write_bytes(pickle.dumps(Planted()))
        Path("train.pkl").write_bytes(pickle.dumps(Planted()))
        for source in (f"hf:{name}", f"hf:{tmp_path / name}", f"hf:{name}/{name}.py"):
            with pytest.raises((ValueError, FileNotFoundError), match=name):
                take(source)
    assert not (tmp_path / "pwned").exists()


def test_a_file_that_pillow_would_hand_to_a_program_is_unreadable(monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: started.append(args))
    with pytest.raises(ValueError, match="UnidentifiedImageError"):
        decode_square(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", 8)
    assert not started


# --- tars -------------------------------------------------------------------------------------------------------


def test_dots_in_names_make_as_many_images_as_there_are_each_with_its_own_caption(tmp_path):
    names = [f"d.x/IMG_2019.{k:02}.00" for k in range(10)]
    tar = tmp_path / "dots.tar"
    write_tar(tar, {f"{name}.{end}": data for k, name in enumerate(names)
                    for end, data in (("JPG", png(k)), ("txt", f"number {k}".encode()), ("json", b"{}"))})  # fmt: skip
    samples = list(tar_images(str(tar)))
    assert [sample.name for sample in samples] == [f"{tar}: {name}.jpg" for name in names]
    assert [(sample.data, sample.caption) for sample in samples] == [(png(k), f"number {k}") for k in range(10)]
    assert left_out_of(tar) == {}


@pytest.mark.parametrize("mask, image", [("0001.seg.png", "0001.jpg"), ("0001.png", "0001.jpg")])
def test_a_mask_before_its_image_is_not_taken_and_said(tmp_path, mask, image):
    tar = tmp_path / "masks.tar"
    write_tar(tar, {"0000.png": png(1), mask: png(2), "0001.txt": b"\xef\xbb\xbfa cat\r\n", image: png(3)})
    assert [(s.data, s.caption) for s in tar_images(str(tar))] == [(png(1), None), (png(3), "a cat")]
    said = {mask: f"beside {image}, which is taken for the image"}
    assert left_out_of(tar) == said
    stream = take(tar, 6)  # three epochs
    assert [tuple(skip) for skip in stream.skipped] == 3 * [(f"{tar}: {mask}", said[mask])] and stream.position == 6


def test_a_repeated_name_costs_one_sample_and_the_rest_is_kept(tmp_path):
    tar = tmp_path / "twice.tar"
    with tarfile.open(tar, "w") as file:
        for k in (0, 1, 2, 2, 3, 4, 5, 6, 7, 8):
            member = tarfile.TarInfo(f"{k}.png")
            member.size = len(png(k))
            file.addfile(member, io.BytesIO(png(k)))
    assert names_of(tar) == [
        f"{k}.png" + (" (stands twice in this tar; expected every name once)" if k == 2 else "") for k in range(9)
    ]
    place = image_files.Place("x")
    images, _ = choose_images("a", [("1.jpg", place), ("2.jpg", place), ("2.jpg", place), ("1.txt", place)])
    assert [isinstance(image.place, ValueError) for image in images] == [False, True]


def test_what_a_tar_holds_and_does_not_hand_out_is_listed(tmp_path):
    tar = tmp_path / "mac.tar"
    hidden = ["./._0.png", "__MACOSX/0.png", ".ipynb_checkpoints/0.png"]
    with tarfile.open(tar, "w") as file:
        for name in ("./.DS_Store", "__meta__/a.png", hidden[0], "./0.png", *hidden[1:], "./0.txt", "1.gif", "n.tar"):
            data = b"words" if name == "./0.txt" else png(0)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
        for name, kind in (("2.png", tarfile.LNKTYPE), ("3.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "./0.png"
            file.addfile(member)
    assert [(s.name, s.caption) for s in tar_images(str(tar))] == [(f"{tar}: ./0.png", "words")]
    reasons = left_out_of(tar)
    assert {*reasons} == {*hidden, "1.gif", "n.tar", "2.png", "3.png"}
    assert {reasons[name] for name in hidden} == {"hidden"} and "link" in reasons["2.png"]
    write_tar(tmp_path / "only.tar", {"._0.png": png(0)})
    assert names_of(tmp_path / "only.tar")[0].endswith("(no image to be read in this tar, but 1 that are left out)")


def test_a_tar_that_does_not_end_as_a_whole_one_gives_what_it_has_and_says_so(tmp_path):
    whole = tmp_path / "whole.tar"
    write_tar(whole, {f"{k}.png": png(k) for k in range(4)})
    data, third = whole.read_bytes(), 2 * (512 + -len(png(0)) % 512 + len(png(0)))
    noise = bytes(range(1, 256)) * 3
    cases = {"boundary": data[:third], "header": data[:third] + noise[:512] + data[third + 512 :], "two": data + data}
    for name, damaged in cases.items():
        tar = tmp_path / f"{name}.tar"
        tar.write_bytes(damaged)
        assert names_of(tar) == [f"{k}.png" for k in range(4 if name == "two" else 2)]
        assert "cut off, or what follows is not read" in left_out_of(tar)["its end"]
    assert left_out_of(whole) == {}
    write_tar(whole, {"0.png": png(0), "._1.png": b"x", "1.png": png(1)})
    whole.write_bytes(whole.read_bytes()[:third])  # cut within the last member
    assert len(names_of(whole)) == 1 and left_out_of(whole) == {"._1.png": "hidden"}


def test_a_compressed_tar_is_refused_unread(tmp_path):
    bomb = tmp_path / "bomb.tar"
    bomb.write_bytes(gzip.compress(bytes(2**24)))
    assert names_of(bomb) == [f"{bomb} (compressed (gzip); expected a plain tar: unpack it first)"]
    with pytest.raises(ValueError, match=r"compressed \(gzip\); expected a plain tar"):
        take(bomb)


def test_a_path_that_exists_is_taken_as_it_is_and_a_pattern_behind_it_still_works(tmp_path):
    for folder in ("cc3m [train]", "a{b", "star*"):
        for k in (0, 1):
            write_tar(tmp_path / folder / f"{k}.tar", {f"{k}.png": png(k)})
        paths = [str(tmp_path / folder / f"{k}.tar") for k in (0, 1)]
        assert find_tars(paths[0]) == paths[:1]
        assert find_tars(str(tmp_path / folder / "*.tar")) == find_tars(str(tmp_path / folder / "{0..1}.tar")) == paths
    write_tar(tmp_path / "x{0..1}.tar", {"0.png": png(0)})
    assert find_tars(str(tmp_path / "x{0..1}.tar")) == [str(tmp_path / "x{0..1}.tar")]
    for pattern, words in (("y{0..1.tar", "expected a brace range"), ("{0..9999999999}.tar", "more than 100000 names")):
        with pytest.raises(ValueError, match=words):
            find_tars(str(tmp_path / pattern))


# --- folders ----------------------------------------------------------------------------------------------------


def write_files(root: Path, *names: str) -> None:
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(k))


def test_links_to_folders_are_followed_and_every_folder_is_read_once(tmp_path):
    write_files(tmp_path / "elsewhere", "one/0.png", "two/deep/1.png")
    root = tmp_path / "root"
    write_files(root, "own/2.png")
    for name in ("one", "two"):
        (root / name).symlink_to(tmp_path / "elsewhere" / name)
    (root / "again").symlink_to(root / "own")
    (root / "own" / "loop").symlink_to(root)
    (tmp_path / "elsewhere" / "two" / "up").symlink_to(tmp_path)
    files, left_out = find_images(root)
    assert [str(file.relative_to(root)) for file in files] == ["one/0.png", "own/2.png", "two/deep/1.png"]
    assert {str(Path(name).relative_to(root)) for name, _ in left_out} == {"again", "own/loop", "two/up"}
    assert take(root, 3).position == 3


def test_folders_that_link_to_each_other_are_read_in_a_moment(tmp_path):
    for a, b in itertools.permutations(range(12), 2):
        write_files(tmp_path, f"{a}/{a}.png")
        (tmp_path / str(a) / f"to-{b}").symlink_to(tmp_path / str(b))
    assert len(find_images(tmp_path)[0]) == 12


def test_hidden_files_and_other_formats_are_left_out_and_listed_once(tmp_path):
    write_files(tmp_path, "0.png", "._0.png", ".ipynb_checkpoints/0.png", "__MACOSX/0.png", "@eaDir/0.png", "1.heic")
    write_files(tmp_path, "2.tar", "notes.txt", ".DS_Store")
    (tmp_path / "locked").mkdir()
    stream = take(tmp_path, 5)
    listed = {str(Path(name).relative_to(tmp_path)): reason for name, reason in stream.skipped}
    assert {*listed} == {"._0.png", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "1.heic", "2.tar"}
    assert len(stream.skipped) == 6 and stream.position == 5 and "expected one of .jpg" in listed["1.heic"]
    assert take(tmp_path, first=5).skipped == []


def test_a_folder_without_images_says_what_it_holds_instead(tmp_path):
    write_tar(tmp_path / "shards" / "0.tar", {"0.png": png(0)})
    with pytest.raises(FileNotFoundError, match=r"but 1 tars; name them as images=.*shards/\*\.tar'") as error:
        take(tmp_path)
    take(str(error.value).partition("name them as images='")[2].partition("'")[0])
    write_files(tmp_path / "hidden", "._0.png")
    with pytest.raises(FileNotFoundError, match=r"1 left out, the first: .*\._0\.png: hidden"):
        take(tmp_path / "hidden")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"a file, not a folder; expected .*tars \(\.tar\)"):
        take(tmp_path / "x.tar.gz")


def test_a_source_without_a_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, "0.png")
    for source in ("", " ", "hf:", "hf::train"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"empty|no name"):
            take(source)
    take(".")


def test_pipes_and_devices_are_never_opened(tmp_path):
    write_files(tmp_path, "0.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    stream = take(tmp_path, 4)
    assert {Path(name).name for name, _ in stream.skipped} == {"pipe.jpg", "zero.jpg"}
    assert all("not a regular file" in reason for _, reason in stream.skipped)
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(ValueError, match="not a regular file"):
        take(tmp_path / "pipe.tar")


# --- pixels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_grey_of_16_bits_is_scaled_and_of_32_bits_is_unreadable(kind):
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    shallow = (deep >> 8).astype(np.uint8)
    data = file_of(Image.fromarray(deep), kind)
    assert (decode_square(data, 8) == decode_square(file_of(Image.fromarray(shallow)), 8)).all()
    with pytest.raises(ValueError, match="32 bits a pixel"):
        decode_square(file_of(Image.fromarray(deep.astype(np.int32)), "tiff"), 8)


def test_an_image_of_too_many_pixels_or_bytes_is_unreadable_before_it_is_decoded(tmp_path, monkeypatch):
    side = int(MAX_PIXELS**0.5) + 1
    header = b"BM" + bytes(8) + b"\x36\0\0\0" + b"\x28\0\0\0" + 2 * side.to_bytes(4, "little") + b"\x01\0\x18\0"
    with pytest.raises(ValueError, match=f"{side} x {side} pixels; expected at most {MAX_PIXELS}"):
        decode_square(header + bytes(24), 8)
    write_files(tmp_path, "0.png", "1.png")
    (tmp_path / "1.png").write_bytes(png(0) + bytes(10_000))
    monkeypatch.setattr(image_files, "MAX_BYTES", 9000)
    assert {Path(name).name for name, _ in take(tmp_path, 3).skipped} == {"1.png"}


def test_a_place_may_hold_its_bytes_and_mean_a_part_of_its_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png(3))
    whole, inside = Place(str(tmp_path / "a.png")), Place("table.parquet", data=png(3))
    part = whole._replace(box=(4, 2, 20, 10))
    pixels = []
    for place in (whole, inside, part, inside._replace(box=part.box)):
        with open_picture(place) as image:
            pixels.append(np.asarray(image))
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[2], pixels[0][2:10, 4:20])
    assert np.array_equal(pixels[3], pixels[2])
    hashes = [content_hash([place]) for place in (whole, inside, part, part._replace(box=(4, 2, 20, 11)))]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    assert str(part).endswith("a.png (4, 2, 20, 10)") and str(inside) == "table.parquet (an image in it)"


def test_a_part_without_pixels_or_with_too_many_is_unreadable():
    for box in ((9, 0, 3, 9), (0, 0, 10**6, 10**6)):
        with pytest.raises(ValueError, match="Error"), open_picture(Place("x", data=png(3), box=box)):
            pass


def test_of_large_images_one_is_decoded_at_a_time(tmp_path, monkeypatch):
    write_files(tmp_path, *(f"{k}.png" for k in range(6)))
    monkeypatch.setattr(image_files, "LARGE", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    whole, busy, most = image_files._to_rgb, [], []

    def watch(image: Image.Image, upright: bool) -> Image.Image:
        busy.append(image)
        found = whole(image, upright)
        most.append(len(busy))
        busy.pop()
        return found

    monkeypatch.setattr(image_files, "_to_rgb", watch)
    take(tmp_path, 5, n=6)
    assert len(most) >= 30 and max(most) == 1
