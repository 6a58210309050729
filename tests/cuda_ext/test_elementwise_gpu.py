"""RMSNorm, q/k norm with RoPE and cache write, and SwiGLU on the GPU, against their torch references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cuda_ext.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from cuda_ext.rope import qk_norm_rope_write, qk_norm_rope_write_reference, rope_table
from cuda_ext.swiglu import swiglu, swiglu_reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULPS = {torch.float32: 4e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative steps of each type; for float32, a few of them."""


def check(found: Tensor, wanted: Tensor, near_zero: float = 0.01) -> None:
    """Equal but for a last step, and for 16-bit types equal to the bit in almost all places.

    The square sums of kernel and reference differ in their last digits, which moves a few values over a rounding edge.
    A rotation subtracts such values: there the step that counts is the one of values of size `near_zero`.
    """
    assert found.dtype == wanted.dtype and found.shape == wanted.shape and bool(found.isfinite().all())
    step = ULPS[found.dtype]
    torch.testing.assert_close(found, wanted, rtol=2 * step, atol=near_zero * step)
    if found.dtype != torch.float32 and found.numel() > 1000:
        assert float((found == wanted).double().mean()) > 0.99


def poison_allocator(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    """Fills what torch will hand out next with NaN, so that an element that no kernel wrote shows."""
    held = [torch.full(shape, torch.nan, dtype=dtype, device="cuda") for shape in shapes for _ in range(2)]
    del held


def apart(rows: int, width: int, dtype: torch.dtype, gap: int) -> Tensor:
    """Random rows with `gap` values between them that must not be read."""
    whole = torch.full((rows, width + gap), torch.nan, dtype=dtype, device="cuda")
    whole[:, :width] = 2 * torch.randn(rows, width, device="cuda")
    return whole[:, :width]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 16, 128, 1000, 1024, 2560, 4096, 5120, 8192, 12288, 20001])
