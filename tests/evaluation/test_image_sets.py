import gzip
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_writers import pixels, png, write_folders, write_tar
from PIL import Image

from diva_lab.evaluation import features
from diva_lab.evaluation.features import FEATURES, FeatureStore
from diva_lab.evaluation.image_sets import (
    CLASSIFICATION_SETS,
    CLUSTERED,
    DEFAULT_TEMPLATES,
    _known,
    canonical_name,
    decode_image,
    has_captions,
    is_set,
    read_set,
)
from diva_lab.evaluation.table import benchmark_folders
from diva_lab.evaluation.task import Task
from diva_lab.image_files import Place, content_hash
from diva_lab.models.encoders import Features, embed, load_encoder


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("tiny")


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["", "test"])
def test_a_folder_for_each_class_is_a_set_without_a_line_of_code(tmp_path, split):
    found = read_set(write_folders(tmp_path / "pets_of_mine", split=split))
    assert found.classes == ("big cat", "dog") and found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.templates == DEFAULT_TEMPLATES and len(found) == 6
    assert found.places[0].read() == (tmp_path / "pets_of_mine" / split / "big_cat" / "0.png").read_bytes()


def test_class_names_and_templates_beside_the_images_win(tmp_path):
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


# --- classes that are none, and names ---------------------------------------------------------------------------


def test_imagenets_own_layout_has_val_for_test_and_its_names_by_wordnet_id(tmp_path):
    for split in ("train", "val"):
        write_folders(tmp_path / "ImageNet-1K", ("n01440764", "n01498041", "n15075141"), 2, split)
    found, train = read_set(tmp_path / "ImageNet-1K"), read_set(tmp_path / "ImageNet-1K", "train")
    assert found.name == "imagenet1k" and found.classes == ("tench", "stingray", "toilet paper")
    assert {place.path.split("/")[-3] for place in found.places} == {"val"} and len(train) == 6
    (tmp_path / "ImageNet-1K" / "test").mkdir()  # images without classes, as ImageNet's own test split
    pixels(0).save(tmp_path / "ImageNet-1K" / "test" / "0.png")
    assert read_set(tmp_path / "ImageNet-1K").places == found.places


def test_wordnet_ids_without_a_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1 class folders .* \(n99999999\); expected their names in classnames\.txt"):
        read_set(write_folders(tmp_path / "mine", ("n01440764", "n99999999"), 1))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (["train/a", "train/b"], "no test split; expected .*test or .*val; found train"),
        (["train/a", "notes/b"], "'train' is a split's name and no class"),
        (["a", "validation", "Test"], r"(?s)'Test' is a split's name.*'validation' is a split's name"),
        (["test/train/a", "test/val/b"], r"(?s)'train' is a split's name.*'val' is a split's name"),
        (["MLLM_VLM Images/Texts", "other"], "'MLLM_VLM Images' holds MMVP-VLM's images"),
        (["mmvp_vlm_images"], "'mmvp_vlm_images' holds MMVP-VLM's images"),
        (["cat"], "'cat' is the only class folder; expected two or more"),
        (["test/cat"], "'cat' is the only class folder"),
    ],
)
def test_splits_mmvps_images_and_a_single_folder_are_no_classes(tmp_path, made, message):
    for i, folder in enumerate(made):
        (tmp_path / "set" / folder).mkdir(parents=True)
        pixels(i).save(tmp_path / "set" / folder / "0.png")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_set(tmp_path / "set")


def test_within_a_split_a_class_may_be_called_train(tmp_path):
    assert read_set(write_folders(tmp_path / "voc2007", ("aeroplane", "train"), split="test")).classes[1] == "train"


