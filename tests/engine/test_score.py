"""Scoring: log-probabilities of given tokens are those of a plain forward pass, however the rows are packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_ray.engine.llm import LLM
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.engine.scheduler import RequestError
from ember_ray.engine.scorer import ScoreRequest
from tests.support.adapters import random_adapter
from tests.support.qwen3 import all_logits, make_qwen3, random_prompts, stage_model
from tests.support.stages import Pipeline

OPTIONS = {"num_kv_blocks": 200, "max_num_batched_tokens": 64, "max_num_seqs": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    make_qwen3(path)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(EngineOptions(str(folder), **OPTIONS))


def rows_of(seed: int, shapes: list[tuple[int, list[int]]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Rows whose prompts are shared: for each prompt length, answers of the given lengths."""
    rows, lens = [], []
    for number, (prompt_len, answers) in enumerate(shapes):
        (prompt,) = random_prompts([prompt_len], seed=100 * seed + number)
        for answer in random_prompts(answers, seed=100 * seed + number + 50):
            rows.append(prompt + answer)
            lens.append(prompt_len)
    return rows, lens


def expected(folder: Path, rows: list[tuple[int, ...]], lens: list[int], update: Any = None) -> list[torch.Tensor]:
    _, model = stage_model(folder)
    found = []
    for row, first in zip(rows, lens, strict=True):
        logits = all_logits(model, row, update)[first - 1 : -1]
        found.append(logits.log_softmax(-1).gather(-1, torch.tensor(row[first:])[:, None])[:, 0])
    return found


def test_without_sharing_every_prompt_is_computed_on_its_own(folder: Path, llm: LLM) -> None:
    rows, lens = rows_of(4, [(37, [5, 9, 3]), (16, [4])])
    apart = LLM(EngineOptions(str(folder), prefix_sharing=False, **OPTIONS))
    fed: list[int] = []
    forward = apart.engine._scorer._forward
    apart.engine._scorer._forward = lambda inputs: fed.append(len(inputs.token_ids)) or forward(inputs)
    for _ in range(2):
        for mine, shared in zip(apart.score(rows, lens), llm.score(rows, lens), strict=True):
            assert mine == pytest.approx(shared, abs=1e-4)
    assert sum(fed) == 2 * sum(len(row) - 1 for row in rows), "a prompt was shared or found in the cache"
    assert apart.engine.scheduler.pool.num_used == 0


def compare(scores: list[list[float]], wanted: list[torch.Tensor]) -> None:
    assert [len(row) for row in scores] == [len(row) for row in wanted]
    for mine, theirs in zip(scores, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(mine), theirs, rtol=0, atol=1e-4)


SHAPES = st.lists(
    st.tuples(st.integers(1, 70), st.lists(st.integers(1, 40), min_size=1, max_size=4)), min_size=1, max_size=4
)


@settings(max_examples=25, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 20))
def test_scores_are_those_of_a_plain_forward_pass(
    folder: Path, llm: LLM, shapes: list[tuple[int, list[int]]], seed: int
) -> None:
    rows, lens = rows_of(seed, shapes)
    wanted = expected(folder, rows, lens)
    compare(llm.score(rows, lens), wanted)
    assert llm.engine.scheduler.pool.num_used == 0
    compare(llm.score(rows, lens), wanted)  # with what the cache holds by now


def test_a_small_pool_and_one_block_a_pass_give_the_same(folder: Path) -> None:
    rows, lens = rows_of(3, [(50, [30, 1, 40, 2]), (1, [80]), (50, [10])])
    tight = LLM(EngineOptions(str(folder), num_kv_blocks=8, max_num_batched_tokens=16, max_num_seqs=1))
    compare(tight.score(rows, lens), expected(folder, rows, lens))
    assert tight.engine.scheduler.pool.num_used == 0


def test_generated_tokens_score_as_they_were_drawn_and_prompts_come_from_the_cache(folder: Path) -> None:
    llm = LLM(EngineOptions(str(folder), **OPTIONS))
    outputs = llm.generate(random_prompts([33, 48]), 3, SamplingParams(max_tokens=12, seed=1, ignore_eos=True))
    rows = [(*o.prompt_token_ids, *c.token_ids) for o in outputs for c in o.candidates]
    lens = [len(o.prompt_token_ids) for o in outputs for _ in o.candidates]
    computed = 0
    forward = llm.engine._scorer._forward

    def counted(inputs: Any) -> torch.Tensor:
        nonlocal computed
        computed += inputs.token_ids.shape[0]
        return forward(inputs)

    llm.engine._scorer._forward = counted
    scores = llm.score(rows, lens)
    compare(scores, [torch.tensor(c.logprobs) for o in outputs for c in o.candidates])
    # of the prompts only what lies behind the last full block before the last token, once for each prompt
    assert computed == (33 - 32) + (48 - 32) + 6 * 11


def test_scores_are_those_of_the_active_policy(folder: Path) -> None:
    llm = LLM(EngineOptions(str(folder), **OPTIONS))
    rows, lens = rows_of(4, [(20, [9, 9])])
    base = llm.score(rows, lens)
    update = random_adapter(folder)
    llm.publish(update)
    compare(llm.score(rows, lens), expected(folder, rows, lens, update))
    llm.rollback(0)
    compare(llm.score(rows, lens), [torch.tensor(row) for row in base])


def test_two_stages_score_as_one(folder: Path) -> None:
    rows, lens = rows_of(5, [(40, [30, 5]), (7, [3])])
    requests = [ScoreRequest(row, length) for row, length in zip(rows, lens, strict=True)]
    with Pipeline(replace(EngineOptions(str(folder)), **OPTIONS), (1, 2)) as pipeline:
        found: dict[int, list[list[float]]] = {}
        pipeline.each(lambda stage: found.__setitem__(stage, pipeline.engines[stage].score(requests)))
        compare(found[1], expected(folder, rows, lens))
        assert found[0] == [[], [], []]


def test_what_can_never_be_scored_is_refused(llm: LLM) -> None:
    for rows, lens, says in (
        ([(5, 6)], 2, "row 0 to score: prompt_len 2 of 2 tokens leaves nothing"),
        ([(5, 6), (5,)], [1, 1], "row 1 to score"),
        ([(5, 6)], 0, "prompt_len 0"),
        ([(5, 300)], 1, "token id 300 is outside the vocabulary of 300"),
        ([tuple([5] * 513)], 1, "513 tokens, the context holds 512"),
    ):
        with pytest.raises(RequestError, match=says):
            llm.score(rows, lens)
    with pytest.raises(ValueError, match="1 rows to score, but 2 prompt lengths"):
        llm.score([(5, 6)], [1, 1])


def test_a_failed_pass_gives_its_blocks_back_and_leaves_nothing_to_be_found(folder: Path) -> None:
    llm = LLM(EngineOptions(str(folder), **OPTIONS))
    rows, lens = rows_of(6, [(40, [30, 5])])
    forward = llm.engine._scorer._forward

    def failing(inputs: Any) -> torch.Tensor:
        raise RuntimeError("a kernel failed")

    llm.engine._scorer._forward = failing
    with pytest.raises(RuntimeError, match="a kernel failed"):
        llm.score(rows, lens)
    llm.engine._scorer._forward = forward
    assert llm.engine.scheduler.pool.num_used == 0
    compare(llm.score(rows, lens), expected(folder, rows, lens))
