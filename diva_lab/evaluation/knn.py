"""k-nearest neighbours on frozen features: what is near, without a text and without training."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diva_lab.evaluation.task import Task, benchmark, labelled, score_row
from diva_lab.statistics import wilson


def knn_accuracy(
    train: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    test_labels: Int[Tensor, " m"],
    k: int = 20,
    tau: float = 0.07,
) -> float:
    """Top-1 accuracy in [0, 1] of a vote of the `k` nearest by cosine, weighted by exp(s / tau) (Wu et al. 2018).

    Args:
        train, test: unit vectors.
        train_labels, test_labels: classes from 0 on.

    Raises:
        ValueError: where there are fewer than `k` to choose from.
    """
    if len(train) < k:
        raise ValueError(f"k={k} nearest of {len(train)} images; expected at least k")
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    right = 0
    for features, labels in zip(test.split(1024), test_labels.split(1024), strict=True):
        near, index = (features @ train.T).topk(k, dim=1)  # [part, k]
        votes = torch.zeros(len(features), classes)
        votes.scatter_add_(1, train_labels[index], ((near - 1) / tau).exp())  # s - 1: no overflow, the same order
        right += (votes.argmax(1) == labels).sum().item()
    return right / len(test)


@benchmark(heeds=("max_images",))
def knn_benchmark(task: Task) -> Iterator[dict]:
    """The vote of the nearest images of the train split."""
    (known, train), (found, test) = labelled(task, "train"), labelled(task)
    accuracy = knn_accuracy(train, torch.from_numpy(known.labels), test, torch.from_numpy(found.labels))
    n = len(found)
    yield score_row("top-1", accuracy, n, *wilson(round(accuracy * n), n), 1 / len(found.classes))