def test_all_that_is_wrong_with_class_folders_is_told_at_once(tmp_path):
    root = write_folders(tmp_path / "set", ("a", "b"))
    (root / "c").mkdir(), (root / "d").mkdir()
    (root / "classnames.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"(?s)- c: no image.*- d: no image.*4 class folders, but 1 line"):
        read_set(root)


@pytest.mark.parametrize(
    ("name", "folders", "expected"),
    [
        ("mnist", [str(i) for i in range(10)], {0: "0", 9: "9"}),
        ("GTSRB", [f"{i:05}" for i in range(43)], {0: "red and white circle 20 kph speed limit"}),
        ("flowers102", [str(i) for i in range(1, 103)], {0: "pink primrose", 9: "globe thistle"}),  # 10 follows 9
        ("flowers102", [f"kind_{i:03}" for i in range(102)], {0: "kind 000"}),  # by another order: their own names
        ("eurosat", ["AnnualCrop", "Forest", *"HIJKLMN", "SeaLake"], {0: "annual crop land", 9: "lake or sea"}),
        ("fer2013", [str(i) for i in range(7)], {3: "3"}),  # its numbers are not in the names' order
        ("cifar10", ["cat", "dog"], {0: "cat"}),
    ],
)
def test_clip_benchmarks_class_names_are_used_where_their_order_is_the_folders(tmp_path, name, folders, expected):
    found = read_set(write_folders(tmp_path / name, tuple(folders), 1))
    assert len(found.classes) == len(folders) and {i: found.classes[i] for i in expected} == expected


def test_both_orders_of_caltechs_names_are_told_apart(tmp_path):
    rest = tuple(f"k{i:03}" for i in range(98))
    published = write_folders(
        tmp_path / "a" / "caltech-101", ("BACKGROUND_Google", "Faces", "Faces_easy", "G", *rest), 1
    )
    lower = write_folders(tmp_path / "b" / "caltech101", ("accordion", "airplanes", "anchor", "ant", *rest), 1)
    assert read_set(published).classes[:3] == ("background", "off-center face", "centered face")
    assert read_set(lower).classes[:4] == ("accordion", "airplane", "anchor", "ant")


PUBLISHED = {  # as EVA-CLIP calls them -> CLIP_benchmark's name, the convention of CLIP's paper, how many prompts
    "ImageNet-1K": ("imagenet1k", "top-1", 80),
    "ImageNet-A": ("imagenet-a", "top-1", 80),
    "ImageNet-R": ("imagenet-r", "top-1", 80),
    "ImageNet-Sketch": ("imagenet_sketch", "top-1", 80),
    "ImageNet-V2": ("imagenetv2", "top-1", 80),
    "ObjectNet": ("objectnet", "top-1", 80),
    "SUN397": ("sun397", "top-1", 2),
    "VOC2007": ("voc2007", "top-1", 1),
    "Birdsnap": ("birdsnap", "top-1", 80),
    "Caltech-101": ("caltech101", "mean per class", 34),
    "Stanford Cars": ("cars", "top-1", 8),
    "CIFAR-10": ("cifar10", "top-1", 18),
    "CIFAR-100": ("cifar100", "top-1", 18),
    "Country211": ("country211", "top-1", 5),
    "DTD": ("dtd", "top-1", 8),
    "EuroSAT": ("eurosat", "top-1", 3),
    "FER2013": ("fer2013", "top-1", 6),
    "FGVC-Aircraft": ("fgvc_aircraft", "mean per class", 2),
    "Flowers-102": ("flowers", "mean per class", 1),
    "Food-101": ("food101", "top-1", 1),
    "GTSRB": ("gtsrb", "top-1", 3),
    "MNIST": ("mnist", "top-1", 1),
    "Oxford-IIIT-Pet": ("pets", "mean per class", 1),
    "STL-10": ("stl10", "top-1", 2),
    "RESISC45": ("resisc45", "top-1", 4),
    "PatchCamelyon": ("pcam", "top-1", 2),
    "Rendered SST2": ("renderedsst2", "top-1", 1),
}


@pytest.mark.parametrize("published", PUBLISHED)
def test_the_27_sets_are_known_with_their_prompts_and_conventions(tmp_path, published):
    name, score, prompts = PUBLISHED[published]
    found = read_set(write_folders(tmp_path / published, ("one", "two"), 1))
    assert found.name == name == canonical_name(f"wds_{name}") == canonical_name(f"wds_vtab-{name}")
    assert CLASSIFICATION_SETS[name].score == score and len(found.templates) == prompts
    assert all("{c}" in template for template in found.templates)


def test_the_lists_hold_27_and_six_sets_and_no_name_means_two():
    assert list(CLASSIFICATION_SETS) == [name for name, *_ in PUBLISHED.values()] and len(CLASSIFICATION_SETS) == 27
    known = {name: len(names) for name in CLASSIFICATION_SETS if (names := _known("classnames", name))}
    assert len(known) == 10 and known == {
        name: CLASSIFICATION_SETS[name].classes + (name == "caltech101") for name in known
    }
    assert len(set(CLUSTERED)) == 6 and set(CLUSTERED) <= set(CLASSIFICATION_SETS)
    names = [alias for own in CLASSIFICATION_SETS.values() for alias in own.aliases]
    assert len(set(names)) == len(names) and {canonical_name(alias) for alias in names} <= set(CLASSIFICATION_SETS)
    assert [canonical_name(name) for name in ("oxford_pets", "flowers102", "aircraft", "caltech-101", "My Cats")] == [
        "pets", "flowers", "fgvc_aircraft", "caltech101", "my cats",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["wds_voc2007_multilabel", "wds_voc2007", "VOC2007"])
def test_several_classes_an_image_are_refused_with_what_is_scored_instead(tmp_path, name):
    if name == "VOC2007":
        (tmp_path / name / "VOCdevkit" / "VOC2007" / "JPEGImages").mkdir(parents=True)
    else:
        write_tar(tmp_path / name / "test" / "0.tar", {"a.png": png(0), "a.npy": b"x"})
    with pytest.raises(ValueError, match=r"several classes for one image.*the single-label version is scored"):
        read_set(tmp_path / name)


# --- tars -------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_tars_is_told_at_once(tmp_path):
    root = tmp_path / "mine"
    members = {"a.png": png(0), "a.cls": b"one", "b.png": png(1), "c.png": png(2), "c.cls": b"-1", "d.cls": b"0"}
    write_tar(root / "test" / "0.tar", members)
    write_tar(root / "test" / "1.tar", {"e.png": png(0), "e.txt": b"\xff\xfe"})
    write_tar(root / "test" / "2.tar", {"f.png": png(0), "f.cls": b"1"})
    whole = (root / "test" / "2.tar").read_bytes()
    (root / "test" / "2.tar").write_bytes(whole[:700])
    (root / "test" / "3.tar").write_bytes(b"no tar")
    (root / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError) as error:
        read_set(root)
    said = str(error.value)
    for words in ("a.cls: b'one'; expected the number of a class", "b: expected an image and .cls", "c.cls: b'-1'",
                  "d: expected an image", "e.txt: not UTF-8", "2.tar: ReadError", "3.tar: ReadError"):  # fmt: skip
        assert words in said, words
    assert said.count("\n- ") == 7


@pytest.mark.parametrize("file", ["classnames.txt", "zeroshot_classification_templates.txt"])
def test_names_and_prompts_that_are_not_utf8_are_named(tmp_path, file):
    root = write_folders(tmp_path / "set")
    (root / file).write_bytes("Bär\nHund\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{file}: not UTF-8"):
        read_set(root)


def test_captions_are_told_by_the_members_and_not_by_the_name(tmp_path):
    write_tar(tmp_path / "mine" / "test" / "0.tar", {"a.jpg": png(0), "a.txt": b"one"})
    write_tar(tmp_path / "wds_flickr30k" / "test" / "0.tar", {"a.jpg": png(0), "a.cls": b"0"})
    write_folders(tmp_path / "coco")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.tar").write_bytes(b"no tar")
    found = {name: has_captions(tmp_path / name) for name in ("mine", "wds_flickr30k", "coco", "broken")}
    assert found == {"mine": True, "wds_flickr30k": False, "coco": False, "broken": None}


def test_a_folder_of_classes_or_splits_is_a_set_and_a_folder_of_sets_is_none(tmp_path):
    assert is_set(write_folders(tmp_path / "flat" / "animals")) and not is_set(tmp_path / "flat")
    assert is_set(write_folders(tmp_path / "deep" / "things", split="val")) and not is_set(tmp_path)
    write_tar(tmp_path / "tars" / "mine" / "0.tar", {"a.jpg": png(0), "a.txt": b"one"})
    assert not is_set(tmp_path / "tars")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"x"}, "expected an image and .cls or .txt"),
        ({"a.png": b"x", "a.cls": b"3"}, "classes up to number 3, but 2 class names"),
        ({"a.png": b"x", "a.cls": b"1", "b.png": b"y", "b.txt": b"c"}, "some images have a class"),
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
    with pytest.raises(ValueError, match="no image in this class"):
        read_set(tmp_path / "set")


