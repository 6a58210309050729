"""The driver's side of the coordinator: plain calls with a time limit each, and errors as themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from actors.calls import ActorLost, UpdateLost, wait
from actors.cluster import Cluster
from actors.messages import CoordinatorSettings, Progress, PromptRow, RolloutResult

if TYPE_CHECKING:
    from ember_ray.engine.sampling_params import SamplingParams
    from ember_ray.model.base_weights import BaseHandles
    from ember_ray.train.batch import Answer

OnProgress = Callable[[Progress], None]
DAY_S = 86400.0
AT_WORK = ("generating", "verifying", "recovering", "scoring")
"""Phases of the coordinator in which what was asked for later waits its turn."""


class Patience:
    """A limit on a change of the policy that does not count the time in which the coordinator is at other work.

    Args:
        limit_s: seconds.
        clock: gives seconds.
    """

    def __init__(self, what: str, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._limit, self._clock = what, limit_s, clock
        self._since = clock()

    def look(self, phase: str) -> None:
        """To be called again and again with the coordinator's phase.

        Raises:
            ActorLost: the limit is over.
        """
        now = self._clock()
        if phase in AT_WORK:
            self._since = now
        elif now - self._since > self._limit:
            raise ActorLost(f"{self._what} did not end within {self._limit:g} s")


class Rollouts:
    """A running coordinator with its stages and verifiers.

    The coordinator is a child of the driver and everything else a child of the coordinator, so the driver's end,
    whatever its cause, ends all of them.

    Its making returns at once: call `ready` when the stages are needed, and start other things meanwhile.

    Args:
        cluster: where to run.
        settings: what to run; as many stages as ``settings.engine.layer_split`` names, and as the cluster placed.
    """

    def __init__(self, cluster: Cluster, settings: CoordinatorSettings) -> None:
        from actors.coordinator import Coordinator

        self._limits = settings.limits
        actor: Any = Coordinator
        self.handle = actor.options(name="ember-coordinator").remote(settings, cluster.placement)
        self._starting = self.handle.start.remote()
        self._begun: set[Any] = set()

    def ready(self, on_progress: OnProgress | None = None) -> None:
        """Waits until verifiers and stages are up.

        Raises:
            ValueError: a reward function does not exist, or the engine refuses the model or the options.
            StageLost, ActorLost: the actors do not come up.
        """
        limit = self._limits.start * (self._limits.failures + 1)
        self._wait(self._starting, "the start of the stages", limit, on_progress)

    def begin(
        self,
        rows: Sequence[PromptRow],
        num_candidates: int,
        sampling_params: SamplingParams,
        round_number: int,
        spare: Sequence[PromptRow] = (),
    ) -> Any:
        """Begins to generate and score ``num_candidates`` candidates of every row; see `Coordinator.rollout`.

        Returns:
            What `finish` takes. Calls to the coordinator are served one after the other: a publication that is asked
            for meanwhile comes after the rollout.
        """
        ref = self.handle.rollout.remote(rows, num_candidates, sampling_params, round_number, spare)
        self._begun.add(ref)
        return ref

    def finish(self, begun: Any, on_progress: OnProgress | None = None) -> RolloutResult:
        """Waits for a rollout.

        The rollout as a whole has no limit (a stalled one fails by ``limits.stall``), its progress calls have.
        """
        try:
            return self._wait(begun, "the rollout", DAY_S, on_progress)
        finally:
            self._begun.discard(begun)

    def rollout(
        self,
        rows: Sequence[PromptRow],
        num_candidates: int,
        sampling_params: SamplingParams,
        round_number: int,
        on_progress: OnProgress | None = None,
    ) -> RolloutResult:
        """`begin` and `finish` in one call."""
        return self.finish(self.begin(rows, num_candidates, sampling_params, round_number), on_progress)

    def score(
        self, answers: Sequence[Answer], policy_version: int | None = None, on_progress: OnProgress | None = None
    ) -> list[list[float]]:
        """Log-probabilities of (prompt, answer) token ids under a version that is kept; see `Coordinator.score`."""
        ref = self.handle.score.remote(list(answers), policy_version)
        return self._wait(ref, "the scoring", DAY_S, on_progress)

    def publish(self, update: Any, in_flight: bool = False) -> int:
        """Makes an adapter the official policy on all stages or on none.

        Args:
            update: an ``AdapterUpdate``, or better the ObjectRef of what ``LearnerActor.adapter_update`` gives: then
                its tensors never go through the driver. While a rollout runs the stages hold it already, so that they
                have only to switch when it has ended.
            in_flight: a rollout that runs goes on under the new policy; its candidates tell what made them.

        Returns:
            Its version.

        Raises:
            AdapterError: it is refused, the text says why; the old version serves on.
            UpdateLost: who was to make the update is lost; the old version serves on.
            ActorLost: the coordinator is lost.
        """
        from ray import ObjectRef

        try:
            if self._begun and isinstance(update, ObjectRef):
                if in_flight:
                    done = self._change(self.handle.publish_in_flight.remote(update), "the publication")
                    if done is not None:
                        return int(done)
                else:
                    self.handle.prepare.remote(update)
            return self._change(self.handle.publish.remote(update), "the publication")
        except ActorLost as lost:
            if isinstance(update, ObjectRef):
                try:
                    wait(update, "the update", self._limits.call)
                except ActorLost as fault:
                    raise UpdateLost(str(fault)) from lost
            raise

    def base_weights(self) -> list[BaseHandles | str]:
        """Where each stage's base weights lie, for `LearnerActor.start` on the stages' host; or why it cannot."""
        return self._wait(self.handle.base_weights.remote(), "the look at the base weights", DAY_S, None)

    def recoveries(self) -> int:
        """How often the stages were lost and made anew."""
        return self._watch("recoveries")

    def rollback(self, version: int) -> int:
        """Goes back to an earlier version, exactly; 0 is the base model. Raises AdapterError if it is not kept."""
        return self._change(self.handle.rollback.remote(version), "the rollback")

    def abort(self, request_id: str) -> None:
        """Ends one request of a rollout that runs in another thread."""
        self._watch("abort", request_id)

    def progress(self) -> Progress:
        """How far the running call is."""
        return self._watch("progress")

    @property
    def policy_version(self) -> int:
        """The official version."""
        return self._watch("policy_version")

    def versions(self) -> list[int]:
        """Versions that `rollback` can go to."""
        return self._watch("versions")

    def counters(self) -> list[dict[str, float]]:
        """Each stage's engine counters."""
        return self._watch("counters")

    def stage_versions(self) -> list[int]:
        """The version that each stage serves."""
        return self._watch("stage_versions")

    def stage_processes(self) -> list[tuple[str, int]]:
        """Node id and process id of each stage."""
        return self._watch("stage_processes")

    def stop(self) -> None:
        """Ends the stages, the verifiers and the coordinator."""
        from actors.calls import kill_all

        self._wait(self.handle.stop.remote(), "the end of the stages", self._limits.call, None)
        kill_all([self.handle])

    def _watch(self, method: str, *arguments: Any) -> Any:
        return wait(getattr(self.handle, method).remote(*arguments), f"the coordinator's {method}", self._limits.call)

    def _change(self, ref: Any, what: str) -> Any:
        """Waits for a change of the policy, which may have to bring up the stages again."""
        limits = self._limits
        patience = Patience(what, limits.call * 4 + (limits.start + limits.call) * limits.failures)
        return self._wait(ref, what, DAY_S, lambda progress: patience.look(progress.phase))

    def _wait(self, ref: Any, what: str, limit_s: float, on_progress: OnProgress | None) -> Any:
        def tick() -> None:
            progress = self.progress()
            if on_progress:
                on_progress(progress)

        return wait(ref, what, limit_s, tick)
