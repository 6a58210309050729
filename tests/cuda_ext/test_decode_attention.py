from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cuda_ext.decode_attention import group_decode_attention, merge_attention, partial_attention
from cuda_ext.decode_groups import DecodeArrays, DecodeCapacity, build_decode_groups

Group = tuple[int, list[int]]  # prefix length, suffix length of each candidate

groups_strategy = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=5)), min_size=1, max_size=4
)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query [heads, dim] over keys [n, kv_heads, dim], in float64."""
    share = q.shape[0] // k.shape[1]
    k, v = (t.double().repeat_interleave(share, 1) for t in (k, v))
    weights = (torch.einsum("hd,nhd->hn", q.double(), k) * scale).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, v)


def build(groups: list[Group], block_size: int, seed: int = 0, steps: int = 1, **options: object) -> DecodeArrays:
    """Decode groups over blocks in random order."""
    counts = [-(-prefix // block_size) for prefix, _ in groups]
    suffixes = [length for _, lengths in groups for length in lengths]
    counts += [-(-(length + steps - 1) // block_size) for length in suffixes]
    order = np.split(np.random.default_rng(seed).permutation(sum(counts)), np.cumsum(counts)[:-1])
    tables = [blocks.tolist() for blocks in order]
    return build_decode_groups(
        tables[: len(groups)],
        [prefix for prefix, _ in groups],
        [len(lengths) for _, lengths in groups],
        tables[len(groups) :],
        suffixes,
        block_size=block_size,
        steps=steps,
        **{"heads_per_kv_head": 1, **options},  # type: ignore[arg-type]
    )


def sequences(arrays: DecodeArrays) -> list[np.ndarray]:
    """Per row that is no padding, the slots of its tokens."""
    parts, size = arrays.parts(), arrays.block_size

    def slots(blocks: np.ndarray, start: int, length: int) -> np.ndarray:
        places = np.arange(length)
        return blocks[start + places // size].astype(np.int64) * size + places % size

    result = []
    for row, group in enumerate(parts["row_group"]):
        if group >= 0:
            prefix = slots(parts["prefix_blocks"], parts["prefix_starts"][group], parts["prefix_lens"][group])
            suffix = slots(parts["suffix_blocks"], parts["suffix_starts"][row], parts["suffix_lens"][row])
            result.append(np.concatenate((prefix, suffix)))
    return result


def spacious(capacity: DecodeCapacity, rows: int) -> DecodeCapacity:
    return DecodeCapacity(
        capacity.rows + rows,
        capacity.groups + 2,
        capacity.prefix_blocks + 3,
        capacity.suffix_blocks + 5,
        capacity.items + 7,
        capacity.partials + 1,
    )


@settings(max_examples=40, deadline=None)
@given(
    groups=groups_strategy,
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (8, 8)]),
    dim=st.sampled_from([8, 16]),
    block_size=st.sampled_from([1, 4, 16]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_group_decode_equals_plain_attention(
    groups: list[Group], heads: tuple[int, int], dim: int, block_size: int, padding: int, seed: int
) -> None:
    arrays = build(groups, block_size, seed)
    if padding:
        arrays = build(groups, block_size, seed, capacity=spacious(arrays.capacity, padding))
    generator = torch.Generator().manual_seed(seed)
    rows = sequences(arrays)
    used = np.unique(np.concatenate(rows))
    # what no row owns is poisoned: it must not reach any output
    k_cache, v_cache = torch.full((2, int(used.max()) + 1 + block_size, heads[1], dim), torch.nan).unbind(0)
    for cache in (k_cache, v_cache):
        cache[used] = 2 * torch.randn(len(used), heads[1], dim, generator=generator)
    q = torch.randn(len(rows) + padding, heads[0], dim, generator=generator)
    out = group_decode_attention(q, k_cache, v_cache, arrays.to("cpu"), dim**-0.5)
    for row, slots in enumerate(rows):
        expected = plain(q[row], k_cache[slots], v_cache[slots], dim**-0.5)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-5)
    assert out.shape == q.shape and bool((out[len(rows) :] == 0).all())


def test_a_batch_of_padding_gives_zeros() -> None:
    arrays = build([(3, [1])], 4)
    parts = arrays.parts()
    parts["row_group"][:], parts["suffix_lens"][:], parts["num_items"][:] = -1, 0, 0
    out = group_decode_attention(torch.ones(1, 2, 8), *torch.ones(2, 8, 2, 8).unbind(0), arrays.to("cpu"), 1.0)
    assert bool((out == 0).all())


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 700), st.lists(st.integers(1, 300), min_size=1, max_size=40)), min_size=1, max_size=4
    ),
    share=st.sampled_from([1, 4, 8, 16]),
    steps=st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_items_cover_every_token_once_at_every_step(groups: list[Group], share: int, steps: int, seed: int) -> None:
    split = 128
    arrays = build(groups, 16, seed, steps, heads_per_kv_head=share, split_tokens=split)
    parts = arrays.parts()
    items = parts["items"][: parts["num_items"][0]]
    assert (np.diff(items[:, 5]) <= 0).all(), "long items come first"
    assert items[:, 1].max(initial=1) <= max(1, 64 // share)
    rows = np.arange(arrays.capacity.rows)
    prefix_len = parts["prefix_lens"][parts["row_group"]]
    for step in {0, steps // 2, steps - 1}:
        length = parts["suffix_lens"] + step
        seen: dict[tuple[int, int], int] = {}  # (row, partial) -> tokens
        for first, count, partial, kind, block, tokens, live_above, _ in items.tolist():
            if kind == 1 and length[first] <= live_above:
                continue
            for row in range(first, first + count):
                assert (row, partial) not in seen
                seen[row, partial] = tokens
                prefix_splits = -(-int(prefix_len[row]) // split)
                start = parts["prefix_starts"][parts["row_group"][row]] if kind == 0 else parts["suffix_starts"][row]
                piece = partial if kind == 0 else partial - prefix_splits
                assert piece >= 0 and block == start + piece * split // 16
                assert tokens == min(split, prefix_len[row] - piece * split) if kind == 0 else tokens == split
        own = (length - 1) // split
        splits = (prefix_len + split - 1) // split + own
        assert sorted(seen) == [(int(row), place) for row in rows for place in range(splits[row])]
        covered = np.zeros(len(rows), dtype=np.int64)
        for (row, _), tokens in seen.items():
            covered[row] += tokens
        assert (covered == prefix_len + own * split).all()
        ends = np.append(parts["partial_starts"][1:], arrays.capacity.partials)
        assert (parts["partial_starts"] + splits <= ends).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_lens": [0]}, "at least 1 token"),
        ({"suffix_lens": [1, 0]}, "at least 1 token"),
        ({"suffix_lens": [1, 5]}, "too short for its tokens after 2 steps"),
        ({"prefix_lens": [9]}, "too short"),
        ({"num_rows": [1]}, "do not match"),
        ({"num_rows": [2, 1]}, "do not match"),
        ({"capacity": DecodeCapacity(1, 1, 9, 9, 9, 9)}, "more than the given"),
    ],
)
def test_unfit_groups_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "prefix_blocks": [[0, 1]],
        "prefix_lens": [8],
        "num_rows": [2],
        "suffix_blocks": [[2], [3, 4]],
        "suffix_lens": [1, 4],
    }
    options = {"block_size": 4, "heads_per_kv_head": 1, "steps": 2}
    build_decode_groups(**arguments, **options)  # type: ignore[arg-type]
    if change.get("suffix_lens") == [1, 5]:
        arguments["suffix_blocks"] = [[2], [3]]
    with pytest.raises(ValueError, match=message):
        build_decode_groups(**{**arguments, **change}, **options)  # type: ignore[arg-type]


def test_unfit_shapes_are_refused() -> None:
    groups = build([(3, [1])], 4).to("cpu")
    caches = torch.ones(2, 8, 2, 8).unbind(0)
    with pytest.raises(ValueError, match="do not fit K"):
        group_decode_attention(torch.ones(1, 3, 8), *caches, groups, 1.0)
    with pytest.raises(ValueError, match="for 1 rows"):
        group_decode_attention(torch.ones(2, 2, 8), *caches, groups, 1.0)


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
