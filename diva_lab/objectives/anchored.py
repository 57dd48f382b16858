"""Stage 1 anchored in captions (ours): the projector learns from CLIP's text embeddings what a detail looks like.

A projector that is fitted on image embeddings alone learns of each direction in CLIP's space only as much as these
embeddings vary along it. A blind CLIP hardly varies along "striped - plain", so the gradient that reaches it through
such a projector says nothing of stripes, although the denoiser sees them. Its text embeddings do vary along it.
"""

import torch
from torch import Tensor

from diva_lab.models.encoders import Features
from diva_lab.objectives.diva import diva, reconstruction, sum_draws
from diva_lab.objectives.step import Step


def anchored(step: Step) -> dict[str, Tensor]:
    """Terms `text` and `rec` of stage 1: the first k = `anchor_share` b images are conditioned on captions.

    text = anchor_weight (k / b) |eps_hat - y|^2 / d under the condition e + gap + n, where e is the caption's embedding
    at unit length, gap the difference of the modalities' means and n normal noise with E|n|^2 = anchor_noise^2. With
    `anchor` = `captions` the caption is the image's own and y = eps; with `shuffled` it is another image's (a placebo);
    with `text` it is any caption and y the denoiser's own prediction under it, for the same noisy latent. rec is
    (b - k) / b L_rec of the other images, under their own embeddings. With k = 0 this is `diva`, to the bit.
    """
    settings, b, n = step.settings, len(step.images), step.settings.draws
    k = round(settings.anchor_share * b)
    if k == 0:
        return diva(step)
    x_t, t, noise = step.draw_noisy(step.latents().repeat(n, 1, 1, 1))  # [n b, c, h, w], [n b], [n b, c, h, w]
    x_t, t, noise = (x.unflatten(0, (n, b)) for x in (x_t, t, noise))  # [n, b, ...]
    embedding = step.encode(step.images).embedding  # [b, d]
    captions = [*step.captions[1:], step.captions[0]] if settings.anchor == "shuffled" else step.captions
    texts = step.embed_text(captions[:k]) + step.gap  # [k, d]
    spread = settings.anchor_noise * texts.shape[1] ** -0.5
    texts = texts + spread * torch.randn(texts.shape, generator=step.generator).to(texts)

    def loss(rows: slice, embedding: Tensor, meant: Tensor | None = None) -> Tensor:
        noisy, at, target = (x[:, rows].flatten(0, 1) for x in (x_t, t, noise))  # [n r, c, h, w], [n r], [n r, c, h, w]
        if meant is not None:
            with torch.no_grad():
                target = step.denoiser.predict(noisy, at, meant.repeat(n, 1, 1))
        context = step.condition(Features(embedding, embedding[:, None])).repeat(n, 1, 1)  # [n r, l, w]
        predicted = step.denoiser.predict(noisy, at, context)
        return len(embedding) / b * sum_draws(step, reconstruction(predicted, target))  # [r]

    meant = step.denoiser.encode_text(list(captions[:k])) if settings.anchor == "text" else None  # [k, l, w]
    terms = {"text": settings.anchor_weight * loss(slice(0, k), texts, meant)}
    return terms | ({"rec": loss(slice(k, b), embedding[k:])} if k < b else {})
