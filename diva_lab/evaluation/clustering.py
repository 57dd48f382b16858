"""Zero-shot clustering: do the classes fall apart by themselves? k-means on unit embeddings; NMI, ACC, ARI."""

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor


def matched_accuracy(labels: Int[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]) -> float:
    """ACC: the share of images on whose class their cluster agrees, under the best one-to-one matching of the two.

    The matching is Hungarian (Kuhn 1955); classes and clusters may differ in number, those left over count as wrong.
    """
    table = contingency_matrix(labels, clusters)  # [classes, clusters]
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels))


def cluster_scores(
    embeddings: Float[Tensor, "n d"], labels: Int[np.ndarray, " n"], seed: int = 0, restarts: int = 5
) -> dict[str, float]:
    """{"nmi", "acc", "ari"} of k-means with as many clusters as there are classes, the best of `restarts` by inertia.

    NMI is normalised by the arithmetic mean of the entropies; NMI and ACC lie in [0, 1], ARI in [-.5, 1] with 0 for
    chance. `labels` are never shown to k-means, but for how many there are.
    """
    points = F.normalize(embeddings, dim=-1).numpy()
    clusters = KMeans(len(np.unique(labels)), n_init=restarts, random_state=seed).fit_predict(points)
    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "acc": matched_accuracy(labels, clusters),
        "ari": float(adjusted_rand_score(labels, clusters)),
    }
