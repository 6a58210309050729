"""Whether adapters are merged into a second copy of the weights, where the options leave it to the memory at hand."""

from __future__ import annotations

import torch

from ember_ray.engine.kv_memory import smallest
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.transport import Transport
from ember_ray.model.qwen3 import StageModel

LEAST_REST = 0.5
"""Share of the memory free after loading that a second copy must leave to KV blocks, activations and adapters."""


def chosen_lora_mode(options: EngineOptions, model: StageModel, transport: Transport) -> str:
    """``slots`` or ``merged``, the same on all stages.

    Args:
        model: loaded, nothing else on its device yet.
    """
    if options.lora_mode != "auto":
        return options.lora_mode
    fits = has_room(_layer_bytes(model), _free_bytes(options)) if torch.device(options.device).type == "cuda" else False
    return "merged" if smallest(transport, int(fits)) else "slots"


def has_room(copy: int, free: int) -> bool:
    """Whether a second copy of so many bytes may be made where so many are free."""
    return free - copy >= LEAST_REST * free


def _layer_bytes(model: StageModel) -> int:
    return sum(weight.nbytes for layer in model.decoder_layers for weight in layer.weights.values())


def _free_bytes(options: EngineOptions) -> int:
    """Of the share of the GPU that the options give this stage."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return min(free, int(total * options.gpu_memory_utilization) - torch.cuda.memory_reserved())
