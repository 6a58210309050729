"""The pool of verifier actors: text in, reward out, and one bad candidate costs only itself."""

from __future__ import annotations

import importlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from actors.calls import cause_of, first_line, kill_all
from actors.messages import VerifierSettings

VERIFIERS = {"json_extraction": "verifiers.json_extraction:verify"}
"""Verifiers by name; anything else is given as ``package.module:function``."""

CHUNK = 8
"""Candidates handed to an actor at once; their verdicts come back one by one."""

Key = tuple[str, int]
"""Request id and candidate index."""


@dataclass(frozen=True)
class VerifyItem:
    """One candidate's text, and what it is judged by."""

    key: Key
    text: str
    gold: object
    schema: dict | None


@dataclass(frozen=True)
class Verdict:
    """What came of one item; reward None means that the verifier failed on it, reason says how."""

    key: Key
    reward: float | None
    components: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


def find_verifier(name: str) -> Callable[..., Any]:
    """The function ``verify(text, gold=..., schema=..., **settings)`` with ``reward, components, reason`` as result.

    Raises:
        ValueError: there is no such verifier.
    """
    path = VERIFIERS.get(name, name)
    module, colon, function = path.partition(":")
    if not colon:
        raise ValueError(f"no verifier '{name}' (known: {', '.join(VERIFIERS)}; or package.module:function)")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as fault:
        raise ValueError(f"verifier '{name}' cannot be loaded: {fault}") from fault


@ray.remote(num_cpus=0)
class VerifierActor:
    """Judges in a process of its own, which can be ended when it hangs."""

    def __init__(self, settings: VerifierSettings) -> None:
        self._settings = settings
        self._verify: Callable[..., Any] | None = None

    def load(self) -> None:
        """Imports the verifier.

        Raises:
            ValueError: there is no such verifier.
        """
        self._verify = find_verifier(self._settings.name)

    @ray.method(num_returns="streaming")
    def score(self, items: list[VerifyItem]) -> Iterator[Verdict]:
        """One verdict an item, in order; an exception of the verifier is a verdict too."""
        verify = self._verify or find_verifier(self._settings.name)
        for item in items:
            try:
                found = verify(item.text, gold=item.gold, schema=item.schema, **self._settings.settings)
                reward = float(found.reward)
                if not math.isfinite(reward):
                    raise ValueError(f"the reward is {reward}")
                verdict = Verdict(item.key, reward, dict(found.components), found.reason)
            except Exception as fault:
                reason = f"the verifier failed: {type(fault).__name__}: {first_line(fault)}"
                verdict = Verdict(item.key, None, {}, reason)
            yield verdict


@dataclass
class _Worker:
    """One actor of the pool, and what it has in hand; ``since`` is when it last gave a sign."""

    handle: Any
    loading: Any
    stream: Any = None
    items: deque[VerifyItem] = field(default_factory=deque)
    since: float = field(default_factory=time.monotonic)


