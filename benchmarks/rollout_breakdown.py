"""Where the time of a decode step goes: GEMM, attention over prompts, attention over answers, sampling, rest.

A whole batch is run under torch.profiler, which records every kernel of the replayed CUDA graphs. A kernel counts
from where the kernels before it ended: with programmatic dependent launch the next kernel is on the chip early and
waits there, which is nobody's work. ``rest`` is the measured step less the other four: small kernels (norms, rotary
positions and the cache write, embedding, append of tokens, SwiGLU where it is no part of a product), the gaps between
kernels, and between steps. So the five add up to the step.

In engines of more than 8 rows attention over prompts (and over whole pieces of long answers) is one kernel; that over
the ends of answers, which also merges the parts, is another and begins beside the first: only what it takes longer is
its own. In engines of fewer rows one kernel does both, and counts as attention over prompts.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout_engines import EmberEngine, Prompts, Refused
from ember_ray.model.qwen3_config import Qwen3Config

PARTS = ("gemm", "attention_prefix", "attention_suffix", "sampling", "rest")

CLASSES = {
    "sampling": r"ember::sampling|argmax|softmax|top_?k|radix|sort",
    "attention_suffix": r"ember::decode::.*finish_kernel",
    "attention_prefix": r"ember::decode::|attention|attn|fmha|flash",
    "gemm": r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|splitk|linear|lora|matmul",
}
"""Kernel name -> part of a step, the first that matches; all others are ``rest``."""


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the device; times in microseconds; ``launch`` is the call that started it."""

    name: str
    start: float
    end: float
    launch: int


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), "rest")


def read_trace(path: Path) -> list[Kernel]:
    """The device's events of a Chrome trace that torch.profiler wrote, by start."""
    events = json.loads(path.read_text())["traceEvents"]
    kernels = [
        Kernel(e["name"], e["ts"], e["ts"] + e["dur"], int(e["args"].get("correlation", -1)))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(kernels, key=lambda kernel: (kernel.start, kernel.end))


def decode_steps(kernels: list[Kernel], least: int) -> list[list[Kernel]]:
    """Kernels of each step after the last prefill: a step is one graph launch of ``least`` kernels or more."""
    launches: dict[int, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        launches[kernel.launch].append(kernel)
    graphs = [group for launch, group in launches.items() if launch >= 0 and len(group) >= least]
    in_graphs = {group[0].launch for group in graphs}
    last_prefill = max(
        (k.end for k in kernels if k.launch not in in_graphs and kind_of(k.name) in ("gemm", "attention_prefix")),
        default=-1.0,
    )
    return [group for group in graphs if group[0].start >= last_prefill]


def own_times(steps: list[list[Kernel]]) -> tuple[dict[str, float], float]:
    """Milliseconds a step of each kernel name, and of a step from its first kernel to that of the next one.

    Raises:
        Refused: there are fewer than two steps.
    """
    if len(steps) < 2:
        raise Refused("the profiler saw fewer than two decode steps in CUDA graphs, so there is nothing to break down")
    times: dict[str, float] = defaultdict(float)
    spans = []
    for step, after in zip(steps, steps[1:], strict=False):
        reached = step[0].start
        for kernel in step:
            times[kernel.name] += max(0.0, kernel.end - max(kernel.start, reached))
            reached = max(reached, kernel.end)
        spans.append(after[0].start - step[0].start)
    return {name: time / len(spans) / 1e3 for name, time in times.items()}, statistics.fmean(spans) / 1e3


def by_kind(times: dict[str, float], ms_per_step: float) -> dict[str, float]:
    """The five parts, which add up to ``ms_per_step``, from milliseconds a step by kernel name."""
    parts = {kind: sum(time for name, time in times.items() if kind_of(name) == kind) for kind in PARTS[:-1]}
    return parts | {"rest": ms_per_step - sum(parts.values())}


def step_breakdown(
    engine: EmberEngine,
    config: Qwen3Config,
    prompts: Prompts,
    ms_per_step: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Keys ``breakdown`` (ms), ``breakdown_profiled_ms`` (a step while profiled) and ``breakdown_kernels``.

    Args:
        ms_per_step: of a run that was not profiled.
    """
    if options.device == "cpu":
        raise Refused("the breakdown of a step needs a GPU")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        engine.generate(prompts, options.seed)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        kernels = read_trace(path)
    times, profiled = own_times(decode_steps(kernels, least=3 * config.num_hidden_layers))
    parts = by_kind(times, ms_per_step)
    longest = sorted(times.items(), key=lambda item: -item[1])[:16]
    return {
        "breakdown": {part: round(time, 4) for part, time in parts.items()},
        "breakdown_profiled_ms": profiled,
        "breakdown_kernels": [[name[:120], kind_of(name), round(time, 4)] for name, time in longest],
    }
