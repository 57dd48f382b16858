"""Retrieval both ways: is an image's caption among the nearest texts, and a caption's image among the nearest?"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from scipy.stats import hypergeom
from torch import Tensor

from diva_lab.evaluation.task import Task, benchmark, score_row
from diva_lab.statistics import wilson


def recall_at(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "m d"],
    owner: Int[Tensor, " m"],
    ks: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
    """R@k in [0, 1], both ways, as for Flickr30K and COCO with five captions for each image.

    Args:
        images, texts: unit vectors.
        owner: of each text, the image that it describes.

    Returns:
        "image to text R@k": the share of images with one of their own captions among the k nearest texts;
        "text to image R@k": the share of captions whose image is among the k nearest.
    """
    found = {}
    near_texts = torch.cat(
        [(part @ texts.T).topk(min(max(ks), len(texts)), dim=1).indices for part in images.split(256)]
    )
    near_images = torch.cat(
        [(part @ images.T).topk(min(max(ks), len(images)), dim=1).indices for part in texts.split(1024)]
    )
    own_text = owner[near_texts] == torch.arange(len(images))[:, None]
    own_image = near_images == owner[:, None]
    for way, hits in (("image to text", own_text), ("text to image", own_image)):
        for k in ks:
            found[f"{way} R@{k}"] = hits[:, :k].any(1).float().mean().item()
    return found


def recall_by_chance(owner: Int[Tensor, " m"], images: int, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """What `recall_at` gives on average where the order is drawn: k of `images` one way; the other way, for an image
    with c of the m texts, 1 - C(m - c, k) / C(m, k)."""
    texts, own = len(owner), owner.bincount(minlength=images).numpy()
    found = {f"image to text R@{k}": float(hypergeom.sf(0, texts, own, min(k, texts)).mean()) for k in ks}
    return found | {f"text to image R@{k}": min(k / images, 1.0) for k in ks}


@benchmark(data="captions", heeds=("max_images",))
def retrieval_benchmark(task: Task) -> Iterator[dict]:
    """R@1, 5, 10 both ways."""
    found = task.read()
    if not found.captions:
        raise ValueError(f"{task.folder}: images without captions; expected .txt members beside them, a caption a line")
    owner = torch.tensor([i for i, texts in enumerate(found.captions) for _ in texts])
    texts = [text for own in found.captions for text in own]
    encoded = torch.cat([task.encoder.encode_text(texts[i : i + 256]).cpu() for i in range(0, len(texts), 256)])
    chances = recall_by_chance(owner, len(found))
    for name, value in recall_at(task.embed(found.places), encoded, owner).items():
        n = len(found) if name.startswith("image") else len(texts)
        yield score_row(name, value, n, *wilson(round(value * n), n), chances[name])
