"""Dollars by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_ray.evaluation.cost import gpu_dollars, gpu_seconds, token_dollars


def test_dollars_by_hand() -> None:
    assert gpu_dollars(1800, 3.0) == 1.5
    assert gpu_dollars(600, 3.6, gpus=2) == pytest.approx(1.2)
    assert token_dollars(2_000_000, 500_000, 0.15, 0.6) == pytest.approx(0.6)


@given(st.floats(0, 1e7), st.floats(0.01, 100), st.integers(1, 64))
def test_a_budget_buys_the_seconds_that_cost_it(seconds: float, price: float, gpus: int) -> None:
    assert gpu_seconds(gpu_dollars(seconds, price, gpus), price, gpus) == pytest.approx(seconds)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        gpu_dollars(-1, 3.0)
    with pytest.raises(ValueError, match="no time"):
        gpu_seconds(1, 0.0)
    with pytest.raises(ValueError, match="negative"):
        token_dollars(1, -1, 0.1, 0.1)
