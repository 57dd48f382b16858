"""Zero-shot classification: the class whose name is nearest to the picture."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

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
