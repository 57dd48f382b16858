"""InfoNCE between the embeddings of two views, and its naive sum with the reconstruction loss."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diva_lab.objectives.diva import diva
from diva_lab.objectives.step import Step, needs_other_images


def info_nce(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], tau: float = 0.1) -> Float[Tensor, " b"]:
    """InfoNCE between two views of a batch, both ways, cosine similarity over tau, log-sum-exp in float32."""
    a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
    scores = (a[:, None] * b).sum(2) / tau  # [b, b]; a matrix product would be in bf16 under autocast
    own = scores.diagonal()
    return (scores.logsumexp(1) + scores.logsumexp(0)) / 2 - own


@needs_other_images
def contrastive(step: Step) -> dict[str, Tensor]:
    """InfoNCE between the embeddings of two augmented views of each picture."""
    one, two = (step.encode(step.augment(step.images)).embedding for _ in range(2))
    return {"con": step.settings.lambda_con * info_nce(one, two, step.settings.tau)}


@needs_other_images
def naive(step: Step) -> dict[str, Tensor]:
    """The naive sum lambda_con L_con + lambda_rec L_rec, whose gradients are said to fight."""
    return contrastive(step) | diva(step)
