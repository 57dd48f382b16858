"""A fake encoder and a fake denoiser, small enough to work out by hand what they must score."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diva_lab.models.denoiser import Denoiser
from diva_lab.models.encoders import Encoder


class FakeEncoder(Encoder):
    """Pictures go through one fixed random linear map of their 8 x 8 thumbnail; texts have given or hashed vectors."""

    def __init__(self, dim: int = 16, texts: dict[str, torch.Tensor] | None = None):
        nn.Module.__init__(self)
        self.dim, self.texts, self.asked = dim, texts or {}, []
        self.weight = nn.Parameter(torch.randn(dim, 192, generator=torch.Generator().manual_seed(0)))

    def encode_image(self, images):
        thumbnails = F.adaptive_avg_pool2d(images - 0.5, 8).flatten(1)
        return F.normalize(thumbnails @ self.weight.T, dim=-1)

    def encode_text(self, texts):
        self.asked.append(list(texts))
        return F.normalize(torch.stack([self.texts.get(text, self._hashed(text)) for text in texts]), dim=-1)

    def _hashed(self, text):
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))


class FakeDenoiser(Denoiser):
    """Finds as large a part of the noise as the context's first entry says: none for "", more for longer captions."""

    def __init__(self):
        nn.Module.__init__(self)

    @property
    def empty(self):
        return torch.zeros(3, 4)

    def encode_text(self, prompts):
        strength = torch.tensor([len(prompt) / 100 for prompt in prompts])
        return strength.view(-1, 1, 1).expand(-1, 3, 4)

    def add_noise(self, x0, noise, t):
        return noise + 0.1 * (1 - t.float() / 1000).view(-1, 1, 1, 1) * x0

    def predict(self, x_t, t, context):
        return x_t * context[:, 0, 0].view(-1, 1, 1, 1)


@pytest.fixture
def encoder():
    return FakeEncoder()


@pytest.fixture
def make_encoder():
    return FakeEncoder


@pytest.fixture
def denoiser():
    return FakeDenoiser()
