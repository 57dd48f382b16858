"""The common shift of a run, and an encoder without it."""

import torch
import torch.nn.functional as F
from one_step import pictures
from torch import nn

from diva_lab.evaluation import shift
from diva_lab.evaluation.shift import Shifted, shift_report, take_back_shift
from diva_lab.models.encoders import embed, load_encoder


class Pushed(nn.Module):
    """An encoder whose embeddings are pushed by a vector each: all by one, and each image by one of its own."""

    def __init__(self, encoder, common: float, own: float):
        super().__init__()
        self.encoder, self.own = encoder, own
        self.common = common * F.normalize(torch.arange(1.0, encoder.dim + 1), dim=0)

    def encode_image(self, images):
        f = self.encoder.encode_image(images)
        return F.normalize(f + self.common + self.own * F.normalize(f.flip(1) - f.flip(1).mean(0), dim=1), dim=1)

    def encode_text(self, texts):
        return self.encoder.encode_text(texts)


def test_a_push_that_is_the_same_for_all_images_is_found_and_taken_back():
    original, images = load_encoder("tiny"), pictures(64)
    pushed = Pushed(original, 0.1, 0.0)
    share, back = take_back_shift(original, pushed, images)
    before, after, taken = embed(original, images), embed(pushed, images), embed(back, images)
    assert share > 0.8
    assert (taken - before).norm(dim=1).mean() < 0.4 * (after - before).norm(dim=1).mean()
    torch.testing.assert_close(taken.norm(dim=1), torch.ones(64))


def test_pushes_of_their_own_share_little():
    original, images = load_encoder("tiny"), pictures(64)
    assert take_back_shift(original, Pushed(original, 0.0, 0.1), images)[0] < 0.3


def test_an_encoder_that_was_not_moved_keeps_its_scores(monkeypatch):
    original = load_encoder("tiny")
    seen = []
    report = {"pairs/mean": 0.2, "probe/mean": 0.5, "zeroshot": 0.9, "nmi": 0.8}
    monkeypatch.setattr(shift, "world_scenes", lambda world, key: (None, pictures(16)))
    monkeypatch.setattr(shift, "world_report", lambda encoder, world, split: seen.append(encoder) or report)
    assert shift_report(original, original) == {
        "shift/share": 0.0, "shift/pairs": 0.2, "shift/probes": 0.5, "shift/zeroshot": 0.9, "shift/nmi": 0.8
    }  # fmt: skip
    (moved,) = seen
    assert isinstance(moved, Shifted)
    torch.testing.assert_close(embed(moved, pictures(4)), embed(original, pictures(4)))
