"""The scheduler alone, with made-up tokens: what must hold for any load."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_ray.engine.block_pool import BlockPool
from ember_ray.engine.request import GenerationRequest
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.engine.scheduler import RequestError, Scheduler, StepPlan
from ember_ray.engine.sequence import Sequence

MAX_LEN = 48
VOCAB = 100


@dataclass(frozen=True)
class Load:
    requests: tuple[GenerationRequest, ...]
    block_size: int
    num_blocks: int
    max_num_seqs: int
    budget: int
    lanes: int


@st.composite
def loads(draw: st.DrawFn) -> Load:
    block_size = draw(st.sampled_from([1, 2, 4]))
    stems = [tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=20))) for _ in range(3)]
    requests = []
    for number in range(draw(st.integers(1, 6))):
        prompt = draw(st.sampled_from(stems)) + tuple(draw(st.lists(st.integers(0, 2), max_size=6)))
        params = SamplingParams(max_tokens=draw(st.integers(1, 12)))
        requests.append(GenerationRequest(f"r{number}", prompt, tuple(range(draw(st.integers(1, 4)))), params))
    need = max(
        -(-len(r.prompt_token_ids) // block_size) + -(-r.sampling_params.max_tokens // block_size) for r in requests
    )
    seqs = draw(st.integers(1, 8))
    return Load(
        tuple(requests), block_size, need + draw(st.integers(0, 20)), seqs, seqs + draw(st.integers(0, 30)),
        draw(st.integers(1, 3)),
    )  # fmt: skip


def make(load: Load, **changes: int) -> Scheduler:
    scheduler = Scheduler(
        BlockPool(load.num_blocks),
        load.block_size,
        load.max_num_seqs,
        load.budget,
        MAX_LEN,
        VOCAB,
        load.lanes,
        **changes,
    )
    scheduler.add(load.requests, [0] * len(load.requests), 1)
    return scheduler


@dataclass(frozen=True)
class Model:
    """What the model would draw: a candidate's tokens and where it ends depend on nothing but itself."""

    seed: int

    def token(self, s: Sequence, place: int) -> int:
        return random.Random(f"{self.seed}.{s.request_id}.{s.index}.{place}").randrange(3)

    def code(self, s: Sequence, place: int) -> int:
        draw = random.Random(f"{self.seed}.{s.request_id}.{s.index}.{place}.end").random()
        return 2 if place + 1 >= s.max_tokens else int(draw < 0.1)

    def tokens(self, s: Sequence, count: int) -> tuple[int, ...]:
        return tuple(self.token(s, place) for place in range(count))

    def results(self, s: Sequence, first: int, count: int) -> tuple[list[int], int]:
        """New tokens behind the first ones, up to the end of the candidate, and its finish code."""
        new = []
        for place in range(first, first + count):
            new.append(self.token(s, place))
            if code := self.code(s, place):
                return new, code
        return new, 0


