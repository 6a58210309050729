"""Where the memory at hand decides between slots and merged weights, with a GPU that is only numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ember_ray.engine import lora_mode
from ember_ray.engine.llm import LLM
from ember_ray.engine.lora_mode import chosen_lora_mode, has_room
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.transport import LoopbackTransport
from tests.support.adapters import random_adapter
from tests.support.qwen3 import make_qwen3, stage_model


@pytest.mark.parametrize(
    ("free", "share", "held", "chosen"),
    [
        (100, 0.9, 8, "merged"),
        (8.1, 0.9, 8, "merged"),  # twice the copy
        (7.9, 0.9, 8, "slots"),
        (100, 0.2, 8, "merged"),  # the stage's share is 20, of which 8 are held
        (100, 0.15, 8, "slots"),
        (100, 0.05, 8, "slots"),  # nothing is left at all
    ],
)
def test_merged_where_the_copy_leaves_half(
    free: float, share: float, held: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_qwen3(tmp_path)
    _, model = stage_model(tmp_path)
    unit = sum(weight.nbytes for layer in model.decoder_layers for weight in layer.weights.values()) / 4
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * unit), int(100 * unit)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int(held * unit))
    options = EngineOptions(str(tmp_path), lora_mode="auto", device="cuda", gpu_memory_utilization=share)
    assert chosen_lora_mode(options, model, LoopbackTransport()) == chosen


def test_half_is_the_bound() -> None:
    assert has_room(4, 8) and not has_room(5, 8) and not has_room(5, 4) and not has_room(1, -1)


def test_on_a_cpu_and_where_it_is_said_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_qwen3(tmp_path)
    monkeypatch.setattr(lora_mode, "_free_bytes", lambda _: pytest.fail("there is no GPU to ask"))
    modes = {mode: LLM(EngineOptions(str(tmp_path), num_kv_blocks=32, lora_mode=mode)) for mode in ("auto", "merged")}
    for mode, llm in modes.items():
        llm.publish(random_adapter(tmp_path, 1))
        assert llm.engine.lora_mode == ("slots" if mode == "auto" else mode)
        assert bool(llm.engine._slots.active) == (mode == "auto")
    with pytest.raises(ValueError, match="lora_mode must be slots, merged or auto, not 'both'"):
        EngineOptions(str(tmp_path), lora_mode="both")
