import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diva_lab.images import SUFFIXES, augment, open_images
from diva_lab.world import World

COUNT = 7  # pictures in the folder and in the tars; each has a grey of its own
GREYS = [20 + 30 * k for k in range(COUNT)]


def picture(grey: int, size: tuple[int, int] = (24, 20), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (grey,) * 3).save(file, kind)
    return file.getvalue()


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
    return {"world": "world:3", "folder": str(root / "folder"), "tar": str(root / "shard-{0..1}.tar")}


def greys(source: str, batches: int, seed: int = 0, n: int = 3) -> list[int]:
    stream = itertools.islice(open_images(source, 16, n, seed), batches)
    return [int(picture.float().mean().round()) for batch in stream for picture in batch]


KINDS = pytest.mark.parametrize("kind", ["world", "folder", "tar"])


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
def test_a_stream_that_starts_at_a_later_step_equals_the_one_that_went_on(sources, kind):
    whole = list(itertools.islice(open_images(sources[kind], 32, 3, seed=4), 9))
    for first in (1, 4, 7):
        later = itertools.islice(open_images(sources[kind], 32, 3, 4, first), 9 - first)
        assert torch.equal(torch.stack(list(later)), torch.stack(whole[first:]))


@pytest.mark.parametrize("kind", ["folder", "tar"])
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


# --- bad input --------------------------------------------------------------------------------------------------


def refused(source, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        next(open_images(source, 16, 4, seed=0))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "nowhere", FileNotFoundError, "nowhere", "no such folder", "'world'")


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    refused(tmp_path, FileNotFoundError, str(tmp_path), "no picture", *SUFFIXES)


@pytest.mark.parametrize("data", [b"", b"words", picture(9, (64, 64), "JPEG")[:-300]], ids=["empty", "text", "cut"])
def test_an_unreadable_picture_is_named(tmp_path, data):
    (tmp_path / "broken.jpg").write_bytes(data)
    refused(tmp_path, ValueError, str(tmp_path / "broken.jpg"), "not a picture")
    tar = write_tar(tmp_path / "one.tar", {"000.jpg": data})
    refused(tar, ValueError, "one.tar", "000.jpg", "not a picture")


@pytest.mark.parametrize("source", ["world:x", "world:", "world:-1", "world:1.5", "world:²"])
def test_a_world_without_a_whole_number_is_refused(source):
    refused(source, ValueError, repr(source), "'world:3'")


def test_tars_that_are_not_there_are_refused(tmp_path):
    refused(tmp_path / "no-{0..3}.tar", FileNotFoundError, "no such tar")


def test_a_tar_without_pictures_is_refused(tmp_path):
    tar = write_tar(tmp_path / "one.tar", {"000.txt": b"a caption"})
    refused(tar, FileNotFoundError, "no picture in", "one.tar")


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
