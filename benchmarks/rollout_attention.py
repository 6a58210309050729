"""Group decode attention of one layer, alone, at the lengths of a row."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.rollout_rows import Row
from cuda_ext.attention import DecodeGroups, group_decode_attention
from ember_ray.model.qwen3_config import Qwen3Config

L2_BYTES = 256 * 2**20
"""Caches are rotated until they are at least this large together, so that none is still in L2 when its turn comes."""

CALLS = 8
"""Calls a timing, at least; more where the caches are small."""


def layer_calls(row: Row, config: Qwen3Config, device: str, dtype: torch.dtype) -> list[Callable[[], torch.Tensor]]:
    """One attention call for each of several caches with random K and V; every candidate has ``gen`` own tokens."""
    block = 16
    slots = row.prompts * row.prompt + row.candidates * -(-row.gen // block) * block
    shape = (2, slots, config.num_key_value_heads, config.head_dim)
    copies = max(1, -(-L2_BYTES // (2 * slots * shape[2] * shape[3] * dtype.itemsize))) if device != "cpu" else 1
    prefix = torch.arange(row.prompts * row.prompt, device=device).view(row.prompts, -1)
    suffix = torch.arange(row.prompts * row.prompt, slots, device=device).view(row.candidates, -1)[:, : row.gen]
    rows = torch.arange(row.candidates, device=device).view(row.prompts, row.n)
    groups = DecodeGroups(
        rows,
        torch.arange(row.prompts, device=device).repeat_interleave(row.n),
        torch.arange(row.n, device=device).repeat(row.prompts),
        prefix,
        torch.zeros(prefix.shape, device=device),
        suffix.contiguous(),
        torch.zeros(suffix.shape, device=device),
    )
    calls = []
    for copy in range(copies):
        generator = torch.Generator(device).manual_seed(copy)
        cache = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        q = torch.empty(row.candidates, config.num_attention_heads, config.head_dim, dtype=dtype, device=device)
        q.normal_(generator=generator)

        def call(q: torch.Tensor = q, cache: torch.Tensor = cache) -> torch.Tensor:
            return group_decode_attention(q, cache[0], cache[1], groups, config.head_dim**-0.5)

        calls.append(call)
    return calls


@torch.inference_mode()
def time_group_attention(
    row: Row, config: Qwen3Config, device: str, dtype: torch.dtype, repetitions: int
) -> list[float]:
    """Seconds of one call, for each repetition: on a GPU by events around the replay of a graph of several calls."""
    calls = layer_calls(row, config, device, dtype)
    calls *= -(-CALLS // len(calls))
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