def test_clip_benchmarks_prefixes_are_dropped():
    assert [canonical_name(name) for name in ("wds_cars", "wds_vtab-pets", "CIFAR10")] == ["cars", "pets", "cifar10"]


# --- features ---------------------------------------------------------------------------------------------------


def places(root, sizes=((32, 32), (48, 40), (32, 64))):
    for i, size in enumerate(sizes):
        pixels(i, size).save(root / f"{i}.png")
    return [Place(str(root / f"{i}.png")) for i in range(len(sizes))]


def test_features_of_files_are_those_of_images_in_memory(tmp_path, encoder):
    found = places(tmp_path, [(32, 32)] * 5)
    images = torch.stack([torch.from_numpy(np.array(pixels(i))).permute(2, 0, 1) for i in range(5)])
    torch.testing.assert_close(FeatureStore(encoder, None, batch=2)(found), embed(encoder, images), atol=1e-6, rtol=0)


def test_images_are_prepared_as_open_clips_own_transform_does(tmp_path, encoder):
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


def test_images_go_through_the_model_in_batches_of_their_own_size(tmp_path, encoder, monkeypatch):
    found, sizes, whole = places(tmp_path, [(32, 32)] * 7), [], encoder.features
    expected = FeatureStore(encoder, None)(found)
    monkeypatch.setattr(features, "LOADED", 2)
    monkeypatch.setattr(encoder, "features", lambda images: sizes.append(len(images)) or whole(images))
    torch.testing.assert_close(FeatureStore(encoder, None, batch=4)(found), expected, atol=1e-6, rtol=0)
    assert sizes == [4, 3]