class Memory:
    """What a stage's KV slots would hold: checks that every position that attention reads was written and is right."""

    def __init__(self, load: Load, model: Model) -> None:
        self.size, self.model = load.block_size, model
        self.slots: dict[int, tuple[int, ...]] = {}

    def write(self, table: list[int], place: int, prefix: tuple[int, ...]) -> None:
        self.slots[table[place // self.size] * self.size + place % self.size] = prefix

    def check(self, table: list[int], count: int, tokens: tuple[int, ...], before: int = 0) -> None:
        for place in range(count):
            slot = table[place // self.size] * self.size + place % self.size
            assert self.slots[slot] == tokens[: before + place + 1]

    def run(self, plan: StepPlan) -> int:
        """Does what a forward pass does: all writes, then all reads. Returns the number of prompt tokens computed."""
        for chunk in plan.prompt_chunks:
            for place in range(chunk.first, chunk.last):
                self.write(chunk.group.block_table, place, chunk.group.token_ids[: place + 1])
        counts = dict(zip(map(id, plan.samples), plan.counts, strict=True))
        pieces = [(s, s.num_computed - counts[id(s)], s.num_computed) for s in plan.decodes]
        pieces += [(piece.sequence, piece.first, piece.last) for piece in plan.suffix_chunks]
        for sequence, first, last in pieces:
            tokens = sequence.group.token_ids + self.model.tokens(sequence, last)
            for place in range(first, last):
                self.write(sequence.block_table, place, tokens[: len(sequence.group.token_ids) + place + 1])
        for chunk in plan.prompt_chunks:
            self.check(chunk.group.block_table, chunk.last, chunk.group.token_ids)
        for sequence, _, last in pieces:
            prompt = sequence.group.token_ids
            self.check(sequence.group.block_table, len(prompt), prompt)
            self.check(sequence.block_table, last, prompt + self.model.tokens(sequence, last), len(prompt))
        for piece in plan.suffix_chunks:
            assert piece.last <= len(piece.sequence.token_ids), "a token is fed by the host that it does not know yet"
        return sum(chunk.last - chunk.first for chunk in plan.prompt_chunks)


def drive(
    load: Load, scheduler: Scheduler, seed: int, abort: str | None = None, lookahead: int = 0
) -> tuple[list[str], int]:
    """Runs a load to its end with pseudo-random tokens; returns a log of what happened and prompt tokens computed.

    With a lookahead the results of that many plans are still on the way when the next one is made.
    """
    model = Model(seed)
    memory, log, computed = Memory(load, model), [], 0
    in_flight: dict[int, list[tuple[StepPlan, list[tuple[list[int], int]]]]] = {n: [] for n in range(load.lanes)}

    def finish(lane: int) -> None:
        plan, results = in_flight[lane].pop(0)
        ended = scheduler.finish_step(plan, [new for new, _ in results], [code for _, code in results])
        if abort is not None and len(log) > 3:
            ended += scheduler.abort(int(abort[1:]))
        log.extend(f"{s.request_id}.{s.index} {s.token_ids} {s.finish_code}" for s in ended)

    for _ in range(5000):
        moved = False
        for lane in range(load.lanes):
            while len(in_flight[lane]) > lookahead:
                moved = True
                finish(lane)
            plan = scheduler.schedule(lane)
            assert plan.num_steps > 1 or plan.num_tokens <= load.budget
            assert plan.num_steps == 1 or not (plan.prompt_chunks or plan.suffix_chunks)
            assert scheduler.mixed or not (plan.decodes and (plan.prompt_chunks or plan.suffix_chunks))
            assert sum(map(len, scheduler.running)) <= max(load.max_num_seqs, load.lanes)
            slots = [s.slot for lane_seqs in scheduler.running for s in lane_seqs]
            assert len(set(slots)) == len(slots) and min(slots, default=0) >= 0
            if not plan.is_empty:
                moved = True
                computed += memory.run(plan)
                results = [
                    model.results(s, s.num_tokens - count, count)
                    for s, count in zip(plan.samples, plan.counts, strict=True)
                ]
                in_flight[lane].append((plan, results))
                log.append(f"{lane} {[(s.request_id, s.index) for s in plan.samples]} {plan.num_tokens}")
            elif in_flight[lane]:
                moved = True
                finish(lane)
        if not (scheduler.has_work or any(in_flight.values())):
            return log, computed
        assert moved, "the scheduler stands still"
    raise AssertionError("the scheduler does not come to an end")


def endings(log: list[str]) -> list[str]:
    return sorted(line for line in log if line.startswith("r"))


@settings(max_examples=300, deadline=None)
@given(load=loads(), seed=st.integers(0, 99))
def test_every_candidate_ends_once_with_its_own_tokens_from_right_blocks(load: Load, seed: int) -> None:
    scheduler = make(load)
    log, computed = drive(load, scheduler, seed)
    expected = sorted(f"{r.request_id}.{index}" for r in load.requests for index in r.candidate_indices)
    assert [line.split()[0] for line in endings(log)] == expected
    assert scheduler.pool.num_used == 0
    # what was computed and what was found add up to the prompts of all candidates
    recomputed_prompts = computed - (
        sum(len(r.prompt_token_ids) * len(r.candidate_indices) for r in load.requests) - scheduler.prefix_hit_tokens
    )
    assert recomputed_prompts >= 0
    if scheduler.preemptions == 0 and load.budget >= MAX_LEN + load.max_num_seqs:
        assert scheduler.recomputed_tokens == 0
    # the load decides when, not what
    roomy = Load(load.requests, load.block_size, 10_000, 100, 10_000, 1)
    assert endings(drive(roomy, make(roomy, prefix_sharing=False), seed)[0]) == endings(log)


@settings(max_examples=400, deadline=None)
@given(load=loads(), seed=st.integers(0, 99), steps=st.integers(1, 5), lookahead=st.integers(0, 2))
def test_what_is_planned_ahead_of_the_results_ends_the_same(load: Load, seed: int, steps: int, lookahead: int) -> None:
    """Prompts apart from decodes, several steps in a plan, results that come plans later."""
    scheduler = make(load, num_scheduler_steps=steps, mixed=False)
    log, computed = drive(load, scheduler, seed, lookahead=lookahead)
    roomy = Load(load.requests, load.block_size, 10_000, 100, 10_000, 1)
    assert endings(drive(roomy, make(roomy), seed)[0]) == endings(log)
    assert scheduler.pool.num_used == 0
    again = drive(load, make(load, num_scheduler_steps=steps, mixed=False), seed, lookahead=lookahead)
    assert again == (log, computed)
    aborted, _ = drive(load, make(load, num_scheduler_steps=steps, mixed=False), seed, abort="r0", lookahead=lookahead)
    others = {line for line in endings(aborted) if not line.startswith("r0")}
    assert others == {line for line in endings(log) if not line.startswith("r0")}


@settings(max_examples=100, deadline=None)
@given(load=loads(), seed=st.integers(0, 99))
def test_two_copies_make_the_same_plans(load: Load, seed: int) -> None:
    assert drive(load, make(load), seed)[0] == drive(load, make(load), seed)[0]


@settings(max_examples=100, deadline=None)
@given(load=loads(), seed=st.integers(0, 99))
def test_an_abort_ends_its_request_and_no_other(load: Load, seed: int) -> None:
    scheduler = make(load)
    log, _ = drive(load, scheduler, seed, abort="r0")
    undisturbed = set(endings(drive(load, make(load), seed)[0]))
    ended = endings(log)
    assert len(ended) == len(undisturbed) and scheduler.pool.num_used == 0
    assert {line for line in ended if not line.startswith("r0")} == {u for u in undisturbed if not u.startswith("r0")}


def request(prompt: int, answer: int, name: str = "a") -> GenerationRequest:
    return GenerationRequest(name, tuple(range(prompt)), (0,), SamplingParams(max_tokens=answer))


def test_equal_prompts_of_different_requests_are_computed_once() -> None:
    load = Load((request(10, 3), request(10, 5, "b")), 4, 50, 8, 100, 1)
    scheduler = make(load)
    _, computed = drive(load, scheduler, 0)
    assert computed == 10 and scheduler.prefix_hit_tokens == 10


@pytest.mark.parametrize("prompt", [3, 8, 10])
def test_candidates_that_come_when_all_others_have_gone_need_no_second_pass(prompt: int) -> None:
    """Two at a time, each wave of the same length, so that between waves nobody holds the prompt's blocks."""
    params = SamplingParams(max_tokens=1)
    load = Load((GenerationRequest("r0", tuple(range(prompt)), tuple(range(7)), params),), 4, 50, 2, 100, 1)
    scheduler = make(load)
    _, computed = drive(load, scheduler, 0)
    assert computed == prompt and scheduler.prefix_hit_tokens == 6 * prompt


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([request(0, 1)], "no tokens"),
        ([request(48, 1)], "48 tokens, the context holds 48"),
        ([request(40, 4)], "need 11 KV blocks of 4, the engine has 10"),
        ([request(4, 4), request(5, 4)], "'a' is in the batch twice"),
        ([GenerationRequest("a", (1, 100), (0,), SamplingParams())], "token id 100 is outside .* vocabulary of 100"),
        ([GenerationRequest("a", (1, -1), (0,), SamplingParams())], "token id -1 is outside"),
        ([GenerationRequest("a", (1,), (0, 2, 0), SamplingParams())], r"must be different .* not \[0, 2, 0\]"),
        ([GenerationRequest("a", (1,), (-1,), SamplingParams())], "at least 0"),
        ([GenerationRequest("a", (1,), (2**31,), SamplingParams())], r"below 2\*\*31"),
    ],
)
def test_what_can_never_be_served_is_refused_whole(bad: list[GenerationRequest], says: str) -> None:
    scheduler = Scheduler(BlockPool(10), 4, 8, 100, MAX_LEN, VOCAB)
    with pytest.raises(RequestError, match=says):
        scheduler.add([request(4, 4, "good"), *bad], [0] * (1 + len(bad)), 0)
    assert not scheduler.has_work
