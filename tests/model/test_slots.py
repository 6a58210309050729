"""Versions side by side and merged: the same logits, places that stay, and a way back that is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ember_ray.engine.llm import LLM
from ember_ray.engine.options import EngineOptions
from ember_ray.model import slots
from ember_ray.model.qwen3_config import read_model_config
from tests.support.adapters import random_adapter
from tests.support.qwen3 import make_qwen3, random_prompts

ROWS = [prompt + prompt[:5] for prompt in random_prompts([30, 12])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    make_qwen3(path)
    return path


def weights(llm: LLM) -> list[torch.Tensor]:
    return [weight for layer in llm.engine.model.decoder_layers for weight in layer.weights.values()]


def scores(llm: LLM) -> torch.Tensor:
    return torch.cat([torch.tensor(row) for row in llm.score(ROWS)])


def test_merged_and_slots_serve_the_same_policies_and_merged_goes_back_to_the_bit(folder: Path) -> None:
    slots, merged = (LLM(EngineOptions(str(folder), num_kv_blocks=64, lora_mode=mode)) for mode in ("slots", "merged"))
    before = [weight.clone() for weight in weights(merged)]
    base = scores(slots)
    seen = []
    for version, seed, rank in ((1, 1, 4), (2, 2, 4), (3, 3, 6)):
        for llm in (slots, merged):
            llm.publish(random_adapter(folder, version, seed, rank))
        seen.append(scores(slots))
        assert (seen[-1] - base).abs().max() > 0.5
        torch.testing.assert_close(scores(merged), seen[-1], rtol=0, atol=1e-4)
    for version in (1, 3, 2):
        for llm in (slots, merged):
            llm.rollback(version)
        assert torch.equal(scores(slots), seen[version - 1])
        torch.testing.assert_close(scores(merged), seen[version - 1], rtol=0, atol=1e-4)
    for llm in (slots, merged):
        llm.rollback(0)
    assert torch.equal(scores(slots), base)
    assert all(torch.equal(old, new) for old, new in zip(before, weights(merged), strict=True))


def test_an_adapter_of_the_same_shape_takes_the_places_of_the_one_before(folder: Path) -> None:
    llm = LLM(EngineOptions(str(folder), num_kv_blocks=64))
    adapters = llm.engine._slots

    def places() -> list[int]:
        return [lora.a.data_ptr() for layer in adapters.active.values() for lora in layer.values()] + [
            part.b.data_ptr() for layer in adapters.active.values() for lora in layer.values() for part in lora.parts
        ]

    llm.publish(random_adapter(folder, 1))
    first, signature = places(), adapters.signature
    llm.publish(random_adapter(folder, 2, seed=2))
    assert (places(), adapters.signature) == (first, signature)
    llm.publish(random_adapter(folder, 3, rank=6))
    assert adapters.signature != signature
    llm.rollback(2)
    assert (places(), adapters.signature) == (first, signature)


def test_places_that_are_gone_are_never_named_again(folder: Path) -> None:
    llm = LLM(EngineOptions(str(folder), num_kv_blocks=64))
    adapters, seen = llm.engine._slots, set()
    for version, rank in ((1, 4), (2, 6), (3, 8)):
        llm.publish(random_adapter(folder, version, rank=rank))
        seen.add(adapters.signature)
    assert len(seen) == 3 and len(adapters.signatures_kept) == 2
    llm.rollback(1)  # its shape was pushed out by the two behind it
    assert adapters.signature not in seen and adapters.signature in adapters.signatures_kept


@pytest.mark.parametrize(("mode", "fails_at"), [("slots", 1), ("merged", 1), ("merged", 2), ("merged", 5)])
def test_a_switch_that_fails_leaves_the_version_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, fails_at: int
) -> None:
    llm = LLM(EngineOptions(str(folder), num_kv_blocks=64, lora_mode=mode))
    llm.publish(random_adapter(folder, 1, rank=4))
    before = scores(llm)
    work = "rebuild_weight" if mode == "merged" else "_copy_over"
    real, calls = getattr(slots, work), []

    def failing(*arguments: object, **named: object) -> object:
        calls.append(arguments)
        if len(calls) == fails_at:
            raise RuntimeError("out of memory")
        return real(*arguments, **named)

    with monkeypatch.context() as now, pytest.raises(RuntimeError, match="out of memory"):
        now.setattr(slots, work, failing)
        llm.publish(random_adapter(folder, 2, seed=2, rank=6))
    assert llm.engine.policy_version == 1 and torch.equal(scores(llm), before)
    llm.engine.commit_adapter(2)  # it is still held
    after = LLM(EngineOptions(str(folder), num_kv_blocks=64, lora_mode=mode))
    after.publish(random_adapter(folder, 2, seed=2, rank=6))
    assert torch.equal(scores(llm), scores(after))


def test_going_back_to_the_base_pushes_no_adapter_out(folder: Path) -> None:
    config = read_model_config(folder)
    adapters = slots.AdapterSlots(config, range(3), torch.float32, "cpu", keep=2)
    for version in (1, 2, 3):
        adapters.stage(random_adapter(folder, version))
        adapters.commit(version)
    assert adapters.resident_versions == [0, 2, 3]
    adapters.commit(0)
    assert adapters.resident_versions == [0, 2, 3]


def test_what_is_used_now_and_then_stays(folder: Path) -> None:
    """A reference is scored with between publications; those go that were in use the longest ago."""
    adapters = slots.AdapterSlots(read_model_config(folder), range(3), torch.float32, "cpu", keep=3)
    for version in range(1, 7):
        adapters.stage(random_adapter(folder, version))
        adapters.commit(version)
        if version > 1:
            adapters.commit(1)
            adapters.commit(version)
    assert adapters.resident_versions == [0, 1, 5, 6]
