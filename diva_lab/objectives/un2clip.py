"""un2CLIP (arXiv 2505.24517): invert an unCLIP decoder, which draws an image from CLIP's own embedding of it."""

import torch
from torch import Tensor

from diva_lab.models.encoders import Features
from diva_lab.objectives.diva import reconstruct
from diva_lab.objectives.step import Step, reads


@reads("decoder")
def un2clip(step: Step) -> dict[str, Tensor]:
    """The decoder's own loss for each image, under its own embedding as class label and the empty prompt.

    No projector stands between encoder and decoder. The embedding carries `settings.embedding_noise` of noise, drawn
    for each draw of (t, eps). The authors' settings are not known to us: these are ours.
    """

    def condition(features: Features) -> dict[str, Tensor]:
        embedding = features.embedding.repeat(step.settings.draws, 1)  # [n b, d]
        noise = torch.randn(embedding.shape, generator=step.generator).to(embedding.device)
        labels = step.denoiser.labels(embedding, step.settings.embedding_noise, noise)  # [n b, 2 d]
        return {"context": step.denoiser.empty_context(len(labels)), "labels": labels}

    return reconstruct(step, "native", condition)