@pytest.mark.parametrize("rows", [1, 3, 67])
def test_norms_equal_the_reference(dtype: torch.dtype, dim: int, rows: int) -> None:
    torch.manual_seed(dim + rows)
    x, residual = (apart(rows, dim, dtype, gap) for gap in (0, 16))
    weight = torch.rand(dim, device="cuda").to(dtype)
    poison_allocator([(rows, dim)], dtype)
    check(rms_norm(residual, weight, 1e-6), rms_norm_reference(residual, weight, 1e-6))
    poison_allocator([(rows, dim)], dtype)
    normed, summed = add_rms_norm(x, residual, weight, 1e-6)
    wanted, wanted_sum = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert torch.equal(summed, wanted_sum)
    check(normed, wanted)
    exact = summed.double() * (summed.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    torch.testing.assert_close(normed.double(), exact, rtol=2 * ULPS[dtype], atol=1e-6)


def test_norm_takes_any_number_of_dimensions_and_rows_without_alignment() -> None:
    weight = torch.rand(64, device="cuda")
    for x in (torch.randn(64), torch.randn(2, 5, 64), torch.randn(5, 2, 64).transpose(0, 1), torch.randn(0, 64)):
        x = x.cuda()
        assert rms_norm(x, weight, 1e-6).shape == x.shape
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    odd = torch.randn(4, 65, device="cuda")[:, 1:]
    torch.testing.assert_close(rms_norm(odd, weight, 1e-6), rms_norm_reference(odd, weight, 1e-6))


def test_a_row_is_the_same_to_the_bit_alone_and_among_others() -> None:
    x, residual = apart(300, 2560, torch.float32, 8), apart(300, 2560, torch.float32, 0)
    weight = torch.rand(2560, device="cuda")
    normed, _ = add_rms_norm(x, residual, weight, 1e-6)
    for row in (0, 17, 299):
        alone, _ = add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, 1e-6)
        assert torch.equal(alone[0], normed[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ffn", [1, 8, 12, 100, 2048, 9728, 12345])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_swiglu_equals_the_reference(dtype: torch.dtype, ffn: int, rows: int) -> None:
    torch.manual_seed(ffn + rows)
    gate_up = 4 * apart(rows, 2 * ffn, dtype, 16)
    poison_allocator([(rows, ffn)], dtype)
    check(swiglu(gate_up), swiglu_reference(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_extreme_gates(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -200.0, -89.0, -20.0, -0.0, 0.0, 20.0, 89.0, 200.0, 3e4], device="cuda")
    gate_up = torch.cat((gate.to(dtype).clamp(-6e4, 6e4), torch.ones(10, device="cuda", dtype=dtype)))[None]
    torch.testing.assert_close(swiglu(gate_up), swiglu_reference(gate_up), rtol=2 * ULPS[dtype], atol=1e-37)
    assert swiglu(gate_up[:0]).shape == (0, 10)


def rope_case(
    dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, tokens: int, gap: int = 16
) -> tuple[tuple, Tensor, Tensor]:
    """Arguments of the op but for the caches, slots, and a pool of NaN with room between slots."""
    torch.manual_seed(head_dim + tokens)
    qkv = apart(tokens, (heads + 2 * kv_heads) * head_dim, dtype, gap)
    weights = (1 + 0.3 * torch.randn(2, head_dim, device="cuda")).to(dtype).unbind(0)
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2, device="cuda") / head_dim)
    table = rope_table(inv_freq, 1.1, 5000)
    positions = torch.randint(0, 5000, (tokens,), device="cuda")
    slots = torch.randperm(tokens + 9, device="cuda")[:tokens]
    pool = torch.full((2, tokens + 9, 2, kv_heads, head_dim), torch.nan, dtype=dtype, device="cuda")
    return (qkv, *weights, 1e-6, table, positions), slots, pool


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 3), (32, 8, 19), (16, 1, 200)])
def test_rope_write_equals_the_reference(dtype: torch.dtype, head_dim: int, shape: tuple[int, int, int]) -> None:
    heads, kv_heads, tokens = shape
    arguments, slots, pool = rope_case(dtype, head_dim, heads, kv_heads, tokens)
    wanted_pool = pool.clone()
    poison_allocator([(tokens, heads, head_dim)], dtype)
    q = qk_norm_rope_write(*arguments, pool[0, :, 0], pool[1, :, 1], slots)
    wanted = qk_norm_rope_write_reference(*arguments, wanted_pool[0, :, 0], wanted_pool[1, :, 1], slots)
    check(q, wanted, near_zero=8.0)
    check(pool[0, slots, 0], wanted_pool[0, slots, 0], near_zero=8.0)
    assert torch.equal(pool[1, slots, 1], wanted_pool[1, slots, 1])
    untouched = pool.isnan()
    assert torch.equal(untouched, wanted_pool.isnan())


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs may still be in the making
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_chain_follows_its_inputs(dtype: torch.dtype) -> None:
    """The kernels start before their predecessors end: a missing wait would show as an old value here."""
    arguments, slots, pool = rope_case(dtype, 128, 16, 8, 37, gap=0)
    qkv, weight = arguments[0], torch.rand(4096, device="cuda").to(dtype)
    x, residual = apart(37, 4096, dtype, 0), apart(37, 4096, dtype, 0)

    def chain() -> Tensor:
        normed, summed = add_rms_norm(x, residual, weight, 1e-6)
        q = qk_norm_rope_write(normed, *arguments[1:], pool[0, :, 0], pool[1, :, 1], slots)
        again, _ = add_rms_norm(swiglu(torch.cat((summed, normed), 1)), q.flatten(1).repeat(1, 2), weight, 1e-6)
        return again

    assert qkv.shape == x.shape
    graph, result = captured(chain)
    for seed in range(5):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        residual.copy_(torch.randn_like(x))
        pool.fill_(torch.nan)
        graph.replay()
        first, first_pool = result.clone(), pool.clone()
        graph.replay()
        assert torch.equal(result, first)
        pool.fill_(torch.nan)
        assert torch.equal(chain(), first) and torch.equal(pool.nan_to_num(), first_pool.nan_to_num())
        assert bool(first.isfinite().all())


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.randn(2, 64, device="cuda"), torch.ones(64, device="cuda")
    with pytest.raises(ValueError, match=r"weight \[64\] of its dtype, not \(32,\)"):
        rms_norm(x, weight[:32], 1e-6)
    with pytest.raises(ValueError, match="must be alike"):
        add_rms_norm(x, x.bfloat16(), weight, 1e-6)
    with pytest.raises(ValueError, match="even number"):
        swiglu(x[:, :63])
    arguments, slots, pool = rope_case(torch.float32, 64, 2, 1, 4)
    with pytest.raises(ValueError, match=r"slots must be \[4\] int64, not \(3,\)"):
        qk_norm_rope_write(*arguments, pool[0, :, 0], pool[1, :, 1], slots[:3])
    with pytest.raises(ValueError, match="v_cache .* whole slots"):
        qk_norm_rope_write(*arguments, pool[0, :, 0], pool[1, :, 1].bfloat16(), slots)
