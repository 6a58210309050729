"""Attention of decoding candidates over the paged KV cache, each group's prefix read once for all its candidates.

The part over the prefix is computed for the candidates' query heads together, the part over each candidate's own
suffix apart, and the two are merged by their log-sum-exp (the split-KV merge of FlashDecoding; Hydragen, Juravsky et
al. 2024, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.decode_groups import MAX_KV_HEADS, DecodeGroups, PaddedGroups


def group_decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: DecodeGroups, scale: float) -> Tensor:
    """One query token a row over its group's prefix and its own suffix.

    Args:
        q: [rows, heads, head_dim].
        k_cache, v_cache: [num_slots, kv_heads, head_dim], each contiguous; the rows' own K and V are written already.
        groups: of as many rows or more; those behind are not computed.
        scale: multiplies the scores; above 0.

    Returns:
        [rows, heads, head_dim] in q's dtype; zeros for padding rows.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    if k_cache.shape != v_cache.shape or k_cache.shape[2] != head_dim or heads % kv_heads:
        raise ValueError(f"queries {tuple(q.shape)} do not fit K {tuple(k_cache.shape)} and V {tuple(v_cache.shape)}")
    if groups.capacity.rows < rows:
        raise ValueError(f"{rows} queries, but decode groups for {groups.capacity.rows} rows")
    if not q.is_cuda:
        return group_decode_attention_reference(q, k_cache, v_cache, groups, scale)
    return _launch(q, k_cache, v_cache, groups, scale)


def _launch(q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: DecodeGroups, scale: float, method: int = 0) -> Tensor:
    """Calls the kernels; ``method`` 1 is the generic kernel, 0 what fits best."""
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    if not q.dtype == k_cache.dtype == v_cache.dtype or q.dtype not in library.DTYPES:
        raise ValueError(f"decode attention takes one dtype of {list(library.DTYPES)}, not {q.dtype}, {k_cache.dtype}")
    if not (q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("decode attention needs contiguous queries and caches")
    if groups.heads_per_kv_head < heads // kv_heads:
        raise ValueError(
            f"decode groups for {groups.heads_per_kv_head} query heads a KV head do not hold {heads // kv_heads}"
        )
    out = torch.empty_like(q)
    one_launch = len(groups.arrivals) > 0 and kv_heads <= MAX_KV_HEADS and q.dtype != torch.float32 and method == 0
    dtype = torch.float32 if one_launch else torch.float16
    partials = torch.empty((max(1, groups.num_partials), heads, head_dim), dtype=dtype, device=q.device)
    stats = torch.empty((max(1, groups.num_partials), heads, 4), dtype=torch.float32, device=q.device)
    library.launch(
        "decode_attention",
        q,
        k_cache,
        v_cache,
        out,
        partials,
        stats,
        groups.row_group,
        groups.prefix_blocks,
        groups.prefix_starts,
        groups.prefix_lens,
        groups.suffix_blocks,
        groups.suffix_starts,
        groups.suffix_lens,
        groups.partial_starts,
        groups.items,
        groups.num_items,
        groups.arrivals if one_launch else None,
        groups.capacity.items,
        rows,
        heads,
        kv_heads,
        head_dim,
        groups.block_size,
        groups.split_tokens,
        q.dtype,
        method,
        float(scale),
    )
    return out


def partial_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over part of the keys, with what is needed to merge it with the rest.

    Args:
        q: [batch, kv_heads, queries, head_dim].
        k, v: [batch, kv_heads, keys, head_dim].
        mask: [batch, keys] float32, added to the scores.

    Returns:
        Output [batch, kv_heads, queries, head_dim] float32, and the log of the sum of exponentials of the scores
        [batch, kv_heads, queries] float32 (-inf, with output 0, where all keys are masked).
    """
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)).mul_(scale).add_(mask[:, None, None, :])
    top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights, v.float()).div_(total.clamp_min(torch.finfo(torch.float32).tiny))
    return out, (total.log() + top).squeeze(-1)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Joins two partial results over disjoint keys.

    Args:
        out_a, out_b: [..., head_dim] float32.
        lse_a, lse_b: [...] float32, log-sum-exp of the scores behind each; not both -inf.

    Returns:
        [..., head_dim] float32, as if the softmax had run over both sets of keys.
    """
    share_b = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)
    return torch.lerp(out_a, out_b, share_b)


def group_decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: DecodeGroups, scale: float
) -> Tensor:
    """:func:`group_decode_attention` in torch operations, float32 inside."""
    padded = groups.padded
    if padded.group_rows.shape[0] == 0:
        return torch.zeros_like(q)
    out = _attend(q if padded.rows is None else q[padded.rows], k_cache, v_cache, padded, scale)
    if padded.rows is None:
        return out
    whole = torch.zeros_like(q)
    whole[padded.rows] = out
    return whole


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, padded: PaddedGroups, scale: float) -> Tensor:
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    share = heads // kv_heads
    num_groups, most = padded.group_rows.shape
    by_head = q.view(rows, kv_heads, share, head_dim)

    folded = by_head[padded.group_rows].permute(0, 2, 1, 3, 4).reshape(num_groups, kv_heads, most * share, head_dim)
    out, lse = partial_attention(
        folded,
        k_cache[padded.prefix_slots].transpose(1, 2),
        v_cache[padded.prefix_slots].transpose(1, 2),
        padded.prefix_mask,
        scale,
    )
    out = out.view(num_groups, kv_heads, most, share, head_dim)[padded.row_group, :, padded.row_place]
    lse = lse.view(num_groups, kv_heads, most, share)[padded.row_group, :, padded.row_place]

    suffix_out, suffix_lse = partial_attention(
        by_head,
        k_cache[padded.suffix_slots].transpose(1, 2),
        v_cache[padded.suffix_slots].transpose(1, 2),
        padded.suffix_mask,
        scale,
    )
    return merge_attention(out, lse, suffix_out, suffix_lse).to(q.dtype).reshape(rows, heads, head_dim)
