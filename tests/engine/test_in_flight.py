"""The policy changes in the middle of a batch: every candidate tells what made it, and a direct forward agrees."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from ember_ray.engine.options import EngineOptions
from ember_ray.engine.request import Candidate, GenerationRequest
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.engine.stage_engine import StageEngine
from tests.support.adapters import random_adapter
from tests.support.cuda_double import doubled_engine, put_in_place
from tests.support.direct_forward import DirectForward
from tests.support.qwen3 import make_qwen3, random_prompts
from tests.support.stages import Pipeline

VERSIONS = (1, 2, 3)
TIGHT = {"num_kv_blocks": 20, "block_size": 8, "max_num_seqs": 6, "max_num_batched_tokens": 24}
NARROW = {"num_kv_blocks": 400, "block_size": 8, "max_num_seqs": 1, "max_num_batched_tokens": 24}
ROOMY = {"num_kv_blocks": 400, "block_size": 8, "max_num_seqs": 12, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    make_qwen3(path)
    return path


@pytest.fixture(scope="module")
def direct(folder: Path) -> DirectForward:
    made = DirectForward(folder)
    made.updates = {version: random_adapter(folder, version, seed=version) for version in VERSIONS}
    return made


class Timetable:
    """Which version is switched to at which step with results; stands where the note of other threads is taken."""

    def __init__(self, dice: random.Random) -> None:
        early, late = dice.sample(range(1, 12), 3), dice.sample(range(12, 120), 5)
        self.steps = {step: dice.choice((0, *VERSIONS)) for step in early + late}
        self.taken = 0

    def take(self) -> int:
        self.taken += 1
        return self.steps.get(self.taken, -1)


def batch(dice: random.Random) -> list[GenerationRequest]:
    # of some all blocks are full: nothing has to be computed where they are found
    prompts = random_prompts([16, 32, dice.randint(3, 60), dice.randint(3, 60)], seed=dice.randrange(100))
    prompts.append((*prompts[0], *prompts[1]))  # they share a beginning
    params = SamplingParams(max_tokens=16, seed=dice.randrange(100), ignore_eos=True)
    return [
        GenerationRequest(f"r{n}", prompt, tuple(range(3)), replace(params, max_tokens=dice.randint(4, 16)))
        for n, prompt in enumerate(prompts)
    ]


def check(direct: DirectForward, requests: list[GenerationRequest], made: list[Candidate]) -> int:
    """Gives how many candidates are of several versions."""
    prompts = {request.request_id: request.prompt_token_ids for request in requests}
    assert len(made) == 3 * len(requests)
    for candidate in made:
        prompt, answer = prompts[candidate.request_id], candidate.token_ids
        assert (candidate.spans is None) == (candidate.token_versions is None) == candidate.cache_exact
        if candidate.token_versions:
            assert len(candidate.token_versions) == len(answer)
            assert candidate.policy_version == candidate.token_versions[0]
        spans = candidate.spans or [(0, len(prompt) + len(answer) - 1, candidate.policy_version)]
        wanted = direct.logprobs(prompt, answer, spans)
        assert candidate.logprobs == pytest.approx(wanted, abs=1e-4), (candidate.request_id, candidate.index, spans)
    return sum(candidate.spans is not None for candidate in made)


def hold_all(engines: list[StageEngine], direct: DirectForward) -> None:
    for engine in engines:
        for version in VERSIONS:
            engine.stage_adapter(direct.updates[version])
            engine.commit_adapter(version)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "options"),
    [((3,), TIGHT), ((3,), NARROW), ((1, 2), TIGHT), ((1, 2), ROOMY)],
    ids=["one tight", "one narrow", "two tight", "two roomy"],
)
def test_candidates_are_of_the_mixture_that_they_tell(
    folder: Path, direct: DirectForward, split: tuple[int, ...], options: dict[str, int]
) -> None:
    mixed = 0
    with Pipeline(EngineOptions(str(folder), **options), split) as pipeline:
        hold_all(pipeline.engines, direct)
        for seed in range(2):
            dice = random.Random(seed)
            pipeline.engines[-1]._runner._take_switch = Timetable(dice).take
            requests = batch(dice)
            for _ in range(2):  # the second begins with what the first has left in the cache
                mixed += check(direct, requests, list(pipeline.rollout(requests).values()))
            assert len({engine.policy_version for engine in pipeline.engines}) == 1
            for version in (1, 3):  # nor has a mixture been left where others find it
                for engine in pipeline.engines:
                    engine.commit_adapter(version)
                pipeline.engines[-1]._runner._take_switch = lambda: -1
                assert check(direct, requests, list(pipeline.rollout(requests).values())) == 0
        preempted = pipeline.engines[0].counters()["preemptions"]
    assert mixed > 4
    assert (preempted > 0) == (options is TIGHT)


def test_plans_ahead_are_of_the_version_that_they_were_run_with(
    folder: Path, direct: DirectForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place(monkeypatch)
    engine, runner = doubled_engine(folder, num_scheduler_steps=4, num_kv_blocks=60, max_num_seqs=8)
    hold_all([engine], direct)
    mixed = 0
    for seed in range(4):
        dice = random.Random(seed)
        timetable = Timetable(dice)
        timetable.steps = {step // 4 + 1: version for step, version in timetable.steps.items()}
        runner._take_switch = timetable.take
        requests = batch(dice)
        mixed += check(direct, requests, [one for ended in engine.rollout(requests) for one in ended])
    assert mixed > 10


def test_a_note_without_a_batch_is_taken_back_by_a_commit(folder: Path, direct: DirectForward) -> None:
    with Pipeline(EngineOptions(str(folder), **ROOMY), (3,)) as pipeline:
        (engine,) = pipeline.engines
        hold_all([engine], direct)
        engine.switch_in_flight(1)
        engine.commit_adapter(2)
        requests = batch(random.Random(0))
        assert check(direct, requests, list(pipeline.rollout(requests).values())) == 0
        assert engine.policy_version == 2
        engine.switch_in_flight(1)
        assert check(direct, requests, list(pipeline.rollout(requests).values())) > 0
        assert engine.policy_version == 1


def test_a_prompt_found_under_the_new_version_begins_an_answer_of_it(folder: Path, direct: DirectForward) -> None:
    """Nothing of it has to be computed, and what is kept behind it is of the version before."""
    params = SamplingParams(max_tokens=4, seed=3, ignore_eos=True)
    requests = [GenerationRequest("r", random_prompts([16])[0], (0, 1, 2), params)]
    with Pipeline(EngineOptions(str(folder), **NARROW), (3,)) as pipeline:
        (engine,) = pipeline.engines
        hold_all([engine], direct)
        for version in (1, 2):
            engine.commit_adapter(version)
            if version == 2:
                timetable = Timetable(random.Random(0))
                timetable.steps = {6: 1}
                engine._runner._take_switch = timetable.take
            made = pipeline.rollout(requests)
            check(direct, requests, list(made.values()))
        assert [made["r", index].policy_version for index in range(3)] == [2, 2, 1]
