"""The pool of verifier actors: text in, reward out, and one bad candidate costs only itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from actors.calls import cause_of, first_line, kill_all
from actors.messages import VerifierSettings
from verifiers.judge import Batch, Judge, Judgement, TrainerState

LONGEST_CHUNK_S, SHORTEST_CHUNK_S = 0.25, 0.01
"""How long the chunks last that actors are given. A hang costs its whole chunk a second look, so they are not long;
a message takes about a millisecond, so they are not short either. But a function that waits for a server takes as long
for one item as for many: chunks may always last twice as long as the quickest has, up to half the limit."""

GROWTH = 4
"""A chunk is at most this many times as large as any before it, whose pace may have been luck."""

Key = tuple[str, int]
"""Request id and candidate index."""


@dataclass(frozen=True)
class VerifyItem:
    """One candidate, and what it is judged by.

    Attributes:
        key: whose answer.
        prompt: messages or text, as the row has it.
        text: the answer.
        completion_token_ids: its tokens.
        columns: further columns of the row, by name.
    """

    key: Key
    prompt: list[dict[str, str]] | str
    text: str
    completion_token_ids: Sequence[int]
    columns: Mapping[str, object]


@dataclass(frozen=True)
class Verdict:
    """What came of one item; reward None means that there is none to learn from, reason says why."""

    key: Key
    reward: float | None
    components: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


@ray.remote(num_cpus=0)
class VerifierActor:
    """Judges in a process of its own, which can be ended when it hangs."""

    def __init__(self, settings: VerifierSettings) -> None:
        self._settings = settings
        self._judge: Judge | None = None

    def load(self) -> None:
        """Imports the reward functions.

        Raises:
            ValueError: one does not exist or cannot be called.
        """
        self._judge = Judge(self._settings.functions)

    def judge(self, items: Sequence[VerifyItem], state: TrainerState) -> tuple[list[Judgement], float]:
        """One judgement an item, in order, and the seconds that they took."""
        if self._judge is None:
            self.load()
        assert self._judge is not None
        begun = time.monotonic()
        batch = Batch(
            [item.prompt for item in items],
            [item.text for item in items],
            [item.completion_token_ids for item in items],
            [item.columns for item in items],
        )
        return self._judge.judge(batch, state), time.monotonic() - begun


@dataclass
class _Worker:
    """One actor of the pool, and what it has in hand; ``since`` is when it got that."""

    handle: Any
    loading: Any
    judging: Any = None
    items: list[VerifyItem] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


class VerifierPool:
    """Keeps its actors busy. Wait on `waitables`, hand what is ready to `take`, call `late` now and then.

    Actors get items in chunks, since reward functions take batches: small ones until their pace is known and when
    little is queued. When a chunk is not judged within the limit or its actor dies, the actor is replaced and the
    items are judged again one by one, because nobody knows which was at fault. The one that then hangs, or kills its
    actor once more, gets no reward.

    Args:
        settings: which reward functions, how many actors.
        limit_s: for one item, and for a chunk as well.
        start_limit_s: for an actor to come up.
    """

    def __init__(self, settings: VerifierSettings, limit_s: float, start_limit_s: float = 60.0) -> None:
        self._settings, self._limit_s, self._start_limit_s = settings, limit_s, start_limit_s
        self._queue: deque[VerifyItem] = deque()
        self._state = TrainerState()
        self._suspects: set[Key] = set()
        self._deadly: set[Key] = set()
        self._least = self._most = 1
        self._quickest = limit_s
        self._failed_starts = 0
        self.replaced = 0
        self._workers = [self._make(index) for index in range(max(1, settings.actors))]

    def _make(self, index: int) -> _Worker:
        actor: Any = VerifierActor
        handle = actor.options(name=f"ember-verifier-{index}").remote(self._settings)
        return _Worker(handle, handle.load.remote())

    def submit(self, items: Sequence[VerifyItem], global_step: int = 0) -> None:
        """Queues items and hands them to idle actors; the step is what functions see in ``trainer_state``."""
        self._state = TrainerState(global_step)
        self._queue.extend(items)
        self._assign()

    @property
    def ready(self) -> bool:
        """All actors are up."""
        return all(worker.loading is None for worker in self._workers)

    @property
    def waitables(self) -> list[Any]:
        """What `take` can make use of once it is ready."""
        refs = [worker.loading if worker.judging is None else worker.judging for worker in self._workers]
        return [ref for ref in refs if ref is not None]

    def take(self, ready: Sequence[Any]) -> list[Verdict]:
        """Verdicts that have come; foreign entries of ``ready`` are passed over.

        Raises:
            ValueError: a reward function does not exist or cannot be called.
            RuntimeError: the actors cannot be started.
        """
        verdicts: list[Verdict] = []
        for index, worker in enumerate(self._workers):
            if worker.loading is not None and worker.loading in ready:
                self._loaded(index, worker)
            elif worker.judging is not None and worker.judging in ready:
                verdicts += self._judged(index, worker)
        self._assign()
        return verdicts

    def late(self) -> list[Verdict]:
        """Ends actors that are over their limit; an item that was alone with one has its verdict now."""
        verdicts: list[Verdict] = []
        now = time.monotonic()
        for index, worker in enumerate(self._workers):
            if worker.loading is not None and now - worker.since > self._start_limit_s:
                self._start_failed(index, f"not up within {self._start_limit_s:g} s")
            elif worker.judging is not None and now - worker.since > self._limit_s:
                if ray.wait([worker.judging], timeout=0)[0]:
                    continue  # the caller was busy elsewhere, the verdicts are here
                if len(worker.items) == 1:
                    verdicts.append(self._give_up(worker, f"the verifier took longer than {self._limit_s:g} s"))
                self._replace(index)
        self._assign()
        return verdicts

    def clear(self) -> None:
        """Forgets all items, after a rollout that failed."""
        self._queue.clear()
        self._suspects.clear()
        self._deadly.clear()
        for index, worker in enumerate(self._workers):
            if worker.items:
                worker.items.clear()
                self._replace(index)

    def close(self) -> None:
        """Ends the actors."""
        kill_all([worker.handle for worker in self._workers])
        self._workers = []

    def _loaded(self, index: int, worker: _Worker) -> None:
        try:
            ray.get(worker.loading, timeout=self._start_limit_s)
        except Exception as error:
            cause = cause_of(error)
            if isinstance(cause, ValueError):
                raise cause from error
            self._start_failed(index, first_line(cause))
            return
        worker.loading, self._failed_starts = None, 0

    def _judged(self, index: int, worker: _Worker) -> list[Verdict]:
        try:
            judgements, seconds = ray.get(worker.judging, timeout=self._limit_s)
        except RayError as error:
            return self._died(index, worker, error)
        self._quickest = min(self._quickest, seconds)
        longest = max(LONGEST_CHUNK_S, min(2 * self._quickest, self._limit_s / 2))
        pace = max(seconds, 1e-6) / len(worker.items)
        self._most = max(1, min(max(self._most, GROWTH * len(worker.items)), int(longest / pace)))
        self._least = min(self._most, 1 + int(SHORTEST_CHUNK_S / pace))
        verdicts = [
            Verdict(item.key, judgement.reward, judgement.components, judgement.reason)
            for item, judgement in zip(worker.items, judgements, strict=True)
        ]
        self._suspects.difference_update(item.key for item in worker.items)
        self._deadly.difference_update(item.key for item in worker.items)
        worker.judging, worker.items = None, []
        return verdicts

    def _died(self, index: int, worker: _Worker, error: RayError) -> list[Verdict]:
        verdicts: list[Verdict] = []
        if len(worker.items) == 1 and worker.items[0].key in self._deadly:
            died = isinstance(error, RayActorError)
            fault = "'s process died twice on this candidate" if died else f" failed: {first_line(cause_of(error))}"
            verdicts.append(self._give_up(worker, f"the verifier{fault}"))
        self._deadly.update(item.key for item in worker.items)
        self._replace(index)
        return verdicts

    def _give_up(self, worker: _Worker, reason: str) -> Verdict:
        """The item that is alone with the actor is left without a reward."""
        item = worker.items.pop()
        self._suspects.discard(item.key)
        self._deadly.discard(item.key)
        return Verdict(item.key, None, {}, reason)

    def _start_failed(self, index: int, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts > 2 * len(self._workers):
            raise RuntimeError(f"the verifier actors cannot be started: {reason}")
        self._replace(index)

    def _replace(self, index: int) -> None:
        """A fresh actor in the place of one that hangs or died; what it had in hand goes to the front of the queue."""
        worker = self._workers[index]
        self._suspects.update(item.key for item in worker.items)
        self._queue.extendleft(reversed(worker.items))
        kill_all([worker.handle])
        self._workers[index] = self._make(index)
        self.replaced += 1

    def _assign(self) -> None:
        for worker in self._workers:
            if not self._queue:
                return
            if worker.loading is None and worker.judging is None:
                worker.items = self._chunk()
                worker.judging, worker.since = worker.handle.judge.remote(worker.items, self._state), time.monotonic()

    def _chunk(self) -> list[VerifyItem]:
        """The next items: half an equal share of what is queued, so that all actors end together; a suspect alone."""
        share = -(-len(self._queue) // (2 * len(self._workers)))
        size = min(max(share, self._least), self._most)
        items = [self._queue.popleft()]
        while len(items) < size and self._queue and not self._suspects & {items[0].key, self._queue[0].key}:
            items.append(self._queue.popleft())
        return items
