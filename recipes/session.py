"""What a recipe stands on: Ray, the coordinator with its stages and verifiers, and calls that show their progress."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
    added,
)
from actors.rollouts import DAY_S, Rollouts
from ember_ray.config import signals
from ember_ray.config.errors import UserError
from ember_ray.config.schema import LearnConfig
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.tracking.console import Console
from ember_ray.train.batch import Answer
from recipes.setup import engine_options, verifier_settings

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
        trained_prompts, trained_tokens: prompts and generated tokens of the rollouts to learn from that have ended.
        pending_prompts: of rollouts to learn from that have begun and not ended.
        policy_version: what the engine serves.
    """

    def __init__(self, config: LearnConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.totals = RolloutStats()
        self.trained_prompts, self.trained_tokens, self.pending_prompts = 0, 0, 0
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
                verifier_settings(config),
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

    @property
    def coordinator(self) -> Any:
        """The coordinator's handle, for actors that talk to it."""
        return self._rollouts.handle

    @property
    def stages_are_here(self) -> bool:
        """Whether all stages are on the driver's node, where the learner is too."""
        import ray
        from ray.util import placement_group_table

        nodes = placement_group_table(self._cluster.placement.group)["bundles_to_node_id"].values()
        return set(nodes) == {ray.get_runtime_context().get_node_id()}

    def base_weights(self) -> list[Any]:
        """Where each stage's base weights lie, or in words why they cannot be shown; waits for a running rollout."""
        return self._rollouts.base_weights()

    def recoveries(self) -> int:
        """How often the stages were lost and made anew."""
        return self._rollouts.recoveries()

    def ready(self) -> None:
        """Waits until stages and verifiers are up; other things may be started meanwhile.

        Raises:
            ValueError: the engine refuses the model or the options.
        """
        split = self._options.layer_split
        with self.console.stage("loading the stages") as stage:
            self._rollouts.ready()
            stage.note(f"{len(split)} stage{'s'[: len(split) > 1]} of {', '.join(map(str, split))} layers")

    def start_rollout(
        self,
        rows: Sequence[PromptRow],
        num_candidates: int,
        params: SamplingParams,
        round_number: int,
        name: str,
        spare: Sequence[PromptRow] = (),
    ) -> PendingRollout:
        """Begins to make candidates of all rows; other actors may work meanwhile.

        Args:
            round_number: another number gives other random numbers; 0 is not counted as training.
            name: of the phase on the console that waits for it.
            spare: see `Coordinator.rollout`.
        """
        ref = self._rollouts.begin(rows, num_candidates, params, round_number, spare)
        if round_number:
            self.begun(len(rows))
        return PendingRollout(self, ref, len(rows), num_candidates, round_number, name)

    def finish_rollout(self, ref: Any, on_progress: Callable[[Progress], None]) -> RolloutResult:
        """Waits for a rollout that `start_rollout` began."""
        return self._rollouts.finish(ref, on_progress)

    def score(self, answers: Sequence[Answer], policy_version: int) -> list[list[float]]:
        """Log-probabilities of given answers under a policy version that is kept."""
        with self.console.phase("scoring"):
            return self._rollouts.score(answers, policy_version, lambda progress: signals.check())

    def begun(self, prompts: int) -> None:
        """Counts a rollout to learn from."""
        self.pending_prompts += prompts

    def ended(self, prompts: int, all_prompts: int, tokens: int) -> None:
        """Counts the end of a rollout to learn from.

        Args:
            prompts: that it began with.
            all_prompts: those that took the place of others included.
            tokens: that it generated.
        """
        self.pending_prompts -= prompts
        self.trained_prompts += all_prompts
        self.trained_tokens += tokens

    def publish(self, update: Any, in_flight: bool = False) -> int:
        """Makes an adapter (or the ref of one) the policy of all stages (see `Rollouts.publish`); gives its version."""
        with self.console.phase("publishing"):
            self.policy_version = self._rollouts.publish(update, in_flight)
        return self.policy_version

    def call(self, name: str, ref: Any) -> Any:
        """Waits for an actor's answer in a phase of the console."""
        with self.console.phase(name):
            found = wait(ref, name, DAY_S, on_tick=signals.check)
        signals.check()
        return found


class PendingRollout:
    """A rollout that has begun."""

    def __init__(
        self, session: Session, ref: Any, prompts: int, num_candidates: int, round_number: int, name: str
    ) -> None:
        self._session, self._ref, self._name = session, ref, name
        self._prompts, self._num_candidates, self._round_number = prompts, num_candidates, round_number

    def result(self) -> RolloutResult:
        """The scored candidates of all rows, with progress on the console until they are there."""
        session = self._session
        console = session.console
        with console.phase(self._name, total=self._prompts * self._num_candidates) as phase:

            def show(progress: Progress) -> None:
                signals.check()
                if progress.candidates_total == phase.total:
                    console.advance(progress.candidates_scored - phase.done)
                    seconds = time.monotonic() - phase.started
                    numbers = {
                        "policy_version": progress.policy_version,
                        "tokens_per_second": progress.generated_tokens / seconds,
                    }
                    if progress.reward_mean is not None:
                        numbers["reward"] = progress.reward_mean
                    console.update(numbers)

            result = session.finish_rollout(self._ref, show)
        session.totals = added(session.totals, result.stats)
        if self._round_number:
            all_prompts = result.stats.candidates // self._num_candidates
            session.ended(self._prompts, all_prompts, result.stats.generated_tokens)
        return result
