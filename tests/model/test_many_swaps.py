"""A thousand swaps and rollbacks in a row leave no trace: in the base, and in what serves afterwards."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ember_ray.model.adapter_layout import AdapterPacker
from ember_ray.model.checkpoint import Checkpoint
from ember_ray.model.lora import AdapterUpdate, check_adapter
from ember_ray.model.qwen3 import FUSED, StageModel
from ember_ray.model.qwen3_config import Qwen3Config, read_model_config
from ember_ray.model.slots import AdapterSlots, MergedWeights
from tests.support.qwen3 import make_qwen3

SWAPS = 1000
MODULES = (("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj"), ("o_proj", "gate_proj"), tuple(
    name for names in FUSED.values() for name in names
))  # fmt: skip


def an_adapter(config: Qwen3Config, version: int, draw: random.Random, device: str) -> AdapterUpdate:
    """Other modules, ranks and values at every call; B is not zero."""
    generator = torch.Generator(device).manual_seed(version)
    tensors, scaling, names, rank = {}, {}, draw.choice(MODULES), draw.choice((1, 3, 8))
    for layer in draw.sample(range(config.num_hidden_layers), draw.randint(1, config.num_hidden_layers)):
        for name in names:
            rows, columns = config.linear_shapes[name]
            path = f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, columns, generator=generator, device=device)
            tensors[f"{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator, device=device)
            scaling[path] = draw.choice((0.5, 2.0))
    return AdapterUpdate(version, tensors, scaling)


def digest(weights: list[Tensor]) -> str:
    found = hashlib.sha256()
    for weight in weights:
        found.update(weight.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def weights(model: StageModel) -> list[Tensor]:
    return [layer.weights[name] for layer in model.decoder_layers for name in FUSED]


def of_the_file(folder: Path, config: Qwen3Config, dtype: torch.dtype) -> list[Tensor]:
    """The same weights, read by the checkpoint's reader and stacked here."""
    found = []
    with Checkpoint(folder) as checkpoint:
        for layer in range(config.num_hidden_layers):
            for names in FUSED.values():
                block = f"model.layers.{layer}.{'self_attn' if names[0][0] in 'qkvo' else 'mlp'}"
                shapes = {f"{block}.{name}.weight": config.linear_shapes[name] for name in names}
                found.append(torch.cat([checkpoint.read(name, shape, dtype, "cpu") for name, shape in shapes.items()]))
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora_mode", ["slots", "merged"])
def test_after_a_thousand_swaps_the_base_is_the_file_to_the_bit(
    lora_mode: str, dtype: torch.dtype, device: str, tmp_path: Path
) -> None:
    make_qwen3(tmp_path, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config = read_model_config(tmp_path)
    model = StageModel(tmp_path, config, range(2), dtype, device, 64)
    original, base = digest(of_the_file(tmp_path, config, dtype)), weights(model)
    assert digest(base) == original
    merged = MergedWeights(range(2), model.decoder_layers) if lora_mode == "merged" else None
    slots = AdapterSlots(config, range(2), dtype, device, keep=4, merged=merged)
    draw, version, kept = random.Random(3), 0, {}

    def serving() -> list[Tensor]:
        loras = [lora for _, layer in sorted(slots.active.items()) for lora in layer.values()]
        return weights(model) + [t for lora in loras for t in (lora.a, *(part.b for part in lora.parts))]

    for step in range(SWAPS):
        if draw.random() < 0.6 or step < 5:
            version += 1
            update = an_adapter(config, version, draw, device)
            if draw.random() < 0.5:
                checked = check_adapter(update, config.linear_shapes, 2)
                slots.stage(AdapterPacker(checked, config.linear_shapes, dtype).pack(version))
            else:
                slots.stage(update)
            slots.commit(version)
        else:
            slots.commit(draw.choice(slots.resident_versions))
        if slots.version not in kept and step % 10 == 0:
            kept[slots.version] = digest(serving())
        elif slots.version in kept:  # gone back to: what serves is the same to the bit
            assert digest(serving()) == kept[slots.version]
    assert version > SWAPS // 2 and len(slots.resident_versions) == 5
    assert digest(base) == original, "the base that was loaded was written"
    slots.commit(0)
    assert digest(weights(model)) == original and slots.active == {}


def test_the_current_the_one_before_and_a_reference_stay(tmp_path: Path) -> None:
    make_qwen3(tmp_path, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config, draw = read_model_config(tmp_path), random.Random(1)
    slots = AdapterSlots(config, range(2), torch.float32, "cpu")
    for version in range(1, 30):
        slots.stage(an_adapter(config, version, draw, "cpu"))
        slots.commit(version)
        slots.commit(1)  # the reference is scored with
        slots.commit(version)
        assert {0, 1, version, max(version - 1, 1)} <= set(slots.resident_versions)
