"""The actor in the middle: it owns the stages, the verifiers and the official policy version."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray

from actors.messages import CoordinatorSettings, Progress, PromptRow, RolloutResult, added
from actors.pipeline import Pipeline, Placement
from actors.policy_server import PolicyServer
from actors.rollout import Rollout, build_requests
from actors.verifier import VerifierPool

if TYPE_CHECKING:
    from actors.adapter_wire import PackedAdapter
    from ember_ray.engine.sampling_params import SamplingParams
    from ember_ray.model.adapter_outbox import AdapterNotice
    from ember_ray.model.base_weights import BaseHandles
    from ember_ray.model.lora import AdapterUpdate
    from ember_ray.train.batch import Answer


class CoordinatorMetrics:
    """What only the coordinator knows, as Ray metrics."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self._reward = Gauge(
            "ember_reward", description="mean reward of the rollout, so far or of the last one", tag_keys=("run",)
        )
        self._queue = Gauge("ember_verifier_queue", description="candidates without a verdict", tag_keys=("run",))
        self._candidates = Counter("ember_candidates_total", description="candidates scored", tag_keys=("run",))
        self._recoveries = Counter("ember_recoveries_total", description="stage groups made anew", tag_keys=("run",))
        for metric in (self._reward, self._queue, self._candidates, self._recoveries):
            metric.set_default_tags({"run": run})

    def step(self, progress: Progress) -> None:
        """While a rollout runs."""
        self._queue.set(progress.candidates_done - progress.candidates_scored)
        if progress.reward_mean is not None:
            self._reward.set(progress.reward_mean)

    def ended(self, result: RolloutResult) -> None:
        """After a rollout."""
        rewards = [scored.reward for group in result.groups for scored in group.candidates if scored.reward is not None]
        if rewards:
            self._reward.set(sum(rewards) / len(rewards))
        self._queue.set(0)
        self._candidates.inc(result.stats.candidates)
        if result.stats.recoveries:
            self._recoveries.inc(result.stats.recoveries)


