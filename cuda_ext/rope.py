"""q/k norm, rotary positions and the write of K and V into the paged cache, in one pass over qkv."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ext.rms_norm import rms_norm


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
        qkv: [tokens, (heads + 2 * kv_heads) * head_dim] of the fused projection.
        q_weight, k_weight: [head_dim] norm weights.
        table: from :func:`rope_table`.
        positions: [tokens] int64.
        k_cache, v_cache: [num_slots, kv_heads, head_dim], written in place.
        slots: [tokens] int64, where each token's K and V go.

    Returns:
        q [tokens, heads, head_dim].
    """
    kv_heads, head_dim = k_cache.shape[1:]
    per_head = qkv.view(qkv.shape[0], -1, head_dim)
    heads = per_head.shape[1] - 2 * kv_heads
    cos, sin = table[positions].unsqueeze(2).unbind(1)
    q = _rotate(rms_norm(per_head[:, :heads], q_weight, eps), cos, sin)
    k = _rotate(rms_norm(per_head[:, heads : heads + kv_heads], k_weight, eps), cos, sin)
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, per_head[:, heads + kv_heads :])
    return q
