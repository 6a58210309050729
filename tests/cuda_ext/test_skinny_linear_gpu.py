"""The skinny linear kernels against float64 and against the separate ops of the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_ext.skinny_linear import (
    MAX_ROWS,
    can_skinny,
    norm_linear,
    norm_linear_reference,
    norm_linear_swiglu,
    norm_linear_swiglu_reference,
    skinny_linear,
    skinny_linear_reference,
)

pytestmark = pytest.mark.gpu

EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float16]
# (in, out): the layers of Qwen3-4B and 0.6B, 8B's width, and sizes that fill no tile, unit, segment or block.
SHAPES = [
    (2560, 6144),
    (4096, 2560),
    (2560, 9728),
    (9728, 2560),
    (1024, 3072),
    (4096, 19456),
    (64, 1),
    (8, 16),
    (72, 37),
    (200, 131),
    (520, 133),
    (1096, 2117),
    (2568, 1031),
    (5128, 17),
    (9720, 515),
]


def _randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def _weight(out: int, width: int, dtype: torch.dtype) -> Tensor:
    return _randn(out, width, seed=out + width, dtype=dtype) * width**-0.5


@pytest.fixture(autouse=True)
def _poison() -> None:
    """Outputs are taken from memory that holds NaN."""
    blocks = [
        torch.full((size,), float("nan"), dtype=torch.bfloat16, device="cuda") for size in [1 << 18] * 32 + [1 << 24]
    ]
    del blocks


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of the result and of what the float32 sums of a few thousand products leave."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert bool(torch.isfinite(actual).all())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected.double(), rtol=eps, atol=2e-5)


def _near(actual: Tensor, expected: Tensor) -> None:
    """Within a few roundings to the dtype: sums in another order make values of every rounding step fall apart."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected.double(), rtol=4 * eps, atol=2 * eps)
    assert (actual.double() - expected.double()).norm() < eps * expected.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), SHAPES)
def test_linear(width: int, out: int, dtype: torch.dtype) -> None:
    weight, bias = _weight(out, width, dtype), _randn(out, seed=5, dtype=dtype)
    for rows in (1, 3, 8, 9, 16):
        x = _randn(rows, width, seed=rows, dtype=dtype)
        exact = x.double() @ weight.double().T
        _close(skinny_linear(x, weight), exact, dtype)
        _close(skinny_linear(x, weight, bias), exact + bias.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), SHAPES)
def test_norm_linear(width: int, out: int, dtype: torch.dtype) -> None:
    weight, norm_weight = _weight(out, width, dtype), 1 + 0.3 * _randn(width, seed=6, dtype=dtype)
    for rows in (1, 5, 16):
        x, residual = (_randn(rows, width, seed=rows + i, dtype=dtype) for i in (0, 100))
        for before in (residual, None):
            y, summed = norm_linear(x, before, norm_weight, EPS, weight)
            expected, expected_sum = norm_linear_reference(x, before, norm_weight, EPS, weight)
            assert torch.equal(summed, expected_sum)
            _near(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "ffn"), [(2560, 9728), (1024, 3072), (4096, 1500), (64, 1), (200, 131), (2568, 77)])
def test_norm_linear_swiglu(width: int, ffn: int, dtype: torch.dtype) -> None:
    weight, norm_weight = _weight(2 * ffn, width, dtype), 1 + 0.3 * _randn(width, seed=6, dtype=dtype)
    for rows in (1, 7, 16):
        x, residual = (_randn(rows, width, seed=rows + i, dtype=dtype) for i in (0, 100))
        for before in (residual, None):
            act, summed = norm_linear_swiglu(x, before, norm_weight, EPS, weight)
            expected, expected_sum = norm_linear_swiglu_reference(x, before, norm_weight, EPS, weight)
            assert torch.equal(summed, expected_sum)
            _near(act, expected)


@pytest.mark.parametrize(("width", "out"), [(2560, 6144), (9728, 2560), (520, 133), (4096, 2560)])
def test_a_row_does_not_depend_on_the_others(width: int, out: int) -> None:
    dtype = torch.bfloat16
    weight, norm_weight = _weight(out, width, dtype), 1 + 0.3 * _randn(width, seed=6, dtype=dtype)
    x, residual = (_randn(MAX_ROWS, width, seed=i, dtype=dtype) for i in (1, 2))
    plain = skinny_linear(x, weight)
    normed, _ = norm_linear(x, residual, norm_weight, EPS, weight)
    gated, _ = norm_linear_swiglu(x, residual, norm_weight, EPS, weight[: out // 2 * 2])
    for rows in range(1, MAX_ROWS):
        some, other = x[MAX_ROWS - rows :], residual[MAX_ROWS - rows :]
        assert torch.equal(skinny_linear(some, weight), plain[MAX_ROWS - rows :])
        assert torch.equal(norm_linear(some, other, norm_weight, EPS, weight)[0], normed[MAX_ROWS - rows :])
        act, _ = norm_linear_swiglu(some, other, norm_weight, EPS, weight[: out // 2 * 2])
        assert torch.equal(act, gated[MAX_ROWS - rows :])


def test_a_chain_of_layers_in_a_graph_is_the_same_every_time() -> None:
    """Kernels overlap their successors here: a read ahead of its writer would show."""
    dtype, width, ffn, layers = torch.bfloat16, 2560, 1280, 6
    weights = [
        (
            _weight(4096, width, dtype),
            _weight(width, 4096, dtype),
            _weight(2 * ffn, width, dtype),
            _weight(width, ffn, dtype),
        )
        for _ in range(layers)
    ]
    norm_weight = 1 + 0.3 * _randn(width, seed=6, dtype=dtype)
    start, zero = _randn(4, width, seed=1, dtype=dtype), torch.zeros(4, width, dtype=dtype, device="cuda")

    def chain() -> Tensor:
        x, residual = start, zero
        for qkv, o, gate_up, down in weights:
            attended, residual = norm_linear(x, residual, norm_weight, EPS, qkv)
            x = skinny_linear(attended, o)
            act, residual = norm_linear_swiglu(x, residual, norm_weight, EPS, gate_up)
            x = skinny_linear(act, down)
        return x + residual

    def slow_chain() -> Tensor:
        x, residual = start, zero
        for qkv, o, gate_up, down in weights:
            attended, residual = norm_linear_reference(x, residual, norm_weight, EPS, qkv)
            x = skinny_linear_reference(attended, o)
            act, residual = norm_linear_swiglu_reference(x, residual, norm_weight, EPS, gate_up)
            x = skinny_linear_reference(act, down)
        return x + residual

    eager = chain()
    torch.cuda.synchronize()
    expected = slow_chain().double()
    assert float((eager.double() - expected).norm() / expected.norm()) < 1e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(50):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, eager)


def test_refusals_name_what_does_not_fit() -> None:
    x = _randn(2, 64, seed=1, dtype=torch.bfloat16)
    assert can_skinny(x, x) and not can_skinny(x.float(), x.float()) and not can_skinny(x[:, :60], x[:, :60])
    assert not can_skinny(x.repeat(9, 1), x) and not can_skinny(x, x[:, :32]) and not can_skinny(x, x.half())
    with pytest.raises(ValueError, match="can_skinny"):
        skinny_linear(x.float(), x.float())
    with pytest.raises(ValueError, match="bias"):
        skinny_linear(x, x, x[0])
    with pytest.raises(ValueError, match="residual"):
        norm_linear(x, x[:1], x[0], EPS, x)
    with pytest.raises(ValueError, match="gate and up"):
        norm_linear_swiglu(x, x, x[0], EPS, x[:1])
