"""Random Qwen3 models on which a fault shows: spread-out logits, random norm weights (the parity rule of the docs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cuda_ext.prefill_attention import PrefillBatch, choose_backend, prefill_attention
from ember_ray.model.adapter_layout import Gathered, adapter_layout
from ember_ray.model.lora import AdapterUpdate, check_adapter
from ember_ray.model.qwen3 import LayerLora, StageModel
from ember_ray.model.qwen3_config import Qwen3Config, read_model_config
from ember_ray.model.slots import AdapterSlots, MergedWeights

VOCAB = 300
EOS, PAD = 1, 0


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes with a small chat template; ids 0 and 1 are <pad> and <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": PAD, "<eos>": EOS}
    vocab |= {letter: place + 2 for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    wrapped.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    wrapped.save_pretrained(folder)


def make_qwen3(folder: Path, seed: int = 0, shard: str = "5GB", **overrides: Any) -> Any:
    """Writes a random Qwen3 to the folder and returns transformers' float32 model of it."""
    from transformers import Qwen3Config as TransformersConfig
    from transformers import Qwen3ForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    config = TransformersConfig(**(shape | overrides), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    network = Qwen3ForCausalLM(config)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        elif "embed" in name or "lm_head" in name:
            parameter.data.normal_(0.0, 3.0 / config.hidden_size**0.5, generator=generator)
        else:
            parameter.data.normal_(0.0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
    network.save_pretrained(folder, max_shard_size=shard)
    save_byte_tokenizer(folder)
    return network.eval()


def random_prompts(lengths: list[int], seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(2, 258, (length,), generator=generator).tolist()) for length in lengths]


def stage_model(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Qwen3Config, StageModel]:
    config = read_model_config(folder)
    layers = range(config.num_hidden_layers)
    return config, StageModel(folder, config, layers, dtype, device, config.max_position_embeddings)


@torch.inference_mode()
def all_logits(
    model: StageModel,
    token_ids: list[int] | tuple[int, ...],
    update: AdapterUpdate | None = None,
    lora_mode: str | None = None,
) -> Tensor:
    """Logits [tokens, vocab] of every position on the CPU, through the stage's layers and the paged cache.

    Args:
        lora_mode: None computes the adapter without an engine's slots, as an oracle for them; "merged" leaves it in
            the model's weights.
    """
    config, device = model.config, model.device
    lora: dict[int, LayerLora] = {}
    if update is not None and lora_mode is None:
        checked = check_adapter(update, config.linear_shapes, config.num_hidden_layers)
        layout, scaling, tensors = adapter_layout(checked, config.linear_shapes)
        flat = torch.zeros(layout.numel, dtype=model.dtype, device=device)
        Gathered.of(tensors, layout, device).copy_to(flat)
        lora = layout.fused(flat, scaling)
    elif update is not None:
        merged = MergedWeights(model.layers, model.decoder_layers) if lora_mode == "merged" else None
        adapters = AdapterSlots(config, model.layers, model.dtype, device, merged=merged)
        adapters.stage(update)
        adapters.commit(update.version)
        lora = adapters.active
    count = len(token_ids)
    # slots in a scrambled order: nothing may depend on where a position lies
    slots = torch.randperm(count + 7, generator=torch.Generator().manual_seed(count))[:count]
    shape = (len(model.layers), 2, count + 7, config.num_key_value_heads, config.head_dim)
    cache = torch.full(shape, torch.nan, dtype=model.dtype, device=device)

    batch = PrefillBatch.build([count], [slots.numpy()], device)
    backend, _ = choose_backend("auto", model.dtype, config.head_dim, device)

    def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return prefill_attention(q, k_cache, v_cache, batch, config.head_dim**-0.5, backend)

    tokens, positions = torch.tensor(token_ids, device=device), torch.arange(count, device=device)
    hidden = model.forward(model.embed(tokens), positions, slots.to(device), cache, attention, lora)
    return model.logits(model.final_norm(hidden)).cpu()
