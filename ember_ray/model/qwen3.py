"""A contiguous cut of a dense Qwen3 model: the layers of one pipeline stage.

Weights of q, k, v and of gate, up are fused. They are read here once and not written again, but where adapters are
merged into them; else adapters live beside them (see :mod:`ember_ray.model.slots` for both).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cuda_ext.decode_state import embed
from cuda_ext.linear_swiglu import linear_swiglu, linear_swiglu_lora
from cuda_ext.lora import FusedLora, lora_expand, lora_linear
from cuda_ext.lora_shrink import lora_shrink
from cuda_ext.rms_norm import add_rms_norm, rms_norm
from cuda_ext.rope import qk_norm_rope_write, rope_table
from cuda_ext.skinny_linear import can_skinny, norm_linear, norm_linear_swiglu, skinny_linear
from ember_ray.model.base_weights import SharedRoom, can_share, stacked
from ember_ray.model.checkpoint import Checkpoint
from ember_ray.model.dummy import dummy_reader
from ember_ray.model.plan import layer_range_parameters
from ember_ray.model.qwen3_config import Qwen3Config, rope_frequencies

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""Fused linear layer -> the projections in it, in row order."""

LAYER_TENSORS = 10
"""Most tensors of a decoder layer: four norms, four linear layers and the biases of two."""

BLOCK_OF = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}
"""Fused linear layer -> the module of a decoder layer that it is in."""

LayerLora = dict[str, FusedLora]
"""Fused linear layer name -> its adapter."""

ADDING_ROWS = 512
"""From so many rows on a 16-bit product adds to the residual stream itself: the norm behind it moves half the bytes."""

