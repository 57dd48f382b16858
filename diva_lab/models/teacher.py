"""What KUEA learns from: a frozen image encoder without text, and the encoder as it was before."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from diva_lab.models.encoders import Encoder
from diva_lab.models.vision import VisionEncoder


class Teacher(nn.Module):
    """A frozen image encoder, the encoder as it was, and the tuned encoder's kernel, whose two numbers are trained.

    Args:
        vision: whose similarities between images the encoder takes over.
        original: the encoder before it is tuned.

    Attributes:
        gamma, coef0: of the encoder's kernel (gamma <x, y> + coef0)^3, from .0032 and .191623 on as released.
        px: side in pixels of the images that `vision` reads.
    """

    def __init__(self, vision: VisionEncoder | Encoder, original: Encoder):
        super().__init__()
        self.vision, self.original = vision.requires_grad_(False), original.requires_grad_(False)
        self.gamma, self.coef0 = nn.Parameter(torch.tensor(0.0032)), nn.Parameter(torch.tensor(0.191623))
        self.px: int = vision.px

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def see(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """The image encoder's embeddings of images in [0, 1], of their own length."""
        images = transforms.resize(images, [self.px, self.px], transforms.InterpolationMode.BICUBIC, antialias=True)
        return self.vision.features(images.clamp(0, 1)).embedding.float()
