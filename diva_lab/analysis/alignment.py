"""The recovered fraction: how much the visual condition helps the denoiser, compared with the image's full caption.

    recovered = (L_rec(empty) - L_rec(visual)) / (L_rec(empty) - L_rec(caption))

0 is as good as the empty prompt, 1 as good as the full caption. All three losses use the same latents, timesteps and
noise; sums over the images are taken before the ratio. Stage 1 is trained to raise it.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from diva_lab.models.encoders import Features
from diva_lab.world import DETAILS, World, caption, draw_scenes

ALIGNMENT_TIMESTEPS = tuple(range(50, 1000, 100))  # the middles of ten equal parts of 0..1000


@torch.no_grad()
def losses_at(denoiser, context: Tensor, latents: Tensor, t: int, seed: int, batch: int) -> np.ndarray:
    """Mean squared eps-error of each image, [n]. The noise depends only on (seed, t) and the image's position."""
    generator = torch.Generator().manual_seed(1000 * seed + t)
    noise = torch.randn(latents.shape, generator=generator).to(latents)  # [n, c, h, w]
    losses = []
    for x0, eps, c in zip(latents.split(batch), noise.split(batch), context.split(batch), strict=True):
        steps = torch.full((len(x0),), t, device=x0.device)
        predicted = denoiser.predict(denoiser.add_noise(x0, eps, steps), steps, c)
        losses.append((predicted - eps).float().square().flatten(1).mean(dim=1))
    return torch.cat(losses).cpu().double().numpy()


def _ratio(gain: np.ndarray, room: np.ndarray) -> np.ndarray:
    """gain / room; NaN where the caption is no better than the empty prompt."""
    return np.divide(gain, room, out=np.full_like(gain, np.nan), where=room > 0)


def recovered_fraction(
    denoiser,
    context_visual: Float[Tensor, "n l c"],
    captions: list[str] | None,
    latents: Float[Tensor, "n k h w"],
    timesteps: Sequence[int] = ALIGNMENT_TIMESTEPS,
    seed: int = 0,
    batch: int = 64,
    level: float = 0.95,
    draws: int = 2000,
) -> pd.DataFrame:
    """The recovered fraction at each timestep, and over all of them in the last row.

    Args:
        denoiser: a frozen `Denoiser`.
        context_visual: the condition made from each image, [n, L, C].
        captions: the full caption of each image; None without captions, which makes the fraction NaN.
        latents: of the images, [n, c, h, w].
        timesteps: at which the losses are taken.
        seed: of the noise and of the bootstrap.
        batch: images in one call of the denoiser.
        level, draws: of the bootstrap over images.

    Returns:
        One row for each timestep, indexed by it, and a last one indexed "total" (t is NaN, losses are means over the
        timesteps). Columns t; empty, visual, caption: the mean losses; recovered, low, high: the fraction and its
        interval, NaN where the caption is no better than the empty prompt (for low and high: in any resample).

    Raises:
        ValueError: if the numbers of contexts, captions and latents differ.
    """
    n = len(latents)
    if len(context_visual) != n or (captions is not None and len(captions) != n):
        counts = f"{len(context_visual)} contexts, {n if captions is None else len(captions)} captions, {n} latents"
        raise ValueError(f"expected one context, one caption and one latent for each image, got {counts}")
    contexts = {"empty": denoiser.empty.expand(n, -1, -1), "visual": context_visual}
    if captions is not None:
        contexts["caption"] = torch.cat([denoiser.encode_text(captions[i : i + batch]) for i in range(0, n, batch)])
    losses = {
        name: np.stack([losses_at(denoiser, context, latents, t, seed, batch) for t in timesteps])  # [T, n]
        for name, context in contexts.items()
    }
    losses.setdefault("caption", np.full((len(timesteps), n), np.nan))
    losses = {name: np.vstack([value, value.mean(axis=0)]) for name, value in losses.items()}  # [T + 1, n]

    gain, room = losses["empty"] - losses["visual"], losses["empty"] - losses["caption"]
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).T  # [n, draws]
    low, high = np.quantile(_ratio(gain @ counts, room @ counts), [(1 - level) / 2, (1 + level) / 2], axis=1)
    return pd.DataFrame(
        {
            "t": [*timesteps, np.nan],
            **{name: value.mean(axis=1) for name, value in losses.items()},
            "recovered": _ratio(gain.sum(axis=1), room.sum(axis=1)),
            "low": low,
            "high": high,
        },
        index=[*timesteps, "total"],
    )


def alignment_report(conditioner, encoder, denoiser, world: World | None = None, n: int = 256) -> dict[str, float]:
    """The recovered fraction on `n` held-out images of the world with full captions, for `align(evaluate=...)`.

    Returns "recovered", its interval "recovered/low" and "recovered/high", and "recovered/<t>" for each timestep; of a
    projector that is anchored in captions also "recovered/text", under the captions' own embeddings.
    """
    world = world or World()
    device = denoiser.device
    scenes = draw_scenes(n, (world.seed, 7))
    images = torch.from_numpy(world.render(scenes)).permute(0, 3, 1, 2).to(device).float() / 255
    with torch.no_grad():
        context = conditioner(encoder.features(images), denoiser.empty)
        texts, latents = [caption(scene, tuple(DETAILS)) for scene in scenes], denoiser.latents(images)
        table = recovered_fraction(denoiser, context, texts, latents)
        total = table.loc["total"]
        out = {"recovered": total["recovered"], "recovered/low": total["low"], "recovered/high": total["high"]}
        out |= {f"recovered/{t}": table.loc[t, "recovered"] for t in table.index if t != "total"}
        if conditioner.gap is not None:
            embedding = encoder.encode_text(texts) + conditioner.gap
            context = conditioner(Features(embedding, embedding[:, None]), denoiser.empty)
            out["recovered/text"] = recovered_fraction(denoiser, context, texts, latents).loc["total", "recovered"]
    return {name: float(value) for name, value in out.items()}
