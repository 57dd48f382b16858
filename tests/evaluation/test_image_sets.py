import numpy as np
import pytest
import torch
from picture_files import pixels, png, write_folders, write_tar
from PIL import Image

from diva_lab.encoders import embed, load_encoder
from diva_lab.evaluation.features import FEATURES, FeatureStore
from diva_lab.evaluation.image_sets import TEMPLATES, Place, canonical, content_hash, read_set


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("tiny")


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["", "test"])
def test_a_folder_for_each_class_is_a_set_without_a_line_of_code(tmp_path, split):
    found = read_set(write_folders(tmp_path / "pets_of_mine", split=split))
    assert found.classes == ("big cat", "dog") and found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.templates == TEMPLATES and len(found) == 6
    assert found.places[0].read() == (tmp_path / "pets_of_mine" / split / "big_cat" / "0.png").read_bytes()


def test_class_names_and_templates_beside_the_pictures_win(tmp_path):
    root = write_folders(tmp_path / "n", ("n01", "n02"))
    (root / "classnames.txt").write_text("tench\ngoldfish\n")
    (root / "zeroshot_classification_templates.txt").write_text("art of a {c}\n")
    found = read_set(root)
    assert found.classes == ("tench", "goldfish") and found.templates == ("art of a {c}",)
    (root / "classnames.txt").write_text("tench\n")
    with pytest.raises(ValueError, match=r"2 class folders, but 1 line"):
        read_set(root)


def test_clip_benchmarks_tars_are_read_with_its_names_and_prompts(tmp_path):
    root = tmp_path / "wds_mnist"
    write_tar(root / "test" / "0.tar", {"s0.png": png(0), "s0.cls": b"7", "s1.png": png(1), "s1.cls": b"0"})
    write_tar(root / "test" / "1.tar", {"s0.png": png(2), "s0.cls": b"9"})
    found = read_set(root)
    assert found.name == "mnist" and found.labels.tolist() == [7, 0, 9]
    assert found.classes == tuple("0123456789") and found.templates == ('a photo of the number: "{c}".',)
    assert [place.read() for place in found.places] == [png(0), png(1), png(2)]


def test_captions_make_a_set_for_retrieval(tmp_path):
    root = tmp_path / "wds_flickr30k"
    write_tar(root / "test" / "0.tar", {"a.jpg": png(0), "a.txt": b"one\ntwo\n", "b.jpg": png(1), "b.txt": b"three"})
    assert read_set(root).captions == (("one", "two"), ("three",))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"x"}, "expected a picture and .cls or .txt"),
        ({"a.png": b"x", "a.cls": b"3"}, "classes up to number 3, but 2 class names"),
        ({"a.png": b"x", "a.cls": b"1", "b.png": b"y", "b.txt": b"c"}, "some pictures have a class"),
    ],
)
def test_tars_whose_parts_do_not_agree_are_refused(tmp_path, members, message):
    write_tar(tmp_path / "mine" / "test" / "0.tar", members)
    (tmp_path / "mine" / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=message):
        read_set(tmp_path / "mine")


def test_what_is_no_set_is_told_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_set(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="a folder for each class"):
        read_set(tmp_path)
    (tmp_path / "set" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="no picture in this class"):
        read_set(tmp_path / "set")


def test_clip_benchmarks_prefixes_are_dropped():
    assert [canonical(name) for name in ("wds_cars", "wds_vtab-pets", "CIFAR10")] == ["cars", "pets", "cifar10"]


# --- features ---------------------------------------------------------------------------------------------------


def places(root, sizes=((32, 32), (48, 40), (32, 64))):
    for i, size in enumerate(sizes):
        pixels(i, size).save(root / f"{i}.png")
    return [Place(str(root / f"{i}.png")) for i in range(len(sizes))]


def test_features_of_files_are_those_of_pictures_in_memory(tmp_path, encoder):
    found = places(tmp_path, [(32, 32)] * 5)
    images = torch.stack([torch.from_numpy(np.array(pixels(i))).permute(2, 0, 1) for i in range(5)])
    torch.testing.assert_close(FeatureStore(encoder, None, batch=2)(found), embed(encoder, images), atol=1e-6, rtol=0)


def test_pictures_are_prepared_as_open_clips_own_transform_does(tmp_path, encoder):
    import open_clip

    own = open_clip.image_transform(
        encoder.px, False, tuple(encoder.mean.flatten().tolist()), tuple(encoder.std.flatten().tolist()),
        resize_mode="shortest", interpolation=encoder.interpolation,
    )  # fmt: skip
    found = places(tmp_path)
    ready = torch.stack([own(Image.open(place.path)) for place in found]) * encoder.std + encoder.mean
    with torch.no_grad():
        expected = encoder.encode_image(ready)
    torch.testing.assert_close(FeatureStore(encoder, None)(found), expected, atol=1e-5, rtol=0)


def test_workers_change_nothing(tmp_path, encoder):
    found = places(tmp_path)
    assert torch.equal(FeatureStore(encoder, None, workers=1)(found), FeatureStore(encoder, None)(found))


def test_features_are_found_again_by_content_alone(tmp_path, encoder):
    (tmp_path / "a").mkdir()
    found, cache = places(tmp_path / "a"), tmp_path / "cache"
    first = FeatureStore(encoder, cache)
    features = first(found)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = [Place(place.path.replace("/a/", "/b/")) for place in found]
    again = FeatureStore(load_encoder("tiny"), cache)
    assert torch.equal(again(moved), features) and again.pictures == 0 and first.pictures == 3
    pixels(77).save(moved[0].path)
    assert not torch.equal(again(moved)[0], features[0]) and again.pictures == 3
    other = load_encoder("tiny")
    with torch.no_grad():
        other.model.visual.conv1.weight.add_(1e-3)
    assert FeatureStore(other, cache).fingerprint != again.fingerprint
    assert FeatureStore(encoder, cache, "bf16").fingerprint != again.fingerprint
    assert content_hash(moved) != content_hash(moved[::-1])


def test_divas_feature_is_class_and_mean_of_patches(tmp_path, encoder):
    found = places(tmp_path, [(32, 32)])
    picture = torch.from_numpy(np.array(pixels(0))).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        tokens = encoder.features(picture)
        expected = torch.nn.functional.normalize(tokens.embedding + tokens.patches.mean(1), dim=-1)
    torch.testing.assert_close(FeatureStore(encoder, None)(found, "class+patches"), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=", ".join(FEATURES).replace("+", r"\+")):
        FeatureStore(encoder, None)(found, "patches")


def test_all_unreadable_pictures_are_named_at_once_and_nothing_is_kept(tmp_path, encoder):
    found = places(tmp_path)
    for i in (0, 2):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"(?s)2 of 3 pictures.*0\.png.*2\.png"):
        FeatureStore(encoder, tmp_path / "cache")(found)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_a_batch_that_does_not_fit_is_halved(tmp_path, encoder, monkeypatch):
    found, whole = places(tmp_path, [(32, 32)] * 5), encoder.features

    def small(images):
        if len(images) > 2:
            raise torch.OutOfMemoryError
        return whole(images)

    monkeypatch.setattr(encoder, "features", small)
    store = FeatureStore(encoder, None, batch=8)
    assert store(found).shape == (5, encoder.dim) and store.batch == 2
