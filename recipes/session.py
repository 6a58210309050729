"""What a recipe stands on: Ray, the coordinator with its stages and verifiers, and calls that show their progress."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors import cluster
from actors.calls import wait
from actors.messages import (
    CoordinatorSettings,
    Limits,
    Progress,
    PromptRow,
    RolloutResult,
    RolloutStats,
    VerifierSettings,
)
from actors.rollouts import DAY_S, Rollouts
from ember_ray.config import signals
from ember_ray.config.errors import UserError
from ember_ray.config.schema import DpoExtractConfig
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.tracking.console import Console
from recipes.extract_task import engine_options, model_path, reward_design

STAGE_GPU, LEARNER_GPU = 0.75, 0.25
"""Shares of a GPU, if the model is to be on one. No two stages get the same GPU, and the learner fits beside a stage,
so one GPU is enough for a run. Ray counts the shares and sets no limit: both must fit into the GPU's memory together.
"""


def check_gpu() -> None:
    """Makes sure, before Ray is started, that this machine's GPU runs the kernels.

    In a process of its own, because to ask a GPU takes some of its memory for as long as the process lives.

    Raises:
        UserError: one sentence on what is wrong and what helps.
    """
    question = (
        "from cuda_ext.device import require_cuda as ask\ntry:\n  ask('cuda')\nexcept ValueError as no:\n  print(no)"
    )
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    if answer.returncode or answer.stdout.strip():
        raise UserError(f"model.device=cuda: {(answer.stdout or answer.stderr).strip().splitlines()[-1]}")


class Session:
    """A started Ray with a coordinator; use as a context manager, so that nothing of it is left.

    Attributes:
        totals: counts over all rollouts of the run.
        policy_version: what the engine serves.
    """

    def __init__(self, config: DpoExtractConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.totals = RolloutStats()
        self.policy_version = 0

    def __enter__(self) -> Session:
        config = self.config
        self._options = options = engine_options(config)
        if config.model.device == "cuda" and config.ray.address is None:
            check_gpu()
        with self.console.stage("starting Ray") as stage:
            self._cluster = cluster.start(
                len(options.layer_split),
                address=config.ray.address,
                run=config.name,
                strategy=config.ray.placement_strategy,
                gpus_per_stage=STAGE_GPU if config.model.device == "cuda" else 0.0,
                num_cpus=config.ray.num_cpus,
                dashboard=config.ray.dashboard,
            )
            signals.reinstall()  # Ray has put its own handler in place
            stage.note(f"{self._cluster.nodes} node{'s'[: self._cluster.nodes > 1]} at {self._cluster.address}")
        try:
            if self._cluster.dashboard_url:
                self.console.info(f"Ray dashboard: {self._cluster.dashboard_url}")
                if self._cluster.token_path:
                    self.console.info(f"its page asks for the token in {self._cluster.token_path}")
            limit = config.ray.stage_timeout_s
            settings = CoordinatorSettings(
                options,
                VerifierSettings(settings={"design": reward_design(config)}, actors=config.rollout.verifier_workers),
                seed=config.seed,
                limits=Limits(call=limit, transport=limit, stall=1.5 * limit),
            )
            self._rollouts = Rollouts(self._cluster, settings)
        except BaseException:
            self._cluster.shutdown()
            raise
        return self

    def __exit__(self, *fault: object) -> None:
        self._cluster.shutdown()

    def ready(self) -> None:
        """Waits until stages and verifiers are up; other things may be started meanwhile.

        Raises:
            ValueError: the engine refuses the model or the options.
        """
        split = self._options.layer_split
        with self.console.stage("loading the stages") as stage:
            self._rollouts.ready()
            stage.note(f"{len(split)} stage{'s'[: len(split) > 1]} of {', '.join(map(str, split))} layers")

    def rollout(
        self, rows: Sequence[PromptRow], num_candidates: int, params: SamplingParams, round_number: int, name: str
    ) -> RolloutResult:
        """Candidates of all rows, scored, with progress on the console under the given name."""
        with self.console.phase(name, total=len(rows) * num_candidates) as phase:

            def show(progress: Progress) -> None:
                signals.check()
                if progress.candidates_total == phase.total:
                    self.console.advance(progress.candidates_scored - phase.done)
                    seconds = time.monotonic() - phase.started
                    numbers = {
                        "policy_version": progress.policy_version,
                        "tokens_per_second": progress.generated_tokens / seconds,
                    }
                    if progress.reward_mean is not None:
                        numbers["reward"] = progress.reward_mean
                    self.console.update(numbers)

            result = self._rollouts.rollout(rows, num_candidates, params, round_number, show)
        self.totals = _added(self.totals, result.stats)
        return result

    def count(self, row: Mapping[str, float]) -> None:
        """Adds a round that an earlier session made, as its line of metrics tells it."""
        names = ("generated_tokens", "prefill_tokens", "prefix_hit_tokens", "preemptions", "recoveries")
        self.totals = _added(self.totals, RolloutStats(**{name: int(row[name]) for name in names}))

    def publish(self, update: Any) -> int:
        """Makes an adapter (or the ref of one) the policy of all stages; returns its version."""
        with self.console.phase("publishing"):
            self.policy_version = self._rollouts.publish(update)
        return self.policy_version

    def call(self, name: str, ref: Any) -> Any:
        """Waits for an actor's answer in a phase of the console."""
        with self.console.phase(name):
            found = wait(ref, name, DAY_S, on_tick=signals.check)
        signals.check()
        return found


def start_learner(config: DpoExtractConfig, planned_steps: int, folder: Path) -> Any:
    """A learner actor; its ``start`` must be waited for. It shares the cores with the stages, which rest meanwhile.

    It is on the driver's node, where the run folder is, unless only another node has a GPU left for it; then the two
    nodes have to share the folder. A float16 model learns in float32, since gradients leave float16's range.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from actors.learner import LEARNER_NAME, LearnerActor
    from ember_ray.train.options import DpoOptions, LoraOptions

    lora = config.lora.model_dump()
    dpo = config.dpo.model_dump()
    margin, per_prompt = dpo.pop("min_margin"), dpo.pop("pairs_per_prompt")
    for name in ("target_modules", "layers_to_transform"):
        lora[name] = lora[name] and tuple(lora[name])
    for name in ("loss_type", "loss_weights"):
        dpo[name] = dpo[name] and tuple(dpo[name])
    options = DpoOptions(**dpo, planned_steps=planned_steps, seed=config.seed)
    actor: Any = LearnerActor
    resources = {"num_cpus": 0, "num_gpus": LEARNER_GPU if config.model.device == "cuda" else 0}
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    dtype = "float32" if config.model.dtype == "float16" else config.model.dtype
    return actor.options(name=LEARNER_NAME, scheduling_strategy=here, **resources).remote(
        model_path(config), LoraOptions(**lora), options, dtype, config.model.device, folder,
        min_margin=margin, pairs_per_prompt=per_prompt,
    )  # fmt: skip


def _added(total: RolloutStats, more: RolloutStats) -> RolloutStats:
    summed = {
        field.name: getattr(total, field.name) + getattr(more, field.name)
        for field in dataclasses.fields(RolloutStats)
        if field.name != "policy_version"
    }
    return RolloutStats(**summed, policy_version=more.policy_version)
