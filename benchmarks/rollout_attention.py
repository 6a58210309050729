"""Group decode attention of one layer, alone, at the lengths of a row; and how attention alone is timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import islice

import torch

from benchmarks.rollout_rows import Row
from cuda_ext.decode_attention import group_decode_attention
from cuda_ext.decode_groups import build_decode_groups
from ember_ray.engine.decode_buffers import split_tokens
from ember_ray.model.qwen3_config import Qwen3Config

BLOCK = 16
"""Tokens of a KV block, the engine's default."""

L2_BYTES = 256 * 2**20
"""Caches are rotated until they are at least this large together, so that none is still in L2 when its turn comes."""

CALLS = 8
"""Calls a timing, at least; more where the caches are small."""


def piece_tokens(row: Row) -> int:
    """Tokens of a piece of attention's work in an engine for the row's candidates."""
    return split_tokens(row.candidates, BLOCK)


def layer_calls(row: Row, config: Qwen3Config, device: str, dtype: torch.dtype) -> list[Callable[[], torch.Tensor]]:
    """One attention call for each of several caches with random K and V; every candidate has ``gen`` own tokens.

    Work is cut into the pieces that an engine for as many candidates uses (:func:`piece_tokens`).
    """
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    prompt_blocks, own_blocks = -(-row.prompt // BLOCK), -(-row.gen // BLOCK)
    num_blocks = row.prompts * prompt_blocks + row.candidates * own_blocks
    # blocks of a sequence lie apart, as in an engine that has run for a while
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    tables = iter(blocks)
    prefixes = [list(islice(tables, prompt_blocks)) for _ in range(row.prompts)]
    suffixes = [list(islice(tables, own_blocks)) for _ in range(row.candidates)]
    groups = build_decode_groups(
        prefixes, [row.prompt] * row.prompts, [row.n] * row.prompts, suffixes, [row.gen] * row.candidates,
        block_size=BLOCK, heads_per_kv_head=heads // kv_heads, split_tokens=piece_tokens(row),
    ).to(device)  # fmt: skip
    shape = (2, num_blocks * BLOCK, kv_heads, dim)
    copies = 1 if device == "cpu" else -(-L2_BYTES // (math.prod(shape) * dtype.itemsize))
    calls = []
    for copy in range(copies):
        generator = torch.Generator(device).manual_seed(copy)
        cache = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        q = torch.empty(row.candidates, heads, dim, dtype=dtype, device=device).normal_(generator=generator)

        def call(q: torch.Tensor = q, cache: torch.Tensor = cache) -> torch.Tensor:
            return group_decode_attention(q, cache[0], cache[1], groups, dim**-0.5)

        calls.append(call)
    return calls


@torch.inference_mode()
def time_calls(calls: list[Callable[[], torch.Tensor]], device: str, repetitions: int) -> list[float]:
    """Seconds of one call, for each repetition: on a GPU by events around the replay of a graph of several calls."""
    calls = calls * -(-CALLS // len(calls))
    if device == "cpu":
        times = []
        for repetition in range(repetitions + 1):
            start = time.perf_counter()
            calls[0]()
            if repetition:
                times.append(time.perf_counter() - start)
        return times
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # lazy set-up must not be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(max(10, repetitions)):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3 / len(calls))
    return times
