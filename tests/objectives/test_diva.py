import torch
import torch.nn.functional as F
from one_step import record

from diva_lab.objectives.diva import reconstruction


def test_the_reconstruction_of_each_image_is_its_own_mean_square():
    a, b = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = reconstruction(a, b)
    assert loss.shape == (3,)
    for k in range(3):
        torch.testing.assert_close(loss[k], F.mse_loss(a[k], b[k]))


def test_the_reconstruction_is_computed_in_float32_under_autocast():
    a, b = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = reconstruction(a, b)
    torch.testing.assert_close(inside, reconstruction(a, b), atol=1e-6, rtol=1e-6)


def test_diva_is_the_mean_over_its_draws(step):
    with record(step) as seen:
        loss = step.terms("diva", draws=4)["rec"]
    (predicted,), ((_, t, noise),) = seen.predicted, seen.draws
    assert t.shape == (4 * 3,)
    errors = [F.mse_loss(a, b) for a, b in zip(predicted, noise, strict=True)]
    torch.testing.assert_close(loss, torch.stack(errors).view(4, 3).mean(0))
