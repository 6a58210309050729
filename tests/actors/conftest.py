"""A random tiny Qwen3 with a byte-level tokenizer, prompt rows, and the settings that the Ray tests share."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a 4-layer Qwen3 with random weights and large logits; every byte is a token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {symbol: index + 1 for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=0,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, 2.0 if "lm_head" in name else 0.12)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def make_rows():
    """Prompt rows of 30 to 60 tokens, all different, with a JSON object as gold."""
    from actors.messages import PromptRow
    from ember_ray.data.example import Example

    def rows(count: int, gold: object = None) -> list[PromptRow]:
        made = []
        for number in range(count):
            prompt = tuple((number * 31 + place * 7) % 256 + 1 for place in range(30 + number % 31))
            example = Example(f"row-{number}", [{"role": "user", "content": f"prompt {number}"}], gold or {"total": 1})
            made.append(PromptRow(example, prompt))
        return made

    return rows


@pytest.fixture(scope="session")
def make_update(tiny_model: str):
    """Random adapters that change the tokens: rank 4 on q, v and down of all layers."""
    import torch

    from ember_ray.model.lora import AdapterUpdate
    from ember_ray.model.qwen3_config import read_model_config

    config = read_model_config(tiny_model)

    def update(version: int, fault: float | None = None) -> AdapterUpdate:
        generator = torch.Generator().manual_seed(version)
        tensors, scaling = {}, {}
        for layer in range(config.num_hidden_layers):
            for block, name in (("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "down_proj")):
                rows, columns = config.linear_shapes[name]
                path = f"model.layers.{layer}.{block}.{name}"
                a, b = f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"
                tensors[a] = torch.randn(4, columns, generator=generator) * 0.2
                tensors[b] = torch.randn(rows, 4, generator=generator) * 0.2
                scaling[path] = 2.0
        if fault is not None:
            tensors[b][0, 0] = fault
        return AdapterUpdate(version, tensors, scaling)

    return update


@pytest.fixture(scope="session")
def make_settings(tiny_model: str):
    """Coordinator settings of the tiny model, cut as asked."""
    from actors.messages import CoordinatorSettings
    from ember_ray.engine.options import EngineOptions

    def settings(split: tuple[int, ...], **rest: object) -> CoordinatorSettings:
        engine = EngineOptions(tiny_model, layer_split=split, num_kv_blocks=1024, max_num_seqs=32)
        return CoordinatorSettings(engine, **{"seed": 11, "threads": 1} | rest)

    return settings


@pytest.fixture(scope="session")
def tokens_of():
    """(row id, candidate index) -> (version, tokens, log-probabilities) of a rollout."""

    def tokens(result) -> dict[tuple[str, int], tuple[int, list[int], list[float]]]:
        found = {}
        for group in result.groups:
            for scored in group.candidates:
                candidate = scored.candidate
                key = (candidate.request_id, candidate.index)
                assert key not in found
                found[key] = (candidate.policy_version, candidate.token_ids, candidate.logprobs)
        return found

    return tokens
