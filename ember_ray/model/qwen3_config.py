"""The configuration of a dense Qwen3 model, read from its Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class ModelError(ValueError):
    """A model folder that cannot be served; the text says which and why."""


@dataclass(frozen=True)
class Qwen3Config:
    """Shapes and constants; names as in transformers' Qwen3Config.

    ``rope_parameters`` holds ``rope_type``, ``rope_theta`` and what that type needs.
    ``eos_token_ids`` come from generation_config.json where it names them, else from config.json.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    rope_parameters: dict[str, Any] = field(hash=False)
    eos_token_ids: tuple[int, ...] = ()

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Projection name to (out, in)."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (q, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, q),
            "gate_proj": (ffn, hidden),
            "up_proj": (ffn, hidden),
            "down_proj": (hidden, ffn),
        }

    @property
    def share(self) -> int:
        """Query heads of a KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, norms included."""
        linears = sum(rows * columns for rows, columns in self.linear_shapes.values())
        biases = 0
        if self.attention_bias:
            biases = sum(self.linear_shapes[name][0] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        return linears + biases + 2 * self.hidden_size + 2 * self.head_dim


def _token_ids(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (int(value),)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise ModelError(f"model folder '{path.parent}': {path.name} cannot be read: {fault}") from fault
    if not isinstance(read, dict):
        raise ModelError(f"model folder '{path.parent}': {path.name} holds no JSON object")
    return read


def read_model_config(folder: str | Path) -> Qwen3Config:
    """Reads config.json (and generation_config.json) of a Hugging Face folder.

    Raises:
        ModelError: no such folder, not a dense Qwen3, or a feature that is not served (sliding windows, a rope type
            whose frequencies change with the length of the sequence, quantized weights).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"there is no model folder '{folder}'")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder '{folder}' has no config.json")
    raw = _read_json(folder / "config.json")
    where = f"model folder '{folder}'"
    if raw.get("model_type") != "qwen3":
        raise ModelError(f"{where}: model_type is {raw.get('model_type')!r}; only dense 'qwen3' models are served")
    if raw.get("quantization_config"):
        raise ModelError(f"{where}: quantized weights are not served; use the float checkpoint")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{where}: hidden_act {raw['hidden_act']!r} is not served, only 'silu'")
    layers = raw.get("num_hidden_layers", 32)
    sliding = raw.get("use_sliding_window") and raw.get("sliding_window") is not None
    if "sliding_attention" in (raw.get("layer_types") or ()) or (
        sliding and not raw.get("layer_types") and raw.get("max_window_layers", 28) < layers
    ):
        raise ModelError(f"{where}: sliding-window attention is not served")

    # transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    served = ("default", "linear", "yarn", "llama3")
    if rope["rope_type"] not in served:
        raise ModelError(
            f"{where}: rope type {rope['rope_type']!r} is not served (served: {', '.join(served)}); "
            "frequencies that change with the sequence would make cached keys wrong"
        )

    generation = folder / "generation_config.json"
    eos = _token_ids(_read_json(generation).get("eos_token_id")) if generation.is_file() else ()
    heads = raw.get("num_attention_heads", 32)
    try:
        config = Qwen3Config(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or 128,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            max_position_embeddings=raw.get("max_position_embeddings", 32768),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=raw.get("attention_bias", False),
            rope_parameters=rope,
            eos_token_ids=eos or _token_ids(raw.get("eos_token_id")),
        )
    except KeyError as fault:
        raise ModelError(f"{where}: config.json has no {fault}") from fault
    if config.num_attention_heads % config.num_key_value_heads:
        raise ModelError(f"{where}: {heads} attention heads cannot share {config.num_key_value_heads} KV heads")
    return config


def rope_frequencies(config: Qwen3Config) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] float32 (radians a position) and the factor on cosines and sines.

    The formulas of the scaled types (linear; YaRN, Peng et al. 2023; Llama 3) are transformers' own, so that
    a checkpoint means the same here as there.
    """
    theta, dim = config.rope_parameters["rope_theta"], config.head_dim
    if config.rope_parameters["rope_type"] == "default":
        return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0
    from transformers import Qwen3Config as TransformersConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    same = TransformersConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=config.rope_parameters,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](same, torch.device("cpu"))
    return frequencies.float(), float(factor)
