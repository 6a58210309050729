"""Prefill attention over the paged KV cache: chunks of several prompts, packed one after the other in one pass.

Chunk c brings q_lens[c] query tokens, which are the last positions of a sequence of k_lens[c] positions so far. Its
token i therefore sees positions 0 to k_lens[c] - q_lens[c] + i: causal with bottom-right alignment, as FlashAttention-2
(Dao 2023) has it. All K and V of the pass are in the cache before, so a chunk may attend to what another chunk wrote.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cuda_ext import library

BACKENDS = ("kernel", "cudnn", "torch_flash", "sdpa", "flash_attn")

TILE = 128
"""Queries, and positions, that the kernel takes at a time."""

SHORTEST_RUN = 8
"""Of consecutive slots, that the kernel reads from the cache itself; K and V in shorter ones are gathered first."""

CUDNN_GRAIN = 256
"""cuDNN prepares a plan for each new shape, which costs milliseconds of the host: only lengths that are multiples of
this, and at least 4 of it, go there."""


@dataclass(frozen=True)
class PrefillBatch:
    """The chunks of one pass; the same for all layers.

    Attributes:
        q_lens: tokens of each chunk, on the host.
        k_lens: positions of each chunk's sequence so far, its own tokens included, on the host.
        cu_q, cu_k: [chunks + 1] int32, where each chunk starts among the packed queries and the packed positions.
        slots: [sum of k_lens] int64, KV slot of every position of every chunk's sequence, in order.
        tiles: [tiles, 4] int32, the work of the kernel, longest first: at most TILE consecutive queries of a chunk
            each, as first packed query, queries, position of the first, packed position 0 of its sequence.
        run: a power of two up to TILE; the slots of positions i * run to (i + 1) * run - 1 of every sequence, as far
            as it has them, are consecutive.
    """

    q_lens: list[int]
    k_lens: list[int]
    cu_q: Tensor
    cu_k: Tensor
    slots: Tensor
    tiles: Tensor
    run: int

    @classmethod
    def build(
        cls, q_lens: Sequence[int], slots_per_chunk: Sequence[np.ndarray], device: str | torch.device
    ) -> PrefillBatch:
        """One copy to the device for the whole pass.

        Args:
            q_lens: tokens of each chunk, each at least 1.
            slots_per_chunk: [k_len] int64 for each chunk, the KV slots of its sequence's positions from 0 on.
        """
        k_lens = [len(slots) for slots in slots_per_chunk]
        if not q_lens or len(q_lens) != len(k_lens):
            raise ValueError(f"{len(q_lens)} chunks have slots for {len(k_lens)}: give each chunk its slots")
        for chunk, (q_len, k_len) in enumerate(zip(q_lens, k_lens, strict=True)):
            if not 1 <= q_len <= k_len:
                raise ValueError(f"chunk {chunk} has {q_len} tokens and {k_len} slots: it needs 1 <= tokens <= slots")
        q, k = np.asarray(q_lens, np.int32), np.asarray(k_lens, np.int32)
        cu_q, cu_k = (np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32) for lengths in (q, k))
        tiles = _tiles(q, k, cu_q, cu_k)
        slots = np.concatenate(slots_per_chunk).astype(np.int64, copy=False)
        # the kernel reads a tile as 16 bytes and a slot as 8: the larger ones first keep all of them aligned
        parts = [tiles.reshape(-1), slots.view(np.int32), cu_q, cu_k]
        device = torch.device(device)
        host = torch.empty(sum(map(len, parts)), dtype=torch.int32, pin_memory=device.type == "cuda")
        np.concatenate(parts, out=host.numpy())
        on_device = host.to(device, non_blocking=True).split([len(part) for part in parts])
        return cls(
            list(q_lens),
            k_lens,
            cu_q=on_device[2],
            cu_k=on_device[3],
            slots=on_device[1].view(torch.int64),
            tiles=on_device[0].view(-1, 4),
            run=_run(slots, cu_k),
        )


def _tiles(q: np.ndarray, k: np.ndarray, cu_q: np.ndarray, cu_k: np.ndarray) -> np.ndarray:
    """PrefillBatch.tiles, [tiles, 4] int32."""
    counts = -(-q // TILE)
    chunk = np.repeat(np.arange(len(q)), counts)
    first = (np.arange(len(chunk)) - np.repeat(np.cumsum(counts) - counts, counts)) * TILE
    queries = np.minimum(TILE, q[chunk] - first)
    position = (k - q)[chunk] + first
    tiles = np.stack([cu_q[chunk] + first, queries, position, cu_k[chunk]], axis=1).astype(np.int32)
    return tiles[np.argsort(-(position + queries), kind="stable")]


def _run(slots: np.ndarray, cu_k: np.ndarray) -> int:
    """PrefillBatch.run: the largest power of two that divides every position at which slots do not go on by one."""
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    places = breaks - cu_k[np.searchsorted(cu_k, breaks, side="right") - 1]
    together = int(np.bitwise_or.reduce(places, initial=TILE))
    return together & -together


def choose_backend(requested: str, dtype: torch.dtype, head_dim: int, device: str | torch.device) -> tuple[str, str]:
    """The implementation to use for a model, and why; for the log.

    Args:
        requested: "auto" or one of BACKENDS.

    Raises:
        ValueError: the requested one cannot serve this dtype, head_dim or device.
    """
    device = torch.device(device)
    if requested == "auto":
        # measured on an H200; cuDNN's kernels for older GPUs have no such lead over FlashAttention-2
        newest = ("kernel", "cudnn") if _capability(device) >= (9, 0) else ()
        for name in (*newest, "torch_flash"):
            if _obstacle(name, dtype, head_dim, device) is None:
                return name, "the fastest here"
        return "sdpa", f"the faster ones cannot do it: {_obstacle('torch_flash', dtype, head_dim, device)}"
    if requested not in BACKENDS:
        raise ValueError(f"prefill attention {requested!r} is not known; choose auto, {', '.join(BACKENDS)}")
    obstacle = _obstacle(requested, dtype, head_dim, device)
    if obstacle is not None:
        raise ValueError(f"prefill attention {requested!r} cannot be used: {obstacle}; choose auto or sdpa")
    return requested, "as requested"


def _obstacle(name: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """What keeps a backend from being used; None where nothing does."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and the device is {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if name == "flash_attn" and _flash_attn_varlen() is None:
        return "the package flash-attn is not installed"
    if name == "kernel":
        return _obstacle_to_kernel(head_dim, device)
    most = 128 if name == "cudnn" else 256
    if head_dim % 8 or head_dim > most:
        return f"head_dim must be a multiple of 8 up to {most}, not {head_dim}"
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    return None


