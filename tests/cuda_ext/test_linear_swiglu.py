from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext.linear_swiglu import COLUMNS, TILE_COST, TILES, best_tiling, linear_swiglu


def test_gate_and_up_are_multiplied_behind_the_gates_activation() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(5, 12, generator=generator), torch.randn(14, 12, generator=generator)
    gate, up = x.double() @ weight[:7].double().T, x.double() @ weight[7:].double().T
    wanted = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(linear_swiglu(x, weight).double(), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(1, 20000), pairs=st.integers(1, 80), multiprocessors=st.integers(2, 200))
def test_no_other_tiling_ends_sooner(tokens: int, pairs: int, multiprocessors: int) -> None:
    columns = 2 * pairs

    def time(tile: int, along_tokens: bool) -> int:
        """Of the busiest cluster, which takes every so manyth pair of tiles, in tokens by columns."""
        pair = (2, 1) if along_tokens else (1, 2)
        work = [0] * (multiprocessors // 2)
        for item in range(-(-tokens // (tile * pair[0])) * (columns // pair[1])):
            work[item % len(work)] += tile + TILE_COST
        return max(work)

    chosen = best_tiling(tokens, columns * COLUMNS, multiprocessors)
    soonest = min(time(tile, along) for tile in TILES for along in (False, True))
    assert time(chosen.tile, chosen.along_tokens) == soonest
    assert chosen.share == pytest.approx(tokens * columns / (soonest * 2 * (multiprocessors // 2)))


def test_tilings_of_the_large_batches() -> None:
    """The fastest as measured on an H200."""
    chosen = {tokens: best_tiling(tokens, 9728, 132)[:2] for tokens in (800, 1600, 16384)}
    assert chosen == {800: (160, False), 1600: (160, True), 16384: (192, True)}
