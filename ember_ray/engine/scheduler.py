"""Decides what each step computes. Pure logic: no tensors, no clock, no randomness.

Every stage runs its own copy on the same requests and the same results, and so comes to the same plans; no
schedule travels. The steps of a stage run in the order in which they were planned, so a block counts as computed
as soon as the step that computes it is planned.

Where a device works through steps without waiting for the host, a plan may hold several decode steps, and the next
plan is made before the results of the last one are known (``num_pending`` of a sequence). What is planned then
depends on how late results are by count, never on when they came.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from ember_ray.engine.block_pool import BlockPool
from ember_ray.engine.request import GenerationRequest
from ember_ray.engine.sequence import ABORT, PromptGroup, Sequence

_ORDER = attrgetter("order")


class RequestError(ValueError):
    """A request that the engine can never serve; the text gives the numbers."""


def extremes(token_ids: Seq[int]) -> tuple[int, int]:
    """The smallest and the largest; by way of an array, which takes a third of the time for long prompts."""
    try:
        tokens = np.frombuffer(array("q", token_ids), dtype=np.int64)
    except OverflowError:  # beyond 64 bits
        return min(token_ids), max(token_ids)
    return int(tokens.min()), int(tokens.max())


@dataclass(frozen=True)
class PromptChunk:
    """Prompt tokens first to last - 1 of a group."""

    group: PromptGroup
    first: int
    last: int


@dataclass(frozen=True)
class SuffixChunk:
    """Generated tokens first to last - 1 of a candidate whose blocks were taken away and are made anew."""

    sequence: Sequence
    first: int
    last: int


@dataclass
class StepPlan:
    """One forward pass of one micro-batch, or several decode steps of it.

    Attributes:
        decodes: candidates that feed their newest token, ordered by group.
        samples: candidates that get new tokens, in the order of the results: the decodes, then the suffix chunks
            that reach their end, then first tokens behind a prompt.
        num_steps: decode steps; above 1 nothing but decodes is planned.
        counts: how many tokens each sample gets at most.
        needs_results: nothing was planned, because the results of plans in flight have to be taken first.
    """

    lane: int
    decodes: list[Sequence] = field(default_factory=list)
    prompt_chunks: list[PromptChunk] = field(default_factory=list)
    suffix_chunks: list[SuffixChunk] = field(default_factory=list)
    samples: list[Sequence] = field(default_factory=list)
    num_steps: int = 1
    counts: list[int] = field(default_factory=list)
    needs_results: bool = False

    @property
    def num_tokens(self) -> int:
        prompts = sum(chunk.last - chunk.first for chunk in self.prompt_chunks)
        return len(self.decodes) + prompts + sum(chunk.last - chunk.first for chunk in self.suffix_chunks)

    @property
    def is_empty(self) -> bool:
        return not self.samples and self.num_tokens == 0


class Scheduler:
    """Continuous batching over micro-batches that share one block pool.

    Args:
        pool: this stage's KV blocks.
        max_num_seqs: most candidates admitted at once, shared out evenly among the lanes; one a lane at least.
        max_num_batched_tokens: most tokens in a step.
        max_model_len: most tokens of prompt and answer together.
        vocab_size: token ids of prompts are below it.
        num_lanes: micro-batches in flight; a prompt's candidates all run in one.
        num_scheduler_steps: most decode steps in a plan.
        mixed: decodes and prompts share a forward pass; False plans prompts first and decodes apart.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
        num_lanes: int = 1,
        prefix_sharing: bool = True,
        num_scheduler_steps: int = 1,
        mixed: bool = True,
    ) -> None:
        if mixed and num_scheduler_steps > 1:
            raise ValueError("several decode steps in a plan need prompts planned apart")
        self.pool, self.block_size, self.num_lanes = pool, block_size, num_lanes
        self.max_num_batched_tokens, self.max_model_len = max_num_batched_tokens, max_model_len
        self.max_lane_seqs = max(1, max_num_seqs // num_lanes)
        self.prefix_sharing, self.vocab_size = prefix_sharing, vocab_size
        self.num_scheduler_steps, self.mixed = num_scheduler_steps, mixed
        self._free_slots = list(range(self.max_lane_seqs * num_lanes))[::-1]
        self.running: list[list[Sequence]] = [[] for _ in range(num_lanes)]
        self.waiting: list[list[Sequence]] = [[] for _ in range(num_lanes)]
        self._by_request: dict[int, list[Sequence]] = {}
        self._version = 0
        self.prefix_hit_tokens = 0
        self.recomputed_tokens = 0
        self.preemptions = 0

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    # -- what comes in ---------------------------------------------------------------------------------------------

    def check(self, request: GenerationRequest) -> None:
        """Raises RequestError where the request can never be served."""
        length, name = len(request.prompt_token_ids), f"request '{request.request_id}'"
        if length == 0:
            raise RequestError(f"{name}: the prompt has no tokens")
        for token in extremes(request.prompt_token_ids):
            if not 0 <= token < self.vocab_size:
                raise RequestError(f"{name}: token id {token} is outside the model's vocabulary of {self.vocab_size}")
        indices = request.candidate_indices
        if len(set(indices)) != len(indices) or any(not 0 <= index < 2**31 for index in indices):
            raise RequestError(
                f"{name}: candidate indices must be different and at least 0 and below 2**31, not {list(indices)}"
            )
        if length >= self.max_model_len:
            raise RequestError(
                f"{name}: the prompt has {length} tokens, the context holds {self.max_model_len} with the answer"
            )
        answer = min(request.sampling_params.max_tokens, self.max_model_len - length)
        need = self.blocks_for(length) + self.blocks_for(answer)
        if need > self.pool.num_blocks:
            raise RequestError(
                f"{name}: {length} prompt and {answer} answer tokens need {need} KV blocks of {self.block_size}, "
                f"the engine has {self.pool.num_blocks}; raise num_kv_blocks"
            )

    def add(self, requests: Seq[GenerationRequest], seeds: Seq[int], policy_version: int) -> None:
        """Takes a batch. Requests with equal prompts join one group, so their prompt is computed once.

        Args:
            seeds: one a request.

        Raises:
            RequestError: a request that can never be served; nothing of the batch is taken then.
        """
        names = [request.request_id for request in requests]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RequestError(f"request id '{twice}' is in the batch twice")
        for request in requests:
            self.check(request)
        self._version = policy_version
        groups: list[PromptGroup] = []
        by_prompt: dict[tuple[int, ...], PromptGroup] = {}
        for number, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
            prompt, params = request.prompt_token_ids, request.sampling_params
            # looked up once a request: hashing a long prompt takes a while
            group = by_prompt.get(prompt) if self.prefix_sharing else None
            max_tokens = min(params.max_tokens, self.max_model_len - len(prompt))
            for index in request.candidate_indices:
                if group is None or not self.prefix_sharing:
                    lane = len(groups) % self.num_lanes
                    group = PromptGroup(
                        prompt, len(groups), self.block_size, policy_version, self.prefix_sharing, lane=lane
                    )
                    groups.append(group)
                    if self.prefix_sharing:
                        by_prompt[prompt] = group
                group.candidates.append(Sequence(group, number, request.request_id, index, 0, params, seed, max_tokens))
        order = 0
        for group in groups:
            for sequence in group.candidates:
                sequence.order = order
                order += 1
                self.waiting[group.lane].append(sequence)
                self._by_request.setdefault(sequence.request_number, []).append(sequence)

    def abort(self, request_number: int) -> list[Sequence]:
        """Ends the unfinished candidates of a request with what they have; returns them."""
        ended = [sequence for sequence in self._by_request.get(request_number, ()) if not sequence.finish_code]
        for sequence in ended:
            sequence.finish_code = ABORT
            lane = sequence.group.lane
            if sequence in self.running[lane]:
                self._leave(sequence)
            else:
                self.waiting[lane].remove(sequence)
        return ended

    def switch(self, policy_version: int) -> None:
        """Plans from here on are computed under another policy: nothing of the one before is found or shared any more,
        and what has been computed stays in use."""
        for sequence in (sequence for lane in self.running for sequence in lane):
            sequence.close_span(self._version)
        unfinished = (sequence for lanes in (self.running, self.waiting) for lane in lanes for sequence in lane)
        for group in {id(sequence.group): sequence.group for sequence in unfinished}.values():
            if group.num_computed:
                group.mix()
            else:
                group.restart(policy_version)
        self._version = policy_version

    def clear(self) -> None:
        """Drops all that is unfinished and gives its blocks back."""
        for lane in range(self.num_lanes):
            while self.running[lane]:
                self._leave(self.running[lane][-1])
            self.waiting[lane].clear()
        self._by_request.clear()

    @property
    def has_work(self) -> bool:
        return any(self.running) or any(self.waiting)

    # -- a step ----------------------------------------------------------------------------------------------------

    def schedule(self, lane: int) -> StepPlan:
        """Plans the next step of a lane; empty when it has to wait for results or for other lanes."""
        plan = StepPlan(lane)
        if self._must_wait(lane):
            plan.needs_results = True
            return plan
        budget = self.max_num_batched_tokens
        if self.mixed:
            budget = self._plan_decodes(plan, budget)
        budget = self._plan_suffixes(plan, budget)
        budget = self._plan_prompts(plan, budget)
        budget = self._admit(plan, budget)
        self._plan_suffixes(plan, budget)  # of those that have just come back
        late = [
            *(chunk.sequence for chunk in plan.suffix_chunks if chunk.last == chunk.sequence.num_tokens),
            *(s for s in self.running[lane] if not s.num_tokens and s.group.prompt_done),
        ]
        if not self.mixed and not late and plan.num_tokens == 0:
            if self._must_wait(lane):  # those just admitted took blocks
                plan.needs_results = True
                return plan
            self._plan_decodes(plan, budget)
        plan.samples = [*plan.decodes, *late]
        plan.counts += [1] * len(late)
        for sequence in late:
            sequence.num_pending += 1
        for sequence in plan.samples:
            sequence.group.has_last_hidden = True
        return plan

    def finish_step(self, plan: StepPlan, tokens: Seq[Seq[int]], finish_codes: Seq[int]) -> list[Sequence]:
        """Takes the results of a plan; returns the candidates that ended.

        Args:
            tokens: for each sample its new tokens, as many as planned or fewer where it ended.
            finish_codes: of each sample, behind its last new token; 0 goes on.
        """
        ended = []
        for sequence, new, code, count in zip(plan.samples, tokens, finish_codes, plan.counts, strict=True):
            sequence.num_pending -= count
            if sequence.finish_code:  # it ended, or was aborted, while this was on the way
                continue
            sequence.token_ids.extend(new)
            if code:
                sequence.finish_code = code
                self._leave(sequence)
                ended.append(sequence)
        return ended

    def _must_wait(self, lane: int) -> bool:
        """Whether blocks run short while results are on the way: they may free some, and a victim needs its tokens."""
        running = self.running[lane]
        if not any(sequence.num_pending for sequence in running):
            return False
        steps = self._num_steps(running)
        need = sum(
            max(0, self.blocks_for(min(s.num_tokens + steps - 1, s.max_tokens)) - len(s.block_table)) for s in running
        )
        return need > self.pool.num_free

    def _num_steps(self, running: Seq[Sequence]) -> int:
        left = max((s.max_tokens - s.num_tokens for s in running if s.num_tokens), default=0)
        return max(1, min(self.num_scheduler_steps, left))

    def _plan_decodes(self, plan: StepPlan, budget: int) -> int:
        running = self.running[plan.lane]
        plan.num_steps = self._num_steps(running)
        for sequence in list(running):
            if sequence.order > running[-1].order:  # preempted: victims leave from the end
                break
            length = sequence.num_tokens
            count = min(plan.num_steps, sequence.max_tokens - length)
            if not length or not count:  # has no token to feed, or all it may have are on the way
                continue
            # most need no new block: this loop is what a step costs the host
            if self.blocks_for(length + count - 1) > len(sequence.block_table):
                if not self._grow(sequence, length + count - 1):
                    break
            if length - sequence.num_computed == 1 and sequence.group.prompt_done:
                plan.decodes.append(sequence)
                plan.counts.append(count)
                sequence.num_computed += count
                sequence.num_pending += count
                budget -= 1
        return budget

    def _plan_suffixes(self, plan: StepPlan, budget: int) -> int:
        """Makes anew what a preemption took away."""
        for sequence in self.running[plan.lane]:
            # what it feeds next is no suffix: a decode takes that
            first, length = sequence.num_computed, len(sequence.token_ids)
            if first >= length or budget <= 0 or not sequence.group.prompt_done:
                continue
            last = min(length, first + budget)
            if not sequence.num_pending and not self._decodes(sequence):
                plan.suffix_chunks.append(SuffixChunk(sequence, first, last))
                sequence.num_computed = last
                self.recomputed_tokens += last - first
                budget -= last - first
        return budget

    def _decodes(self, sequence: Sequence) -> bool:
        """Whether it goes on by a decode in a plan of its own."""
        return not self.mixed and sequence.num_tokens - sequence.num_computed == 1

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Gives the candidate blocks for its tokens, preempting the latest of its lane; False if that was itself."""
        need = self.blocks_for(length) - len(sequence.block_table)
        while need > self.pool.num_free:
            victim = self.running[sequence.group.lane][-1]
            self._leave(victim)
            insort(self.waiting[sequence.group.lane], victim, key=_ORDER)
            self.preemptions += 1
            if victim is sequence:
                return False
        sequence.block_table.extend(self.pool.allocate(max(0, need)))
        return True

    def _plan_prompts(self, plan: StepPlan, budget: int) -> int:
        group: PromptGroup | None = None
        for sequence in self.running[plan.lane]:
            if sequence.group is not group:
                group = sequence.group
                budget -= self._plan_prompt(plan, group, budget)
        return budget

    def _plan_prompt(self, plan: StepPlan, group: PromptGroup, budget: int) -> int:
        """Plans as much of the prompt as the budget allows; returns how many tokens that is."""
        first = group.num_computed
        last = min(len(group.token_ids), first + budget)
        if last <= first:
            return 0
        plan.prompt_chunks.append(PromptChunk(group, first, last))
        if group.was_computed:
            self.recomputed_tokens += last - first
        group.num_computed = last
        group.was_computed = group.was_computed or group.prompt_done
        done = len(group.keys) if group.prompt_done else last // self.block_size
        for place in range(first // self.block_size, min(done, len(group.keys))):
            self.pool.publish(group.block_table[place], group.keys[place])
        return last - first

    def _admit(self, plan: StepPlan, budget: int) -> int:
        """Lets waiting candidates in, in order, as far as places, tokens and blocks go."""
        running, waiting = self.running[plan.lane], self.waiting[plan.lane]
        while waiting and len(running) < self.max_lane_seqs:
            sequence = waiting[0]
            group, length = sequence.group, len(sequence.group.token_ids)
            own = self.blocks_for(max(1, len(sequence.token_ids)))
            # prompts come before decodes there, and must leave them room to grow
            spare = 0 if self.mixed else len(running)
            hit_tokens = length
            if group.num_admitted == 0:
                # without the hidden state behind it, the last token has to be computed again
                usable = len(group.keys) if group.has_last_hidden else (length - 1) // self.block_size
                found = self.pool.lookup(group.keys[:usable])
                hit_tokens = min(length, len(found) * self.block_size)
                if budget == 0 and hit_tokens < length:
                    break
                fresh = self.blocks_for(length) - len(found)
                if fresh + own + spare + sum(map(self.pool.is_free, found)) > self.pool.num_free:
                    break
                self.pool.hold(found)
                group.block_table = found + self.pool.allocate(fresh)
                group.num_computed = hit_tokens
            elif own + spare > self.pool.num_free:
                break
            if not sequence.was_admitted:
                sequence.was_admitted = True
                self.prefix_hit_tokens += hit_tokens
            sequence.block_table = self.pool.allocate(own)
            sequence.slot = self._free_slots.pop()
            group.num_admitted += 1
            insort(running, waiting.pop(0), key=_ORDER)
            budget -= self._plan_prompt(plan, group, budget)
        return budget

    def _leave(self, sequence: Sequence) -> None:
        """Takes a candidate out of its lane and gives its blocks back; the prompt's with the last of its group."""
        group = sequence.group
        sequence.close_span(self._version)
        sequence.num_spanned, sequence.has_prompt_spans = 0, False
        self.running[group.lane].remove(sequence)
        self.pool.release(sequence.block_table)
        sequence.block_table, sequence.num_computed = [], 0
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        group.num_admitted -= 1
        if group.num_admitted == 0:
            self.pool.release(group.block_table)
            group.block_table, group.num_computed = [], 0
            group.spans, group.num_spanned = [], 0
            if group.policy_version != self._version:
                group.restart(self._version)
