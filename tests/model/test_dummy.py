"""Random weights are sane, and the same from run to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ember_ray.model.dummy import LOGIT_STD, dummy_reader
from ember_ray.model.qwen3_config import Qwen3Config, read_model_config

SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 3000,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
}


def config_of(folder: Path, **overrides: Any) -> Qwen3Config:
    (folder / "config.json").write_text(json.dumps(SHAPE | overrides))
    return read_model_config(folder)


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Transformers' own model of the shape, each of its parameters read by its name."""
    from transformers import AutoConfig, Qwen3ForCausalLM

    config = config_of(folder, **overrides)
    network = Qwen3ForCausalLM(AutoConfig.from_pretrained(folder)).to(dtype).eval()
    read = dummy_reader(config, dtype, "cpu")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(read(name, tuple(parameter.shape)))
    return network


def logits_and_hidden(network: Any, tokens: int = 96) -> tuple[Tensor, list[Tensor]]:
    ids = torch.randint(0, SHAPE["vocab_size"], (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out = network(ids, output_hidden_states=True)
    return out.logits.float(), [hidden.float() for hidden in out.hidden_states]


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False, "attention_bias": True}], ids=["tied", "not"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_spread_by_a_few_and_activations_stay_in_range(
    tmp_path: Path, dtype: torch.dtype, overrides: dict[str, Any]
) -> None:
    logits, hidden = logits_and_hidden(transformers_model(tmp_path, dtype, **overrides))
    assert torch.isfinite(logits).all()
    assert 0.7 * LOGIT_STD < logits.std() < 1.5 * LOGIT_STD
    # no token is alone worth drawing, at any position
    assert logits.softmax(-1).amax(-1).mean() < 0.5
    rms = [float(h.pow(2).mean().sqrt()) for h in hidden[1:-1]]
    assert 0.1 < min(rms) and max(rms) < 10


def test_a_tensor_depends_on_seed_and_name_only(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    names = {
        "model.embed_tokens.weight": (3000, 128),
        "model.layers.0.self_attn.q_proj.weight": (256, 128),
        "model.layers.1.self_attn.q_proj.weight": (256, 128),
        "model.layers.0.input_layernorm.weight": (128,),
        "model.norm.weight": (128,),
    }
    read, again, other = (dummy_reader(config, torch.float32, "cpu", seed) for seed in (0, 0, 1))
    first = {name: read(name, shape) for name, shape in names.items()}
    backwards = {name: again(name, shape) for name, shape in reversed(names.items())}
    for name, shape in names.items():
        assert first[name].shape == shape and first[name].dtype == torch.float32
        assert torch.equal(first[name], backwards[name])
        assert not torch.equal(first[name], other(name, shape))
    a, b = (first[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert not torch.equal(a, b)
    assert abs(float(a.std()) - 128**-0.5) < 0.01
    assert 0.9 < float(first["model.norm.weight"].mean()) < 1.1


def test_what_torch_drew_before_does_not_matter(tmp_path: Path) -> None:
    read = dummy_reader(config_of(tmp_path), torch.bfloat16, "cpu")
    first = read("model.norm.weight", (128,))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert torch.equal(first, read("model.norm.weight", (128,)))
    assert torch.equal(state, torch.get_rng_state())
