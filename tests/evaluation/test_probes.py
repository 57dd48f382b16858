import numpy as np
import pytest
import torch

from diva_lab.evaluation.probes import linear_probes


@pytest.fixture
def data():
    """600 images in 8-d: "sign" is the first coordinate's, "third" hides in a faint direction, "noise" is nowhere."""
    rng = np.random.default_rng(0)
    labels = {"sign": rng.integers(2, size=600), "third": rng.integers(3, size=600), "noise": rng.integers(2, size=600)}
    points = rng.normal(size=(600, 8))
    points[:, 0] = 4.0 * labels["sign"] + 0.1 * points[:, 0]
    points[:, 1:4] = 0.001 * (np.eye(3)[labels["third"]] + 0.1 * points[:, 1:4])
    return torch.from_numpy(points).float(), labels


def split(data, n=300):
    points, labels = data
    return (
        points[:n], {name: values[:n] for name, values in labels.items()},
        points[n:], {name: values[n:] for name, values in labels.items()},
    )  # fmt: skip


def test_what_is_linearly_there_is_read_and_what_is_not_stays_at_chance(data):
    accuracies = linear_probes(*split(data))
    assert accuracies["sign"] == 1 and accuracies["third"] > 0.99
    assert accuracies["noise"] == pytest.approx(0.5, abs=0.1)


def test_probes_are_unchanged_by_scaling_and_shifting_each_feature(data):
    train, train_labels, test, test_labels = split(data)
    scale, shift = torch.logspace(-2, 2, 8), torch.linspace(-3, 3, 8)
    moved = linear_probes(train * scale + shift, train_labels, test * scale + shift, test_labels)
    assert moved == pytest.approx(linear_probes(train, train_labels, test, test_labels), abs=0.01)


def test_probes_see_nothing_of_the_test_set(data):
    train, train_labels, test, test_labels = split(data)
    twice = {name: np.repeat(values[:1], 2) for name, values in test_labels.items()}
    one = linear_probes(train, train_labels, torch.cat([test[:1], test[:1]]), twice)
    both = linear_probes(train, train_labels, torch.cat([test[:1], 1e3 + test[1:2]]), twice)
    assert all(accuracy in (0, 1) for accuracy in one.values())
    assert all(both[name] in (accuracy / 2, (accuracy + 1) / 2) for name, accuracy in one.items())


def test_structured_scenes_serve_as_labels(data):
    points, labels = data
    scenes = np.zeros(600, [("sign", "i1")])
    scenes["sign"] = labels["sign"]
    assert linear_probes(points, {"sign": scenes["sign"]}, points, {"sign": scenes["sign"]}) == {"sign": 1.0}
