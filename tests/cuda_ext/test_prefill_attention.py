from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cuda_ext.prefill_attention import BACKENDS, PrefillBatch, choose_backend, gather_kv, prefill_attention


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Queries [q_len, heads, dim], the last of the positions of k and v [k_len, kv_heads, dim], in float64."""
    share = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(share, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    place = torch.arange(len(k) - len(q), len(k))
    scores.masked_fill_(torch.arange(len(k))[None, :] > place[:, None], -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (8, 8)]),
    dim=st.sampled_from([7, 16]),
    seed=st.integers(0, 2**16),
)
def test_packed_chunks_equal_each_sequence_alone(
    chunks: list[tuple[int, int]], heads: tuple[int, int], dim: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = [tokens + context for tokens, context in chunks]
    order = torch.randperm(sum(lengths) + 5, generator=generator)
    # what no chunk names is poisoned: it must not reach any output
    k_cache, v_cache = torch.full((2, sum(lengths) + 5, heads[1], dim), torch.nan).unbind(0)
    slots = order[: sum(lengths)].split(lengths)
    for cache in (k_cache, v_cache):
        cache[order[: sum(lengths)]] = 2 * torch.randn(sum(lengths), heads[1], dim, generator=generator)
    q = torch.randn(sum(tokens for tokens, _ in chunks), heads[0], dim, generator=generator)
    batch = PrefillBatch.build([tokens for tokens, _ in chunks], [s.numpy() for s in slots], "cpu")

    out = prefill_attention(q, k_cache, v_cache, batch, 0.3, "sdpa")

    for part, own, at in zip(out.split(batch.q_lens), q.split(batch.q_lens), slots, strict=True):
        expected = exact(own, k_cache[at], v_cache[at], 0.3)
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-5)


def test_chunks_of_a_prompt_equal_the_whole_prompt() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k_cache, v_cache = (torch.randn(60, h, 16, generator=generator) for h in (4, 2, 2))
    slots = torch.randperm(60, generator=generator).numpy()
    whole = prefill_attention(q, k_cache, v_cache, PrefillBatch.build([60], [slots], "cpu"), 0.25, "sdpa")
    # all three chunks in one pass: the later ones see what the earlier ones wrote
    batch = PrefillBatch.build([13, 1, 46], [slots[:13], slots[:14], slots], "cpu")
    torch.testing.assert_close(prefill_attention(q, k_cache, v_cache, batch, 0.25, "sdpa"), whole)


def test_prompts_share_the_slots_of_a_prefix() -> None:
    generator = torch.Generator().manual_seed(2)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    prefix, tails = np.arange(20), [np.arange(20, 27), np.arange(27, 39)]
    k_cache, v_cache = torch.randn(2, 39, 2, 8, generator=generator).unbind(0)
    q = torch.randn(19, 4, 8, generator=generator)
    batch = PrefillBatch.build([7, 12], [np.concatenate((prefix, tail)) for tail in tails], "cpu")
    out = prefill_attention(q, k_cache, v_cache, batch, 0.4, "sdpa")
    for rows, tail in zip((slice(0, 7), slice(7, 19)), tails, strict=True):
        own = torch.as_tensor(np.concatenate((prefix, tail)))
        torch.testing.assert_close(out[rows].double(), exact(q[rows], k_cache[own], v_cache[own], 0.4), **tolerance)


def test_a_batch_says_where_each_chunk_starts() -> None:
    batch = PrefillBatch.build([3, 1, 2], [np.arange(5), np.arange(10, 14), np.arange(2)], "cpu")
    assert (batch.q_lens, batch.k_lens) == ([3, 1, 2], [5, 4, 2])
    assert (batch.cu_q.tolist(), batch.cu_k.tolist()) == ([0, 3, 4, 6], [0, 5, 9, 11])
    assert batch.slots.tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 0, 1]
    assert batch.cu_q.dtype == batch.cu_k.dtype == torch.int32 and batch.slots.dtype == torch.int64


def test_tiles_cover_every_query_once_longest_first() -> None:
    q_lens, k_lens = [300, 1, 128, 7], [300, 500, 129, 7]
    batch = PrefillBatch.build(q_lens, [np.arange(n) for n in k_lens], "cpu")
    seen = {}
    for first, queries, position, key in batch.tiles.tolist():
        assert 1 <= queries <= 128
        for i in range(queries):
            seen[first + i] = (position + i, key)
    assert seen == {
        sum(q_lens[:c]) + i: (k_lens[c] - q_lens[c] + i, sum(k_lens[:c])) for c in range(4) for i in range(q_lens[c])
    }
    work = [position + queries for _, queries, position, _ in batch.tiles.tolist()]
    assert work == sorted(work, reverse=True) and batch.tiles.dtype == torch.int32


@pytest.mark.parametrize(
    ("slots", "run"),
    [
        ([np.arange(5)], 128),
        ([np.arange(300), np.arange(7, 90)], 128),
        ([np.concatenate((np.arange(64, 80), np.arange(16)))], 16),
        ([np.concatenate((np.arange(32), np.arange(64, 80), np.arange(9))), np.arange(40)], 16),
        ([np.arange(40), np.concatenate((np.arange(64, 96), np.arange(5)))], 32),
        ([np.arange(40), np.array([3, 2, 1])], 1),
    ],
)
def test_runs_of_consecutive_slots(slots: list[np.ndarray], run: int) -> None:
    assert PrefillBatch.build([1] * len(slots), slots, "cpu").run == run


@pytest.mark.parametrize(
    ("q_lens", "k_lens", "words"),
    [
        ([2], [2, 3], "1 chunks have slots for 2"),
        ([], [], "0 chunks"),
        ([2, 0], [2, 3], "chunk 1 has 0 tokens and 3 slots"),
        ([4], [3], "chunk 0 has 4 tokens and 3 slots"),
    ],
)
def test_chunks_without_sense_are_refused(q_lens: list[int], k_lens: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PrefillBatch.build(q_lens, [np.arange(n) for n in k_lens], "cpu")


def test_tensors_that_do_not_fit_are_refused() -> None:
    batch = PrefillBatch.build([3], [np.arange(3)], "cpu")
    cache = torch.zeros(3, 2, 8)
    with pytest.raises(ValueError, match="2 queries were given for a batch of 3"):
        prefill_attention(torch.zeros(2, 4, 8), cache, cache, batch, 1.0, "sdpa")
    for q, v in ((torch.zeros(3, 3, 8), cache), (torch.zeros(3, 4, 16), cache), (torch.zeros(3, 4, 8), cache[:, :1])):
        with pytest.raises(ValueError, match="do not fit a cache"):
            prefill_attention(q, cache, v, batch, 1.0, "sdpa")


def test_gathering_picks_the_slots() -> None:
    cache = torch.arange(24.0).view(4, 2, 3)
    k, v = gather_kv(cache, -cache, torch.tensor([3, 0, 3]))
    assert torch.equal(k, cache[[3, 0, 3]]) and torch.equal(v, -k)


def test_the_choice_is_one_that_works_here() -> None:
    assert choose_backend("auto", torch.float32, 16, "cpu")[0] == "sdpa"
    assert choose_backend("sdpa", torch.bfloat16, 7, "cuda") == ("sdpa", "as requested")
    for name in set(BACKENDS) - {"sdpa"}:
        with pytest.raises(ValueError, match=f"'{name}' cannot be used: it needs a CUDA GPU, and the device is cpu"):
            choose_backend(name, torch.bfloat16, 128, "cpu")
        with pytest.raises(ValueError, match="bfloat16 or float16, not float32"):
            choose_backend(name, torch.float32, 128, "cuda")
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8 up to 256, not 257"):
        choose_backend("torch_flash", torch.float16, 257, "cuda")
    with pytest.raises(ValueError, match="head_dim must be 64 or 128, not 96"):
        choose_backend("kernel", torch.float16, 96, "cuda")
    assert choose_backend("auto", torch.float16, 256, "cuda:0")[0] == "torch_flash"
    reason = choose_backend("auto", torch.float16, 7, "cuda")[1]
    assert "multiple of 8" in reason
    with pytest.raises(ValueError, match="'fast' is not known"):
        choose_backend("fast", torch.float32, 16, "cpu")
