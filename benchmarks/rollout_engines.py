"""The engines that the rollout benchmark runs: this one, transformers' ``generate``, and vLLM where it is installed.

All serve the same shape with random weights; ours and transformers' are equal, tensor by tensor.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.rollout_rows import Row
from ember_ray.assets import tiny_model_path
from ember_ray.engine.llm import LLM
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.model.dummy import dummy_reader
from ember_ray.model.lora import AdapterUpdate
from ember_ray.model.qwen3_config import Qwen3Config, read_model_config

Prompts = list[tuple[int, ...]]

Answer = tuple[Sequence[int], Sequence[float], Sequence[float]]
"""Token ids, logprobs and sampling_logprobs of a candidate."""

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    },
    "tiny": {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    },
}  # fmt: skip
"""Shapes by name; ``tiny`` runs on a CPU."""


class Refused(Exception):
    """An engine or a row that cannot run here; the text says why in one sentence."""


def write_model_folder(folder: Path, shape: str) -> Path:
    """A model without weights: config.json of the shape, and the shipped tokenizer, which nothing is decoded with."""
    config = SHAPES[shape] | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "attention_bias": False, "tie_word_embeddings": True, "rope_theta": 1e6, "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_model_path()) / name, folder / name)
    return folder


def random_adapter(config: Qwen3Config, rank: int, version: int, device: str, seed: int = 0) -> AdapterUpdate:
    """An adapter on all linear layers that moves their outputs by about a tenth."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    scaling: dict[str, float] = {}
    for layer in range(config.num_hidden_layers):
        for name, (out, into) in config.linear_shapes.items():
            block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            path = f"model.layers.{layer}.{block}.{name}"
            a, b = (torch.empty(shape, device=device) for shape in ((rank, into), (out, rank)))
            tensors[f"{path}.lora_A.weight"] = a.normal_(0.0, into**-0.5, generator=generator)
            tensors[f"{path}.lora_B.weight"] = b.normal_(0.0, 0.05 * rank**-0.5, generator=generator)
            scaling[path] = 2.0
    return AdapterUpdate(version, tensors, scaling)


class Engine(Protocol):
    """What the benchmark needs of an engine.

    Attributes:
        implementation: names of what computes attention, prefill and sampling, and versions.
    """

    implementation: dict[str, str]

    def prepare(self, row: Row) -> dict[str, Any]:
        """Before the warm-up of a row: its adapter, its filters; returns further keys of the row."""

    def generate(self, prompts: Prompts, seed: int) -> Any:
        """The timed part: all candidates, with token ids and both log-probabilities on the host at the end."""

    def answers(self, made: Any) -> list[Answer]:
        """What :meth:`generate` gave, candidate by candidate."""

    def figures(self) -> dict[str, float]:
        """Of the last batch, as far as the engine knows: prefill_tokens, prefix_hit_tokens, prefill_s, decode_s,
        decode_steps."""

    def close(self) -> None:
        """Gives the device's memory back."""


