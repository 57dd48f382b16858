from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from diva_lab.evaluation.clustering import (
    agreement,
    agreement_by_chance,
    agreement_intervals,
    cluster_scores,
    matched_accuracy,
)


def blobs(spread, classes=4, each=40, dim=8):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    centres = torch.eye(classes, dim)[labels]
    return centres + spread * torch.randn(len(labels), dim, generator=generator), labels.numpy()


def test_classes_that_lie_apart_score_one():
    assert cluster_scores(*blobs(0.02)) == pytest.approx({"nmi": 1, "acc": 1, "ari": 1})


def test_labels_that_have_nothing_to_do_with_the_points_score_chance():
    points, labels = blobs(0.3, each=300)
    scores = cluster_scores(points, np.random.default_rng(0).permutation(labels))
    assert scores["nmi"] < 0.01 and abs(scores["ari"]) < 0.01 and 0.25 <= scores["acc"] < 0.3


def test_scores_agree_with_sklearn_on_the_same_clusters():
    from sklearn.cluster import KMeans

    points, labels = blobs(0.5)
    unit = points / points.norm(dim=1, keepdim=True)
    clusters = KMeans(4, n_init=5, random_state=3).fit_predict(unit.numpy())
    scores = cluster_scores(points, labels, seed=3)
    assert scores["nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters))
    assert scores["ari"] == pytest.approx(adjusted_rand_score(labels, clusters))
    assert scores["acc"] == pytest.approx(matched_accuracy(labels, clusters))


def test_scores_do_not_depend_on_the_length_of_the_embeddings():
    points, labels = blobs(0.4)
    lengths = 2.0 ** torch.randint(-3, 4, (len(points), 1), generator=torch.Generator().manual_seed(1))
    assert cluster_scores(points * lengths, labels) == pytest.approx(cluster_scores(points, labels))


def test_scores_are_fixed_by_the_seed():
    points, labels = blobs(0.6)
    assert cluster_scores(points, labels, seed=5) == cluster_scores(points, labels, seed=5)


def test_acc_is_unchanged_by_permuting_the_clusters_and_is_the_best_over_all_matchings():
    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(4, size=60), rng.integers(4, size=60)
    renamed = [np.array(order)[clusters] for order in permutations(range(4))]
    assert {matched_accuracy(labels, other) for other in renamed} == {matched_accuracy(labels, clusters)}
    assert matched_accuracy(labels, clusters) == max((labels == other).mean() for other in renamed)


def test_acc_counts_what_is_left_unmatched_as_wrong():
    labels = np.array([0, 0, 0, 0, 1, 1])
    assert matched_accuracy(labels, np.array([0, 0, 1, 1, 2, 2])) == pytest.approx(4 / 6)
    assert matched_accuracy(labels, np.zeros(6, int)) == pytest.approx(4 / 6)


def test_agreement_by_hand():
    found = agreement(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))  # a table of 1 1 / 0 2
    mutual = 0.25 * np.log(0.25 / (0.5 * 0.25)) + 0.25 * np.log(0.25 / (0.5 * 0.75)) + 0.5 * np.log(0.5 / (0.5 * 0.75))
    entropies = np.log(2), -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert found["nmi"] == pytest.approx(mutual / np.mean(entropies)) and found["acc"] == 0.75
    assert found["ari"] == pytest.approx((1 - 2 * 3 / 6) / ((2 + 3) / 2 - 2 * 3 / 6))  # 1 of 6 pairs agree: chance


def test_intervals_hold_the_score_and_narrow_with_more_images():
    rng, widths = np.random.default_rng(0), []
    for n in (60, 960):
        labels = rng.integers(3, size=n)
        clusters = np.where(rng.random(n) < 0.6, labels, rng.integers(3, size=n))
        found, intervals = agreement(labels, clusters), agreement_intervals(labels, clusters)
        assert all(low < found[name] < high for name, (low, high) in intervals.items())
        widths.append({name: high - low for name, (low, high) in intervals.items()})
    assert all(widths[1][name] < 0.5 * widths[0][name] for name in ("nmi", "acc", "ari"))


def test_an_interval_of_acc_nears_the_binomials():
    labels = np.repeat([0, 1], 400)
    clusters = np.where(np.arange(800) % 5 == 0, 1 - labels, labels)  # ACC .8
    low, high = agreement_intervals(labels, clusters, draws=400)["acc"]
    assert (low, high) == pytest.approx((0.8 - 1.96 * 0.4 / 800**0.5, 0.8 + 1.96 * 0.4 / 800**0.5), abs=0.01)


def test_clusters_that_have_nothing_to_do_with_the_classes_are_not_above_their_chance():
    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(4, size=80), rng.integers(4, size=80)
    chance, intervals = agreement_by_chance(labels, clusters), agreement_intervals(labels, clusters)
    assert chance["ari"] == 0 and 0 < chance["nmi"] < 0.15 and 0.25 < chance["acc"] < 0.45
    assert all(intervals[name][0] <= chance[name] for name in chance)
    perfect = agreement_intervals(labels, labels)
    assert all(perfect[name][0] > 0.9 > chance[name] for name in chance)
