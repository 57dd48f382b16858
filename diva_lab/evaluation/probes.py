"""Linear probes: is a detail still in the embedding, though no text reaches it?

A pair can be lost for two reasons: the image's embedding lacks the detail, or it has it where the text does not
look. The probe tells them apart: it reads the embedding with a regression of its own.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from diva_lab.evaluation.task import Task, benchmark, labelled, score_row
from diva_lab.statistics import wilson

SMALL = 1 << 22  # numbers in a training set, below which two BLAS threads are 15 times slower than one


def linear_probes(
    train: Float[Tensor, "n d"],
    train_labels: Mapping[str, np.ndarray],
    test: Float[Tensor, "m d"],
    test_labels: Mapping[str, np.ndarray],
    strength: float = 0.1,
) -> dict[str, float]:
    """Test accuracy in [0, 1] of one multinomial logistic regression for each detail in `train_labels`.

    Args:
        train, test: frozen embeddings [n, D] and [m, D]; each feature is standardised by the training images.
        train_labels, test_labels: detail -> its value for each image, as integers [n] and [m].
        strength: sklearn's C, the inverse of the L2 penalty.
    """
    return {
        detail: float(fit_probe(train, labels, strength).score(test.numpy(), test_labels[detail]))
        for detail, labels in train_labels.items()
    }


def fit_probe(train: Float[Tensor, "n d"], labels: np.ndarray, strength: float = 0.1) -> Pipeline:
    """The fitted regression of one detail."""
    with threadpool_limits(1 if train.numel() < SMALL else None):
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300)).fit(train.numpy(), labels)


@benchmark(heeds=("max_images",))
def linear_probe(task: Task) -> Iterator[dict]:
    """Logistic regression on the train split's features."""
    (known, train), (found, test) = labelled(task, "train"), labelled(task)
    accuracy = linear_probes(train, {"class": known.labels}, test, {"class": found.labels})["class"]
    n = len(found)
    yield score_row("top-1", accuracy, n, *wilson(round(accuracy * n), n), 1 / len(found.classes))