class EmberEngine:
    """This project's engine, through its public face.

    Args:
        rows: all that will run on it; they set its limits.
    """

    def __init__(
        self, model: Path, rows: Sequence[Row], device: str, dtype: str, load_format: str, options: dict[str, Any]
    ) -> None:
        if device == "cpu":
            block = EngineOptions.block_size
            need = max(
                row.candidates * (-(-row.gen // block)) + row.prompts * (-(-row.prompt // block)) for row in rows
            )
            options = {"num_kv_blocks": need + 16} | options
        if rows[0].lora_mode:
            options = {"lora_mode": rows[0].lora_mode} | options
        limits = {
            "max_num_seqs": max(row.candidates for row in rows),
            "max_model_len": max(row.prompt + row.gen for row in rows),
        }
        self.llm: Any = LLM(
            EngineOptions(str(model), dtype=dtype, device=device, load_format=load_format, **(limits | options))
        )
        self.implementation = dict(self.llm.engine.implementation)
        self.block_size = int(self.llm.engine.options.block_size)
        self._device = device

    def prepare(self, row: Row) -> dict[str, Any]:
        self._row = row
        self._version = 0
        if not row.lora_rank:
            self.llm.rollback(0)
            return {}
        self._version = max(self.llm.engine.resident_versions) + 1
        update = random_adapter(self.llm.engine.config, row.lora_rank, self._version, self._device)
        synchronize(self._device)
        start = time.perf_counter()
        self.llm.publish(update)
        synchronize(self._device)
        return {"publish_s": round(time.perf_counter() - start, 6)}

    def generate(self, prompts: Prompts, seed: int) -> Any:
        row = self._row
        self._before = self.llm.engine.counters()
        params = SamplingParams(
            temperature=1.0, top_k=row.top_k, top_p=row.top_p, max_tokens=row.gen, seed=seed, ignore_eos=True,
            detokenize=False,
        )  # fmt: skip
        return self.llm.generate(prompts, row.n, params)

    def answers(self, made: Any) -> list[Answer]:
        candidates = [candidate for output in made for candidate in output.candidates]
        wrong = {c.policy_version for c in candidates} - {self._version}
        if wrong:
            raise Refused(f"candidates came from policy version {min(wrong)}, version {self._version} was to serve")
        return [(c.token_ids, c.logprobs, c.sampling_logprobs) for c in candidates]

    def figures(self) -> dict[str, float]:
        now, before = self.llm.engine.counters(), self._before
        changed = {name: now[name] - before[name] for name in ("prefill_tokens", "prefix_hit_tokens", "preemptions")}
        if changed.pop("preemptions"):
            raise Refused("candidates were preempted: the KV pool is too small for this row")
        timings = self.llm.engine.timings  # empty where nothing is timed on the device, as on a CPU
        names = {"prefill_s": "prefill_seconds", "decode_s": "decode_seconds", "decode_steps": "decode_steps"}
        return changed | {ours: timings[theirs] for ours, theirs in names.items() if theirs in timings}

    def close(self) -> None:
        del self.llm
        release(self._device)


class TransformersEngine:
    """``generate`` with num_return_sequences, SDPA attention: every candidate's prompt is computed."""

    def __init__(self, model: Path, device: str, dtype: str, load_format: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self._device = device
        if load_format == "dummy":
            read = dummy_reader(read_model_config(model), getattr(torch, dtype), device)
            with torch.device("meta"):
                network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
            network = network.to(getattr(torch, dtype)).to_empty(device=device)
            network.tie_weights()
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(read(name, tuple(parameter.shape)))
            # tables that are computed, not loaded, are empty too
            rope = network.model.rotary_emb
            network.model.rotary_emb = type(rope)(network.config).to(device)
        else:
            network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
        self._network = network.eval()
        attention = str(network.config._attn_implementation)
        self.implementation = {
            "attention": attention, "prefill": attention, "sampling": "transformers",
            "engine_version": metadata.version("transformers"),
        }  # fmt: skip

    def prepare(self, row: Row) -> dict[str, Any]:
        if row.lora_rank:
            raise Refused("transformers is measured without an adapter only")
        self._row = row
        return {}

    @torch.inference_mode()
    def generate(self, prompts: Prompts, seed: int) -> Any:
        row = self._row
        torch.manual_seed(seed)
        tokens = torch.tensor(prompts, device=self._device)
        out = self._network.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=1.0, top_k=row.top_k,
            top_p=row.top_p, num_return_sequences=row.n, min_new_tokens=row.gen, max_new_tokens=row.gen,
            pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, output_logits=True, output_scores=True,
        )  # fmt: skip
        drawn = out.sequences[:, row.prompt :]

        def chosen(steps: Sequence[torch.Tensor]) -> list[list[float]]:
            columns = [
                step.float().log_softmax(-1).gather(-1, drawn[:, place, None])[:, 0] for place, step in enumerate(steps)
            ]
            return torch.stack(columns, dim=1).tolist()

        return drawn.tolist(), chosen(out.logits), chosen(out.scores)

    def answers(self, made: Any) -> list[Answer]:
        return list(zip(*made, strict=True))

    def figures(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        del self._network
        release(self._device)


class VllmEngine:
    """vLLM with its defaults (prefix caching, CUDA graphs) and random weights of its own.

    It gives one log-probability a token. The seed is the engine's: seeds of requests would make its sampler slow.
    """

    def __init__(self, model: Path, rows: Sequence[Row], dtype: str, load_format: str, seed: int, folder: Path) -> None:
        import vllm

        self._vllm, self._model, self._folder = vllm, model, folder
        lora = any(row.lora_rank for row in rows)
        options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 1} if lora else {}
        self._llm: Any = vllm.LLM(
            str(model), dtype=dtype, load_format=load_format, max_num_seqs=max(row.candidates for row in rows),
            max_model_len=max(row.prompt + row.gen for row in rows), seed=seed, **options,
        )  # fmt: skip
        self.implementation = {
            "attention": "vllm", "prefill": "vllm", "sampling": "vllm", "engine_version": vllm.__version__
        }  # fmt: skip

    def prepare(self, row: Row) -> dict[str, Any]:
        self._row, self._lora = row, None
        if row.lora_rank:
            self._lora = self._lora_request(row)
        return {}

    def _lora_request(self, row: Row) -> Any:
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        config = read_model_config(self._model)
        update = random_adapter(config, row.lora_rank, 1, "cpu")
        folder = self._folder / "adapter"
        folder.mkdir(exist_ok=True)
        tensors = {f"base_model.model.{name}": tensor for name, tensor in update.tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": row.lora_rank, "lora_alpha": 2 * row.lora_rank, "bias": "none",
                    "target_modules": list(config.linear_shapes), "task_type": "CAUSAL_LM"}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return LoRARequest("benchmark", 1, str(folder))

    def generate(self, prompts: Prompts, seed: int) -> Any:
        row, vllm = self._row, self._vllm
        params = vllm.SamplingParams(
            n=row.n, temperature=1.0, top_k=row.top_k, top_p=row.top_p, max_tokens=row.gen, min_tokens=row.gen,
            ignore_eos=True, logprobs=0, detokenize=False,
        )  # fmt: skip
        batch = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self._llm.generate(batch, params, use_tqdm=False, lora_request=self._lora)

    def answers(self, made: Any) -> list[Answer]:
        found: list[Answer] = []
        for output in made:
            for candidate in output.outputs:
                steps = zip(candidate.token_ids, candidate.logprobs, strict=True)
                logprobs = [step[token].logprob for token, step in steps]
                found.append((candidate.token_ids, logprobs, logprobs))
        return found

    def figures(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        del self._llm
        release("cuda")


def synchronize(device: str) -> None:
    """Waits until the device has done all."""
    if device != "cpu":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Gives memory that nothing refers to back to the device."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
