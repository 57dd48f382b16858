import pytest
import torch

from diva_lab.objectives.rows import by_rows


@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_by_rows_is_the_loss_and_the_gradient_of_all_at_once(size):
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 3, dtype=torch.float64, generator=random).requires_grad_() for _ in range(2))
    place, weight = torch.arange(5.0), torch.rand(5, generator=random, dtype=torch.float64)

    def loss(rows, x, y):
        return (x * y.exp()).sum(1).sin() * place[rows]

    expected = torch.autograd.grad((weight * loss(slice(0, 5), a, b)).sum(), (a, b))
    values = by_rows(loss, size, a, b)
    torch.testing.assert_close(values, loss(slice(0, 5), a, b))
    torch.testing.assert_close(torch.autograd.grad((weight * values).sum(), (a, b)), expected)
    (only,) = torch.autograd.grad((weight * by_rows(loss, size, a, b.detach())).sum(), a)
    torch.testing.assert_close(only, expected[0])
    with torch.no_grad():
        torch.testing.assert_close(by_rows(loss, size, a, b), values)
