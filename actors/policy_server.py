"""The stages together with the policy that they serve: one official version, everywhere or nowhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actors.adapter_wire import PackedAdapter, Refusal, pack_adapter
from actors.calls import StageLost, UpdateLost, first_line
from actors.pipeline import Pipeline

if TYPE_CHECKING:
    from ember_ray.model.adapter_outbox import AdapterNotice
    from ember_ray.model.base_weights import BaseHandles
    from ember_ray.model.lora import AdapterUpdate
    from ember_ray.train.batch import Answer

BASE_VERSION = 0
COPY_LIMIT_S = 60.0
"""How long a copy of an adapter may take; it has been under way since the publication before."""

ADAPTERS_KEPT = 8
"""As many as a stage keeps resident (`AdapterSlots`), those that were in use last."""

SWITCH_POLL_S = 0.002
"""How often stages are asked whether they have switched within a batch."""

logger = logging.getLogger(__name__)


class PolicyServer:
    """Publishes adapters to a pipeline and brings fresh stages to where the lost ones were.

    Publication has two phases. First every stage checks and holds the update; one refusal, and all forget it.
    Then the decision is made here, by setting `official`, and every stage switches. A stage that dies before the
    decision comes back at the old version and the publication is tried again; one that dies after it comes back at
    the new one. So at no time do two stages serve different versions to a rollout.

    A notice tells where a learner's update lies; stages read it there, and it is there until the next publication but
    one. A copy for stages that are made anew is taken behind the switch, while other work goes on.

    All methods are for one thread but `prepare` and `publish_in_flight`, which a second one may call at any time.

    Args:
        failures: pipelines lost in a row, without `succeeded` in between, before `recover` gives up.
    """

    def __init__(self, pipeline: Pipeline, failures: int) -> None:
        self.pipeline = pipeline
        self.official = BASE_VERSION
        self.history = [BASE_VERSION]
        """Official versions, one behind the other."""
        self.highest = BASE_VERSION
        self.recoveries = 0
        self._failures_allowed = failures
        self._failures = 0
        self._updates: dict[int, Any] = {}
        """By version, the one in use last behind the others, as the stages have them: refs of packed adapters, of the
        newest one its notice."""
        self._copies: dict[int, tuple[Any, Any]] = {}
        """By version: copies that are being taken, as refs, and refs that tell that they are there."""
        self._lock = threading.RLock()
        self._prepared: int | None = None
        self._in_batch = False
        self._is_settled = True  # else the stages may not all have heard yet of a switch in a running batch

    @property
    def versions(self) -> list[int]:
        """Versions that `rollback` can go to."""
        return sorted([BASE_VERSION, *self._updates])

    def start(self) -> None:
        """Brings the stages up at the official version.

        Raises:
            StageLost: they could not be brought up, also when tried again.
            ValueError: the engine refuses the model or the options.
        """
        with self._lock:
            self._prepared, self._in_batch, self._is_settled = None, False, True
            while True:
                try:
                    self.pipeline.start()
                    self._restore()
                    return
                except StageLost as lost:
                    self._count_failure(lost)
                except BaseException:
                    self.pipeline.stop()
                    raise

    def ensure(self) -> None:
        """`start`, if the stages are down."""
        if not self.pipeline.stages:
            self.start()

    def recover(self, lost: StageLost) -> None:
        """After a loss: a fresh pipeline at the official version.

        Raises:
            StageLost: too many losses in a row.
        """
        self._count_failure(lost)
        self.start()
        self.recoveries += 1

    def succeeded(self) -> None:
        """Work was done; losses are counted from 0 again."""
        self._failures = 0

    def prepare(self, update: PackedAdapter | AdapterNotice) -> None:
        """Lets the stages check and hold an update while they are at work, so that `publish` has only to switch.

        It promises nothing: where anything is in the way, it is left to `publish` to do it and to say so.
        """
        with self._lock:
            if update.version <= self.highest or not self.pipeline.stages:
                return
            try:
                if not any(self.pipeline.call_all("stage_adapter", update)):
                    self._prepared = update.version
            except StageLost as lost:
                logger.info("policy version %d was not prepared: %s", update.version, lost)

    def publish_in_flight(self, update: PackedAdapter | AdapterNotice) -> bool:
        """`publish` while a batch runs, which goes on under the new version from between two of its steps on.

        As `prepare`, for a second thread.

        Returns:
            Whether it is done: all stages have switched, or will when the batch has ended. If not, nothing has
            happened, and `publish` will do it or say what is in the way.
        """
        import ray

        from ember_ray.model.adapter_outbox import AdapterNotice

        with self._lock:
            if self._in_batch:
                self.prepare(update)
            if not self._in_batch or self._prepared != update.version:
                return False
            version, self._prepared = update.version, None
            self.highest = version
            self._finish_copies()
            self._updates[version] = update if isinstance(update, AdapterNotice) else ray.put(update)
            self._decide(version)
            self._keep(set(list(self._updates)[-ADAPTERS_KEPT:]))  # the stages will; fresh ones have no room for more
            self._is_settled = False
            try:
                self.pipeline.call_all("switch_in_flight", version)  # the last stage tells it with a step's results
            except StageLost as lost:  # who waits for the batch finds out too, and brings fresh stages to this version
                logger.info("policy version %d was decided when stages were lost: %s", version, lost)
            if isinstance(update, AdapterNotice):
                self._begin_copy(update)
        self._await_switch(version)
        return True

    def _await_switch(self, version: int) -> None:
        """Until all stages serve a version, or the batch has ended: before they must not be given another update."""
        while not self._is_settled:
            try:
                done = set(self.pipeline.call_all("policy_version")) == {version}
                resident = self.pipeline.call_all("resident_versions")[0] if done else ()
            except StageLost:
                return
            if not done:
                time.sleep(SWITCH_POLL_S)
                continue
            with self._lock:
                if not self._is_settled and self.official == version:
                    self._is_settled = True
                    self._keep({*resident, version})

    def begin_batch(self) -> None:
        """The stages are up and serve the official version; a batch begins, within which they may switch.

        Raises:
            StageLost: the stages are lost for good.
        """
        self.ensure()
        self._in_batch = True

    def end_batch(self) -> None:
        """It has ended; stages that have not switched within it, as was decided, do so now.

        Raises:
            StageLost: the stages are lost for good.
        """
        with self._lock:
            self._in_batch = False
            if not self._is_settled:
                self._keep(self._switch(self.official))
            self._finish_copies()

    def publish(self, update: AdapterUpdate | PackedAdapter | AdapterNotice) -> int:
        """Makes an update the official version on all stages.

        Returns:
            Its version.

        Raises:
            AdapterError: it is refused, or its version was seen before; the old version serves on.
            UpdateLost: it is not to be had from who made it; the old version serves on, and the version is still new.
            StageLost: the stages are lost for good.
        """
        import ray

        from ember_ray.model.adapter_outbox import AdapterNotice
        from ember_ray.model.lora import AdapterError

        version = update.version
        with self._lock:
            if version <= self.highest:
                raise AdapterError(
                    f"policy version {version} is not new (highest so far {self.highest}); versions are never reused"
                )
            before, self.highest = self.highest, version
            self._finish_copies()  # of the version before, whose buffer may be written after this publication
            if isinstance(update, AdapterNotice):
                shared: Any = update
            else:
                shared = ray.put(update if isinstance(update, PackedAdapter) else pack_adapter(update))
            refusals = self._stage(version, shared)
            if refusals:
                if all(refusal.lost for refusal in refusals):
                    self.highest = before
                    raise UpdateLost(refusals[0].text)
                raise AdapterError(next(refusal.text for refusal in refusals if not refusal.lost))
            self._updates[version] = shared
            self._decide(version)
            self._keep(self._switch(version))
            if isinstance(update, AdapterNotice):
                self._begin_copy(update)
        return version

    def rollback(self, version: int) -> int:
        """Makes an earlier version official again, exactly as it was; 0 is the base model.

        Raises:
            AdapterError: the version is unknown or no longer kept.
        """
        self._check_kept(version)
        with self._lock:
            self.ensure()
            self._decide(version)
            self._switch(version)
        return version

    def score(self, answers: Sequence[Answer], version: int | None = None) -> list[list[float]]:
        """Log-probabilities of given answers under a version that is kept; the official one serves on after it.

        Args:
            answers: (prompt, answer) token ids; both have at least one token.
            version: None takes the official one.

        Returns:
            For each answer one natural logarithm a token, at temperature 1.

        Raises:
            AdapterError: the version is unknown or no longer kept.
            RequestError: an answer can never be scored.
            StageLost: the stages are lost for good.
        """
        import ray

        version = self.official if version is None else version
        self._check_kept(version)
        shared = ray.put(list(answers))
        tokens = sum(len(prompt) + len(answer) for prompt, answer in answers)
        while True:
            try:
                self.ensure()
                scores = self.pipeline.score(shared, version, tokens)
                self._used(version)
                self._used(self.official)
                self.succeeded()
                return scores
            except StageLost as lost:
                self.recover(lost)

    def base_weights(self) -> list[BaseHandles | str]:
        """Where each stage's base weights lie, or why they cannot be shown; asked again after each loss of a stage.

        Raises:
            StageLost: the stages are lost for good.
        """
        while True:
            try:
                self.ensure()
                return self.pipeline.call_all("base_weights")
            except StageLost as lost:
                self.recover(lost)

    def close(self) -> None:
        """Ends the stages."""
        self.pipeline.stop()

    def _check_kept(self, version: int) -> None:
        from ember_ray.model.lora import AdapterError

        if version not in self.versions:
            kept = ", ".join(str(number) for number in self.versions)
            raise AdapterError(f"policy version {version} cannot be served, it is not kept (kept: {kept})")

    def _stage(self, version: int, shared: Any) -> list[Refusal]:
        """All stages hold an update, or none does; gives their refusals."""
        prepared, self._prepared = self._prepared, None  # stages hold one update at a time
        if prepared == version:
            return []
        while True:
            try:
                self.ensure()
                refusals = [refusal for refusal in self.pipeline.call_all("stage_adapter", shared) if refusal]
                if refusals:
                    self.pipeline.call_all("discard_adapter", version)
                    self.succeeded()
                return refusals
            except StageLost as lost:
                self.recover(lost)

    def _decide(self, version: int) -> None:
        """Whoever dies from here on comes back at this version."""
        self.official = version
        self.history.append(version)
        self._used(version)

    def _switch(self, version: int) -> set[int]:
        """Carries a decision out; gives what the stages keep: no more can be rolled back to."""
        while True:
            try:
                resident = self.pipeline.call_all("commit_adapter", version)[0]
                break
            except StageLost as lost:
                self.recover(lost)
        self.succeeded()
        self._is_settled = True
        return {*resident, version}

    def _keep(self, versions: set[int]) -> None:
        self._updates = {number: kept for number, kept in self._updates.items() if number in versions}

    def _begin_copy(self, notice: AdapterNotice) -> None:
        if self.pipeline.stages:
            self._copies[notice.version] = self.pipeline.stages[0].adapter_copy.remote(notice)

    def _finish_copies(self) -> None:
        """Puts copies in the place of notices; one that failed is left to the notice, which is good as long as it is
        of the newest version."""
        import ray
        from ray.exceptions import RayError

        copies, self._copies = self._copies, {}
        for version, (ref, done) in copies.items():
            try:
                ray.get(done, timeout=COPY_LIMIT_S)
            except RayError as error:
                logger.warning("no copy was taken of policy version %d: %s", version, first_line(error))
                continue
            if version in self._updates:
                self._updates[version] = ref

    def _restore(self) -> None:
        """Gives fresh stages every version that is kept, in the order of their numbers; then they are used in the order
        in which they were, so that the same ones will leave, the official one last."""
        from ember_ray.model.adapter_outbox import AdapterNotice

        self._finish_copies()
        for version, shared in sorted(self._updates.items()):
            refusals = [refusal for refusal in self.pipeline.call_all("stage_adapter", shared) if refusal]
            if refusals:
                raise RuntimeError(f"policy version {version} was served before and is refused now: {refusals[0].text}")
            self.pipeline.call_all("commit_adapter", version)
        for version in [*self._updates, self.official]:
            self.pipeline.call_all("commit_adapter", version)
        for shared in self._updates.values():
            if isinstance(shared, AdapterNotice):
                self._begin_copy(shared)

    def _used(self, version: int) -> None:
        if version in self._updates:
            self._updates[version] = self._updates.pop(version)

    def _count_failure(self, lost: StageLost) -> None:
        self._failures += 1
        logger.warning("stages lost (%d in a row): %s", self._failures, lost)
        self.pipeline.stop()
        if self._failures >= self._failures_allowed:
            raise StageLost(f"the stages were lost {self._failures} times in a row; last: {lost}") from lost
