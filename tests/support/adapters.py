"""Random adapters in the form in which a learner publishes them."""

from __future__ import annotations

from pathlib import Path

import torch

from ember_ray.model.lora import AdapterUpdate
from ember_ray.model.qwen3_config import read_model_config


def random_adapter(folder: Path, version: int = 1, seed: int = 1, rank: int = 4) -> AdapterUpdate:
    """A and B of q, v and down projections of all layers; B is not zero."""
    config, generator = read_model_config(folder), torch.Generator().manual_seed(seed)
    tensors, scaling = {}, {}
    for layer in range(config.num_hidden_layers):
        for block, name in (("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "down_proj")):
            rows, columns = config.linear_shapes[name]
            path = f"model.layers.{layer}.{block}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.2
            tensors[f"{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.2
            scaling[path] = 2.0
    return AdapterUpdate(version, tensors, scaling)
