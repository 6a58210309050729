"""The two processes of the unified-backend benchmark: what the engine's does, and what the learner's.

Functions for a ``ProcessPoolExecutor`` of one spawned worker each. Both use the parts that the actors use: the engine's
tensors mapped by the learner, the learner's adapter read from its memory by the engine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Prompts = list[tuple[int, ...]]


def warm_imports(*modules: str) -> int:
    """Imports; gives the process's id."""
    import importlib

    for name in modules:
        importlib.import_module(name)
    return os.getpid()


def memory(device: str) -> dict[str, float]:
    """GB (10^9 bytes): what torch holds in this process, at most and now, and what the whole GPU has in use."""
    import torch

    if device == "cpu":
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        pss = next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e6
        return {"now": pss, "peak": pss, "gpu": 0.0}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "now": torch.cuda.memory_allocated() / 1e9,
        "peak": torch.cuda.max_memory_allocated() / 1e9,
        "gpu": (total - free) / 1e9,
    }


def synchronize(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


# -- the engine's process ----------------------------------------------------------------------------------------------


@dataclass
class EngineSide:
    llm: Any = None
    inbox: Any = None
    device: str = "cpu"
    buckets: dict[int, Any] = field(default_factory=dict)


ENGINE = EngineSide()


def start_engine(options: dict[str, Any]) -> dict[str, Any]:
    """Loads the engine; gives the handles of its base weights and their bytes."""
    from ember_ray.engine.llm import LLM
    from ember_ray.engine.options import EngineOptions
    from ember_ray.model.adapter_outbox import AdapterInbox
    from ember_ray.model.base_weights import export_base

    ENGINE.llm = LLM(EngineOptions(**options))
    ENGINE.device = options["device"]
    ENGINE.inbox = AdapterInbox(ENGINE.device)
    synchronize(ENGINE.device)
    base = ENGINE.llm.engine.model.base
    cache = ENGINE.llm.engine.kv_cache
    return {
        "handles": export_base(base),
        "base": sum(tensor.nbytes for tensor in base.values()) / 1e9,
        "kv": cache.nbytes / 1e9,
        "memory": memory(ENGINE.device),
    }


def rollout(prompts: Prompts, num_candidates: int, max_tokens: int, seed: int) -> dict[str, Any]:
    """Candidates of all prompts: seconds, tokens, and the groups, judged by the share of even tokens."""
    from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
    from ember_ray.engine.sampling_params import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=max_tokens, seed=seed, ignore_eos=True, detokenize=False)
    begun = time.monotonic()
    made = ENGINE.llm.generate(prompts, num_candidates, params)
    synchronize(ENGINE.device)
    ended = time.monotonic()
    groups = []
    for number, output in enumerate(made):
        scored = [
            ScoredCandidate(one, sum(token % 2 == 0 for token in one.token_ids) / len(one.token_ids))
            for one in output.candidates
        ]
        groups.append(ScoredGroup(str(number), "", tuple(output.prompt_token_ids), scored))
    tokens = sum(len(one.candidate.token_ids) for group in groups for one in group.candidates)
    return {"seconds": ended - begun, "ended": ended, "tokens": tokens, "groups": groups}


def take_notice(notice: Any) -> None:
    """Reads an adapter in the learner's memory and switches to it."""
    engine = ENGINE.llm.engine
    engine.stage_adapter(ENGINE.inbox.read(notice))
    engine.commit_adapter(notice.version)


def take_folder(folder: str, version: int) -> None:
    """Reads an adapter from a PEFT folder and switches to it."""
    from ember_ray.model.lora import load_peft_adapter

    ENGINE.llm.publish(load_peft_adapter(folder, version))


def take_weights(number: int, handle: Any, places: Sequence[tuple[str, int, int]], last: bool) -> None:
    """Copies whole weights out of a bucket over the engine's own; behind the last one nothing cached is good."""
    import torch

    from ember_ray.model.tensor_handles import open_tensor

    if number not in ENGINE.buckets:
        ENGINE.buckets[number] = open_tensor(handle)
    bucket, engine = ENGINE.buckets[number], ENGINE.llm.engine
    with torch.inference_mode():
        for name, first, count in places:
            engine.model.base[name].view(-1).copy_(bucket[first : first + count])
    synchronize(ENGINE.device)
    if last:
        engine.scheduler.pool.forget()


def first_token(prompt: tuple[int, ...]) -> float:
    """When the first token of a prompt is there (of the clock that all processes of a host share)."""
    return rollout([prompt], 1, 1, 0)["ended"]


def engine_memory() -> dict[str, float]:
    return memory(ENGINE.device)


# -- the learner's process ---------------------------------------------------------------------------------------------


@dataclass
class LearnerSide:
    learner: Any = None
    outbox: Any = None
    base: Any = None
    device: str = "cpu"
    buckets: list[Any] = field(default_factory=list)


LEARNER = LearnerSide()