def test_precision_is_float32_on_a_cpu_unless_asked(encoder):
    assert FeatureStore(encoder, None, "auto").precision == FeatureStore(encoder, None).precision == "no"
    assert FeatureStore(encoder, None, "bf16").precision == "bf16" and FeatureStore(encoder, None).batch == 256
    with pytest.raises(ValueError, match="unknown precision 'half'; expected one of auto, no, bf16"):
        FeatureStore(encoder, None, "half")


@pytest.mark.cuda
def test_on_a_gpu_precision_is_bf16_and_the_first_batch_is_2048(tmp_path, encoder):
    store = FeatureStore(load_encoder("tiny", "cuda"), None, "auto")
    assert store.precision == "bf16" and store.batch == 2048
    found = places(tmp_path)
    torch.testing.assert_close(store(found), FeatureStore(encoder, None)(found), atol=0.05, rtol=0)


def test_workers_change_nothing(tmp_path, encoder):
    found = places(tmp_path)
    assert torch.equal(FeatureStore(encoder, None, workers=1)(found), FeatureStore(encoder, None)(found))


def test_features_are_found_again_by_content_alone(tmp_path, encoder):
    (tmp_path / "a").mkdir()
    found, cache = places(tmp_path / "a"), tmp_path / "cache"
    first = FeatureStore(encoder, cache)
    kept = first(found)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = [Place(place.path.replace("/a/", "/b/")) for place in found]
    again = FeatureStore(load_encoder("tiny"), cache)
    assert torch.equal(again(moved), kept) and again.images == 0 and first.images == 3
    pixels(77).save(moved[0].path)
    assert not torch.equal(again(moved)[0], kept[0]) and again.images == 3
    other = load_encoder("tiny")
    with torch.no_grad():
        other.model.visual.conv1.weight.add_(1e-3)
    assert FeatureStore(other, cache).fingerprint != again.fingerprint
    assert FeatureStore(encoder, cache, "bf16").fingerprint != again.fingerprint
    assert content_hash(moved) != content_hash(moved[::-1])


def test_divas_feature_is_class_and_mean_of_patches(tmp_path, encoder):
    found = places(tmp_path, [(32, 32)])
    image = torch.from_numpy(np.array(pixels(0))).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        tokens = encoder.features(image)
        expected = torch.nn.functional.normalize(tokens.embedding + tokens.patches.mean(1), dim=-1)
    torch.testing.assert_close(FeatureStore(encoder, None)(found, "class+patches"), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=", ".join(FEATURES).replace("+", r"\+")):
        FeatureStore(encoder, None)(found, "patches")


