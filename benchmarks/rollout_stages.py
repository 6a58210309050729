"""This project's engine on several GPUs for the rollout benchmark: a Ray actor a stage, one GPU each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rollout_engines import Answer, Prompts, Refused
from benchmarks.rollout_rows import Row
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.request import Candidate, GenerationRequest
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.model.plan import plan_stages
from ember_ray.model.qwen3_config import read_model_config

WAIT_S = 5.0
"""How long one look for candidates waits; between looks the stages are asked whether they still step."""


class StagesEngine:
    """The pipeline that recipes use, coordinator and verifiers left out. The time of a batch includes the way of
    prompts and candidates between the processes.

    Args:
        gpus: stages; the layers are shared out evenly by their work.
        rows: all that will run on it; they set its limits.
    """

    def __init__(
        self,
        model: Path,
        rows: Sequence[Row],
        gpus: int,
        device: str,
        dtype: str,
        load_format: str,
        options: dict[str, Any],
    ) -> None:
        from actors import cluster
        from actors.messages import CoordinatorSettings
        from actors.pipeline import Pipeline

        limits = {
            "max_num_seqs": max(row.candidates for row in rows),
            "max_model_len": max(row.prompt + row.gen for row in rows),
        }
        if device == "cpu":
            limits["num_kv_blocks"] = 4096
        split = plan_stages(read_model_config(model), gpus)
        engine = EngineOptions(
            str(model), dtype=dtype, device=device, load_format=load_format, layer_split=split, **(limits | options)
        )
        self.block_size = engine.block_size
        self._cluster = cluster.start(
            gpus, run="benchmark", gpus_per_stage=0.0 if device == "cpu" else 1.0, dashboard=False
        )
        try:
            self._pipeline = Pipeline(CoordinatorSettings(engine, threads=1), self._cluster.placement)
            self._pipeline.start()
            self.implementation = dict(self._each(lambda actor: actor._engine.implementation)[-1])
            by_nccl = all(self._each(lambda actor: actor._transport.is_ahead))
        except BaseException:
            self._cluster.shutdown()
            raise
        self.lanes = engine.micro_batches or gpus
        self.implementation |= {"layer_split": "+".join(map(str, split)), "transport": "nccl" if by_nccl else "gloo"}

    def _each(self, look: Any) -> list[Any]:
        """look(actor) in the process of each stage."""
        return self._pipeline.call_all("__ray_call__", look)

    def prepare(self, row: Row) -> dict[str, Any]:
        if row.lora_rank:
            raise Refused("several GPUs are measured without an adapter only")
        self._row = row
        return {"micro_batches": self.lanes}

    def generate(self, prompts: Prompts, seed: int) -> list[Candidate]:
        import ray

        row = self._row
        self._before = self._pipeline.counters()[0]
        params = SamplingParams(
            temperature=1.0, top_k=row.top_k, top_p=row.top_p, max_tokens=row.gen, seed=seed, ignore_eos=True,
            detokenize=False,
        )  # fmt: skip
        batch = self._pipeline.begin(
            [GenerationRequest(str(n), prompt, tuple(range(row.n)), params) for n, prompt in enumerate(prompts)]
        )
        made: list[Candidate] = []
        while not batch.done:
            ready, _ = ray.wait(batch.waitables, timeout=WAIT_S)
            made += batch.take(ready)
            if not ready:
                batch.watch()
        return made

    def answers(self, made: list[Candidate]) -> list[Answer]:
        return [(c.token_ids, c.logprobs, c.sampling_logprobs) for c in made]

    def figures(self) -> dict[str, Any]:
        """As :meth:`rollout_engines.Engine.figures`; times by the last stage's host, prompts and decodes sharing steps
        until the last prompt is through. ``stage_gpu_ms``: what a decode step keeps each stage's GPU busy for."""
        now = self._pipeline.counters()[0]
        found: dict[str, Any] = {n: now[n] - self._before[n] for n in ("prefill_tokens", "prefix_hit_tokens")}
        if now["preemptions"] > self._before["preemptions"]:
            raise Refused("candidates were preempted: the KV pool is too small for this row")
        timings = self._each(lambda actor: dict(actor._engine.timings))
        last = timings[-1]
        steps = last["decode_steps"]
        found |= {
            "prefill_s": last["prefill_seconds"], "decode_s": last["decode_seconds"], "decode_steps": steps
        }  # fmt: skip
        if "gpu_decode_seconds" in last:
            found["stage_gpu_ms"] = [round(1e3 * each["gpu_decode_seconds"] / max(1, steps), 4) for each in timings]
            found["peak_gib"] = max(self._each(_peak_gib))
        return found

    def close(self) -> None:
        self._cluster.shutdown()


def _peak_gib(actor: Any) -> float:
    """Most memory that torch has held in a stage's process since it began."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30
