"""Zero-shot classification: the class whose name is nearest to the image."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diva_lab.evaluation.image_sets import CLASSIFICATION_SETS
from diva_lab.evaluation.task import Task, benchmark, labelled, score_row
from diva_lab.statistics import bootstrap_mean, wilson

TEMPLATES = ("a photo of a {}",)


@torch.no_grad()
def class_embeddings(encoder, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Float[Tensor, "c d"]:
    """Unit vectors [C, D], one a class: the mean over `templates` of the unit text embeddings, made unit again."""
    texts = [template.format(name) for name in names for template in templates]
    embeddings = encoder.encode_text(texts).float().cpu()  # [C * templates, D]
    return F.normalize(embeddings.unflatten(0, (len(names), len(templates))).mean(dim=1), dim=-1)


def zeroshot_accuracy(
    encoder,
    embeddings: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> float:
    """Top-1 accuracy in [0, 1] of images' `embeddings` [n, D] with classes `labels` [n], indices into `names`."""
    logits = embeddings @ class_embeddings(encoder, names, templates).T  # [n, C]
    return (logits.argmax(dim=1) == labels).float().mean().item()


@benchmark(heeds=("max_images",))
def zero_shot(task: Task) -> Iterator[dict]:
    """Top-1, top-5, the mean of the classes' accuracies, and `score`: whichever of them is the set's convention."""
    found, embeddings = labelled(task)
    prompts = [template.replace("{c}", "{}") for template in found.templates]
    logits = embeddings @ class_embeddings(task.encoder, found.classes, prompts).T
    labels, n, c = torch.from_numpy(found.labels), len(found), len(found.classes)
    right = (logits.argmax(1) == labels).numpy()
    top1 = score_row("top-1", float(right.mean()), n, *wilson(int(right.sum()), n), 1 / c)
    groups = [right[found.labels == k].astype(float) for k in np.unique(found.labels)]
    mean = float(np.mean([group.mean() for group in groups]))
    per_class = score_row("mean per class", mean, n, *bootstrap_mean(groups, seed=task.seed), 1 / c)
    yield top1
    yield per_class
    if c > 5:
        five = (logits.topk(5, dim=1).indices == labels[:, None]).any(1).sum().item()
        yield score_row("top-5", five / n, n, *wilson(five, n), 5 / c)
    by_class = found.name in CLASSIFICATION_SETS and CLASSIFICATION_SETS[found.name].score == "mean per class"
    yield (per_class if by_class else top1) | {"metric": "score"}
