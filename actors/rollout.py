"""One rollout: candidates come from the stages and go to the verifiers while others are still generating."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from actors.calls import StageLost
from actors.messages import Progress, PromptRow, RolloutResult, RolloutStats
from actors.pipeline import StageBatch
from actors.policy_server import PolicyServer
from actors.verifier import Verdict, VerifierPool, VerifyItem

if TYPE_CHECKING:
    from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
    from ember_ray.engine.request import Candidate, GenerationRequest
    from ember_ray.engine.sampling_params import SamplingParams

WATCH_S = 2.0
"""How often the stages are looked at while a batch runs."""

ABORT_S = 0.2
"""How often the stages are told again of a request that is to end."""

COUNTED = ("prefill_tokens", "prefix_hit_tokens", "preemptions")


def request_seed(seed: int, round_number: int, repeat: int) -> int:
    """The seed of a request.

    Args:
        repeat: how many rows with the same prompt came before it in the batch; without it they would all get
            the same candidates, because random numbers depend on the prompt and not on the row.

    Returns:
        63 bits of SHA-256, the same on every machine.
    """
    digest = hashlib.sha256(f"{seed}/{round_number}/{repeat}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def build_requests(
    rows: Sequence[PromptRow], num_candidates: int, sampling_params: SamplingParams, seed: int, round_number: int
) -> list[GenerationRequest]:
    """One request a row; a seed in the sampling parameters takes the place of the run's.

    Raises:
        ValueError: no rows, no candidates, an empty prompt, or two rows of the same id.
    """
    from ember_ray.engine.request import GenerationRequest

    if not rows:
        raise ValueError("a rollout needs at least one prompt")
    if num_candidates < 1:
        raise ValueError(f"a rollout needs at least one candidate a prompt, not {num_candidates}")
    base = seed if sampling_params.seed is None else sampling_params.seed
    seen_prompts: dict[tuple[int, ...], int] = {}
    seen_ids: set[str] = set()
    requests = []
    for row in rows:
        name, prompt = row.example.id, tuple(row.prompt_token_ids)
        if name in seen_ids:
            raise ValueError(f"two rows of a rollout have the id '{name}'")
        if not prompt:
            raise ValueError(f"the prompt of row '{name}' has no tokens")
        seen_ids.add(name)
        repeat = seen_prompts.get(prompt, 0)
        seen_prompts[prompt] = repeat + 1
        params = dataclasses.replace(sampling_params, seed=request_seed(base, round_number, repeat))
        requests.append(GenerationRequest(name, prompt, tuple(range(num_candidates)), params))
    return requests


class Rollout:
    """State of one rollout: which candidates are missing, which are with the verifiers, which are scored.

    Args:
        round_number: reward functions see it as ``trainer_state.global_step``.
        report: told of every step forward; read by `Coordinator.progress`.
    """

    def __init__(
        self,
        server: PolicyServer,
        pool: VerifierPool,
        rows: Sequence[PromptRow],
        requests: Sequence[GenerationRequest],
        round_number: int,
        report: Callable[[Progress], None],
    ) -> None:
        self._server, self._pool, self._round_number, self._report = server, pool, round_number, report
        self._rows = {row.example.id: row for row in rows}
        self._columns = {name: row.example.reward_columns() for name, row in self._rows.items()}
        self._requests = list(requests)
        self._missing = {(request.request_id, index) for request in requests for index in request.candidate_indices}
        self._total = len(self._missing)
        self._candidates: dict[tuple[str, int], Candidate] = {}
        self._scored: dict[tuple[str, int], ScoredCandidate] = {}
        self._tokens, self._reward_sum, self._reward_count = 0, 0.0, 0
        self._counters: dict[str, float] = {}
        self._aborts: set[str] = set()
        self._next_aborts = 0.0
        self._phase = "generating"
        self._decided_before = len(server.history) - 1
        self.stats = RolloutStats(policy_version=server.official)

    def run(self) -> RolloutResult:
        """Generates and scores everything, across the loss of stages.

        Raises:
            StageLost: the stages were lost too often without a new candidate.
            ValueError: the engine refuses a request.
        """
        begun = time.monotonic()
        recoveries = self._server.recoveries
        try:
            while self._missing:
                try:
                    self._generate()
                except StageLost as lost:
                    self._phase = "recovering"
                    self._tell()
                    self._server.recover(lost)
                    self._phase = "generating"
            generated = time.monotonic()
            self._phase = "verifying"
            while len(self._scored) < self._total:
                self._wait(None)
        except BaseException:
            self._pool.clear()
            raise
        self.stats.seconds = time.monotonic() - begun
        self.stats.seconds_generating = generated - begun
        self.stats.seconds_verifying = self.stats.seconds - self.stats.seconds_generating
        self.stats.candidates = self._total
        self.stats.generated_tokens = self._tokens
        self.stats.verifier_failures = sum(scored.reward is None for scored in self._scored.values())
        self.stats.recoveries = self._server.recoveries - recoveries
        return RolloutResult(self._groups(), self.stats)

    def abort(self, request_id: str) -> None:
        """Ends a request with what it has, also one that has not begun; from any thread."""
        self._aborts.add(request_id)
        self._server.pipeline.abort(request_id)

    def _repeat_aborts(self) -> None:
        """Stages hear nothing before they begin the batch, and what they heard is lost with them."""
        now = time.monotonic()
        if self._aborts and now >= self._next_aborts:
            self._next_aborts = now + ABORT_S
            for request_id in self._aborts & {name for name, _ in self._missing}:
                self._server.pipeline.abort(request_id)

    def _generate(self) -> None:
        """Asks the stages for what is missing, until it has come or they are lost."""
        self._server.begin_batch()
        self._counters = self._server.pipeline.counters()[0]
        batch = self._server.pipeline.begin(self._open_requests())
        next_watch = time.monotonic() + WATCH_S
        try:
            while not batch.done:
                self._wait(batch)
                if time.monotonic() >= next_watch:
                    self._count(batch.watch()[0])
                    next_watch = time.monotonic() + WATCH_S
            self._server.end_batch()
            self._count(self._server.pipeline.counters()[0])
        except StageLost:
            raise
        except BaseException:
            # The stages may be anywhere in the batch; the next call begins with fresh ones.
            self._server.pipeline.stop()
            raise
        if self._missing:
            raise StageLost(f"the stages ended a batch without {len(self._missing)} of its candidates")

    def _open_requests(self) -> list[GenerationRequest]:
        """The requests cut down to their missing candidates."""
        cut = []
        for request in self._requests:
            indices = tuple(
                index for index in request.candidate_indices if (request.request_id, index) in self._missing
            )
            if indices:
                cut.append(dataclasses.replace(request, candidate_indices=indices))
        return cut

    def _wait(self, batch: StageBatch | None) -> None:
        """Waits for the stages and the verifiers, whoever is first, and takes what came."""
        import ray

        waitables = [*(batch.waitables if batch else ()), *self._pool.waitables]
        self._repeat_aborts()
        ready, _ = ray.wait(waitables, num_returns=1, timeout=ABORT_S if self._aborts else 0.5)
        if len(waitables) > 1 and ready:
            ready, _ = ray.wait(waitables, num_returns=len(waitables), timeout=0)
        self._score(self._pool.take(ready))
        self._score(self._pool.late())
        if batch:
            self._accept(batch.take(ready))
        self._tell()

    def _accept(self, candidates: Sequence[Candidate]) -> None:
        """Notes candidates and hands them to the verifiers."""
        items = []
        official = self._server.history[self._decided_before :]  # several only where the policy changed in flight
        for candidate in candidates:
            key = (candidate.request_id, candidate.index)
            made_by = {candidate.policy_version, *(candidate.token_versions or ())}
            if not made_by <= set(official):
                raise RuntimeError(
                    f"candidate {key} was made by policy version {min(made_by - set(official))}, "
                    f"official is {official[-1]}"
                )
            if key not in self._missing:
                raise RuntimeError(f"candidate {key} came twice or was not asked for")
            self._missing.remove(key)
            self._candidates[key] = candidate
            self._tokens += len(candidate.token_ids)
            example = self._rows[candidate.request_id].example
            prompt = example.messages[0]["content"] if example.is_text else example.messages
            columns = self._columns[candidate.request_id]
            items.append(VerifyItem(key, prompt, candidate.text, candidate.token_ids, columns))
        if items:
            self._server.succeeded()
            self._pool.submit(items, self._round_number)

    def _score(self, verdicts: Sequence[Verdict]) -> None:
        from ember_ray.data.scored_group import ScoredCandidate

        for verdict in verdicts:
            self._scored[verdict.key] = ScoredCandidate(
                self._candidates[verdict.key], verdict.reward, verdict.components, verdict.reason
            )
            if verdict.reward is not None:
                self._reward_sum += verdict.reward
                self._reward_count += 1

    def _count(self, counters: dict[str, float]) -> None:
        """Adds what the stages counted since the last look."""
        for name in COUNTED:
            added = int(counters[name] - self._counters[name])
            setattr(self.stats, name, getattr(self.stats, name) + added)
        self._counters = counters

    def _tell(self) -> None:
        self._report(
            Progress(
                phase=self._phase,
                candidates_done=len(self._candidates),
                candidates_total=self._total,
                candidates_scored=len(self._scored),
                generated_tokens=self._tokens,
                reward_mean=self._reward_sum / self._reward_count if self._reward_count else None,
                recoveries=self._server.recoveries,
                policy_version=self._server.official,
            )
        )

    def _groups(self) -> list[ScoredGroup]:
        from ember_ray.data.scored_group import ScoredGroup

        return [
            ScoredGroup(
                request.request_id,
                self._rows[request.request_id].example.messages,
                request.prompt_token_ids,
                [self._scored[request.request_id, index] for index in request.candidate_indices],
            )
            for request in self._requests
        ]
