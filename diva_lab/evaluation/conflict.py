"""Is a conflict of gradients about the pictures? Cosines between the two terms of the naive sum, over pairs of batches.

In training both gradients come from one batch. Here every gradient of the contrast meets every gradient of the
reconstruction: where the batches differ, a cosine says what two draws of the terms have to do with each other when
the pictures have nothing in common. That is the null distribution that METHOD section 6 asks for.
"""

import numpy as np
import pandas as pd

from diva_lab.denoisers import load_denoiser
from diva_lab.evaluation.intervals import wilson
from diva_lab.gradients import conflict, term_gradients
from diva_lab.images import open_images
from diva_lab.machine import autocast, default_device, generator
from diva_lab.objectives import naive
from diva_lab.runs import Run
from diva_lab.training import Settings, build_conditioner, build_encoder, make_step


def conflict_rate(cosines: np.ndarray | pd.Series, level: float = 0.95) -> tuple[float, float, float]:
    """Share of negative cosines with its Wilson interval (rate, low, high), steps taken as independent; NaN left out.

    Raises ValueError where no cosine is left.
    """
    values = np.asarray(cosines, float)
    values = values[np.isfinite(values)]
    negative = int((values < 0).sum())
    low, high = wilson(negative, len(values), level)
    return negative / len(values), low, high


def gradient_cosines(run: Run, batches: int = 10) -> pd.DataFrame:
    """cos(g_con of one batch, g_rec of another) at the weights that `run` of `tune` ended with, dropout off.

    Args:
        run: a finished run; its settings give encoder, denoiser, projector, batch size and the terms' weights.
        batches: the pictures that would have come next, as many batches.

    Returns:
        batches^2 rows: `con`, `rec` (numbers of the two batches; equal ones are what training sees) and `cos`, in
        [-1, 1], NaN where a gradient is zero.
    """
    settings, device = Settings.of(run), default_device()
    encoder, denoiser = build_encoder(settings, device), load_denoiser(settings.denoiser, device)
    conditioner = build_conditioner(settings, encoder, denoiser).requires_grad_(False)
    weights = {name.removeprefix("encoder."): w for name, w in run.weights().items() if name.startswith("encoder.")}
    encoder.load_state_dict(weights, strict=False)
    parameters = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    first = settings.steps * settings.accumulate * settings.batch
    source = open_images(settings.images, max(encoder.px, denoiser.px), settings.batch, settings.seed, first)
    gradients = []
    for number in range(batches):
        random = generator("cosines", settings.seed, number)
        images = next(source).to(device).float() / 255
        step = make_step(images, encoder, conditioner, denoiser, random, settings)
        with autocast(device):
            terms = naive(step)
        gradients.append(term_gradients(terms, parameters))
    rows = [
        (i, j, conflict(one["con"], two["rec"])["cos"])
        for i, one in enumerate(gradients)
        for j, two in enumerate(gradients)
    ]
    return pd.DataFrame(rows, columns=["con", "rec", "cos"])
