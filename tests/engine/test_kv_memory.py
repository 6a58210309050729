"""How many KV blocks a stage takes, with a GPU that is only numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.rollout_engines import random_adapter
from ember_ray.engine import kv_memory
from ember_ray.engine.kv_memory import (
    RESERVE,
    KvMemoryError,
    between_stages_bytes,
    fitting_kv_blocks,
    kv_block_bytes,
)
from ember_ray.engine.options import EngineOptions
from ember_ray.model.qwen3 import StageModel
from ember_ray.model.qwen3_config import read_model_config
from tests.support.qwen3 import make_qwen3, stage_model

GIB = 2**30
NEEDED = GIB


def fitting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free: float, total: float, held: float, share: float
) -> float:
    """GiB that the KV blocks take; all else in GiB too."""
    options = EngineOptions(str(folder), gpu_memory_utilization=share)
    _, model = stage_model(folder)
    monkeypatch.setattr(kv_memory, "_needed_bytes", lambda *_: NEEDED)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * GIB), int(total * GIB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int(held * GIB))
    return fitting_kv_blocks(options, model, "sdpa") * kv_block_bytes(options, model) / GIB


def test_a_stage_fills_its_own_share_whatever_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_qwen3(tmp_path)
    reserve = (NEEDED + RESERVE) / GIB
    alone = fitting(tmp_path, monkeypatch, free=92, total=100, held=8, share=0.45)
    assert alone == pytest.approx(0.45 * 100 - 8 - reserve, abs=0.01)
    # another stage with the same share has filled its own before
    second = fitting(tmp_path, monkeypatch, free=47, total=100, held=8, share=0.45)
    assert second == pytest.approx(alone, abs=0.01)
    # more than is free is never taken
    crowded = fitting(tmp_path, monkeypatch, free=10, total=100, held=8, share=0.9)
    assert crowded == pytest.approx(10 - reserve, abs=0.01)


def test_room_is_left_for_all_adapters_that_may_be_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_qwen3(tmp_path)
    without = fitting(tmp_path, monkeypatch, free=92, total=100, held=8, share=0.45)
    monkeypatch.setattr(kv_memory, "ADAPTER_RANK", 1 << 20)
    update = random_adapter(read_model_config(tmp_path), rank=8, version=1, device="cpu")
    one = sum(tensor.numel() for tensor in update.tensors.values()) * 4 / 8 * 2**20 / GIB
    left = fitting(tmp_path, monkeypatch, free=920, total=1000, held=8, share=0.45)
    assert left - without == pytest.approx(0.45 * 900 - 11 * one, rel=1e-3)


def test_room_is_left_for_what_travels_between_stages(tmp_path: Path) -> None:
    make_qwen3(tmp_path)
    config = read_model_config(tmp_path)
    options = EngineOptions(str(tmp_path), layer_split=(1, 2), micro_batches=3, max_num_batched_tokens=128)
    first, whole = (
        StageModel(tmp_path, config, range(end), torch.float32, "cpu", 64) for end in (1, config.num_hidden_layers)
    )
    row = 5 * config.hidden_size + config.num_attention_heads * config.head_dim  # three sent, one more, one received
    assert between_stages_bytes(options, first) == 128 * 4 * row
    assert between_stages_bytes(options, whole) == 0


def test_no_room_is_refused_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_qwen3(tmp_path)
    says = "100.0 GiB in all, 92.0 free, gpu_memory_utilization 0.09 allows 9.0 to this process, its weights take 8.0"
    with pytest.raises(KvMemoryError, match=says):
        fitting(tmp_path, monkeypatch, free=92, total=100, held=8, share=0.09)
