"""The stages together with the policy that they serve: one official version, everywhere or nowhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actors.adapter_wire import PackedAdapter, pack_adapter
from actors.calls import StageLost
from actors.pipeline import Pipeline

if TYPE_CHECKING:
    from ember_ray.model.lora import AdapterUpdate
    from ember_ray.train.batch import Answer

BASE_VERSION = 0
logger = logging.getLogger(__name__)


class PolicyServer:
    """Publishes adapters to a pipeline and brings fresh stages to where the lost ones were.

    Publication has two phases. First every stage checks and holds the update; one refusal, and all forget it.
    Then the decision is made here, by setting `official`, and every stage switches. A stage that dies before the
    decision comes back at the old version and the publication is tried again; one that dies after it comes back at
    the new one. So at no time do two stages serve different versions to a rollout.

    Args:
        failures: pipelines lost in a row, without `succeeded` in between, before `recover` gives up.
    """

    def __init__(self, pipeline: Pipeline, failures: int) -> None:
        self.pipeline = pipeline
        self.official = BASE_VERSION
        self.highest = BASE_VERSION
        self.recoveries = 0
        self._failures_allowed = failures
        self._failures = 0
        self._updates: dict[int, Any] = {}
        """By version, the one in use last behind the others, as the stages have them."""

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

    def publish(self, update: AdapterUpdate | PackedAdapter) -> int:
        """Makes an update the official version on all stages.

        Returns:
            Its version.

        Raises:
            AdapterError: it is refused, or its version was seen before; the old version serves on.
            StageLost: the stages are lost for good.
        """
        import ray

        from ember_ray.model.lora import AdapterError

        packed = update if isinstance(update, PackedAdapter) else pack_adapter(update)
        if packed.version <= self.highest:
            raise AdapterError(
                f"policy version {packed.version} is not new (highest so far {self.highest}); versions are never reused"
            )
        self.highest = packed.version
        shared = ray.put(packed)
        while True:
            try:
                self.ensure()
                refusals = [text for text in self.pipeline.call_all("stage_adapter", shared) if text is not None]
                if refusals:
                    self.pipeline.call_all("discard_adapter", packed.version)
                    self.succeeded()
                    raise AdapterError(refusals[0])
                break
            except StageLost as lost:
                self.recover(lost)
        self._updates[packed.version] = shared
        self._switch(packed.version)
        self._forget_old()
        return packed.version

    def rollback(self, version: int) -> int:
        """Makes an earlier version official again, exactly as it was; 0 is the base model.

        Raises:
            AdapterError: the version is unknown or no longer kept.
        """
        self._check_kept(version)
        self.ensure()
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

    def close(self) -> None:
        """Ends the stages."""
        self.pipeline.stop()

    def _check_kept(self, version: int) -> None:
        from ember_ray.model.lora import AdapterError

        if version not in self.versions:
            kept = ", ".join(str(number) for number in self.versions)
            raise AdapterError(f"policy version {version} cannot be served, it is not kept (kept: {kept})")

    def _switch(self, version: int) -> None:
        """The decision, and then its execution: whoever dies from here on comes back at the new version."""
        self.official = version
        self._used(version)
        try:
            self.pipeline.call_all("commit_adapter", version)
        except StageLost as lost:
            self.recover(lost)
        self.succeeded()

    def _restore(self) -> None:
        """Gives fresh stages every version that is kept, in the order of their numbers; then they are used in the order
        in which they were, so that the same ones will leave, the official one last."""
        for version, shared in sorted(self._updates.items()):
            refusals = [text for text in self.pipeline.call_all("stage_adapter", shared) if text is not None]
            if refusals:
                raise RuntimeError(f"policy version {version} was served before and is refused now: {refusals[0]}")
            self.pipeline.call_all("commit_adapter", version)
        for version in [*self._updates, self.official]:
            self.pipeline.call_all("commit_adapter", version)

    def _used(self, version: int) -> None:
        if version in self._updates:
            self._updates[version] = self._updates.pop(version)

    def _forget_old(self) -> None:
        """Keeps the tensors of what the stages keep: no more can be rolled back to."""
        try:
            resident = set(self.pipeline.call_all("resident_versions")[0]) | {self.official}
        except StageLost as lost:
            self.recover(lost)
            return
        self._updates = {version: shared for version, shared in self._updates.items() if version in resident}

    def _count_failure(self, lost: StageLost) -> None:
        self._failures += 1
        logger.warning("stages lost (%d in a row): %s", self._failures, lost)
        self.pipeline.stop()
        if self._failures >= self._failures_allowed:
            raise StageLost(f"the stages were lost {self._failures} times in a row; last: {lost}") from lost
