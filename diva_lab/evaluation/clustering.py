"""Zero-shot clustering: do the classes fall apart by themselves? k-means on unit embeddings; NMI, ACC, ARI."""

from collections.abc import Iterator

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from diva_lab.evaluation.task import Task, benchmark, labelled, score_row


def matched_accuracy(labels: Int[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]) -> float:
    """ACC: the share of images on whose class their cluster agrees, under the best one-to-one matching of the two.

    The matching is Hungarian (Kuhn 1955); classes and clusters may differ in number, those left over count as wrong.
    """
    table = contingency_matrix(labels, clusters)  # [classes, clusters]
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels))


def find_clusters(
    embeddings: Float[Tensor, "n d"], classes: int, seed: int = 0, restarts: int = 5
) -> Int[np.ndarray, " n"]:
    """k-means on unit embeddings with as many clusters as `classes`, the best of `restarts` by inertia."""
    points = F.normalize(embeddings, dim=-1).numpy()
    return KMeans(classes, n_init=restarts, random_state=seed).fit_predict(points)


def agreement(labels: Int[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]) -> dict[str, float]:
    """{"nmi", "acc", "ari"} of clusters with classes; see `cluster_scores`."""
    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "acc": matched_accuracy(labels, clusters),
        "ari": float(adjusted_rand_score(labels, clusters)),
    }


def cluster_scores(
    embeddings: Float[Tensor, "n d"], labels: Int[np.ndarray, " n"], seed: int = 0, restarts: int = 5
) -> dict[str, float]:
    """{"nmi", "acc", "ari"} of k-means with as many clusters as there are classes, the best of `restarts` by inertia.

    NMI is normalised by the arithmetic mean of the entropies; NMI and ACC lie in [0, 1], ARI in [-.5, 1] with 0 for
    chance. `labels` are never shown to k-means, but for how many there are.
    """
    return agreement(labels, find_clusters(embeddings, len(np.unique(labels)), seed, restarts))


def agreement_by_chance(
    labels: Int[np.ndarray, " n"], clusters: Int[np.ndarray, " n"], seed: int = 0, draws: int = 20
) -> dict[str, float]:
    """What clusters of these sizes score with no bearing on the classes: the mean over shuffles; for ARI that is 0."""
    rng = np.random.default_rng(seed)
    shuffled = [agreement(rng.permutation(labels), clusters) for _ in range(draws)]
    return {name: float(np.mean([found[name] for found in shuffled])) for name in ("nmi", "acc")} | {"ari": 0.0}


def agreement_intervals(
    labels: Int[np.ndarray, " n"],
    clusters: Int[np.ndarray, " n"],
    level: float = 0.95,
    seed: int = 0,
    draws: int = 200,
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals (low, high) of `agreement` over the images, the clusters as they are.

    A resample holds some images twice, which raises NMI and ACC: the draws are shifted so that their mean is the
    score itself, and cut at its range. What other starts of k-means would change is not in the interval.
    """
    rng, found = np.random.default_rng(seed), agreement(labels, clusters)
    chosen = (rng.integers(len(labels), size=len(labels)) for _ in range(draws))
    drawn = [agreement(labels[rows], clusters[rows]) for rows in chosen]
    intervals = {}
    for name, value in found.items():
        values = np.array([draw[name] for draw in drawn])
        low, high = np.quantile(values - values.mean() + value, [(1 - level) / 2, (1 + level) / 2])
        low, high = max(low, -0.5 if name == "ari" else 0), min(high, 1)
        intervals[name] = (float(min(low, value)), float(max(high, value)))
    return intervals


@benchmark(heeds=("max_images",))
def cluster_benchmark(task: Task) -> Iterator[dict]:
    """k-means with as many clusters as classes: NMI, ACC, ARI."""
    found, embeddings = labelled(task)
    clusters = find_clusters(embeddings, len(np.unique(found.labels)), task.seed)
    intervals = agreement_intervals(found.labels, clusters, seed=task.seed)
    chances = agreement_by_chance(found.labels, clusters, task.seed)
    for name, value in agreement(found.labels, clusters).items():
        yield score_row(name, value, len(found), *intervals[name], chances[name])
