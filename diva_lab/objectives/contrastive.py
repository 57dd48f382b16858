"""InfoNCE between two views' embeddings, its naive sum with the reconstruction loss, and CLIP's own on captions."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diva_lab.objectives.diva import diva
from diva_lab.objectives.step import Step, needs_other_images, reads_captions


def info_nce(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], tau: float = 0.1) -> Float[Tensor, " b"]:
    """Symmetric InfoNCE between two views a and b of each image of a batch, one value per image.

    With s the cosine, L_i = 1/2 log sum_j exp((s(a_i, b_j) - s(a_i, b_i)) / tau)
    + 1/2 log sum_j exp((s(a_j, b_i) - s(a_i, b_i)) / tau). It is computed in float32.
    """
    a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)  # [b, d]
    scores = (a[:, None] * b).sum(2) / tau  # [b, b]; a matrix product would run in bf16 under autocast
    positives = scores.diagonal()  # [b]
    return (scores.logsumexp(1) + scores.logsumexp(0)) / 2 - positives


@needs_other_images
def contrastive(step: Step) -> dict[str, Tensor]:
    """lambda_con L_con: InfoNCE between the embeddings of two augmented views of each image."""
    one, two = (step.encode(step.augment(step.images)).embedding for _ in range(2))  # [b, d]
    return {"con": step.settings.lambda_con * info_nce(one, two, step.settings.tau)}


@needs_other_images
def naive(step: Step) -> dict[str, Tensor]:
    """The naive sum lambda_con L_con + lambda_rec L_rec; according to DCR's paper the two gradients conflict."""
    return contrastive(step) | diva(step)


@reads_captions
@needs_other_images
def caption_contrast(step: Step) -> dict[str, Tensor]:
    """CLIP's own loss between images and their captions, the text tower frozen: the rival that reads captions.

    `settings.tau` is its temperature; that of a trained CLIP is .01. No denoiser is used.
    """
    embedding = step.encode(step.images).embedding  # [b, d]
    return {"cap": info_nce(embedding, step.embed_text(step.captions), step.settings.tau)}