class VerifierPool:
    """Keeps its actors busy. Wait on `waitables`, hand what is ready to `take`, call `late` now and then.

    An item whose verdict does not come within the limit gets none, its actor is replaced and the other items in
    its hands are judged again. When an actor dies, its items are judged again one by one, because the last verdicts
    before a death can be lost with it and so the culprit is not known; the one that then dies alone gets none.

    Args:
        settings: which verifier, how many actors.
        limit_s: for one verdict.
        start_limit_s: for an actor to come up.
    """

    def __init__(self, settings: VerifierSettings, limit_s: float, start_limit_s: float = 60.0) -> None:
        self._settings, self._limit_s, self._start_limit_s = settings, limit_s, start_limit_s
        self._queue: deque[VerifyItem] = deque()
        self._survivors: set[Key] = set()
        self._failed_starts = 0
        self.replaced = 0
        self._workers = [self._make(index) for index in range(max(1, settings.actors))]

    def _make(self, index: int) -> _Worker:
        actor: Any = VerifierActor
        handle = actor.options(name=f"ember-verifier-{index}").remote(self._settings)
        return _Worker(handle, handle.load.remote())

    def submit(self, items: Sequence[VerifyItem]) -> None:
        """Queues items and hands them to idle actors."""
        self._queue.extend(items)
        self._assign()

    @property
    def ready(self) -> bool:
        """All actors are up."""
        return all(worker.loading is None for worker in self._workers)

    @property
    def waitables(self) -> list[Any]:
        """What `take` can make use of once it is ready."""
        refs = [worker.loading if worker.stream is None else worker.stream for worker in self._workers]
        return [ref for ref in refs if ref is not None]

    def take(self, ready: Sequence[Any]) -> list[Verdict]:
        """Verdicts that have come; foreign entries of ``ready`` are passed over.

        Raises:
            ValueError: the verifier does not exist.
            RuntimeError: its actors cannot be started.
        """
        verdicts: list[Verdict] = []
        for index, worker in enumerate(self._workers):
            if worker.loading is not None and worker.loading in ready:
                self._loaded(index, worker)
            elif worker.stream is not None and worker.stream in ready:
                verdicts += self._next(index, worker)
        self._assign()
        return verdicts

    def late(self) -> list[Verdict]:
        """Ends actors that are over their limit; the item that each was at has its verdict now."""
        verdicts: list[Verdict] = []
        now = time.monotonic()
        for index, worker in enumerate(self._workers):
            if worker.loading is not None and now - worker.since > self._start_limit_s:
                self._start_failed(index, f"not up within {self._start_limit_s:g} s")
            elif worker.stream is not None and worker.items and now - worker.since > self._limit_s:
                if ray.wait([worker.stream], timeout=0)[0]:
                    continue  # the caller was busy elsewhere, the verdict is here
                verdicts.append(self._give_up(worker, f"the verifier took longer than {self._limit_s:g} s"))
                self._replace(index)
        self._assign()
        return verdicts

    def clear(self) -> None:
        """Forgets all items, after a rollout that failed."""
        self._queue.clear()
        self._survivors.clear()
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
        worker.loading, worker.since, self._failed_starts = None, time.monotonic(), 0

    def _next(self, index: int, worker: _Worker) -> list[Verdict]:
        try:
            verdict = ray.get(next(worker.stream), timeout=self._limit_s)
        except StopIteration:
            worker.stream = None
            return []
        except RayError:  # its process died, or the verdict did not come within the limit
            return self._died(index, worker)
        worker.items.popleft()
        worker.since = time.monotonic()
        self._survivors.discard(verdict.key)
        return [verdict]

    def _died(self, index: int, worker: _Worker) -> list[Verdict]:
        verdicts: list[Verdict] = []
        if len(worker.items) == 1 and worker.items[0].key in self._survivors:
            verdicts.append(self._give_up(worker, "the verifier's process died twice on this candidate"))
        self._survivors.update(item.key for item in worker.items)
        self._replace(index)
        return verdicts

    def _give_up(self, worker: _Worker, reason: str) -> Verdict:
        """The item that the actor is at is left without a reward."""
        item = worker.items.popleft()
        self._survivors.discard(item.key)
        return Verdict(item.key, None, {}, reason)

    def _start_failed(self, index: int, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts > 2 * len(self._workers):
            raise RuntimeError(f"the verifier actors cannot be started: {reason}")
        self._replace(index)

    def _replace(self, index: int) -> None:
        """A fresh actor in the place of one that hangs or died; what it had in hand goes to the front of the queue."""
        worker = self._workers[index]
        self._queue.extendleft(reversed(worker.items))
        kill_all([worker.handle])
        self._workers[index] = self._make(index)
        self.replaced += 1

    def _assign(self) -> None:
        for worker in self._workers:
            if not self._queue:
                return
            if worker.loading is None and worker.stream is None:
                share = -(-len(self._queue) // len(self._workers))
                items = [self._queue.popleft()]
                while len(items) < min(CHUNK, share) and not self._survivors & {items[0].key, self._queue[0].key}:
                    items.append(self._queue.popleft())
                worker.items = deque(items)
                worker.stream, worker.since = worker.handle.score.remote(items), time.monotonic()
