from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_ext.prefill_attention import (
    BACKENDS,
    PrefillBatch,
    choose_backend,
    gather_kv,
    gather_kv_reference,
    prefill_attention,
)

pytestmark = pytest.mark.gpu

# (tokens, positions before them) of each chunk; lengths stand on and beside the edges of tiles
PASSES = {
    "one token": [(1, 0)],
    "a token after much": [(1, 700)],
    "few": [(2, 0), (17, 0), (1, 0)],
    "a tile": [(128, 0)],
    "beside tiles": [(127, 0), (129, 0), (255, 0), (257, 0)],
    "one long": [(2048, 0)],
    "equal": [(1024, 0)] * 3,
    "equal after a context": [(1024, 512)] * 2,
    "two runs": [(1024, 0), (1024, 0), (1280, 256)],
    "chunked": [(128, 1), (1, 128), (17, 333), (300, 1000), (64, 64), (129, 127)],
    "odd": [(2048, 0), (1, 0), (777, 1234), (1, 2047), (130, 3)],
}


def passes() -> list:  # type: ignore[type-arg]
    return [pytest.param(chunks, id=name) for name, chunks in PASSES.items()]


def usable(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    try:
        choose_backend(backend, dtype, head_dim, "cuda")
    except ValueError as error:
        pytest.skip(str(error))


def draw(
    chunks: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, block: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, PrefillBatch]:
    """Queries, a cache whose blocks are dealt at random and poisoned where no chunk writes, and the batch."""
    generator = torch.Generator("cuda").manual_seed(seed)
    lengths = [tokens + context for tokens, context in chunks]
    needed = [-(-length // block) for length in lengths]
    order = np.random.default_rng(seed).permutation(sum(needed) + 3)
    tables = np.split(order[: sum(needed)], np.cumsum(needed)[:-1])
    slots = [
        (table[:, None] * block + np.arange(block)).reshape(-1)[:length]
        for table, length in zip(tables, lengths, strict=True)
    ]
    shape = (len(order) * block, kv_heads, dim)
    k_cache, v_cache = (torch.full(shape, torch.nan, device="cuda", dtype=dtype) for _ in range(2))
    used = torch.as_tensor(np.concatenate(slots), device="cuda")
    k_cache[used] = (1.5 * torch.randn(len(used), *shape[1:], device="cuda", generator=generator)).to(dtype)
    v_cache[used] = torch.randn(len(used), *shape[1:], device="cuda", generator=generator).to(dtype)
    tokens = [tokens for tokens, _ in chunks]
    q = torch.randn(sum(tokens), heads, dim, device="cuda", generator=generator).to(dtype)
    return q, k_cache, v_cache, PrefillBatch.build(tokens, slots, "cuda")


def exact(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PrefillBatch, scale: float) -> Tensor:
    """In float64, one KV head at a time."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    share = q.shape[1] // k_cache.shape[1]
    first = first_k = 0
    for q_len, k_len in zip(batch.q_lens, batch.k_lens, strict=True):
        slots = batch.slots[first_k : first_k + k_len]
        hidden = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).triu_(k_len - q_len + 1)
        for kv_head in range(k_cache.shape[1]):
            own = q[first : first + q_len, kv_head * share : (kv_head + 1) * share].double().transpose(0, 1)
            scores = (own @ k_cache[slots, kv_head].double().T).mul_(scale).masked_fill_(hidden, -torch.inf)
            part = scores.softmax(-1) @ v_cache[slots, kv_head].double()
            out[first : first + q_len, kv_head * share : (kv_head + 1) * share] = part.transpose(0, 1)
        first, first_k = first + q_len, first_k + k_len
    return out


def assert_near(out: Tensor, expected: Tensor) -> None:
    """Each row against its own size: a row that is wrong may not hide among many that are right."""
    assert not out.isnan().any(), f"{out.isnan().any(-1).any(-1).sum()} rows are NaN"
    rounding = torch.finfo(out.dtype).eps
    error = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    worst = error.argmax().item()
    place = (worst // out.shape[1], worst % out.shape[1])
    # P and the result are rounded to the dtype: half an eps each at most, far less over a whole row
    assert error.max() < rounding, f"row and head {place} are off by {error.max():.2e} of their norm"


@pytest.mark.parametrize("chunks", passes())
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"sdpa"}))
def test_backend_equals_float64(backend: str, dtype: torch.dtype, dim: int, chunks: list[tuple[int, int]]) -> None:
    usable(backend, dtype, dim)
    for heads, kv_heads, block, seed in ((8, 2, 16, 1), (5, 1, 1, 2), (3, 3, 128, 3)):
        inputs = draw(chunks, heads, kv_heads, dim, dtype, block, seed)
        try:
            out = prefill_attention(*inputs, dim**-0.5, backend)
        except RuntimeError as fault:
            if backend == "flash_attn" and "this build has" in str(fault):
                pytest.skip(f"flash-attn was built for less: {fault}")
            raise
        assert_near(out, exact(*inputs, dim**-0.5))
        again = prefill_attention(*inputs, dim**-0.5, backend)
        assert torch.equal(out, again)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loudness", [3, 12])
def test_kernel_follows_maxima_that_rise_far(loudness: float, dtype: torch.dtype, dim: int) -> None:
    """The kernel goes from the last keys to the first and keeps old maxima while new ones are little higher."""
    usable("kernel", dtype, dim)
    q, k_cache, v_cache, batch = draw([(300, 1500), (777, 0)], 8, 2, dim, dtype, 16, 6)
    k_cache *= torch.linspace(1.5, 0.5, len(k_cache), device="cuda").to(dtype)[:, None, None]
    inputs = (loudness * q, k_cache, v_cache, batch)
    assert_near(prefill_attention(*inputs, dim**-0.5, "kernel"), exact(*inputs, dim**-0.5))


@pytest.mark.parametrize("chunks", passes())
def test_float32_is_exact_to_its_own_rounding(chunks: list[tuple[int, int]]) -> None:
    inputs = draw(chunks, 4, 2, 64, torch.float32, 16, 3)
    name, _ = choose_backend("auto", torch.float32, 64, "cuda")
    out = prefill_attention(*inputs, 0.125, name)
    torch.testing.assert_close(out.double(), exact(*inputs, 0.125), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_capturable(backend: str) -> None:
    """What stays on the device can be captured and replayed over new values."""
    usable(backend, torch.bfloat16, 128)
    inputs = draw([(1024, 256), (1024, 256)], 8, 2, 128, torch.bfloat16, 16, 4)
    prefill_attention(*inputs, 0.1, backend)  # libraries make their plans and handles outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prefill_attention(*inputs, 0.1, backend)
    inputs[0].copy_(torch.randn_like(inputs[0]))
    out.fill_(torch.nan)
    graph.replay()
    assert_near(out, exact(*inputs, 0.1))


@pytest.mark.parametrize(
    ("kv_heads", "dim", "dtype"),
    [(8, 128, torch.bfloat16), (1, 8, torch.float16), (3, 20, torch.float32), (1, 7, torch.float16)],
)
@pytest.mark.parametrize("count", [1, 17, 4099])
def test_gathering_copies_to_the_bit(kv_heads: int, dim: int, dtype: torch.dtype, count: int) -> None:
    k_cache, v_cache = torch.randn(2, 5000, kv_heads, dim, device="cuda").to(dtype).unbind(0)
    slots = torch.randint(5000, (count,), device="cuda")
    slots[-1] = 4999
    for out, expected in zip(
        gather_kv(k_cache, v_cache, slots), gather_kv_reference(k_cache, v_cache, slots), strict=True
    ):
        assert torch.equal(out, expected)