# Work runs in the default group, one call after the other; "watch" answers meanwhile, and "prepare" lets the stages
# hold the next policy while they generate.
@ray.remote(num_cpus=0, concurrency_groups={"watch": 4, "prepare": 1})
class Coordinator:
    """Makes stages and verifiers as its children (they end with it) and does rollouts and publications with them."""

    def __init__(self, settings: CoordinatorSettings, placement: Placement) -> None:
        self._settings = settings
        self._pool: VerifierPool | None = None
        self._server = PolicyServer(Pipeline(settings, placement), settings.limits.failures)
        self._metrics = CoordinatorMetrics(placement.run)
        self._progress = Progress()
        self._rollout: Rollout | None = None
        self._told = 0.0

    def start(self) -> None:
        """Brings up the verifiers and the stages; returns when they are ready.

        Raises:
            ValueError: a reward function does not exist, or the engine refuses the model or the options.
            StageLost: the stages do not come up.
        """
        self._progress = Progress(phase="starting")
        limits = self._settings.limits
        self._pool = VerifierPool(self._settings.verifier, limits.verify)
        self._server.start()
        while not self._pool.ready:
            ready, _ = ray.wait(self._pool.waitables, timeout=0.5)
            self._pool.take(ready)
            self._pool.late()
        self._progress = Progress()

    def rollout(
        self,
        rows: Sequence[PromptRow],
        num_candidates: int,
        sampling_params: SamplingParams,
        round_number: int,
        spare: Sequence[PromptRow] = (),
    ) -> RolloutResult:
        """Generates and scores candidates of every row.

        Args:
            rows: their ids are unique in the batch.
            sampling_params: how to draw; without a seed the run's seed counts.
            round_number: another number gives other random numbers.
            spare: groups whose rewards are all equal give their places to groups of these, as far as there are any.
                Once a rollout: what comes instead may be without spread as well.

        Raises:
            ValueError: the rows or a request cannot be served; the text says which and why.
            StageLost: the stages were lost too often in a row.
        """
        if self._pool is None:
            raise RuntimeError("the coordinator is not started")
        from ember_ray.train.grpo_rows import zero_spread

        def run(some: Sequence[PromptRow]) -> RolloutResult:
            requests = build_requests(some, num_candidates, sampling_params, self._settings.seed, round_number)
            self._rollout = Rollout(self._server, pool, some, requests, round_number, self._report)
            return self._rollout.run()

        pool = self._pool
        try:
            result = run(rows)
            useless = zero_spread(result.groups)[: len(spare)]
            if useless:
                more = run(spare[: len(useless)])
                for place, group in zip(useless, more.groups, strict=True):
                    result.groups[place] = group
                result.stats = added(result.stats, more.stats)
        finally:
            self._rollout = None
            self._rest()
        self._metrics.ended(result)
        return result

    def score(self, answers: Sequence[Answer], policy_version: int | None = None) -> list[list[float]]:
        """Log-probabilities of given answers under a version that is kept, whichever serves.

        Args:
            answers: (prompt, answer) token ids. Equal prompts are computed once, and found in the cache where that
                version's rollout has been there.
            policy_version: None takes the official one; 0 is the base model.

        Returns:
            For each answer one natural logarithm a token, at temperature 1.

        Raises:
            AdapterError: that version is not kept.
            RequestError: an answer is empty, too long, or has tokens that the model does not know.
            StageLost: the stages were lost too often in a row.
        """
        self._progress = Progress(phase="scoring", policy_version=self._server.official)
        try:
            return self._server.score(answers, policy_version)
        finally:
            self._rest()

    def publish(self, update: AdapterUpdate | PackedAdapter | AdapterNotice) -> int:
        """Makes an update the official version on all stages or on none; gives its version.

        Raises:
            AdapterError: the update is refused and the old version serves on.
            UpdateLost: the update is not to be had from the learner that wrote it; the old version serves on.
            StageLost: the stages were lost too often in a row.
        """
        self._progress = Progress(phase="publishing", policy_version=self._server.official)
        try:
            return self._server.publish(update)
        finally:
            self._rest()

    @ray.method(concurrency_group="prepare")
    def prepare(self, update: PackedAdapter | AdapterNotice) -> None:
        """Lets the stages check and hold an update whose `publish` comes after what they are at now."""
        self._server.prepare(update)

    def base_weights(self) -> list[BaseHandles | str]:
        """Where each stage's base weights lie, for a learner on their host that builds its model on them; or why not.

        Raises:
            StageLost: the stages were lost too often in a row.
        """
        return self._server.base_weights()

    @ray.method(concurrency_group="prepare")
    def publish_in_flight(self, update: PackedAdapter | AdapterNotice) -> int | None:
        """Lets the running rollout go on under a new official version, and gives that; None where it cannot be done
        now, and `publish` is to be called."""
        return update.version if self._server.publish_in_flight(update) else None

    def rollback(self, version: int) -> int:
        """Makes an earlier version official again, exactly; 0 is the base model.

        Raises:
            AdapterError: that version is not kept.
        """
        self._progress = Progress(phase="publishing", policy_version=self._server.official)
        try:
            return self._server.rollback(version)
        finally:
            self._rest()

    def stop(self) -> None:
        """Ends the stages and the verifiers."""
        self._server.close()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    @ray.method(concurrency_group="watch")
    def progress(self) -> Progress:
        """How far the running call is; cheap."""
        return self._progress

    @ray.method(concurrency_group="watch")
    def engine_dtype(self) -> str:
        """What the stages serve in."""
        return self._settings.engine.dtype

    @ray.method(concurrency_group="watch")
    def obstacle(self, source: bytes) -> str | None:
        """Why a stage cannot read a learner's buffers (an `AdapterSource`, pickled); None where all can.

        Raises:
            StageLost: the stages are down.
        """
        return next((found for found in self._server.pipeline.call_all("obstacle", source) if found), None)

    @ray.method(concurrency_group="watch")
    def recoveries(self) -> int:
        """How often the stages were lost and made anew; their base weights lie elsewhere then."""
        return self._server.recoveries

    @ray.method(concurrency_group="watch")
    def policy_version(self) -> int:
        """The official version."""
        return self._server.official

    @ray.method(concurrency_group="watch")
    def versions(self) -> list[int]:
        """Versions that `rollback` can go to."""
        return self._server.versions

    @ray.method(concurrency_group="watch")
    def counters(self) -> list[dict[str, float]]:
        """Each stage's counters."""
        return self._server.pipeline.counters()

    @ray.method(concurrency_group="watch")
    def stage_versions(self) -> list[int]:
        """The version that each stage serves; all the same, except in the moment of a publication."""
        return self._server.pipeline.call_all("policy_version")

    @ray.method(concurrency_group="watch")
    def stage_processes(self) -> list[tuple[str, int]]:
        """Node id and process id of each stage."""
        pipeline = self._server.pipeline
        return list(zip(pipeline.call_all("node_id"), pipeline.call_all("pid"), strict=True))

    @ray.method(concurrency_group="watch")
    def abort(self, request_id: str) -> None:
        """Ends a request of the running rollout; what it lacks comes back with finish reason ``abort``."""
        rollout = self._rollout
        if rollout is not None:
            rollout.abort(request_id)

    def _report(self, progress: Progress) -> None:
        self._progress = progress
        if time.monotonic() - self._told > 0.5:
            self._told = time.monotonic()
            self._metrics.step(progress)

    def _rest(self) -> None:
        self._progress = Progress(recoveries=self._server.recoveries, policy_version=self._server.official)