def test_tokens_are_brought_to_unit_length_before_they_are_added(tmp_path, encoder):
    found = places(tmp_path, [(32, 32)])
    image = torch.from_numpy(np.array(pixels(0))).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        tokens = encoder.features(image)
    unit = tokens.embedding / tokens.embedding.norm(), tokens.patches / tokens.patches.norm(dim=-1, keepdim=True)
    expected = torch.nn.functional.normalize(unit[0] + unit[1].mean(1), dim=-1)
    torch.testing.assert_close(FeatureStore(encoder, None)(found, "class+unit-patches"), expected, atol=1e-6, rtol=0)
    assert (FeatureStore(encoder, None)(found, "class+patches") - expected).abs().max() > 1e-3


def test_drawn_patches_follow_from_seed_and_draw_and_not_from_the_batch(tmp_path, encoder):
    found = places(tmp_path, [(32, 32)] * 5)
    cached = FeatureStore(encoder, tmp_path / "cache", batch=2)
    kind, draws = "class+76patches", {}
    for seed, draw in ((0, 0), (0, 1), (0, 19), (1, 0)):
        draws[seed, draw] = FeatureStore(encoder, None)(found, kind, seed, draw)
        torch.testing.assert_close(cached(found, kind, seed, draw), draws[seed, draw], atol=1e-6, rtol=0)
    assert cached.images == 2 * 5  # once for a seed
    flat = torch.stack(list(draws.values())).flatten(1)
    assert (torch.cdist(flat, flat) + torch.eye(4) > 1e-3).all()


def test_drawn_patches_are_76_with_replacement_for_each_image(tmp_path, encoder, monkeypatch):
    found = places(tmp_path, [(32, 32)] * 2)
    whole = encoder.features

    def counted(images):  # the same tokens for both images: 16 axes of the embedding's space
        tokens = whole(images)
        patches = torch.eye(tokens.patches.shape[1], tokens.embedding.shape[1]).expand(len(images), -1, -1)
        return Features(torch.zeros_like(tokens.embedding), patches)

    monkeypatch.setattr(encoder, "features", counted)
    counts = FeatureStore(encoder, None)(found, "class+76patches")
    counts = 76 * counts / counts.sum(1, keepdim=True)
    torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
    assert (counts > 1.5).any() and not torch.equal(counts[0], counts[1])


def test_all_unreadable_images_are_named_at_once_and_nothing_is_kept(tmp_path, encoder):
    found = places(tmp_path)
    for i in (0, 2):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)2 of 3 images.*0\.png.*2\.png"):
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


# --- files as people have them ----------------------------------------------------------------------------------


def test_clutter_is_no_class_no_tar_and_no_image(tmp_path):
    root = write_folders(tmp_path / "data" / "animals")
    for folder in (".ipynb_checkpoints", "__MACOSX", "dog/.ipynb_checkpoints", "dog/__MACOSX"):
        (root / folder).mkdir()
        (root / folder / "0.png").write_bytes(png(0))
    (root / "dog" / "._0.png").write_bytes(b"resource fork")
    (root / "dog" / "0.gif").write_bytes(b"")
    assert is_set(root) and read_set(root).classes == ("big cat", "dog") and len(read_set(root)) == 6
    listed = {Path(name).relative_to(root / "dog").as_posix() for name, _ in read_set(root).left_out}
    assert listed == {".ipynb_checkpoints", "__MACOSX", "._0.png", "0.gif"}
    write_tar(tmp_path / "mine" / "test" / "0.tar", {"._a.png": b"x", "a.png": png(0), "a.txt": b"one", "._a.txt": b""})
    (tmp_path / "mine" / "test" / "._0.tar").write_bytes(b"resource fork")
    found = read_set(tmp_path / "mine")
    assert len(found) == 1 and [reason for _, reason in found.left_out] == ["hidden"]
    write_folders(tmp_path / "data" / "__MACOSX" / "animals")
    assert benchmark_folders(tmp_path / "data", "zero-shot") == [root]


