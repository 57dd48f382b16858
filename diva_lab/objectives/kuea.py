"""KUEA (ICML 2025): align the kernel between CLIP's embeddings with that of an encoder trained on images alone.

After the released code (github.com/peterant330/KUEA): no denoiser, no text, and the embeddings of their own length.
"""

from jaxtyping import Float
from torch import Tensor

from diva_lab.objectives.step import Step, needs_other_images, reads

KERNEL_WEIGHT = 0.5  # as released


def polynomial_kernel(
    x: Float[Tensor, "b d"], gamma: Tensor | float, coef0: Tensor | float, degree: int = 3
) -> Float[Tensor, "b b"]:
    """k(x, y) / sqrt(k(x, x) k(y, y)) with k(x, y) = (gamma <x, y> + coef0)^degree, in float32: 1 on the diagonal."""
    x = x.float()
    products = gamma * (x[:, None] * x).sum(2) + coef0  # [b, b]; a matrix product would run in bf16 under autocast
    own = products.diagonal()  # [b]
    return (products * (own[:, None] * own).rsqrt()) ** degree


@reads("teacher")
@needs_other_images
def kuea(step: Step) -> dict[str, Tensor]:
    """lambda_con / 2 of the mean squared difference of the two kernels, and lambda_rec |f - f0|^2 to the embedding f0
    before.

    The teacher's kernel has gamma = 1 / e, of its width e, and coef0 = 1; those of CLIP's kernel are trained.
    """
    settings, embedding = step.settings, step.encode(step.images).embedding.float()  # [b, d]
    seen, before = step.teacher.see(step.images), step.encode_before(step.images).embedding.float()
    own = polynomial_kernel(embedding, step.teacher.gamma, step.teacher.coef0)
    goal = polynomial_kernel(seen, 1 / seen.shape[1], 1.0)
    return {
        "kernel": settings.lambda_con * KERNEL_WEIGHT * (own - goal).square().mean(1),  # [b]
        "keep": settings.lambda_rec * (embedding - before).square().sum(1),  # [b]
    }
