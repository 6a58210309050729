"""The group of stage actors: made together, called together, lost together."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.calls import StageLost, as_stage_error, cause_of, kill_all
from actors.messages import CoordinatorSettings

if TYPE_CHECKING:
    from ember_ray.engine.request import Candidate, GenerationRequest

TOKENS_BEFORE_STALL = 16384
"""As many tokens may be scored in ``limits.stall``; scoring has no steps that could be watched."""

GRACE_S = 3.0
"""How long the other stages may take to say what they saw, once one of them failed."""


@dataclass(frozen=True)
class Placement:
    """A placement group with one bundle a stage, and what each bundle holds.

    Attributes:
        group: Ray's PlacementGroup.
        cpus, gpus: of each stage.
        run: name of the run, a tag of the metrics.
    """

    group: Any
    cpus: float
    gpus: float
    run: str


class Pipeline:
    """Stage actors that serve one model. Not thread-safe: one caller at a time, `abort` and `counters` aside.

    Whatever goes wrong with one stage makes the whole group useless, because its peers wait for it: the caller
    gets `StageLost`, and `start` makes a new group.
    """

    def __init__(self, settings: CoordinatorSettings, placement: Placement) -> None:
        self._settings, self._placement = settings, placement
        self._limits = settings.limits
        self.num_stages = max(1, len(settings.engine.layer_split))
        self.stages: list[Any] = []

    def start(self) -> None:
        """Makes the actors, lets them meet and loads the model; what was there before is torn down.

        Raises:
            StageLost: a stage died or did not come up in time.
            ValueError: the engine refuses the model or the options.
        """
        from ray.exceptions import ActorAlreadyExistsError
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from actors.stage import StageActor

        self.stop()
        actor: Any = StageActor
        for stage in range(self.num_stages):
            options: dict[str, Any] = {
                "name": f"ember-stage-{stage}",
                "num_cpus": self._placement.cpus,
                "num_gpus": self._placement.gpus,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self._placement.group, stage),
            }
            try:
                self.stages.append(actor.options(**options).remote(stage, self.num_stages, self._placement.run))
            except ActorAlreadyExistsError as taken:
                raise StageLost(f"the name of stage {stage} is still taken") from taken
        places = self.call_all("place", limit_s=self._limits.start)
        nodes = [place.node_id for place in places]
        master = "127.0.0.1" if len(set(nodes)) == 1 else places[0].address
        threads = [self._settings.threads or max(1, place.cores // nodes.count(place.node_id)) for place in places]
        arguments = [
            (self._settings.engine, master, places[0].free_port, self._limits.transport, count) for count in threads
        ]
        self.call_each("setup", arguments, limit_s=self._limits.start)

    def stop(self) -> None:
        """Ends all stage actors; there may be none."""
        stages, self.stages = self.stages, []
        kill_all(stages)

    def call_all(self, method: str, *arguments: Any, limit_s: float | None = None) -> list[Any]:
        """Calls a method of every stage at once and gives their answers in order.

        Raises:
            StageLost: a stage died, failed or did not answer within the limit.
            ValueError: what a stage refused.
        """
        return self.call_each(method, [arguments] * len(self.stages), limit_s)

    def call_each(self, method: str, arguments: Sequence[tuple[Any, ...]], limit_s: float | None = None) -> list[Any]:
        """`call_all` with arguments of their own for each stage."""
        import ray

        stages = list(self.stages)
        if not stages:
            raise StageLost("the stages are down")
        limit_s = self._limits.call if limit_s is None else limit_s
        refs = [getattr(stage, method).remote(*own) for stage, own in zip(stages, arguments, strict=True)]
        end = time.monotonic() + limit_s
        answers: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        waiting = dict(zip(refs, range(len(refs)), strict=True))
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for ref in ready:
                stage = waiting.pop(ref)
                try:
                    answers[stage] = ray.get(ref, timeout=self._limits.call)
                except Exception as error:
                    errors[stage] = as_stage_error(stage, error)
                    end = min(end, time.monotonic() + GRACE_S)
        if errors:
            raise worst(list(errors.values()))
        if waiting:
            late = ", ".join(str(stage) for stage in sorted(waiting.values()))
            raise StageLost(f"stage {late} did not answer '{method}' within {limit_s:g} s")
        return [answers[stage] for stage in range(len(refs))]

    def score(self, answers: Any, version: int, tokens: int) -> list[list[float]]:
        """Log-probabilities of answers, see `StageActor.score`.

        Args:
            answers: a list of them, or the ref of one.
            tokens: of all answers and their prompts; the time limit grows with them.

        Raises:
            StageLost: a stage died, or the time limit is over.
            RequestError: an answer can never be scored.
        """
        limit_s = self._limits.stall * max(1, math.ceil(tokens / TOKENS_BEFORE_STALL))
        return self.call_all("score", answers, version, limit_s=limit_s)[-1]

    def counters(self) -> list[dict[str, float]]:
        """Each stage's counters; answered while a rollout runs."""
        return self.call_all("counters")

    def abort(self, request_id: str) -> None:
        """Asks the stages to end a request of the running batch; does not wait, and is lost if they are."""
        if self.stages:
            self.stages[-1].abort.remote(request_id)

    def begin(self, requests: list[GenerationRequest]) -> StageBatch:
        """Starts one batch on all stages: one call each, whatever the size of the batch."""
        if not self.stages:
            raise StageLost("the stages are down")
        return StageBatch(self, requests, self._limits.stall, self._limits.call)


