"""A contiguous cut of a dense Qwen3 model: the layers of one pipeline stage.

Weights of q, k, v and of gate, up are fused. They are read here once and never written again; adapters live
beside them (see :mod:`ember_ray.model.slots`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cuda_ext.lora import FusedLora, lora_linear
from cuda_ext.rms_norm import add_rms_norm, rms_norm
from cuda_ext.rope import qk_norm_rope_write, rope_table
from cuda_ext.swiglu import swiglu
from ember_ray.model.checkpoint import Checkpoint
from ember_ray.model.qwen3_config import Qwen3Config, rope_frequencies

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""Fused linear layer -> the projections in it, in row order."""

LayerLora = dict[str, FusedLora]
"""Fused linear layer name -> its adapter."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [tokens, heads, head_dim], k_cache, v_cache [num_slots, kv_heads, head_dim]) -> like q."""


@dataclass
class DecoderLayer:
    """One layer; shapes as in transformers, q, k, v and gate, up stacked along the output."""

    config: Qwen3Config
    input_norm: Tensor
    post_attention_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]

    @classmethod
    def load(cls, config: Qwen3Config, index: int, read: Callable[[str, tuple[int, ...]], Tensor]) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for fused, projections in FUSED.items():
            block = "self_attn" if fused in ("qkv_proj", "o_proj") else "mlp"
            parts = [read(f"{prefix}.{block}.{name}.weight", config.linear_shapes[name]) for name in projections]
            weights[fused] = torch.cat(parts) if len(parts) > 1 else parts[0]
            if config.attention_bias and block == "self_attn":
                rows = [read(f"{prefix}.{block}.{name}.bias", config.linear_shapes[name][:1]) for name in projections]
                biases[fused] = torch.cat(rows)
        hidden, head = (config.hidden_size,), (config.head_dim,)
        return cls(
            config,
            read(f"{prefix}.input_layernorm.weight", hidden),
            read(f"{prefix}.post_attention_layernorm.weight", hidden),
            read(f"{prefix}.self_attn.q_norm.weight", head),
            read(f"{prefix}.self_attn.k_norm.weight", head),
            weights,
            biases,
        )

    def linear(self, name: str, x: Tensor, lora: LayerLora) -> Tensor:
        return lora_linear(x, self.weights[name], self.biases.get(name), lora.get(name))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        lora: LayerLora,
        attention: Attention,
        table: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] still to be added to residual (None: x is the residual stream); returns both anew."""
        eps = self.config.rms_norm_eps
        if residual is None:
            normed, residual = rms_norm(x, self.input_norm, eps), x
        else:
            normed, residual = add_rms_norm(x, residual, self.input_norm, eps)
        qkv = self.linear("qkv_proj", normed, lora)
        q = qk_norm_rope_write(qkv, self.q_norm, self.k_norm, eps, table, positions, k_cache, v_cache, slots)
        attended = attention(q, k_cache, v_cache).flatten(1)
        normed, residual = add_rms_norm(self.linear("o_proj", attended, lora), residual, self.post_attention_norm, eps)
        return self.linear("down_proj", swiglu(self.linear("gate_up_proj", normed, lora)), lora), residual


class StageModel:
    """The layers of one stage, with the embedding on the first and norm and LM head on the last.

    Args:
        folder: Hugging Face folder; only this stage's tensors are read from it.
        layers: which layers, a contiguous range.
        max_positions: length of the rope table.

    Raises:
        ModelError: a tensor is missing or has another shape.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Qwen3Config,
        layers: range,
        dtype: torch.dtype,
        device: str,
        max_positions: int,
    ) -> None:
        self.config, self.layers, self.dtype, self.device = config, layers, dtype, device
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.num_hidden_layers
        with Checkpoint(folder) as checkpoint:

            def read(name: str, shape: tuple[int, ...]) -> Tensor:
                return checkpoint.read(name, shape, dtype, device)

            table = (config.vocab_size, config.hidden_size)
            self.decoder_layers = [DecoderLayer.load(config, index, read) for index in layers]
            self.embedding = read("model.embed_tokens.weight", table) if self.is_first else None
            self.norm = read("model.norm.weight", table[1:]) if self.is_last else None
            self.lm_head: Tensor | None = None
            if self.is_last:
                if not config.tie_word_embeddings:
                    self.lm_head = read("lm_head.weight", table)
                elif self.embedding is not None:
                    self.lm_head = self.embedding
                else:
                    self.lm_head = read("model.embed_tokens.weight", table)
            self.tensors_read = tuple(checkpoint.names_read)
        frequencies, factor = rope_frequencies(config)
        self.rope = rope_table(frequencies.to(device), factor, max_positions)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[tokens] int64 -> [tokens, hidden]. First stage only."""
        assert self.embedding is not None
        return self.embedding[token_ids]

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        kv_cache: Tensor,
        attention: Attention,
        lora: dict[int, LayerLora],
    ) -> Tensor:
        """Runs the stage's layers.

        Args:
            hidden: [tokens, hidden], the residual stream.
            positions, slots: [tokens] int64.
            kv_cache: [layers, 2, num_slots, kv_heads, head_dim], written at slots.
            lora: adapters by layer index.

        Returns:
            The residual stream [tokens, hidden] behind the last layer of the stage.
        """
        residual: Tensor | None = None
        for place, (index, layer) in enumerate(zip(self.layers, self.decoder_layers, strict=True)):
            k_cache, v_cache = kv_cache[place].unbind(0)
            hidden, residual = layer.forward(
                hidden, residual, lora.get(index, {}), attention, self.rope, positions, k_cache, v_cache, slots
            )
        assert residual is not None
        return residual + hidden

    def final_norm(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, hidden]. Last stage only."""
        assert self.norm is not None
        return rms_norm(hidden, self.norm, self.config.rms_norm_eps)

    def logits(self, normed: Tensor) -> Tensor:
        """[rows, hidden] behind the final norm -> [rows, vocab] float32. Last stage only."""
        assert self.lm_head is not None
        return torch.nn.functional.linear(normed, self.lm_head).float()
