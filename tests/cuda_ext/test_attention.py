from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cuda_ext.attention import (
    DecodeGroups,
    PrefillChunk,
    group_decode_attention,
    merge_attention,
    partial_attention,
    prefill_attention,
)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query [heads, dim] over keys [n, kv_heads, dim], in float64."""
    share = q.shape[0] // k.shape[1]
    k, v = (t.double().repeat_interleave(share, 1) for t in (k, v))
    weights = (torch.einsum("hd,nhd->hn", q.double(), k) * scale).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, v)


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    slots = torch.stack([torch.cat((row, row[:1].expand(width - len(row)))) for row in rows])
    mask = torch.stack([torch.where(torch.arange(width) < len(row), 0.0, -torch.inf) for row in rows])
    return slots, mask


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=5)), min_size=1, max_size=4
    ),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (8, 8)]),
    dim=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**16),
)
def test_group_decode_equals_plain_attention(
    groups: list[tuple[int, list[int]]], heads: tuple[int, int], dim: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    needed = sum(prefix + sum(suffixes) for prefix, suffixes in groups)
    order = torch.randperm(needed + 5, generator=generator)
    # what no row owns is poisoned: it must not reach any output
    k_cache, v_cache = torch.full((2, needed + 5, heads[1], dim), torch.nan).unbind(0)
    q = torch.randn(sum(len(s) for _, s in groups), heads[0], dim, generator=generator)
    taken = 0

    def take(count: int) -> Tensor:
        nonlocal taken
        slots = order[taken : taken + count]
        taken += count
        for cache in (k_cache, v_cache):
            cache[slots] = 2 * torch.randn(count, heads[1], dim, generator=generator)
        return slots

    prefixes, suffixes, row_group, row_place = [], [], [], []
    for number, (prefix, lengths) in enumerate(groups):
        prefixes.append(take(prefix))
        for place, length in enumerate(lengths):
            suffixes.append(take(length))
            row_group.append(number)
            row_place.append(place)
    group_rows = torch.zeros(len(groups), max(row_place) + 1, dtype=torch.int64)
    group_rows[row_group, row_place] = torch.arange(len(row_group))
    arranged = DecodeGroups(
        group_rows, torch.tensor(row_group), torch.tensor(row_place), *padded(prefixes), *padded(suffixes)
    )
    out = group_decode_attention(q, k_cache, v_cache, arranged, dim**-0.5)
    for row, number in enumerate(row_group):
        slots = torch.cat((prefixes[number], suffixes[row]))
        torch.testing.assert_close(
            out[row].double(), plain(q[row], k_cache[slots], v_cache[slots], dim**-0.5), rtol=1e-5, atol=1e-5
        )


@settings(max_examples=30, deadline=None)
@given(context=st.integers(0, 30), length=st.integers(1, 20), seed=st.integers(0, 999))
def test_prefill_chunk_is_causal_over_its_context(context: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(60, generator=generator)[: context + length]
    k_cache, v_cache = torch.randn(2, 60, 2, 8, generator=generator).unbind(0)
    q = torch.randn(3 + length, 4, 8, generator=generator)
    out = prefill_attention(q, k_cache, v_cache, [PrefillChunk(3, 3 + length, slots)], 0.3)
    for row in range(length):
        seen = slots[: context + row + 1]
        torch.testing.assert_close(
            out[3 + row].double(), plain(q[3 + row], k_cache[seen], v_cache[seen], 0.3), rtol=1e-5, atol=1e-5
        )


def test_merge_is_exact_where_one_side_dominates_or_is_empty() -> None:
    q = torch.randn(1, 1, 2, 8) * 50  # scores far outside what exp can hold
    k, v = torch.randn(2, 1, 1, 30, 8).unbind(0)
    whole, lse = partial_attention(q, k, v, torch.zeros(1, 30), 1.0)
    first = partial_attention(q, k[:, :, :11], v[:, :, :11], torch.zeros(1, 11), 1.0)
    second = partial_attention(q, k[:, :, 11:], v[:, :, 11:], torch.zeros(1, 19), 1.0)
    torch.testing.assert_close(merge_attention(*first, *second), whole)
    nothing = partial_attention(q, k, v, torch.full((1, 30), -torch.inf), 1.0)
    assert bool((nothing[1] == -torch.inf).all()) and bool((nothing[0] == 0).all())
    torch.testing.assert_close(merge_attention(*nothing, whole, lse), whole)
    torch.testing.assert_close(merge_attention(whole, lse, *nothing), whole)