def start_learner(
    model: str, handles: Any, dtype: str, device: str, rank: int, batch: int, accumulation: int, max_tokens: int
) -> dict[str, Any]:
    """A GRPO learner on the engine's base weights, or (handles None) on the same ones of its own."""
    import torch

    from ember_ray.model.base_weights import open_base
    from ember_ray.model.qwen3 import StageModel
    from ember_ray.model.qwen3_config import read_model_config
    from ember_ray.train.grpo import GrpoLearner, GrpoOptions
    from ember_ray.train.options import LoraOptions

    LEARNER.device = device
    config = read_model_config(model)
    if handles is None:
        layers = range(config.num_hidden_layers)
        LEARNER.base = StageModel(model, config, layers, getattr(torch, dtype), device, 64, "dummy").base
    else:
        LEARNER.base = open_base([handles])
    options = GrpoOptions(
        learning_rate=1e-3, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        max_completion_length=max_tokens, mismatch_candidates=0, vllm_importance_sampling_correction=False,
    )  # fmt: skip
    lora = LoraOptions(r=rank, lora_alpha=2 * rank)
    LEARNER.learner = GrpoLearner(model, lora, options, dtype, device, base=LEARNER.base)
    synchronize(device)
    return {"memory": memory(device)}


def learn(groups: Any) -> dict[str, Any]:
    """A round; ``ended`` is when the optimizer step had ended on the device."""
    begun = time.monotonic()
    metrics = LEARNER.learner.learn(groups)
    synchronize(LEARNER.device)
    ended = time.monotonic()
    return {"seconds": ended - begun, "ended": ended, "loss": metrics["loss"], "steps": metrics["steps"]}


def mismatch(groups: Any) -> float:
    """Mean absolute difference between the engine's log-probabilities and the learner's, as it is now."""
    return float(LEARNER.learner.mismatch(groups)["mismatch/mean"])


def write_notice(model: str, dtype: str, version: int) -> Any:
    """The adapter in memory that the engine reads."""
    import torch

    from ember_ray.model.adapter_outbox import AdapterOutbox
    from ember_ray.model.lora import AdapterUpdate
    from ember_ray.model.qwen3_config import read_model_config
    from ember_ray.train.adapter import adapter_scaling, adapter_tensors

    if LEARNER.outbox is None:
        config, network = read_model_config(model), LEARNER.learner.model
        update = AdapterUpdate(0, adapter_tensors(network), adapter_scaling(network))
        LEARNER.outbox = AdapterOutbox(
            update, config.linear_shapes, config.num_hidden_layers, getattr(torch, dtype), LEARNER.device
        )
    return LEARNER.outbox.write(version)


def save_folder(folder: str) -> None:
    """The adapter as a PEFT folder."""
    LEARNER.learner.save_adapter(folder)


def make_buckets(dtype: str, bucket_bytes: int) -> tuple[list[Any], list[list[tuple[str, int, int]]]]:
    """Two buffers that the engine can open, and what of the weights goes into each of the buckets that pass through
    them: name, first element and how many."""
    import torch

    from ember_ray.model.tensor_handles import empty_shared, export_tensor

    kind = getattr(torch, dtype)
    most = max(bucket_bytes // kind.itemsize, max(tensor.numel() for tensor in LEARNER.base.values()))
    plan: list[list[tuple[str, int, int]]] = [[]]
    used = 0
    for name, tensor in LEARNER.base.items():
        if used + tensor.numel() > most:
            plan.append([])
            used = 0
        plan[-1].append((name, used, tensor.numel()))
        used += tensor.numel()
    LEARNER.buckets = [empty_shared((most,), kind, LEARNER.device) for _ in range(2)]
    synchronize(LEARNER.device)
    return [export_tensor(bucket) for bucket in LEARNER.buckets], plan


def fill_bucket(number: int, places: Sequence[tuple[str, int, int]]) -> None:
    """Whole weights with the adapter merged into them, ``W + s B A``."""
    import torch

    from ember_ray.model.qwen3 import FUSED
    from ember_ray.train.adapter import adapter_scaling, adapter_tensors

    network = LEARNER.learner.model
    pairs, scaling = adapter_tensors(network), adapter_scaling(network)
    bucket = LEARNER.buckets[number]
    with torch.no_grad():
        for name, first, count in places:
            base = LEARNER.base[name]
            merged = bucket[first : first + count].view(base.shape)
            merged.copy_(base)
            block, _, leaf = name.removesuffix(".weight").rpartition(".")
            row = 0
            for projection in FUSED.get(leaf, ()):
                path = f"{block}.{projection}"
                a, b = (pairs[f"base_model.model.{path}.lora_{half}.weight"] for half in "AB")
                merged[row : row + b.shape[0]] += (scaling[path] * (b @ a)).to(base.dtype)
                row += b.shape[0]
    synchronize(LEARNER.device)


def learner_memory() -> dict[str, float]:
    return memory(LEARNER.device)
