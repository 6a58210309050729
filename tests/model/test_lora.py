"""What an adapter may be, and that a refused one changes nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ember_ray.model.lora import AdapterError, AdapterUpdate, load_peft_adapter
from ember_ray.model.qwen3_config import Qwen3Config, read_model_config
from ember_ray.model.slots import AdapterSlots
from tests.support.peft_adapters import make_adapter
from tests.support.qwen3 import make_qwen3

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Qwen3Config:
    folder = tmp_path_factory.mktemp("qwen3")
    make_qwen3(folder)
    return read_model_config(folder)


def update(version: int = 1, **changes: Tensor | None) -> AdapterUpdate:
    tensors = {
        f"base_model.model.{Q}.lora_A.weight": torch.ones(2, 64),
        f"base_model.model.{Q}.lora_B.weight": torch.ones(64, 2),
    }
    for name, tensor in changes.items():
        key = f"base_model.model.{Q}.lora_{name}.weight"
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    return AdapterUpdate(version, tensors, {Q: 2.0})


def slots(config: Qwen3Config, keep: int = 8) -> AdapterSlots:
    return AdapterSlots(config, range(3), torch.float32, "cpu", keep)


BAD = {
    "NaN": (update(A=torch.full((2, 64), torch.nan)), "NaN or Inf"),
    "Inf": (update(B=torch.full((64, 2), torch.inf)), "NaN or Inf"),
    "shape of A": (update(A=torch.ones(2, 63)), "do not fit"),
    "ranks differ": (update(B=torch.ones(64, 3)), "do not fit"),
    "no B": (update(B=None), "no lora_B"),
    "empty": (AdapterUpdate(1, {}, {}), "no tensors"),
    "integers": (update(A=torch.ones(2, 64, dtype=torch.int32)), "2-d float"),
    "scale NaN": (dataclasses.replace(update(), scaling={Q: float("nan")}), "scale is nan"),
    "no scale": (dataclasses.replace(update(), scaling={}), "has no scale"),
    "scale of nothing": (dataclasses.replace(update(), scaling={Q: 1.0, "model.x": 1.0}), "no adapter tensors"),
    "unknown module": (AdapterUpdate(1, {"model.layers.0.mlp.router.lora_A.weight": torch.ones(2, 64)}, {}), "router"),
    "no LoRA tensor": (AdapterUpdate(1, {"lm_head.weight": torch.ones(2, 64)}, {}), "no LoRA A or B"),
    "linear layer of another block": (
        AdapterUpdate(1, {"model.layers.0.mlp.q_proj.lora_A.weight": torch.ones(2, 64)}, {}), r"mlp\.q_proj",
    ),
    "layer outside": (AdapterUpdate(1, {f"{Q.replace('1', '3')}.lora_A.weight": torch.ones(2, 64)}, {}), "3 layers"),
    "version 0": (update(version=0), "never reused"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_by_name_and_the_old_version_serves(name: str, config: Qwen3Config) -> None:
    bad, says = BAD[name]
    held = slots(config)
    held.stage(update(1))
    held.commit(1)
    before = held.active
    with pytest.raises(AdapterError, match=says):
        held.stage(dataclasses.replace(bad, version=bad.version and 2))
    assert held.version == 1 and held.active is before


def test_switch_and_rollback_are_exact(config: Qwen3Config) -> None:
    held = slots(config, keep=3)
    mine = torch.ones(2, 64)
    for version in range(1, 5):
        held.stage(update(version, A=mine.mul_(2)))
        assert held.version == version - 1
        held.commit(version)
    mine.fill_(torch.nan)  # the learner's own tensors are its own
    assert held.resident_versions == [0, 2, 3, 4]
    held.commit(3)
    assert torch.equal(held.active[1]["qkv_proj"].a, torch.full((2, 64), 8.0))
    held.commit(0)
    assert held.active == {}
    with pytest.raises(AdapterError, match="version 1 is not resident"):
        held.commit(1)
    with pytest.raises(AdapterError, match="never reused"):
        held.stage(update(4))
    held.stage(update(5))
    held.discard(5)
    with pytest.raises(AdapterError, match="version 5 is not resident"):
        held.commit(5)


def test_a_stage_keeps_its_own_layers_only(config: Qwen3Config) -> None:
    held = AdapterSlots(config, range(2, 3), torch.float32, "cpu")
    held.stage(update(1))
    held.commit(1)
    assert held.active == {}


def test_peft_folders_that_are_not_served(tmp_path: Path) -> None:
    make_adapter(make_qwen3(tmp_path / "model"), tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    good = json.loads(path.read_text())
    assert load_peft_adapter(tmp_path / "adapter", 1).scaling[Q] == 2.0
    for change, says in [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"r": 8}, "its configuration says 8"),
        ({"r": "four"}, "its configuration says four"),
        ({"lora_alpha": "eight"}, "unsupported operand"),
        ({"rank_pattern": {"q_proj(": 4}}, "unterminated subpattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weight"),
        ({"init_lora_weights": "olora"}, "changed the base weight"),
        ({"layer_replication": [[1, 3], [0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "something else"),
        ({"lora_bias": True}, "biases"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(AdapterError, match=says):
            load_peft_adapter(tmp_path / "adapter", 1)
    path.write_text(json.dumps({key: value for key, value in good.items() if key != "lora_alpha"}))
    with pytest.raises(AdapterError, match="no lora_alpha"):
        load_peft_adapter(tmp_path / "adapter", 1)
    path.unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        load_peft_adapter(tmp_path / "adapter", 1)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_of_head_or_embedding_is_refused_by_name(module: str, tmp_path: Path) -> None:
    network = make_qwen3(tmp_path / "model", tie_word_embeddings=False)
    make_adapter(network, tmp_path / "adapter", r=2, lora_alpha=2, target_modules=["q_proj", module])
    held = slots(read_model_config(tmp_path / "model"))
    with pytest.raises(AdapterError, match=f"{module}.* is no LoRA A or B of a Qwen3 linear layer"):
        held.stage(load_peft_adapter(tmp_path / "adapter", 1))
    assert held.version == 0 and held.active == {}


def test_what_the_serving_dtype_cannot_hold_is_refused(config: Qwen3Config) -> None:
    large = update(1, A=torch.full((2, 64), 1e5))
    half = AdapterSlots(config, range(3), torch.float16, "cpu")
    with pytest.raises(AdapterError, match="NaN or Inf in float16"):
        half.stage(large)
    slots(config).stage(large)
    AdapterSlots(config, range(3), torch.bfloat16, "cpu").stage(large)


def test_names_of_a_live_peft_model_mean_the_same(config: Qwen3Config) -> None:
    held, live = slots(config), update(1)
    tensors = {name.replace(".weight", ".default.weight"): tensor for name, tensor in live.tensors.items()}
    held.stage(dataclasses.replace(live, tensors=tensors))
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in live.tensors.items()}
    held.stage(dataclasses.replace(live, tensors=bare))
    with pytest.raises(AdapterError, match="there twice"):
        held.stage(dataclasses.replace(live, tensors={**live.tensors, **bare}))