Stream = tuple[Tensor | None, Tensor]
"""Two tensors [tokens, hidden] whose sum is the residual stream: what a linear layer gave, None where it was added
already, and the stream before it."""

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
    def load(
        cls,
        config: Qwen3Config,
        index: int,
        read: Callable[[str, tuple[int, ...]], Tensor],
        hold: Callable[[Sequence[Tensor]], Tensor],
    ) -> DecoderLayer:
        """Reads a layer's tensors; ``hold`` gives the parts of a fused one, stacked, a place to stay."""
        prefix = f"model.layers.{index}"
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for fused, projections in FUSED.items():
            block = BLOCK_OF[fused]
            weights[fused] = hold(
                [read(f"{prefix}.{block}.{name}.weight", config.linear_shapes[name]) for name in projections]
            )
            if config.attention_bias and block == "self_attn":
                rows = [read(f"{prefix}.{block}.{name}.bias", config.linear_shapes[name][:1]) for name in projections]
                biases[fused] = hold(rows)
        hidden, head = (config.hidden_size,), (config.head_dim,)
        return cls(
            config,
            hold([read(f"{prefix}.input_layernorm.weight", hidden)]),
            hold([read(f"{prefix}.post_attention_layernorm.weight", hidden)]),
            hold([read(f"{prefix}.self_attn.q_norm.weight", head)]),
            hold([read(f"{prefix}.self_attn.k_norm.weight", head)]),
            weights,
            biases,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it by transformers' names in a layer, but for those of the fused ones."""
        named = {
            "input_layernorm.weight": self.input_norm,
            "post_attention_layernorm.weight": self.post_attention_norm,
            "self_attn.q_norm.weight": self.q_norm,
            "self_attn.k_norm.weight": self.k_norm,
        }
        named |= {f"{BLOCK_OF[name]}.{name}.weight": weight for name, weight in self.weights.items()}
        return named | {f"{BLOCK_OF[name]}.{name}.bias": bias for name, bias in self.biases.items()}

    def linear(self, name: str, x: Tensor, lora: LayerLora) -> Tensor:
        weight, bias = self.weights[name], self.biases.get(name)
        if name not in lora and can_skinny(x, weight):
            return skinny_linear(x, weight, bias)
        return lora_linear(x, weight, bias, lora.get(name))

    def onto(self, name: str, x: Tensor, residual: Tensor, lora: LayerLora, may_write: bool) -> Stream:
        """A linear layer whose output goes onto the residual stream, by the product itself where that is faster."""
        narrow = x.dtype != torch.float32 and len(x) >= ADDING_ROWS
        if not may_write or not narrow or name in self.biases:
            return self.linear(name, x, lora), residual
        if name in lora:
            lora_expand(residual, lora_shrink(x, lora[name].a), lora[name])
        return None, residual.addmm_(x, self.weights[name].T)

    def norm(self, x: Tensor | None, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The normalized residual stream, and the stream itself with x added to it."""
        eps = self.config.rms_norm_eps
        return (rms_norm(residual, weight, eps), residual) if x is None else add_rms_norm(x, residual, weight, eps)

    def qkv(self, x: Tensor | None, residual: Tensor, lora: LayerLora) -> tuple[Tensor, Tensor]:
        """qkv_proj behind its norm, and the residual stream."""
        weight = self.weights["qkv_proj"]
        if "qkv_proj" not in lora and can_skinny(residual, weight):
            eps, bias = self.config.rms_norm_eps, self.biases.get("qkv_proj")
            first, second = (residual, None) if x is None else (x, residual)
            return norm_linear(first, second, self.input_norm, eps, weight, bias)
        normed, residual = self.norm(x, residual, self.input_norm)
        return self.linear("qkv_proj", normed, lora), residual

    def gated(self, x: Tensor | None, residual: Tensor, lora: LayerLora) -> tuple[Tensor, Tensor]:
        """SwiGLU of gate_up_proj behind its norm, and the residual stream."""
        weight = self.weights["gate_up_proj"]
        if x is not None and "gate_up_proj" not in lora and can_skinny(x, weight):
            return norm_linear_swiglu(x, residual, self.post_attention_norm, self.config.rms_norm_eps, weight)
        normed, residual = self.norm(x, residual, self.post_attention_norm)
        adapter = lora.get("gate_up_proj")
        if adapter is None:
            return linear_swiglu(normed, weight), residual
        return linear_swiglu_lora(normed, weight, adapter), residual

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor,
        lora: LayerLora,
        attention: Attention,
        table: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        first: bool,
        last: bool,
    ) -> Stream:
        """The residual stream behind the layer.

        Args:
            x, residual: the stream before it.
            first, last: of a stage. The first does not write what it is given, the last leaves x to be added.
        """
        eps = self.config.rms_norm_eps
        qkv, residual = self.qkv(x, residual, lora)
        q = qk_norm_rope_write(qkv, self.q_norm, self.k_norm, eps, table, positions, k_cache, v_cache, slots)
        attended = attention(q, k_cache, v_cache).flatten(1)
        x, residual = self.onto("o_proj", attended, residual, lora, not first)
        gated, residual = self.gated(x, residual, lora)
        return self.onto("down_proj", gated, residual, lora, not last)


class StageModel:
    """The layers of one stage, with the embedding on the first and norm and LM head on the last.

    Args:
        folder: Hugging Face folder; only this stage's tensors are read from it.
        layers: which layers, a contiguous range.
        max_positions: length of the rope table.
        load_format: "auto" reads the checkpoint, "dummy" makes random weights of the right scale on the device.

    Attributes:
        base: the weights as they were loaded, by transformers' names but for those of the fused ones, which are
            ``...qkv_proj`` and ``...gate_up_proj``; nothing writes them. ``lm_head.weight`` is among them if it is not
            the embedding itself. On a CPU they lie in memory that other processes can open.

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
        load_format: str = "auto",
    ) -> None:
        self.config, self.layers, self.dtype, self.device = config, layers, dtype, device
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.num_hidden_layers
        hold = stacked
        if torch.device(device).type == "cpu" and can_share():
            tensors = LAYER_TENSORS * len(layers) + 3
            hold = SharedRoom(layer_range_parameters(config, layers), tensors, dtype).place
        if load_format == "dummy":
            self._load(dummy_reader(config, dtype, device), hold)
            self.tensors_read: tuple[str, ...] = ()
        else:
            with Checkpoint(folder) as checkpoint:
                self._load(lambda name, shape: checkpoint.read(name, shape, dtype, device), hold)
                self.tensors_read = tuple(checkpoint.names_read)
        self.base = self._tensors()
        frequencies, factor = rope_frequencies(config)
        self.rope = rope_table(frequencies.to(device), factor, max_positions)

    def _load(self, read: Callable[[str, tuple[int, ...]], Tensor], hold: Callable[[Sequence[Tensor]], Tensor]) -> None:
        config = self.config
        table = (config.vocab_size, config.hidden_size)
        self.decoder_layers = [DecoderLayer.load(config, index, read, hold) for index in self.layers]
        self.embedding = hold([read("model.embed_tokens.weight", table)]) if self.is_first else None
        self.norm = hold([read("model.norm.weight", table[1:])]) if self.is_last else None
        self.lm_head: Tensor | None = None
        if self.is_last:
            if not config.tie_word_embeddings:
                self.lm_head = hold([read("lm_head.weight", table)])
            elif self.embedding is not None:
                self.lm_head = self.embedding
            else:
                self.lm_head = hold([read("model.embed_tokens.weight", table)])

    def _tensors(self) -> dict[str, Tensor]:
        named = {
            f"model.layers.{index}.{name}": tensor
            for index, layer in zip(self.layers, self.decoder_layers, strict=True)
            for name, tensor in layer.tensors().items()
        }
        ends = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if self.lm_head is not self.embedding:
            ends["lm_head.weight"] = self.lm_head
        return named | {name: tensor for name, tensor in ends.items() if tensor is not None}

    def embed(self, token_ids: Tensor) -> Tensor:
        """[tokens] int64 -> [tokens, hidden]. First stage only."""
        assert self.embedding is not None
        return embed(self.embedding, token_ids)

    def run_layers(
        self,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        kv_cache: Tensor,
        attention: Attention,
        lora: dict[int, LayerLora],
    ) -> tuple[Tensor, Tensor]:
        """Runs the stage's layers.

        Args:
            hidden: [tokens, hidden], the residual stream.
            positions, slots: [tokens] int64.
            kv_cache: [layers, 2, num_slots, kv_heads, head_dim], written at slots.
            lora: adapters by layer index.

        Returns:
            x and residual, both [tokens, hidden]; their sum is the residual stream behind the last layer. They are
            apart so that the norm that follows can add them.
        """
        x: Tensor | None = None
        residual, last = hidden, len(self.decoder_layers) - 1
        for place, (index, layer) in enumerate(zip(self.layers, self.decoder_layers, strict=True)):
            k_cache, v_cache = kv_cache[place].unbind(0)
            inputs = (attention, self.rope, positions, k_cache, v_cache, slots)
            x, residual = layer.forward(x, residual, lora.get(index, {}), *inputs, place == 0, place == last)
        assert x is not None
        return x, residual

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        kv_cache: Tensor,
        attention: Attention,
        lora: dict[int, LayerLora],
    ) -> Tensor:
        """As :meth:`run_layers`; returns the residual stream [tokens, hidden] behind the last layer of the stage."""
        x, residual = self.run_layers(hidden, positions, slots, kv_cache, attention, lora)
        return residual + x

    def final_norm(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, hidden]. Last stage only."""
        assert self.norm is not None
        return rms_norm(hidden, self.norm, self.config.rms_norm_eps)

    def logits(self, normed: Tensor) -> Tensor:
        """[rows, hidden] behind the final norm -> [rows, vocab] in the model's dtype. Last stage only."""
        assert self.lm_head is not None
        if can_skinny(normed, self.lm_head):
            return skinny_linear(normed, self.lm_head)
        return torch.nn.functional.linear(normed, self.lm_head)

    def head(self, x: Tensor, residual: Tensor) -> Tensor:
        """Logits [rows, vocab] of what :meth:`run_layers` gave, in the model's dtype. Last stage only."""
        assert self.lm_head is not None and self.norm is not None
        eps = self.config.rms_norm_eps
        if can_skinny(x, self.lm_head):
            return norm_linear(x, residual, self.norm, eps, self.lm_head)[0]
        return self.logits(add_rms_norm(x, residual, self.norm, eps)[0])