def worst(errors: Sequence[BaseException]) -> BaseException:
    """Of what several stages saw, the error that explains the others: a lasting one before a lost peer."""
    return min(errors, key=lambda error: isinstance(error, StageLost))


class StageBatch:
    """One running batch. The caller waits on `waitables` and hands what is ready to `take`."""

    def __init__(self, pipeline: Pipeline, requests: list[GenerationRequest], stall_s: float, call_s: float) -> None:
        import ray

        self._pipeline, self._stall_s, self._call_s = pipeline, stall_s, call_s
        shared = ray.put(requests)
        self._streams = {stage.rollout.remote(shared): index for index, stage in enumerate(pipeline.stages)}
        self._last_steps: list[float] = []
        self._last_step_time = time.monotonic()

    @property
    def waitables(self) -> list[Any]:
        """Streams of the stages that have not ended."""
        return list(self._streams)

    @property
    def done(self) -> bool:
        """All stages have ended the batch."""
        return not self._streams

    def take(self, ready: Sequence[Any]) -> list[Candidate]:
        """Candidates that have come.

        Args:
            ready: what ``ray.wait`` found ready; foreign entries are passed over.

        Raises:
            StageLost: a stage died, or lost its peer.
            ValueError: the engine refused the requests.
        """
        import ray

        found: list[Candidate] = []
        for stream in ready:
            if stream not in self._streams:
                continue
            stage = self._streams[stream]
            try:
                found += ray.get(next(stream), timeout=self._call_s)
            except StopIteration:
                del self._streams[stream]
            except Exception as error:
                del self._streams[stream]
                raise worst([as_stage_error(stage, error), *self._other_errors()]) from cause_of(error)
        return found

    def watch(self) -> list[dict[str, float]]:
        """Looks whether the stages still step; call it now and then. Gives their counters.

        Raises:
            StageLost: a stage is gone, or none has taken a step for the time limit.
        """
        counters = self._pipeline.counters()
        steps = [count["steps"] for count in counters]
        now = time.monotonic()
        if steps != self._last_steps:
            self._last_steps, self._last_step_time = steps, now
        elif now - self._last_step_time > self._stall_s:
            raise StageLost(f"no stage took a step for {self._stall_s:g} s")
        return counters

    def _other_errors(self) -> list[BaseException]:
        """What the other stages say of the failure, as far as they say it soon; their candidates are given up."""
        import ray

        errors: list[BaseException] = []
        end = time.monotonic() + GRACE_S
        while self._streams and time.monotonic() < end:
            ready, _ = ray.wait(self.waitables, timeout=max(0.0, end - time.monotonic()))
            for stream in ready:
                stage = self._streams[stream]
                try:
                    ray.get(next(stream), timeout=self._call_s)
                except StopIteration:
                    del self._streams[stream]
                except Exception as error:
                    del self._streams[stream]
                    errors.append(as_stage_error(stage, error))
        return errors
