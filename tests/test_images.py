import io
import itertools
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from diva_lab import image_files
from diva_lab.image_files import SUFFIXES, _length, tar_images
from diva_lab.images import PATIENCE, augment, open_images
from diva_lab.world import World

COUNT = 7  # pictures in the folder and in the tars; each has a grey of its own
GREYS = [20 + 30 * k for k in range(COUNT)]


def picture(grey: int, size: tuple[int, int] = (24, 20), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (grey,) * 3).save(file, kind)
    return file.getvalue()


def write_dataset(path: Path, files: list[bytes | None], split: str | None = None) -> datasets.Dataset:
    """A Hugging Face dataset of captions and pictures, saved to disk."""
    features = datasets.Features({"caption": datasets.Value("string"), "picture": datasets.Image()})
    cells = [data and {"bytes": data, "path": None} for data in files]
    made = datasets.Dataset.from_dict({"caption": ["words"] * len(files), "picture": cells}, features, split=split)
    made.save_to_disk(path)
    return made


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("images")
    for k, grey in enumerate(GREYS):
        path = root / "folder" / ("deep" if k % 2 else ".") / (f"{k}.PNG" if k % 3 else f"{k}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(grey))
    (root / "folder" / "notes.txt").write_text("not a picture")
    for shard, ks in enumerate((range(4), range(4, COUNT))):
        members = {f"{k:03}.{end}": d for k in ks for end, d in (("png", picture(GREYS[k])), ("txt", b"a caption"))}
        write_tar(root / f"shard-{shard}.tar", members)
    write_dataset(root / "dataset", [picture(grey) for grey in GREYS])
    return {
        "world": "world:3",
        "folder": str(root / "folder"),
        "tar": str(root / "shard-{0..1}.tar"),
        "hf": f"hf:{root / 'dataset'}",
    }


def greys(source: str, batches: int, seed: int = 0, n: int = 3) -> list[int]:
    stream = itertools.islice(open_images(source, 16, n, seed), batches)
    return [int(picture.float().mean().round()) for batch in stream for picture in batch]


KINDS = pytest.mark.parametrize("kind", ["world", "folder", "tar", "hf"])


@KINDS
def test_a_source_gives_endless_uint8_batches_of_the_size_asked_for(sources, kind):
    for batch in itertools.islice(open_images(sources[kind], 32, 5, seed=0), 4):
        assert batch.shape == (5, 3, 32, 32) and batch.dtype == torch.uint8


@KINDS
def test_the_same_seed_and_step_give_the_same_batch_and_another_seed_another(sources, kind):
    one, two, other = (open_images(sources[kind], 32, 3, seed) for seed in (1, 1, 2))
    batches = [torch.stack(list(itertools.islice(stream, 3))) for stream in (one, two, other)]
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


@KINDS
def test_a_stream_that_starts_at_a_later_position_equals_the_one_that_went_on(sources, kind):
    stream = open_images(sources[kind], 32, 3, seed=4)
    whole, positions = zip(*((next(stream), stream.position) for _ in range(9)), strict=True)
    assert positions == tuple(range(3, 30, 3)) and stream.skipped == []
    for step in (1, 4, 7):
        later = open_images(sources[kind], 32, 3, 4, positions[step - 1])
        assert torch.equal(torch.stack(list(itertools.islice(later, 9 - step))), torch.stack(whole[step:]))
        assert later.position == positions[-1]


@pytest.mark.parametrize("kind", ["folder", "tar", "hf"])
def test_each_picture_is_seen_once_an_epoch_in_another_order_each_time(sources, kind):
    seen = np.array(greys(sources[kind], COUNT)).reshape(3, COUNT)  # three epochs
    assert (np.sort(seen) == GREYS).all()
    assert len({tuple(row) for row in seen}) > 1


def test_world_pictures_are_those_of_the_world_asked_for(monkeypatch):
    rendered = []
    monkeypatch.setattr(World, "render", lambda world, scenes: rendered.append(world) or np.zeros((4, 32, 32, 3), "u1"))
    for source in ("world", "world:0", "world:3"):
        next(open_images(source, 32, 4, seed=1))
    assert rendered == [World(0), World(0), World(3)]


def test_tars_are_found_by_path_glob_and_brace_range(sources):
    root = Path(sources["tar"]).parent
    assert sorted(greys(str(root / "shard-0.tar"), 4, n=1)) == GREYS[:4]
    assert greys(str(root / "*.tar"), 3) == greys(str(root / "shard-{0..1}.tar"), 3)


def test_a_picture_is_resized_by_its_shorter_side_and_cut_at_the_centre(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255  # the middle third is white
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert next(open_images(tmp_path, 10, 1, seed=0)).min() > 200


def test_of_the_epochs_before_a_position_no_tar_is_read(sources, monkeypatch):
    opened, whole = [], image_files.tar_images
    monkeypatch.setattr(
        image_files, "tar_images", lambda tar, read=True: opened.extend([tar] * read) or whole(tar, read)
    )
    next(open_images(sources["tar"], 16, 1, 0, 50 * COUNT + 1))
    assert len(opened) == 2  # those of the 51st


def test_a_tars_length_is_what_is_read_of_it_wherever_it_is_cut(tmp_path):
    with tarfile.open(tmp_path / "whole", "w") as tar:
        names = ("__meta__/a.png", "0.png", "0.txt", "1.txt", "deep/2.PNG", "no suffix", "3.jpg", "4.a.png", "4.b.png")
        for name in (*names, f"{'long' * 40}.png"):
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(bytes(700)))
        tar.add(tmp_path, "folder.png", recursive=False)
    data, lengths = (tmp_path / "whole").read_bytes(), set()
    for cut in [*range(0, len(data), max(1, len(data) // 100)), len(data)]:
        path = tmp_path / f"{cut}.tar"
        path.write_bytes(data[:cut])
        read = list(tar_images(str(path)))
        assert _length(str(path)) == len(read), cut
        lengths.add(len(read))
    assert lengths >= {1, 2, 6}
    assert _length(str(write_tar(tmp_path / "none.tar", {"0.txt": b""}))) == 0


# --- bad input --------------------------------------------------------------------------------------------------


def refused(source, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        next(open_images(source, 16, 4, seed=0))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "nowhere", FileNotFoundError, "nowhere", "no such folder", "'world'")


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    refused(tmp_path, FileNotFoundError, str(tmp_path), "no image", *SUFFIXES)


BROKEN = {"empty": b"", "text": b"words", "cut": picture(9, (64, 64), "JPEG")[:-300]}
READABLE = range(8)  # pictures beside the broken ones


def with_broken(root: Path, kind: str) -> tuple[str, set[str]]:
    """A source of readable and of broken pictures, and the names of the broken ones."""
    files = {f"{k:03}.jpg": picture(GREYS[k % COUNT]) for k in READABLE} | {f"{k}.jpg": d for k, d in BROKEN.items()}
    if kind == "folder":
        for name, data in files.items():
            (root / name).write_bytes(data)
        (root / "gone.jpg").symlink_to(root / "nowhere")
        return str(root), {str(root / f"{name}.jpg") for name in (*BROKEN, "gone")}
    if kind == "tar":
        tar = write_tar(root / "one.tar", files)
        cut = write_tar(root / "two.tar", {"cut.jpg": bytes(20_000)})
        cut.write_bytes(cut.read_bytes()[:9000])
        return str(root / "*.tar"), {f"{tar}: {name}.jpg" for name in BROKEN} | {str(cut)}
    write_dataset(root, [*files.values(), None])
    first = len(READABLE)
    return f"hf:{root}", {f"hf:{root}: row {first + k}" for k in range(len(BROKEN) + 1)}


@pytest.mark.parametrize("kind", ["folder", "tar", "hf"])
def test_unreadable_pictures_are_skipped_counted_and_listed(tmp_path, kind):
    source, names = with_broken(tmp_path, kind)
    stream, listed, whole = open_images(source, 16, 2, seed=1), [], []
    for step in range(12):  # three epochs
        whole.append(next(stream))
        assert stream.position == 2 * (step + 1) + len(stream.skipped)  # nothing that was only read ahead
        listed.append((stream.position, list(stream.skipped)))
    assert {name for name, _ in stream.skipped} == names and 2 * len(names) < len(stream.skipped) <= 4 * len(names)
    assert all(reason and " at 0x" not in reason for _, reason in stream.skipped)
    for step in (2, 5, 9):
        position, before = listed[step - 1]
        later = open_images(source, 16, 2, 1, position)
        assert torch.equal(torch.stack(list(itertools.islice(later, 12 - step))), torch.stack(whole[step:]))
        assert before + later.skipped == stream.skipped and later.position == stream.position


@pytest.mark.parametrize("kind", ["folder", "tar", "hf"])
def test_a_source_without_one_readable_picture_is_refused_naming_the_first(tmp_path, kind):
    data = {f"{k}.jpg": b"words" for k in range(3)}
    if kind == "folder":
        for name, words in data.items():
            (tmp_path / name).write_bytes(words)
    source = {
        "folder": lambda: str(tmp_path),
        "tar": lambda: str(write_tar(tmp_path / "one.tar", data)),
        "hf": lambda: write_dataset(tmp_path, list(data.values())) and f"hf:{tmp_path}",
    }[kind]()
    words = (repr(source), f"{PATIENCE} samples in a row (3 different ones)", "UnidentifiedImageError", "start again")
    refused(source, ValueError, *words, str(tmp_path))


def test_a_tar_that_is_none_is_refused(tmp_path):
    (tmp_path / "one.tar").write_bytes(b"words" * 1000)
    refused(tmp_path / "one.tar", ValueError, "(1 different ones)", "ReadError: not a whole tar")


def test_a_long_row_of_unreadable_pictures_is_refused_and_a_shorter_one_is_not(tmp_path):
    for broken in ((PATIENCE - 1) // 2, 2 * PATIENCE):  # an epoch's last and the next one's first may make one row
        folder = tmp_path / str(broken)
        folder.mkdir()
        (folder / "whole.png").write_bytes(picture(9))
        for k in range(broken):
            (folder / f"{k}.png").write_bytes(b"words")
    assert len(list(itertools.islice(open_images(tmp_path / "49", 16, 1, seed=0), 10))) == 10
    with pytest.raises(ValueError, match=f"{PATIENCE} samples in a row"):
        list(itertools.islice(open_images(tmp_path / "200", 16, 1, seed=0), 3))


def test_datasets_that_were_saved_and_folders_that_load_dataset_reads_give_their_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "parquet").mkdir()
    made = write_dataset(tmp_path / "saved", [picture(grey) for grey in GREYS], split="test")
    made.to_parquet(tmp_path / "parquet" / "test.parquet")
    datasets.DatasetDict({"train": made.select(range(3)), "test": made}).save_to_disk(tmp_path / "both")
    for k, grey in enumerate(GREYS):
        path = tmp_path / "pictures" / "test" / str(k % 2) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(grey))
    whole = greys(f"hf:{tmp_path / 'saved'}", 7)
    assert sorted(whole) == sorted(3 * GREYS)
    for name in ("parquet", "saved:test", "both:test"):
        assert greys(f"hf:{tmp_path / name}", 7) == whole
    assert sorted(greys(f"hf:{tmp_path / 'pictures'}", 7)) == sorted(whole)
    assert sorted(greys(f"hf:{tmp_path / 'both'}", 1)) == GREYS[:3]  # its split `train`


def test_a_dataset_that_cannot_be_had_is_refused_saying_how_to_fetch_it(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    refused("hf:nobody/nothing", FileNotFoundError, "nobody/nothing", "hf download --repo-type dataset nobody/nothing")
    refused("hf:no/such/folder", FileNotFoundError, "no folder no/such/folder")
    assert time.monotonic() - start < 5


def test_a_dataset_without_pictures_or_without_the_split_is_refused(tmp_path):
    datasets.Dataset.from_dict({"caption": ["words"]}).save_to_disk(tmp_path / "words")
    refused(f"hf:{tmp_path / 'words'}", ValueError, "only caption; expected a column of datasets.Image")
    write_dataset(tmp_path / "none", [])
    refused(f"hf:{tmp_path / 'none'}", ValueError, "datasets cannot load", str(tmp_path / "none"))
    write_dataset(tmp_path / "test", [picture(9)], split="test")
    refused(f"hf:{tmp_path / 'test'}:val", ValueError, "no split 'val'", "expected one of test")
    (tmp_path / "empty").mkdir()
    refused(f"hf:{tmp_path / 'empty'}", ValueError, "datasets cannot load", str(tmp_path / "empty"))


@pytest.mark.parametrize("source", ["world:x", "world:", "world:-1", "world:1.5", "world:²"])
def test_a_world_without_a_whole_number_is_refused(source):
    refused(source, ValueError, repr(source), "'world:3'")


def test_tars_that_are_not_there_are_refused(tmp_path):
    refused(tmp_path / "no-{0..3}.tar", FileNotFoundError, "no such tar")


def test_a_tar_without_pictures_is_refused(tmp_path):
    tar = write_tar(tmp_path / "one.tar", {"000.txt": b"a caption"})
    refused(tar, FileNotFoundError, "no image in", "one.tar")


# --- augmentation -----------------------------------------------------------------------------------------------


def draw(images: torch.Tensor, seed: int = 0, flips: bool = True) -> torch.Tensor:
    return augment(images, torch.Generator().manual_seed(seed), flips)


def corner(n: int) -> torch.Tensor:
    """Pictures that are bright at the upper left only."""
    images = torch.full((n, 3, 32, 32), 0.2)
    images[:, :, :16, :16] = 0.8
    return images


def brighter(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each picture: is the left brighter than the right, is the top brighter than the bottom?"""
    left, right = images[..., :16].mean((1, 2, 3)), images[..., 16:].mean((1, 2, 3))
    return left > right, images[:, :, :16].mean((1, 2, 3)) > images[:, :, 16:].mean((1, 2, 3))


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (5, 5)])
def test_augmented_pictures_keep_shape_and_range(size):
    images = torch.rand(16, 3, *size).round()  # black and white: every jitter would leave the range
    views = draw(images)
    assert views.shape == images.shape and views.min() >= 0 and views.max() <= 1


def test_augmentation_is_reproducible_and_drawn_for_each_picture():
    images = torch.rand(1, 3, 32, 32).expand(8, -1, -1, -1)
    views = draw(images, flips=False)
    assert torch.equal(views, draw(images, flips=False)) and not torch.equal(views, draw(images, 1, flips=False))
    assert len({view.numpy().tobytes() for view in views}) == 8


def test_augmentation_uses_its_own_generator_only():
    before = torch.get_rng_state()
    draw(corner(4))
    assert torch.equal(before, torch.get_rng_state())


def test_without_flips_no_picture_is_flipped():
    assert all(side.all() for side in brighter(draw(corner(60), flips=False)))


def test_with_flips_half_the_pictures_are_flipped_each_way():
    for side in brighter(draw(corner(60))):
        assert 0.25 < side.float().mean() < 0.75


def test_augmentation_is_mild():
    images = corner(20)
    assert (draw(images, flips=False) - images).abs().mean((1, 2, 3)).max() < 0.2
