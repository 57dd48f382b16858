"""What a run did to all images alike: the common shift of the embeddings, and scores with that shift taken back."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diva_lab.analysis.readability import common_shift
from diva_lab.evaluation.world import WORLD, WORLD_SPLITS, world_report, world_scenes
from diva_lab.models.encoders import embed
from diva_lab.world import World


class Shifted(nn.Module):
    """An encoder of which a vector is subtracted from every image embedding of unit length; texts are as they were."""

    def __init__(self, encoder: nn.Module, shift: Float[Tensor, " d"]):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("shift", shift)

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return F.normalize(self.encoder.encode_image(images) - self.shift, dim=-1)

    def encode_text(self, texts: list[str]) -> Float[Tensor, "n d"]:
        return self.encoder.encode_text(texts)


def take_back_shift(original: nn.Module, tuned: nn.Module, images: UInt8[Tensor, "n 3 h w"]) -> tuple[float, Shifted]:
    """The share of the squared shift of n images' embeddings that is common to all, and `tuned` without it."""
    before, after = embed(original, images), embed(tuned, images)
    share, shift = common_shift(before, after)
    return share, Shifted(tuned, shift.to(next(tuned.parameters()).device)).eval()


@torch.no_grad()
def shift_report(
    original: nn.Module, tuned: nn.Module, world: World = WORLD, split: str = "measure"
) -> dict[str, float]:
    """`shift/share`, and `shift/pairs`, `shift/probes`, `shift/zeroshot`, `shift/nmi` with the common shift taken back.

    The shift is measured on 1000 scenes of the world that the scores do not use.
    """
    _, images = world_scenes(world, max(key for *_, key in WORLD_SPLITS.values()) + 1)
    share, moved_back = take_back_shift(original, tuned, images[:1000])
    scores = world_report(moved_back, world, split)
    names = {"pairs": "pairs/mean", "probes": "probe/mean", "zeroshot": "zeroshot", "nmi": "nmi"}
    return {"shift/share": share} | {f"shift/{name}": scores[key] for name, key in names.items()}
