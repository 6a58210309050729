"""The CUDA runner on a CPU: its host side is the real one, kernels are their references, torch.cuda is a double.

Of CUDA the double keeps what the host side must respect: a graph goes on to read the tensors that it was captured with,
whatever has taken their place since; and a memory pool whose last graph has gone takes no more captures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ember_ray.engine.block_pool import BlockPool
from ember_ray.engine.cuda_runner import CudaRunner
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.scheduler import Scheduler
from ember_ray.engine.stage_engine import StageEngine
from ember_ray.engine.transport import LoopbackTransport


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other.time - self.time)


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        pass


class _Pool:
    num_graphs, is_dead = 0, False


class _Graph:
    """Replays a step on the tensors of its capture."""

    pool: _Pool | None = None

    def captured(self, runner: DoubledRunner, rows: int, pool: _Pool) -> None:
        self.pool, self.runner, self.rows = pool, runner, rows
        pool.num_graphs += 1
        params, groups = runner._buffers.params(rows), runner._buffers.groups
        self.fixed: dict[str, Any] = {
            "_buffers": SimpleNamespace(params=lambda rows: params, groups=groups),
            "_adapters": SimpleNamespace(active=runner._adapters.active),
        }

    def replay(self) -> None:
        now = {name: getattr(self.runner, name) for name in self.fixed}
        # groups remember what their reference made of the contents: another object at each replay
        self.fixed["_buffers"].groups = replace(self.fixed["_buffers"].groups)
        vars(self.runner).update(self.fixed)
        try:
            CudaRunner._step(self.runner, self.rows)
        finally:
            vars(self.runner).update(now)

    def __del__(self) -> None:
        if self.pool is not None:
            self.pool.num_graphs -= 1
            self.pool.is_dead = self.pool.num_graphs == 0


class DoubledRunner(CudaRunner):
    """Notes what it captures, the newest last."""

    capturing: _Graph | None = None
    pool: Any = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.captures: list[int] = []

    def _step(self, rows: int) -> None:
        super()._step(rows)
        if DoubledRunner.capturing is not None:
            DoubledRunner.capturing.captured(self, rows, DoubledRunner.pool)
            self.captures.append(rows)


@contextmanager
def _graph(graph: _Graph, pool: _Pool, **_: Any) -> Iterator[None]:
    assert not pool.is_dead, "a pool whose graphs have all gone takes no more captures"
    DoubledRunner.capturing, DoubledRunner.pool = graph, pool
    try:
        yield
    finally:
        DoubledRunner.capturing = None


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces torch.cuda until the test ends."""
    for name, value in {
        "Event": _Event,
        "CUDAGraph": _Graph,
        "graph": _graph,
        "graph_pool_handle": _Pool,
        "synchronize": lambda: None,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda one: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def doubled_engine(folder: Path, **options: Any) -> tuple[StageEngine, DoubledRunner]:
    """An engine whose runner is the CUDA one; torch.cuda is replaced already."""
    roomy = {"num_kv_blocks": 400, "max_num_seqs": 64, "max_num_batched_tokens": 256}
    asked = EngineOptions(str(folder), **(roomy | options))
    engine = StageEngine(asked, 0, LoopbackTransport())
    blocks, size, shape = engine.scheduler.pool.num_blocks, asked.block_size, list(engine.kv_cache.shape)
    shape[2] += size
    engine.kv_cache = torch.full(shape, torch.nan)
    engine.scheduler = Scheduler(
        BlockPool(blocks), size, asked.max_num_seqs, asked.max_num_batched_tokens, engine.max_model_len,
        engine.config.vocab_size, engine.num_lanes, asked.prefix_sharing, asked.num_scheduler_steps, mixed=False,
    )  # fmt: skip
    assert engine._stop_check is not None
    runner = DoubledRunner(
        asked, engine.model, engine._slots, engine.kv_cache, engine._stop_check, engine._aborts.take,
        engine._switch.take, engine.prefill_backend,
    )  # fmt: skip
    engine._runner = runner
    return engine, runner
