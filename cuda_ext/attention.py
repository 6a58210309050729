"""Attention over the paged KV cache.

Decoding reads a group's prefix once for all its candidates: the part over the prefix is computed for the
candidates' query heads together, the part over each candidate's own suffix apart, and the two are merged by
their log-sum-exp (the split-KV merge of FlashDecoding; Hydragen, Juravsky et al. 2024, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefillChunk:
    """Consecutive tokens of one sequence.

    Attributes:
        first, last: its rows in the batch.
        slots: [context + last - first] int64, where K and V of all its positions lie, this chunk's at the end.
    """

    first: int
    last: int
    slots: Tensor


@dataclass(frozen=True)
class DecodeGroups:
    """Candidates that decode one token each, ordered by group.

    Attributes:
        group_rows: [groups, most candidates] int64, rows of the decode queries; padded with any valid row.
        row_group, row_place: [rows] int64, where each row stands in group_rows.
        prefix_slots: [groups, longest prefix] int64, padded with any valid slot.
        prefix_mask: [groups, longest prefix] float32, 0 or -inf where padded.
        suffix_slots: [rows, longest suffix] int64, the current token's slot included.
        suffix_mask: [rows, longest suffix] float32, 0 or -inf where padded.
    """

    group_rows: Tensor
    row_group: Tensor
    row_place: Tensor
    prefix_slots: Tensor
    prefix_mask: Tensor
    suffix_slots: Tensor
    suffix_mask: Tensor


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, chunks: list[PrefillChunk], scale: float) -> Tensor:
    """Causal attention of each chunk over its sequence so far.

    Args:
        q: [tokens, heads, head_dim].
        k_cache, v_cache: [num_slots, kv_heads, head_dim].
        scale: multiplies the scores.

    Returns:
        [tokens, heads, head_dim]; rows that no chunk covers are left undefined.
    """
    out = torch.empty_like(q)
    for chunk in chunks:
        length, total = chunk.last - chunk.first, chunk.slots.shape[0]
        mask = None
        if 1 < length < total:
            mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril_(total - length)
        part = torch.nn.functional.scaled_dot_product_attention(
            q[chunk.first : chunk.last].transpose(0, 1)[None],
            k_cache[chunk.slots].transpose(0, 1)[None],
            v_cache[chunk.slots].transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=length == total,
            scale=scale,
            enable_gqa=q.shape[1] != k_cache.shape[1],
        )
        out[chunk.first : chunk.last] = part[0].transpose(0, 1)
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


def group_decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: DecodeGroups, scale: float) -> Tensor:
    """One query token a row over its group's prefix and its own suffix.

    Args:
        q: [rows, heads, head_dim].
        k_cache, v_cache: [num_slots, kv_heads, head_dim]; the rows' own K and V are written already.
        scale: multiplies the scores.

    Returns:
        [rows, heads, head_dim] in q's dtype.
    """
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    share = heads // kv_heads
    num_groups, most = groups.group_rows.shape
    by_head = q.view(rows, kv_heads, share, head_dim)

    folded = by_head[groups.group_rows].permute(0, 2, 1, 3, 4).reshape(num_groups, kv_heads, most * share, head_dim)
    out, lse = partial_attention(
        folded,
        k_cache[groups.prefix_slots].transpose(1, 2),
        v_cache[groups.prefix_slots].transpose(1, 2),
        groups.prefix_mask,
        scale,
    )
    out = out.view(num_groups, kv_heads, most, share, head_dim)[groups.row_group, :, groups.row_place]
    lse = lse.view(num_groups, kv_heads, most, share)[groups.row_group, :, groups.row_place]

    suffix_out, suffix_lse = partial_attention(
        by_head,
        k_cache[groups.suffix_slots].transpose(1, 2),
        v_cache[groups.suffix_slots].transpose(1, 2),
        groups.suffix_mask,
        scale,
    )
    return merge_attention(out, lse, suffix_out, suffix_lse).to(q.dtype).reshape(rows, heads, head_dim)
