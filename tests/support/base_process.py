"""What a process of its own does with base weights: load and show them as a stage does, or learn on them with little
memory. Functions for a ``ProcessPoolExecutor`` of one spawned worker, which keeps the models between calls."""

from __future__ import annotations

import hashlib
import os
import resource
from pathlib import Path
from typing import Any

MODELS: list[Any] = []


def see_gpus(numbers: str) -> None:
    """For the pool's initializer: the GPUs that this process sees."""
    os.environ["CUDA_VISIBLE_DEVICES"] = numbers


def load(
    folder: str, split: tuple[int, ...], stages: tuple[int, ...], dtype: str = "float32", device: str = "cpu"
) -> Any:
    """Loads stages of a model; gives the handles of each one's base weights."""
    import torch

    from ember_ray.model.base_weights import export_base
    from ember_ray.model.plan import stage_layers
    from ember_ray.model.qwen3 import StageModel
    from ember_ray.model.qwen3_config import read_model_config

    config = read_model_config(folder)
    for stage in stages:
        MODELS.append(StageModel(folder, config, stage_layers(split, stage), getattr(torch, dtype), device, 64))
    if device != "cpu":
        torch.cuda.synchronize()
    return [export_base(model.base) for model in MODELS[-len(stages) :]]


def digest() -> str:
    """Of all base weights that this process has loaded."""
    import torch

    found = hashlib.sha256()
    for model in MODELS:
        for name, tensor in sorted(model.base.items()):
            found.update(name.encode())
            found.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def pid() -> int:
    return os.getpid()


def _kilobytes(file: str, name: str) -> int:
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == f"{name}:")


def learn_with_little_memory(folder: str, handles: Any, pairs: Any, spare_bytes: int) -> dict[str, float]:
    """A learner on base weights, and a round, in a process that may take no more private memory than so much.

    Returns:
        ``private``: by how much its dirty private pages grew, ``shared``: base weights that it has mapped, in bytes;
        ``refused``: whether as much as the base weights could not have been had.
    """
    import torch

    from ember_ray.model.base_weights import open_base
    from ember_ray.train.dpo import DpoLearner, DpoOptions, LoraOptions
    from ember_ray.train.shared_base import SharedBase
    from ember_ray.train.trl_trainer import quiet, watched

    base = open_base(handles)
    nbytes = sum(tensor.nbytes for tensor in base.values())
    with quiet():  # what the first use of libraries takes for good is no part of what is measured
        from trl import DPOConfig, DPOTrainer

        assert watched(DPOTrainer) and DPOConfig
        SharedBase(folder, base, torch.float32).model(torch.ones(1, 2, dtype=torch.int64))
    before = _kilobytes("/proc/self/smaps_rollup", "Private_Dirty")
    limit = 1024 * _kilobytes("/proc/self/status", "VmData") + spare_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    learner = DpoLearner(folder, LoraOptions(r=4), DpoOptions(learning_rate=1e-2), base=base)
    learner.learn(pairs)
    try:
        torch.empty(nbytes, dtype=torch.uint8)
        refused = False
    except RuntimeError:
        refused = True
    return {
        "private": 1024 * (_kilobytes("/proc/self/smaps_rollup", "Private_Dirty") - before),
        "shared": nbytes,
        "refused": refused,
        "moved": sum(float(p.detach().abs().sum()) for n, p in learner.model.named_parameters() if "lora_B" in n),
    }


def learn(folder: str, handles: Any, rounds: Any, dtype: str, kill: int | None = None) -> dict[str, Any]:
    """A learner on the visible GPUs learns rounds of pairs, on base weights of other processes or (None) its own.

    Args:
        kill: a process to kill after the first round.

    Returns:
        ``losses``; ``adapter``; ``loaded`` and ``peak``: bytes that torch held on each GPU.
    """
    import signal

    import torch

    from ember_ray.model.base_weights import open_base
    from ember_ray.train.dpo import DpoLearner, DpoOptions, LoraOptions

    base = None if handles is None else open_base(handles)
    options = DpoOptions(learning_rate=1e-2, beta=0.3)
    learner = DpoLearner(folder, LoraOptions(r=4), options, dtype, "cuda", base=base)
    gpus = range(torch.cuda.device_count())
    loaded = [torch.cuda.memory_allocated(gpu) for gpu in gpus]
    peak = [torch.cuda.max_memory_allocated(gpu) for gpu in gpus]
    losses = []
    for pairs in rounds:
        losses.append(learner.learn(pairs)["loss"])
        if kill is not None and len(losses) == 1:
            os.kill(kill, signal.SIGKILL)
    adapter = dict(learner.adapter_update(1).tensors)
    return {"losses": losses, "adapter": adapter, "loaded": loaded, "peak": peak}
