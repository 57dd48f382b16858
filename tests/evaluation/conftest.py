import pytest
from fakes import denoiser, encoder, make_encoder  # noqa: F401, fixtures

from diva_lab.evaluation import world


@pytest.fixture
def small_world(monkeypatch) -> int:
    """The tiny world's benchmarks with so many scenes in place of thousands."""
    monkeypatch.setattr(world, "SCENES", 200)
    world.world_scenes.cache_clear()
    yield 200
    world.world_scenes.cache_clear()
