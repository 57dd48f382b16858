import pytest
import torch

from diva_lab.machine import generator
from diva_lab.objectives.timesteps import TIMESTEPS, draw_timesteps


@pytest.mark.parametrize("kind", TIMESTEPS)
def test_timesteps_are_in_range_spread_out_and_fixed_by_the_generator(kind):
    one, same, other = (draw_timesteps(kind, 4000, 1000, generator(seed)) for seed in (1, 1, 2))
    assert one.dtype == torch.int64 and one.min() >= 0 and one.max() < 1000 and one.float().std() > 100
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_timesteps_have_the_distribution_they_are_named_after():
    t = {kind: draw_timesteps(kind, 20_000, 1000, generator(0)).double() / 1000 for kind in TIMESTEPS}
    assert abs(t["uniform"].mean() - 0.5) < 0.01 and abs((t["uniform"] < 0.1).double().mean() - 0.1) < 0.01
    assert t["high-noise"].min() >= 0.5 and abs(t["high-noise"].mean() - 0.75) < 0.01
    z = t["logit-normal"].clamp(1e-3, 1 - 1e-3).logit()
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03


def test_timesteps_follow_the_weights_of_equal_parts():
    t = draw_timesteps("0,3,0,1", 20_000, 1000, generator(0))
    shares = [((t >= low) & (t < low + 250)).double().mean().item() for low in range(0, 1000, 250)]
    assert shares == pytest.approx([0, 0.75, 0, 0.25], abs=0.01)
    inside = t[(t >= 250) & (t < 500)].double()
    assert inside.mean().item() == pytest.approx(375, abs=3) and inside.std().item() == pytest.approx(72, abs=2)
    even, uniform = (draw_timesteps(kind, 1000, 1000, generator(0)) for kind in ("1,1,1,1", "uniform"))
    assert (even - uniform).abs().max() <= 1


@pytest.mark.parametrize("weights", ["0,0", "1,-1", "1,two", "", "nan,1", "inf,1"])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="or weights of equal parts"):
        draw_timesteps(weights, 2, 1000, generator(0))


def test_unknown_timesteps_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"unknown timesteps 'cosine'; expected one of {', '.join(TIMESTEPS)}"):
        draw_timesteps("cosine", 2, 1000, generator(0))
