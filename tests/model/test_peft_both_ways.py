"""Adapters saved here load elsewhere, adapters saved elsewhere load here: the same logits both ways."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ember_ray.model.lora import AdapterError, load_peft_adapter
from ember_ray.train.adapter import peft_config, save_peft_folder
from ember_ray.train.options import LoraOptions
from tests.support.qwen3 import all_logits, make_qwen3, random_prompts, stage_model

TOKENS = random_prompts([60], seed=2)[0]

OPTIONS = {
    "all linears": LoraOptions(r=8, lora_alpha=16),
    "rsLoRA on q and v": LoraOptions(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"), use_rslora=True),
    "patterns": LoraOptions(
        r=4, lora_alpha=6, rank_pattern={"k_proj": 3, "layers.1.mlp.up_proj": 9}, alpha_pattern={"down_proj": 11}
    ),
    "rsLoRA with patterns": LoraOptions(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"o_proj": 2}, alpha_pattern={"v_proj": 3}
    ),
    "two layers": LoraOptions(r=2, lora_alpha=4, layers_to_transform=(0, 2)),
}


def learnt(folder: Path, options: LoraOptions) -> Any:
    """A model as a learner has it, its adapter as if learnt."""
    from peft import get_peft_model

    model = get_peft_model(make_qwen3(folder), peft_config(options)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    return model


def vllm_style(folder: Path, projections: Iterable[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Reads a folder by the rules of vLLM's loader (PEFTHelper, parse_fine_tuned_lora_name): one r and one alpha.

    Returns:
        module path -> A, B, scale.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and isinstance(config["r"], int) and isinstance(config["lora_alpha"], int)
    assert not config["use_dora"] and not config["modules_to_save"] and config["bias"] == "none"
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        assert parts[:2] == ["base_model", "model"] and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
        module = ".".join(parts[2:-2])
        assert parts[-3] in projections and parts[-3] in config["target_modules"]
        halves.setdefault(module, {})[parts[-2]] = tensor
    return {module: (pair["lora_A"], pair["lora_B"], scale) for module, pair in halves.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_saved_here_is_the_same_there(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = learnt(tmp_path / "model", OPTIONS[name])
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0]
    save_peft_folder(model, tmp_path / "adapter")
    with torch.no_grad():
        there = PeftModel.from_pretrained(make_qwen3(tmp_path / "again"), tmp_path / "adapter").eval()
        assert torch.equal(there(torch.tensor([TOKENS])).logits[0], wanted)
        with there.disable_adapter():
            assert (there(torch.tensor([TOKENS])).logits[0] - wanted).abs().max() > 0.5
    config, ours = stage_model(tmp_path / "model")
    update = load_peft_adapter(tmp_path / "adapter", 1)
    assert (all_logits(ours, TOKENS, update, "slots") - wanted).abs().max() < 1e-4
    if not (OPTIONS[name].rank_pattern or OPTIONS[name].alpha_pattern):  # of which such loaders know nothing
        read = vllm_style(tmp_path / "adapter", config.linear_shapes)
        assert {f"{path}.lora_A.weight" for path in read} | {f"{path}.lora_B.weight" for path in read} == {
            re.sub(r"^base_model\.model\.", "", name) for name in update.tensors
        }
        for path, (a, b, scale) in read.items():
            assert torch.equal(a, update.tensors[f"base_model.model.{path}.lora_A.weight"])
            assert torch.equal(b, update.tensors[f"base_model.model.{path}.lora_B.weight"])
            assert scale == pytest.approx(update.scaling[path], rel=1e-9)


def test_an_adapter_of_a_quantized_base_is_refused(tmp_path: Path) -> None:
    save_peft_folder(learnt(tmp_path / "model", OPTIONS["all linears"]), tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(settings.read_text())
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    settings.write_text(json.dumps(config | {"base_model_name_or_path": str(quantized)}))
    for base in ({}, {"quantization_config": None}):
        (quantized / "config.json").write_text(json.dumps(base))
        load_peft_adapter(tmp_path / "adapter", 1)
    (quantized / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(AdapterError, match=f"its base model '{quantized}' is quantized"):
        load_peft_adapter(tmp_path / "adapter", 1)
    settings.write_text(json.dumps(config | {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}))
    with pytest.raises(AdapterError, match="it changed the base weight"):
        load_peft_adapter(tmp_path / "adapter", 1)
