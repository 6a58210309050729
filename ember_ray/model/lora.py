"""LoRA adapters as the engine takes them: PEFT tensors in, checked pairs of A and B out.

A LoRA layer computes ``W x + s B A x`` (Hu et al. 2021, section 4.1) with ``s = alpha / r``, or
``alpha / sqrt(r)`` for rsLoRA (Kalajdzievski 2023, section 3).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ember_ray.model.safetensors_file import read_float_tensors

_TENSOR_NAME = re.compile(
    r"^(?:base_model\.model\.)?"
    r"(?P<path>model\.layers\.(?P<layer>\d+)\.(?:"
    r"self_attn\.(?P<attention>q_proj|k_proj|v_proj|o_proj)|mlp\.(?P<mlp>gate_proj|up_proj|down_proj)))"
    r"\.lora_(?P<half>A|B)(?:\.default)?\.weight$"
)

_NOT_PLAIN = "it computes something else than W x + s B A x"
_REFUSED = {
    "use_dora": "DoRA needs the norm of the merged weight",
    "modules_to_save": "whole modules cannot be swapped in place",
    "trainable_token_indices": "the embedding cannot be swapped in place",
    "lora_bias": "biases are not part of a swap",
    "fan_in_fan_out": "Qwen3 has no transposed linear layers",
    "layer_replication": "the layers of the base model stay as they are",
    "target_parameters": "only linear layers are adapted",
    **dict.fromkeys(
        ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
        _NOT_PLAIN,
    ),
}
"""Settings of PEFT's LoraConfig that, where they are set, cannot be served, and why."""

_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to start A and B that leave the base weight as it is; all others take something out of it first."""


MAX_SCALE = 1000.0
"""Largest magnitude of s that is taken for meant; usual ones are below 10."""


class AdapterError(ValueError):
    """An adapter that cannot be served; the text names what is wrong and where."""


@dataclass(frozen=True)
class AdapterUpdate:
    """A policy as it travels from the learner to the stages.

    Attributes:
        version: its number; never reused. Version 0 is the base model without an adapter.
        tensors: PEFT names to float tensors, ``...lora_A.weight`` [r, in] and ``...lora_B.weight`` [out, r].
        scaling: module path without PEFT's prefix (``model.layers.0.self_attn.q_proj``) to s.
    """

    version: int
    tensors: Mapping[str, torch.Tensor]
    scaling: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraPair:
    """A [r, in], B [out, r] and the scale of one linear layer."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


LoraLayers = dict[int, dict[str, LoraPair]]
"""Layer index -> projection name -> pair."""


def check_adapter(
    update: AdapterUpdate,
    shapes: Mapping[str, tuple[int, int]],
    num_layers: int,
    dtype: torch.dtype = torch.float32,
    looked_at: range = range(0),
) -> LoraLayers:
    """Turns an update into pairs per layer, or refuses it.

    Args:
        update: what the learner published.
        shapes: projection name to (out, in) of the model's linear layers.
        num_layers: layers of the whole model (every stage checks the whole update, so that
            all stages refuse the same ones).
        dtype: in which A and B will serve; a value that it cannot hold is as bad as an infinite one.
        looked_at: layers whose values the caller looks at where it copies them.

    Raises:
        AdapterError: unknown module, A without B, wrong shape or rank, NaN or Inf, bad scale, no tensor at all.
    """
    halves: dict[str, dict[str, torch.Tensor]] = {}
    where: dict[str, tuple[int, str]] = {}
    for name, tensor in update.tensors.items():
        match = _TENSOR_NAME.match(name)
        if match is None:
            raise AdapterError(
                f"adapter tensor '{name}' is no LoRA A or B of a Qwen3 linear layer (those: {', '.join(shapes)})"
            )
        path, layer, half = match["path"], int(match["layer"]), match["half"]
        projection = match["attention"] or match["mlp"]
        if layer >= num_layers:
            raise AdapterError(f"adapter tensor '{name}': the model has only {num_layers} layers")
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise AdapterError(
                f"adapter tensor '{name}' must be a 2-d float tensor, not {tensor.dtype} {tuple(tensor.shape)}"
            )
        if layer not in looked_at and not bool(torch.isfinite(tensor.to(dtype)).all()):
            raise AdapterError(f"adapter tensor '{name}' has NaN or Inf in {str(dtype).removeprefix('torch.')}")
        if half in halves.setdefault(path, {}):
            raise AdapterError(f"adapter tensor '{name}' is there twice")
        halves[path][half] = tensor
        where[path] = (layer, projection)
    if not halves:
        raise AdapterError("the adapter has no tensors")
    unknown = set(update.scaling) - set(halves)
    if unknown:
        raise AdapterError(f"a scale is given for '{min(unknown)}', which has no adapter tensors")

    layers: LoraLayers = {}
    for path, pair in halves.items():
        layer, projection = where[path]
        for half in ("A", "B"):
            if half not in pair:
                raise AdapterError(f"module '{path}' has no lora_{half}")
        out_features, in_features = shapes[projection]
        rank = pair["A"].shape[0]
        if rank == 0 or tuple(pair["A"].shape) != (rank, in_features) or tuple(pair["B"].shape) != (out_features, rank):
            raise AdapterError(
                f"module '{path}': lora_A {tuple(pair['A'].shape)} and lora_B {tuple(pair['B'].shape)} do not fit a "
                f"linear layer of {in_features} inputs and {out_features} outputs"
            )
        if path not in update.scaling:
            raise AdapterError(f"module '{path}' has no scale")
        scale = float(update.scaling[path])
        check_scale(path, scale)
        layers.setdefault(layer, {})[projection] = LoraPair(pair["A"], pair["B"], scale)
    return layers


