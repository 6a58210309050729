"""How many KV blocks fit on a GPU beside weights, activations and graphs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cuda_ext.prefill_attention import PrefillBatch, prefill_attention
from ember_ray.engine.options import EngineOptions
from ember_ray.model.qwen3 import StageModel

RESERVE = 512 * 2**20
"""Bytes left to what is not seen in the trial: cuBLAS and cuDNN workspaces, graphs, fragmentation."""


class KvMemoryError(ValueError):
    """No room for a KV cache; the text gives the numbers."""


def kv_block_bytes(options: EngineOptions, model: StageModel) -> int:
    """Bytes of one KV block over all of the stage's layers."""
    config = model.config
    token = 2 * len(model.layers) * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return options.block_size * token


@torch.inference_mode()
def fitting_kv_blocks(options: EngineOptions, model: StageModel, prefill_backend: str) -> int:
    """Runs the largest forward passes once, with a small cache, and gives the rest of the allowed memory to KV blocks.

    Raises:
        KvMemoryError: not even one sequence of a block fits.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _trial(options, model, prefill_backend)
    activations = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    allowed = int(total * options.gpu_memory_utilization)
    block = kv_block_bytes(options, model)
    room = min(free, allowed - (total - free)) - activations - RESERVE
    blocks = room // block
    if blocks < 2:
        gib = 2**30
        raise KvMemoryError(
            f"no GPU memory is left for KV blocks: {total / gib:.1f} GiB in all, {free / gib:.1f} free, "
            f"gpu_memory_utilization {options.gpu_memory_utilization} allows {allowed / gib:.1f}, activations take "
            f"{activations / gib:.1f}; raise gpu_memory_utilization, or lower max_num_batched_tokens or max_num_seqs"
        )
    return blocks


def _trial(options: EngineOptions, model: StageModel, prefill_backend: str) -> None:
    """A prompt pass of as many tokens as a step may have, in sequences as long as they may be; then the LM head."""
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
    x, residual = model.run_layers(hidden, positions, torch.from_numpy(slots).to(device), cache, attention, {})
    if model.is_last:
        rows = min(options.max_num_seqs, tokens)
        model.head(x[:rows], residual[:rows])
    torch.cuda.synchronize()
