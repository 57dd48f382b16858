"""Do the patch tokens of an image and of its minimal partner differ where the two images differ?

For each patch 1 - cosine between the two images' tokens at its place: a map. Its overlap with the exact mask, the
patches in which a pixel differs, is the average precision over all patches of a pattern's pairs; chance is the share of
changed patches. A tower in which every token has seen every other may have spread the difference over the whole image.
"""

from collections.abc import Iterator
from math import isqrt

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from diva_lab.analysis.readability import world_pairs_in_memory
from diva_lab.evaluation.patches import BATCH, read_layer
from diva_lab.evaluation.task import Task, benchmark, score_row
from diva_lab.evaluation.world import WORLD_SPLITS
from diva_lab.models.encoders import Encoder
from diva_lab.statistics import average_precision, bootstrap_weights, percentiles
from diva_lab.world import PATTERNS

PAIRS = 100  # of each pattern


def difference_maps(encoder: Encoder, pairs: UInt8[Tensor, "n 2 3 h w"], layer: int = -2) -> Float[Tensor, "n s s"]:
    """1 - cosine between the patch tokens of the two images of each pair, on the tower's grid of s x s patches."""
    maps = []
    for part in pairs.split(BATCH):
        tokens = read_layer(encoder, part.flatten(0, 1), layer).unflatten(0, (-1, 2))  # [b, 2, p, width]
        maps.append(1 - F.cosine_similarity(tokens[:, 0], tokens[:, 1], dim=-1))
    found = torch.cat(maps)
    return found.unflatten(1, (isqrt(found.shape[1]), -1))


def changed_patches(pairs: UInt8[Tensor, "n 2 3 h w"], side: int) -> Bool[Tensor, "n {side} {side}"]:
    """The patches of a grid, laid over the whole image, in which at least one byte of the two images differs."""
    changed = (pairs[:, 0] != pairs[:, 1]).any(1).float()  # [n, h, w]
    return F.adaptive_max_pool2d(changed[:, None], side)[:, 0] > 0


@benchmark(data="nothing", fixed={"features": "patches", "precision": "no"}, layer=True)
def correspondence(task: Task) -> Iterator[dict]:
    """Average precision of the map of differences for the changed patches, of each detail; intervals resample pairs."""
    pairs = world_pairs_in_memory(PAIRS, WORLD_SPLITS["measure"][1])
    maps = difference_maps(task.encoder, pairs.images, task.layer)
    changed = changed_patches(pairs.images, maps.shape[1]).flatten(1).numpy()  # [n, p]
    scores, weights = maps.flatten(1).numpy(), np.vstack([np.ones(PAIRS, int), bootstrap_weights(PAIRS, task.seed)])
    each, chances = [], []
    for detail, pattern in PATTERNS.items():
        own = np.array(pairs.patterns) == pattern
        each.append(average_precision(scores[own], changed[own], weights))  # of all pairs, then of those drawn
        chances.append(changed[own].mean())
        yield score_row("overlap", each[-1][0], PAIRS, *percentiles(each[-1][1:]), chances[-1], detail)
    mean = np.mean(each, axis=0)
    yield score_row("overlap", mean[0], len(pairs), *percentiles(mean[1:]), float(np.mean(chances)))
