from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_ray.model.plan import plan_stages, stage_bytes, stage_layers
from ember_ray.model.qwen3_config import Qwen3Config


def shape(layers: int, hidden: int = 64, vocab: int = 300, tied: bool = True) -> Qwen3Config:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return Qwen3Config(vocab, hidden, 3 * hidden, layers, 4, 2, 16, 1e-6, 128, tied, False, rope)


QWEN3_4B = Qwen3Config(
    151936, 2560, 9728, 36, 32, 8, 128, 1e-6, 262144, True, False, {"rope_type": "default", "rope_theta": 5e6}
)


def test_qwen3_4b_has_its_size() -> None:
    """4.02 billion parameters, 3.63 without the embedding (its model card)."""
    assert sum(stage_bytes(QWEN3_4B, (36,), "bfloat16")) / 2 == pytest.approx(4.02e9, rel=0.005)
    assert 36 * QWEN3_4B.layer_parameters == pytest.approx(3.63e9, rel=0.005)


def test_the_head_counts() -> None:
    assert plan_stages(QWEN3_4B, 2) == (20, 16)
    assert plan_stages(QWEN3_4B, 1) == (36,)
    assert plan_stages(QWEN3_4B, [9, 27]) == (9, 27)


@given(layers=st.integers(1, 9), stages=st.integers(1, 5), vocab=st.sampled_from([10, 300, 5000, 100000]))
def test_an_even_split_has_the_least_slowest_stage(layers: int, stages: int, vocab: int) -> None:
    config = shape(layers, vocab=vocab)
    if stages > layers:
        with pytest.raises(ValueError, match="cannot be cut"):
            plan_stages(config, stages)
        return
    head = config.vocab_size * config.hidden_size / config.layer_parameters

    def slowest(split: tuple[int, ...]) -> float:
        return max([*split[:-1], split[-1] + head])

    split = plan_stages(config, stages)
    assert sum(split) == layers and min(split) >= 1
    cuts = [(0, *inner, layers) for inner in combinations(range(1, layers), stages - 1)]
    assert slowest(split) == min(slowest(tuple(b - a for a, b in zip(c, c[1:], strict=False))) for c in cuts)
    assert [index for stage in range(stages) for index in stage_layers(split, stage)] == list(range(layers))


@pytest.mark.parametrize(
    ("stages", "says"), [([2, 3], "hold 5 layers"), ([0, 4], "at least one"), ([], "at least one")]
)
def test_a_split_that_does_not_fit_is_refused(stages: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan_stages(shape(4), stages)