def check_scale(path: str, scale: float) -> None:
    """Raises AdapterError where a module's s is NaN, infinite or so large that it can only be a mistake."""
    if not math.isfinite(scale):
        raise AdapterError(f"module '{path}': the scale is {scale}")
    if abs(scale) > MAX_SCALE:
        raise AdapterError(f"module '{path}': the scale is {scale:g}, beyond {MAX_SCALE:g}; alpha / r is meant")


def _pattern_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the end of the module path."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def load_peft_adapter(folder: str | Path, version: int) -> AdapterUpdate:
    """Reads ``adapter_config.json`` and ``adapter_model.safetensors`` of a PEFT folder.

    Raises:
        AdapterError: a file is missing or broken, or the adapter is of a kind that is not served
            (another PEFT type, DoRA and other variants of LoRA, a start that changed the base weight as PiSSA's
            does, modules_to_save, biases), or its base model is known to be quantized.
    """
    folder = Path(folder)
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise AdapterError(f"no PEFT adapter in '{folder}': {path.name} is missing")
    try:
        config = json.loads(config_path.read_text())
        tensors = read_float_tensors(weights_path)
    except Exception as fault:
        raise AdapterError(f"PEFT adapter '{folder}' cannot be read: {fault}") from fault
    if not isinstance(config, dict) or not {"r", "lora_alpha"} <= config.keys():
        raise AdapterError(f"PEFT adapter '{folder}': adapter_config.json has no r or no lora_alpha")
    refused = {key: why for key, why in _REFUSED.items() if config.get(key)}
    if config.get("peft_type", "LORA") != "LORA":
        refused["peft_type"] = "only LoRA adapters are served"
    if config.get("bias", "none") != "none":
        refused["bias"] = "biases are not part of a swap"
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        refused["init_lora_weights"] = "it changed the base weight; save the adapter converted to a plain LoRA"
    for key, why in refused.items():
        raise AdapterError(f"PEFT adapter '{folder}': {key}={config[key]!r} is not supported, {why}")
    base = config.get("base_model_name_or_path")
    if _is_quantized(base):
        raise AdapterError(
            f"PEFT adapter '{folder}': its base model '{base}' is quantized, so it makes up for roundings that "
            "float weights do not have; learn it on the float checkpoint"
        )
    try:
        return AdapterUpdate(version, tensors, _scaling(config, tensors))
    except (AdapterError, TypeError, re.error) as fault:
        raise AdapterError(f"PEFT adapter '{folder}': {fault}") from fault


def _is_quantized(base: object) -> bool:
    """Whether a base model that can be looked at, in a folder, says that its weights are quantized."""
    path = Path(base) / "config.json" if isinstance(base, str) and base else None
    try:
        return path is not None and bool(json.loads(path.read_text()).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False


def _scaling(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The scale of every module that has an A, from an adapter_config.json."""
    scaling: dict[str, float] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.match(name)
        if match and match["half"] == "A":
            path, rank = match["path"], tensor.shape[0]
            alpha = _pattern_value(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
            expected = _pattern_value(config.get("rank_pattern") or {}, path, config["r"])
            if rank != expected:
                raise AdapterError(f"'{name}' has rank {rank}, its configuration says {expected}")
            scaling[path] = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return scaling