def _obstacle_to_kernel(head_dim: int, device: torch.device) -> str | None:
    if head_dim not in (64, 128):
        return f"head_dim must be 64 or 128, not {head_dim}"
    if _capability(device) != (9, 0):
        return f"it needs a GPU of compute capability 9.0, and {device} has {'.'.join(map(str, _capability(device)))}"
    try:
        there = hasattr(library.load(), "ember_prefill_attention")
    except OSError:
        there = False
    return None if there else "the CUDA library was not built, or without it"


def _capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) for what is no CUDA GPU, or none that is there."""
    usable = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if usable else (0, 0)


@cache
def _flash_attn_varlen() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PrefillBatch, scale: float, backend: str
) -> Tensor:
    """Causal attention of each chunk over its sequence so far, bottom-right aligned.

    Args:
        q: [tokens, heads, head_dim], packed chunk after chunk.
        k_cache, v_cache: [num_slots, kv_heads, head_dim], contiguous, same dtype as q, K and V of all the pass's
            tokens written; kv_heads divides heads. Slots that no chunk names are not read.
        scale: multiplies the scores; above 0.
        backend: from choose_backend(). "cudnn" falls back to "torch_flash" for a pass with a chunk that has positions
            before it, or a length for which a plan of cuDNN would hardly be used again (CUDNN_GRAIN).

    Returns:
        [tokens, heads, head_dim].
    """
    tokens, heads, head_dim = q.shape
    if k_cache.shape != v_cache.shape or k_cache.shape[2] != head_dim or heads % k_cache.shape[1]:
        raise ValueError(
            f"queries {list(q.shape)} do not fit a cache of K {list(k_cache.shape)} and V {list(v_cache.shape)}"
        )
    if tokens != sum(batch.q_lens):
        raise ValueError(f"{tokens} queries were given for a batch of {sum(batch.q_lens)} tokens")
    if backend == "sdpa":
        return prefill_attention_reference(q, k_cache, v_cache, batch, scale)
    if backend == "kernel":
        return _kernel(q, k_cache, v_cache, batch, scale)
    k, v = gather_kv(k_cache, v_cache, batch.slots)
    if backend == "cudnn" and _repeats(batch):
        return _cudnn(q, k, v, batch, scale)
    if backend in ("cudnn", "torch_flash"):
        return torch.ops.aten._flash_attention_forward(
            q, k, v, batch.cu_q, batch.cu_k, max(batch.q_lens), max(batch.k_lens), 0.0, True, False, scale=scale
        )[0]
    if backend == "flash_attn" and (flash := _flash_attn_varlen()) is not None:
        longest = (max(batch.q_lens), max(batch.k_lens))
        return flash(q, k, v, batch.cu_q, batch.cu_k, *longest, softmax_scale=scale, causal=True)
    raise ValueError(f"prefill attention {backend!r} cannot be used here: let choose_backend() choose")


def prefill_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PrefillBatch, scale: float, backend: str = "sdpa"
) -> Tensor:
    """As prefill_attention(), chunk by chunk with torch's scaled_dot_product_attention, on any device and dtype."""
    out = torch.empty_like(q)
    first = first_k = 0
    for q_len, k_len in zip(batch.q_lens, batch.k_lens, strict=True):
        slots = batch.slots[first_k : first_k + k_len]
        mask = None
        if 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril_(k_len - q_len)
        part = torch.nn.functional.scaled_dot_product_attention(
            q[first : first + q_len].transpose(0, 1)[None],
            k_cache[slots].transpose(0, 1)[None],
            v_cache[slots].transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=q_len == k_len,
            scale=scale,
            enable_gqa=q.shape[1] != k_cache.shape[1],
        )
        out[first : first + q_len] = part[0].transpose(0, 1)
        first, first_k = first + q_len, first_k + k_len
    return out


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of the named slots as contiguous tensors.

    Args:
        k_cache, v_cache: [num_slots, kv_heads, head_dim], contiguous.
        slots: [count] int64.

    Returns:
        K and V, each [count, kv_heads, head_dim].
    """
    row_bytes = k_cache.element_size() * k_cache.shape[1] * k_cache.shape[2]
    if not k_cache.is_cuda or row_bytes % 16:
        return gather_kv_reference(k_cache, v_cache, slots)
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("K and V can be gathered from a contiguous cache only")
    k, v = (cache.new_empty(len(slots), *cache.shape[1:]) for cache in (k_cache, v_cache))
    library.launch("gather_kv", k, v, k_cache, v_cache, slots, len(slots), row_bytes)
    return k, v


def gather_kv_reference(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """As gather_kv(), on any device and for any row."""
    return k_cache[slots], v_cache[slots]


def _kernel(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PrefillBatch, scale: float) -> Tensor:
    """csrc/prefill_attention.cu, which reads the cache itself where slots come in runs, as blocks of the cache give."""
    if not (q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("prefill attention's kernel needs contiguous queries and a contiguous cache")
    if q.dtype != k_cache.dtype or q.dtype != v_cache.dtype:
        raise ValueError(f"queries are {q.dtype}, K is {k_cache.dtype} and V is {v_cache.dtype}: they must be the same")
    k, v = k_cache, v_cache
    slots: Tensor | None = batch.slots
    if batch.run < SHORTEST_RUN:
        k, v = gather_kv(k_cache, v_cache, batch.slots)
        slots = None
    out = torch.empty_like(q)
    sizes = (len(batch.tiles), len(q), len(k), q.shape[1], k.shape[1], q.shape[2], batch.run)
    library.launch("prefill_attention", out, q, k, v, slots, batch.tiles, *sizes, q.dtype, float(scale))
    return out


def _repeats(batch: PrefillBatch) -> bool:
    """Whether all lengths of the pass are ones that a plan of cuDNN is worth being made for."""
    return all(
        q_len == k_len and q_len >= 4 * CUDNN_GRAIN and q_len % CUDNN_GRAIN == 0
        for q_len, k_len in zip(batch.q_lens, batch.k_lens, strict=True)
    )


def _cudnn(q: Tensor, k: Tensor, v: Tensor, batch: PrefillBatch, scale: float) -> Tensor:
    """Each run of chunks of equal length as one batch, in a pass of whole prompts: its causal masks are top-left."""
    outs = []
    first = 0
    for length, run in itertools.groupby(batch.q_lens):
        chunks = len(list(run))
        last = first + chunks * length
        parts = (t[first:last].view(chunks, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(*parts, None, False, 0.0, True, False, scale=scale)[0]
        outs.append(out.transpose(1, 2).reshape(chunks * length, *q.shape[1:]))
        first = last
    return outs[0] if len(outs) == 1 else torch.cat(outs)
