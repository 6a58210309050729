"""How many KV blocks fit on a GPU beside weights, activations and graphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cuda_ext.logprobs import token_logprobs
from cuda_ext.prefill_attention import PrefillBatch, prefill_attention
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.scorer import LOGITS_ROWS
from ember_ray.engine.transport import Transport
from ember_ray.model.qwen3 import StageModel
from ember_ray.model.slots import SHAPES_KEPT, VERSIONS_KEPT

RESERVE = 512 * 2**20
"""Bytes left to what the trial does not see: CUDA itself, cuBLAS and cuDNN workspaces, fragmentation."""

ADAPTER_RANK = 16
"""Rank of the adapters on all linear layers that room is left for. Higher ones take from RESERVE, and then from what
``gpu_memory_utilization`` leaves free."""

AGREEMENT_TAG = 1
"""Of the message in which stages tell each other how many KV blocks fit; steps count their tags from 2."""


class KvMemoryError(ValueError):
    """No room for a KV cache; the text gives the numbers."""


def kv_block_bytes(options: EngineOptions, model: StageModel) -> int:
    """Bytes of one KV block over all of the stage's layers."""
    config = model.config
    token = 2 * len(model.layers) * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return options.block_size * token


def adapter_bytes(model: StageModel) -> int:
    """Bytes of all adapters that a stage may hold at once: resident ones, one staged, and the places of active ones."""
    features = sum(out + into for out, into in model.config.linear_shapes.values())
    one = ADAPTER_RANK * features * len(model.layers) * model.dtype.itemsize
    return (VERSIONS_KEPT + 1 + SHAPES_KEPT) * one


def between_stages_bytes(options: EngineOptions, model: StageModel) -> int:
    """Bytes of what the trial of a stage does not see: hidden states that are kept until they have left, one that has
    come, and queries of prompts and decodes that share a pass."""
    if model.is_first and model.is_last:
        return 0
    stages, config = len(options.layer_split), model.config
    hidden = (options.micro_batches or stages) * (stages - 1) + 2
    row = hidden * config.hidden_size + config.num_attention_heads * config.head_dim
    return options.max_num_batched_tokens * row * model.dtype.itemsize


@torch.inference_mode()
def fitting_kv_blocks(options: EngineOptions, model: StageModel, prefill_backend: str) -> int:
    """Runs the largest forward passes once, with a small cache, and gives the rest of the stage's share to KV blocks.

    The share is the stage's own: what other processes hold on the GPU counts only in that it is not free.

    Raises:
        KvMemoryError: not even one sequence of a block fits.
    """
    needed = _needed_bytes(options, model, prefill_backend) + adapter_bytes(model)
    needed += between_stages_bytes(options, model)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    allowed = int(total * options.gpu_memory_utilization)
    room = min(free, allowed - held) - needed - RESERVE
    blocks = room // kv_block_bytes(options, model)
    if blocks < 2:
        gib = 2**30
        raise KvMemoryError(
            f"no GPU memory is left for KV blocks: {total / gib:.1f} GiB in all, {free / gib:.1f} free, "
            f"gpu_memory_utilization {options.gpu_memory_utilization} allows {allowed / gib:.1f} to this process, its "
            f"weights take {held / gib:.1f}, activations, graphs and adapters {(needed + RESERVE) / gib:.1f}; raise "
            "gpu_memory_utilization, or lower max_num_batched_tokens or max_num_seqs"
        )
    return blocks


def agreed_kv_blocks(transport: Transport, fitting: Callable[[], int]) -> int:
    """The smallest number of all stages: their copies of the scheduler must have equal pools.

    Raises:
        KvMemoryError: here or on another stage none fit; all stages hear of it.
    """
    try:
        mine = fitting()
    except KvMemoryError:
        smallest(transport, 0)
        raise
    agreed = smallest(transport, mine)
    if agreed == 0:
        raise KvMemoryError(f"{mine} KV blocks fit on stage {transport.rank}, but none on another: see what that says")
    return agreed


def smallest(transport: Transport, value: int) -> int:
    """The smallest of all stages' values."""
    others = [stage for stage in range(transport.world_size) if stage != transport.rank]
    for stage in others:
        transport.send(torch.tensor([value]), stage, AGREEMENT_TAG)
    values = [int(transport.receive(torch.zeros(1, dtype=torch.int64), stage, AGREEMENT_TAG)) for stage in others]
    transport.flush()
    return min([value, *values])


def _needed_bytes(options: EngineOptions, model: StageModel, prefill_backend: str) -> int:
    """Peak of the largest passes beside weights and KV blocks, and what captured steps keep for themselves."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x, residual = _prompt_pass(options, model, prefill_backend)
    torch.cuda.synchronize()
    peak, kept = (read() - before for read in (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated))
    if not model.is_last:
        return peak
    torch.cuda.reset_peak_memory_stats()
    rows = min(options.max_num_seqs, len(x))
    model.head(x[:rows], residual[:rows])
    torch.cuda.synchronize()
    step = torch.cuda.max_memory_allocated() - before - kept
    torch.cuda.reset_peak_memory_stats()
    rows = min(LOGITS_ROWS, len(x))
    lines = torch.arange(rows, device=x.device)
    token_logprobs(model.head(x[:rows], residual[:rows]), lines, torch.zeros_like(lines))
    torch.cuda.synchronize()
    scoring = torch.cuda.max_memory_allocated() - before - kept
    captures = model.is_first and not options.enforce_eager
    return max(peak, kept + step, kept + scoring) + (step if captures else 0)


def _prompt_pass(options: EngineOptions, model: StageModel, prefill_backend: str) -> tuple[Tensor, Tensor]:
    """As many prompt tokens as a step may have, in sequences as long as they may be; x and residual behind it."""
    config, device = model.config, options.device
    tokens, longest = options.max_num_batched_tokens, model.rope.shape[0]
    lengths = [min(longest, tokens - first) for first in range(0, tokens, longest)]
    slots = np.arange(tokens, dtype=np.int64)
    parts = np.split(slots, np.cumsum(lengths)[:-1])
    batch = PrefillBatch.build(lengths, parts, device)
    shape = (1, 2, tokens, config.num_key_value_heads, config.head_dim)
    # the layers of the trial share one layer's cache: what counts is the activations
    cache = torch.zeros(shape, dtype=model.dtype, device=device).expand(len(model.layers), -1, -1, -1, -1)

    def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return prefill_attention(q, k_cache, v_cache, batch, config.head_dim**-0.5, prefill_backend)

    hidden = torch.zeros(tokens, config.hidden_size, dtype=model.dtype, device=device)
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device)
    return model.run_layers(hidden, positions, torch.from_numpy(slots).to(device), cache, attention, {})
