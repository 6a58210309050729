"""Decode attention from flash-attn's stock kernels at the lengths of a row: what group decode attention is against.

Two ways: ``flash_attn_unshared``, as serving engines do, every candidate reads its prompt's pages by itself; and
``flash_attn_two_part``, the candidates of a prompt folded into the queries of one sequence over it, then each over its
own tokens, and both merged by their log-sum-exp (Hydragen, Juravsky et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor

from benchmarks.rollout_engines import Refused
from benchmarks.rollout_rows import Row
from cuda_ext.decode_attention import group_decode_attention
from cuda_ext.decode_groups import build_decode_groups
from ember_ray.model.qwen3_config import Qwen3Config

PEERS = ("flash_attn_two_part", "flash_attn_unshared")

PAGE = 256
"""Tokens of a page, the least that flash-attn takes."""

TOLERANCE = 2e-2
"""Of outputs in half precision whose values are around 0.05 and at most about 1."""


def peer_calls(name: str, row: Row, config: Qwen3Config, device: str, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    """One call of one layer; its pages are many times larger than the L2 cache.

    Raises:
        Refused: the lengths do not fit pages, there is no flash-attn, or it computes something else than we do.
    """
    if row.prompt % PAGE:
        raise Refused(f"prompts of {row.prompt} tokens are no whole pages of {PAGE}")
    try:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
    except ImportError as fault:
        raise Refused(f"flash-attn cannot be imported here: {fault}") from fault
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    share, scale = heads // kv_heads, dim**-0.5
    prompt_pages, own_pages = row.prompt // PAGE, -(-row.gen // PAGE)
    num_pages = row.prompts * prompt_pages + row.candidates * own_pages
    generator = torch.Generator().manual_seed(0)
    pages = torch.randperm(num_pages, generator=generator, dtype=torch.int32)
    prefix_table = pages[: row.prompts * prompt_pages].view(row.prompts, prompt_pages)
    own_table = pages[row.prompts * prompt_pages :].view(row.candidates, own_pages)
    groups = build_decode_groups(
        prefix_table.tolist(), [row.prompt] * row.prompts, [row.n] * row.prompts, own_table.tolist(),
        [row.gen] * row.candidates, block_size=PAGE, heads_per_kv_head=share,
    ).to(device)  # fmt: skip
    prefix_table, own_table = prefix_table.to(device), own_table.to(device)
    whole_table = torch.cat((prefix_table.repeat_interleave(row.n, 0), own_table), dim=1)
    on_device = torch.Generator(device).manual_seed(0)
    shape = (num_pages, PAGE, kv_heads, dim)
    k, v = (torch.empty(shape, dtype=dtype, device=device).normal_(generator=on_device) for _ in range(2))
    q = torch.empty(row.candidates, heads, dim, dtype=dtype, device=device).normal_(generator=on_device)
    folded = row.n * share
    starts_q = torch.arange(row.prompts + 1, dtype=torch.int32, device=device) * folded
    starts_k = torch.arange(row.prompts + 1, dtype=torch.int32, device=device) * row.prompt
    own_lens = torch.full((row.candidates,), row.gen, dtype=torch.int32, device=device)

    def unshared() -> Tensor:
        return flash_attn_with_kvcache(
            q[:, None], k, v, cache_seqlens=own_lens + row.prompt, block_table=whole_table, softmax_scale=scale
        )[:, 0]

    def two_part() -> Tensor:
        by_group = q.view(row.prompts, row.n, kv_heads, share, dim).transpose(2, 3)
        out, lse, _ = flash_attn_varlen_func(
            by_group.reshape(-1, kv_heads, dim), k, v, starts_q, starts_k, folded, row.prompt, softmax_scale=scale,
            return_attn_probs=True, block_table=prefix_table,
        )  # fmt: skip
        own, own_lse = flash_attn_with_kvcache(
            q[:, None], k, v, cache_seqlens=own_lens, block_table=own_table, softmax_scale=scale,
            return_softmax_lse=True,
        )  # fmt: skip
        out = out.view(row.candidates, share, kv_heads, dim).transpose(1, 2)
        lse = lse.view(kv_heads, row.candidates, share).transpose(0, 1)
        weight = torch.sigmoid(own_lse.view(row.candidates, kv_heads, share) - lse).to(dtype)
        return torch.lerp(out, own.view(row.candidates, kv_heads, share, dim), weight[..., None]).flatten(1, 2)

    call = two_part if name == "flash_attn_two_part" else unshared
    ours = group_decode_attention(q, k.flatten(0, 1), v.flatten(0, 1), groups, scale)
    farthest = float((call().float() - ours.float()).abs().max())
    if not farthest < TOLERANCE:
        raise Refused(f"{name} is {farthest:.3g} away from group decode attention on the same cache")
    return [call]


def peer_version() -> str:
    return metadata.version("flash_attn")