def test_what_is_left_out_of_a_set_is_printed_once(tmp_path, capsys, encoder):
    root = write_folders(tmp_path / "animals")
    (root / "dog" / "0.tiff").write_bytes(b"")
    for _ in range(2):
        Task(encoder, FeatureStore(encoder, None), root).read()
    assert capsys.readouterr().out.splitlines() == [
        f"{root}: 1 left out, the first: {root / 'dog' / '0.tiff'}: expected one of .jpg, .jpeg, .png, .webp, .bmp"
    ]


def test_linked_class_folders_and_links_within_them_are_followed(tmp_path):
    store = write_folders(tmp_path / "store", ("one", "two", "more"))
    root = tmp_path / "animals"
    root.mkdir()
    for name in ("one", "two"):
        (root / name).symlink_to(store / name)
    (store / "one" / "deep").symlink_to(store / "more")
    assert read_set(root).labels.tolist() == [0] * 6 + [1] * 3


def test_dots_in_names_masks_and_repeated_names_of_tars(tmp_path):
    tar = tmp_path / "mine" / "0.tar"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "classnames.txt").write_text("a\nb\n")
    names = [f"IMG_2019.01.{k:02}" for k in range(10)]
    members = {f"{name}.{end}": data for k, name in enumerate(names)
               for end, data in (("jpg", png(k)), ("cls", b"%d" % (k % 2)))}  # fmt: skip
    write_tar(tar, members)
    found = read_set(tmp_path / "mine")
    assert found.labels.tolist() == 5 * [0, 1] and [place.read() for place in found.places] == [
        png(k) for k in range(10)
    ]
    write_tar(tar, {"0.seg.png": png(0), "0.png": png(1), "0.jpg": png(2), "0.cls": b"1"})
    found = read_set(tmp_path / "mine")
    assert [place.read() for place in found.places] == [png(2)]
    assert {name for name, _ in found.left_out} == {f"{tar}: 0.seg.png", f"{tar}: 0.png"}
    write_tar(tar, members)
    tar.write_bytes(tar.read_bytes() + tar.read_bytes())
    with pytest.raises(ValueError, match=r"0\.tar: its end: .* what follows is not read"):
        read_set(tmp_path / "mine")
    with tarfile.open(tar, "w") as file:
        for name in ("0.cls", "1.cls", "0.jpg", "1.jpg", "0.jpg"):
            file.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match=r"0: stands twice in this tar"):
        read_set(tmp_path / "mine")


@pytest.mark.parametrize("text", ["tench\ngoldfish\n\n", "\ufefftench\r\ngoldfish\r\n \r\n", "tench \n goldfish"])
def test_empty_lines_at_the_end_of_class_names_are_no_class(tmp_path, text):
    root = write_folders(tmp_path / "n", ("n01", "n02"))
    (root / "classnames.txt").write_bytes(text.encode())
    assert read_set(root).classes == ("tench", "goldfish")


@pytest.mark.parametrize(("text", "line"), [("tench\n\ngoldfish\n", 2), ("\ntench\ngoldfish", 1), ("", 1), (" \n", 1)])
def test_an_empty_line_among_class_names_is_refused(tmp_path, text, line):
    root = write_folders(tmp_path / "n", ("n01", "n02"))
    (root / "classnames.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"classnames.txt: line {line} is empty"):
        read_set(root)


def test_pipes_and_compressed_tars_are_refused_and_deep_grey_is_scaled(tmp_path, encoder):
    root = write_folders(tmp_path / "animals")
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(root / "deep.png")
    assert (decode_image(Place(str(root / "deep.png")), np.asarray)[..., 0] == deep >> 8).all()
    os.mkfifo(root / "dog" / "pipe.jpg")
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(ValueError, match=r"pipe\.jpg: not a regular file"):
            FeatureStore(encoder, cache)(read_set(root).places)
    (tmp_path / "mine" / "test").mkdir(parents=True)
    os.mkfifo(tmp_path / "mine" / "test" / "0.tar")
    (tmp_path / "mine" / "test" / "1.tar").write_bytes(gzip.compress(bytes(10_000)))
    assert has_captions(tmp_path / "mine") is None
    with pytest.raises(ValueError, match=r"(?s)0\.tar: not a regular file.*1\.tar: compressed \(gzip\)"):
        read_set(tmp_path / "mine")
