import pytest
from one_step import OneStep, open_lora


@pytest.fixture(scope="module")
def step(small_settings) -> OneStep:
    one = OneStep.of(small_settings)
    open_lora(one.encoder)
    return one
