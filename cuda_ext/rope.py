"""q/k norm, rotary positions and the write of K and V into the paged cache, in one pass over qkv."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ext.library import launch
from cuda_ext.rms_norm import rms_norm_reference


def rope_table(inv_freq: Tensor, attention_factor: float, max_positions: int) -> Tensor:
    """Cosines and sines of all positions.

    Args:
        inv_freq: [head_dim / 2] float32, radians a position (Su et al. 2021, section 3.2.2).
        attention_factor: multiplies both (YaRN's attention temperature; 1 without scaling).

    Returns:
        [max_positions, 2, head_dim / 2] float32, cosines then sines.
    """
    angles = torch.arange(max_positions, dtype=torch.float32, device=inv_freq.device)[:, None] * inv_freq.float()
    return torch.stack((angles.cos(), angles.sin()), dim=1) * attention_factor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def qk_norm_rope_write(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Norms and rotates q and k per head, and stores k and v at their slots.

    Args:
        qkv: [tokens, (heads + 2 * kv_heads) * head_dim] of the fused projection; rows may lie apart.
        q_weight, k_weight: [head_dim] norm weights. The GPU takes a head_dim that is a multiple of 8 up to 256.
        table: from :func:`rope_table`.
        positions: [tokens] int64.
        k_cache, v_cache: [num_slots, kv_heads, head_dim], written in place.
        slots: [tokens] int64, where each token's K and V go.

    Returns:
        q [tokens, heads, head_dim].
    """
    if not qkv.is_cuda:
        return qk_norm_rope_write_reference(qkv, q_weight, k_weight, eps, table, positions, k_cache, v_cache, slots)
    tokens, width = qkv.shape
    kv_heads, head_dim = k_cache.shape[1:]
    heads = width // head_dim - 2 * kv_heads
    _check(qkv, q_weight, k_weight, table, positions, k_cache, v_cache, slots)
    q = qkv.new_empty(tokens, heads, head_dim)
    if tokens:
        launch(
            "qk_norm_rope_write",
            *(qkv, qkv.stride(0), q_weight, k_weight, float(eps), table, positions),
            *(k_cache, k_cache.stride(0), v_cache, v_cache.stride(0), slots, q),
            *(tokens, heads, kv_heads, head_dim, qkv.dtype),
        )
    return q


def _check(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> None:
    """What the kernel relies on."""
    tokens, width = qkv.shape
    kv_heads, head_dim = k_cache.shape[1:]
    wide = 16 // qkv.element_size()  # elements of a 16-byte access
    if head_dim % 8 or head_dim > 256 or width % head_dim or width <= 2 * kv_heads * head_dim:
        raise ValueError(
            f"qk_norm_rope_write: qkv {tuple(qkv.shape)} does not hold heads of {head_dim} values and 2 x {kv_heads} "
            "heads for K and V; on the GPU a head has a multiple of 8 values, at most 256"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != qkv.dtype or cache.shape != k_cache.shape or cache.stride()[1:] != (head_dim, 1):
            raise ValueError(
                f"qk_norm_rope_write: {name} {tuple(cache.shape)} {cache.dtype} must be [slots, {kv_heads}, {head_dim}]"
                f" in {qkv.dtype} with whole slots"
            )
    for name, strided in (("qkv", qkv), ("k_cache", k_cache), ("v_cache", v_cache)):
        if strided.stride(-1) != 1 or strided.stride(0) % wide or strided.data_ptr() % 16:
            raise ValueError(f"qk_norm_rope_write: rows of {name} must begin at multiples of 16 bytes")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.dtype != qkv.dtype or weight.shape != (head_dim,) or not weight.is_contiguous():
            raise ValueError(
                f"qk_norm_rope_write: {name} must be [{head_dim}] in {qkv.dtype}, not {tuple(weight.shape)}"
            )
    if table.dtype != torch.float32 or table.shape[1:] != (2, head_dim // 2) or not table.is_contiguous():
        raise ValueError("qk_norm_rope_write: table must come from rope_table for this head size")
    for name, index in (("positions", positions), ("slots", slots)):
        if index.dtype != torch.int64 or index.shape != (tokens,) or not index.is_contiguous():
            raise ValueError(f"qk_norm_rope_write: {name} must be [{tokens}] int64, not {tuple(index.shape)}")


def qk_norm_rope_write_reference(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """:func:`qk_norm_rope_write` in plain torch, on any device."""
    kv_heads, head_dim = k_cache.shape[1:]
    per_head = qkv.view(qkv.shape[0], -1, head_dim)
    heads = per_head.shape[1] - 2 * kv_heads
    cos, sin = table[positions].unsqueeze(2).unbind(1)
    q = _rotate(rms_norm_reference(per_head[:, :heads], q_weight, eps), cos, sin)
    k = _rotate(rms_norm_reference(per_head[:, heads : heads + kv_heads], k_weight, eps), cos, sin)
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, per_head[:, heads + kv_heads :])
    return q
