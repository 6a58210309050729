"""The model against transformers and PEFT, by the parity rule: only on weights that can show a fault."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_ext import linear_swiglu, lora
from ember_ray.engine.llm import LLM
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.model import qwen3
from ember_ray.model.lora import load_peft_adapter
from tests.support.peft_adapters import make_adapter
from tests.support.qwen3 import all_logits, make_qwen3, random_prompts, stage_model

TOLERANCE = 1e-4

SHAPES: dict[str, dict[str, Any]] = {
    "tied-gqa": {},
    "untied-one-kv-head": {
        "tie_word_embeddings": False, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "all-heads-kv-sharded": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "shard": "40KB"},
    "head-dim-over-hidden": {
        "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32, "num_hidden_layers": 2,
    },
    "attention-bias-untied-sharded": {
        "attention_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 4, "shard": "40KB",
    },
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.5}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
        }
    },
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}  # fmt: skip

ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linears": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "qv-rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"],
        "rank_pattern": {"k_proj": 3, "layers.1.mlp.up_proj": 9}, "alpha_pattern": {"down_proj": 11},
    },
    "upper-layers": {
        "r": 16, "lora_alpha": 8, "target_modules": ["gate_proj", "q_proj"], "layers_to_transform": [1, 2],
    },
    "rslora-with-patterns": {
        "r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": r".*\.(v_proj|gate_proj|down_proj)",
        # keys that overlap, the first counts; in order of the alphabet, in which PEFT saves them
        "rank_pattern": {"^model.layers.1.mlp.down_proj": 1, "gate_proj": 7, r"layers\.[02]\.mlp\..*": 2},
        "alpha_pattern": {r".*\.0\.self_attn\.v_proj": 1, "down_proj|up_proj": 6, "v_proj": 9},
    },
    "one-layer-by-pattern": {
        "r": 1, "lora_alpha": 4, "target_modules": ["o_proj", "up_proj", "k_proj"], "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
}  # fmt: skip


@torch.no_grad()
def reference(network: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    return network(torch.tensor([tokens])).logits[0]


def test_products_that_add_to_the_residual_stream_round_no_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_qwen3(tmp_path, seed=5, num_hidden_layers=4)
    tokens = random_prompts([60], seed=6)[0]
    errors = []
    exact = all_logits(stage_model(tmp_path)[1], tokens)
    for rows in (len(tokens) + 1, len(tokens)):
        monkeypatch.setattr(qwen3, "ADDING_ROWS", rows)
        _, model = stage_model(tmp_path, dtype=torch.bfloat16)
        embed, given = model.embed, []
        monkeypatch.setattr(model, "embed", lambda ids, embed=embed, given=given: given.append(embed(ids)) or given[-1])
        errors.append((all_logits(model, tokens).float() - exact).pow(2).mean().sqrt().item())
        assert torch.equal(given[0], embed(torch.tensor(tokens))), "the stage's input was written"
    apart, added = errors
    assert 0 < added < 1.1 * apart and added != apart


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    network = make_qwen3(tmp_path, seed=len(name), **SHAPES[name])
    assert ("shard" in SHAPES[name]) == (tmp_path / "model.safetensors.index.json").exists()
    tokens = random_prompts([200], seed=3)[0]
    theirs = reference(network, tokens)
    _, model = stage_model(tmp_path)
    assert theirs.std() >= 2, "these weights could not show a fault"
    assert (all_logits(model, tokens) - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("twin", ["q norm left out", "another rope theta", "k and v swapped"])
def test_a_faulty_twin_fails(twin: str, tmp_path: Path) -> None:
    network = make_qwen3(tmp_path)
    tokens = random_prompts([60])[0]
    config, model = stage_model(tmp_path)
    if twin == "q norm left out":
        model.decoder_layers[1].q_norm.fill_(1.0)
    elif twin == "another rope theta":
        raw = json.loads((tmp_path / "config.json").read_text())
        raw["rope_parameters"]["rope_theta"] *= 1.1
        (tmp_path / "config.json").write_text(json.dumps(raw))
        _, model = stage_model(tmp_path)
    else:
        weight, rows = model.decoder_layers[0].weights["qkv_proj"], config.linear_shapes["k_proj"][0]
        weight[-2 * rows :] = weight[-2 * rows :].roll(rows, 0)
    assert (all_logits(model, tokens) - reference(network, tokens)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_logits_equal_peft(name: str, device: str, tmp_path: Path) -> None:
    network = make_qwen3(tmp_path / "model")
    tokens = random_prompts([120], seed=5)[0]
    base = reference(network, tokens)
    theirs = reference(make_adapter(network, tmp_path / "adapter", **ADAPTERS[name]), tokens)
    assert (theirs - base).abs().max() >= 0.5, "this adapter could not show a fault"
    update = load_peft_adapter(tmp_path / "adapter", 1)
    twin = dataclasses.replace(update, scaling={path: 1.01 * scale for path, scale in update.scaling.items()})
    _, model = stage_model(tmp_path / "model", device=device)
    for lora_mode in ("slots", "merged"):  # in this order: what is merged stays in the weights
        assert (all_logits(model, tokens, update, lora_mode) - theirs).abs().max() < TOLERANCE, lora_mode
    for lora_mode in ("slots", "merged"):
        _, model = stage_model(tmp_path / "model", device=device)
        assert (all_logits(model, tokens, twin, lora_mode) - theirs).abs().max() > 10 * TOLERANCE, lora_mode


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("lora_mode", ["slots", "merged"])
def test_half_precision_with_an_adapter_is_as_close_to_float32_as_peft(
    lora_mode: str, rows: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities of the same tokens: median and p95 of the distance from PEFT in float32.

    Args:
        rows: "many" computes as for large batches.
    """
    from peft import PeftModel

    if rows == "many":
        monkeypatch.setattr(qwen3, "ADDING_ROWS", 1)
        monkeypatch.setattr(lora, "FIRST_ROWS", 1)
        monkeypatch.setattr(linear_swiglu, "LEAST_SHARE", 0.0)
    network = make_qwen3(tmp_path / "model", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    make_adapter(network, tmp_path / "adapter", r=8, lora_alpha=8, target_modules="all-linear")
    prompts = random_prompts([96] * 24, seed=9)

    def peft(dtype: torch.dtype) -> list[torch.Tensor]:
        model = type(network).from_pretrained(tmp_path / "model", dtype=dtype)
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapter", autocast_adapter_dtype=False).eval().to(device)
        with torch.no_grad():
            return [adapted(torch.tensor([row], device=device)).logits[0].float().cpu() for row in prompts]

    def picked(logits: torch.Tensor, row: tuple[int, ...]) -> torch.Tensor:
        return logits[:-1].float().log_softmax(-1).gather(-1, torch.tensor(row[1:])[:, None])

    _, model = stage_model(tmp_path / "model", torch.bfloat16, device)
    update = load_peft_adapter(tmp_path / "adapter", 1)
    own = [all_logits(model, prompts[0], update, lora_mode)]
    # what is merged is in the weights by now
    own += [all_logits(model, row, update if lora_mode == "slots" else None) for row in prompts[1:]]
    exact, theirs = peft(torch.float32), peft(torch.bfloat16)

    def off(half: list[torch.Tensor]) -> torch.Tensor:
        rows = zip(half, exact, prompts, strict=True)
        return torch.cat([(picked(one, row) - picked(true, row)).abs() for one, true, row in rows])

    ours_off, theirs_off = off(own), off(theirs)
    assert ours_off.median() <= 1.05 * theirs_off.median()
    assert ours_off.quantile(0.95) <= 1.05 * theirs_off.quantile(0.95)


@pytest.mark.parametrize("name", ["tied-gqa", "untied-one-kv-head", "yarn"])
def test_greedy_tokens_equal_transformers_for_64_steps(name: str, tmp_path: Path) -> None:
    network = make_qwen3(tmp_path, seed=7, **SHAPES[name])
    prompts = random_prompts([5, 33, 64, 90])
    outputs = LLM(EngineOptions(str(tmp_path))).generate(
        prompts, 1, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        theirs = network.generate(
            torch.tensor([prompt]),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
        )
        assert output.candidates[0].token_ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    """bf16 rule of the design: median and p95 of the log-probability error no worse than transformers' own."""
    network = make_qwen3(tmp_path, hidden_size=128, num_hidden_layers=4)
    prompts = random_prompts([48] * 8)
    outputs = LLM(EngineOptions(str(tmp_path), dtype=str(dtype).removeprefix("torch."))).generate(
        prompts, 4, SamplingParams(max_tokens=48, ignore_eos=True, seed=2)
    )
    half = type(network).from_pretrained(tmp_path, dtype=dtype).eval()
    exact = type(network).from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours, theirs = [], []
    for output in outputs:
        for candidate in output.candidates:
            tokens = (*output.prompt_token_ids, *candidate.token_ids)
            picked = torch.tensor(candidate.token_ids).unsqueeze(-1)
            rows = slice(len(output.prompt_token_ids) - 1, -1)
            true = reference(exact, tokens)[rows].log_softmax(-1).gather(-1, picked)
            other = reference(half, tokens)[rows].float().log_softmax(-1).gather(-1, picked)
            ours.append((torch.tensor(candidate.logprobs).unsqueeze(-1) - true).abs())
            theirs.append((other - true).abs())
    own, other = torch.cat(ours), torch.cat(theirs)
    assert own.median() <= 1.05 * other.median()
    assert own.quantile(0.95) <= 1.05 * other.quantile(0.95)
