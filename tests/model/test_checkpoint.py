"""What a stage reads, and what it says of folders that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ember_ray.model.qwen3 import StageModel
from ember_ray.model.qwen3_config import ModelError, read_model_config
from ember_ray.model.tokenizer import Tokenizer
from tests.support.qwen3 import make_qwen3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    make_qwen3(path, tie_word_embeddings=False, num_hidden_layers=4, shard="60KB")
    return path


def test_a_stage_reads_its_own_tensors_only(folder: Path) -> None:
    config = read_model_config(folder)
    first, middle, last = (
        StageModel(folder, config, layers, torch.float32, "cpu", 32)
        for layers in (range(0, 1), range(1, 3), range(3, 4))
    )
    assert {name for name in first.tensors_read if ".layers." not in name} == {"model.embed_tokens.weight"}
    assert {name.split(".")[2] for name in middle.tensors_read} == {"1", "2"}
    assert {name for name in last.tensors_read if ".layers." not in name} == {"model.norm.weight", "lm_head.weight"}
    names = [*first.tensors_read, *middle.tensors_read, *last.tensors_read]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(names) == sorted(index["weight_map"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "only dense 'qwen3'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 3}, "cannot share"),
    ],
)
def test_what_is_not_served_is_refused_by_name(change: dict, says: str, folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=says):
        read_model_config(tmp_path)


def test_old_style_rope_keys_mean_the_same(folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    rope = read_model_config(tmp_path).rope_parameters
    assert rope["rope_type"] == "yarn" and rope["rope_theta"] == 5e5 and rope["factor"] == 4.0


def test_faulty_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model folder"):
        read_model_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json holds no JSON object"):
        read_model_config(tmp_path)
    config = read_model_config(folder)
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        StageModel(tmp_path, config, range(4), torch.float32, "cpu", 32)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ModelError, match="cannot be read"):
        StageModel(tmp_path, config, range(4), torch.float32, "cpu", 32)


def test_missing_and_misshapen_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    config = read_model_config(folder)
    broken = dict(tensors)
    del broken["model.layers.2.self_attn.k_norm.weight"]
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.2\.self_attn\.k_norm\.weight' is missing"):
        StageModel(tmp_path, config, range(4), torch.float32, "cpu", 32)
    broken = tensors | {"model.norm.weight": torch.ones(65)}
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' is \(65,\)"):
        StageModel(tmp_path, config, range(4), torch.float32, "cpu", 32)
