"""The host side of the CUDA runner on a CPU, against the eager runner: graphs, plans ahead, slots, failures."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cuda_ext.decode_groups import ITEM_QUERY_ROWS
from ember_ray.engine.decode_buffers import DecodeBuffers
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.request import Candidate, GenerationRequest
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.engine.sequence import PromptGroup, Sequence
from ember_ray.engine.stage_engine import StageEngine
from ember_ray.engine.transport import LoopbackTransport
from ember_ray.model.qwen3_config import ModelError
from tests.support.adapters import random_adapter
from tests.support.cuda_double import doubled_engine, put_in_place
from tests.support.qwen3 import make_qwen3, random_prompts

PARAMS = [
    SamplingParams(max_tokens=14, seed=3),
    SamplingParams(max_tokens=11, seed=3, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01),
    SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True),
]

LENGTHS = [5, 37, 16, 16, 17, 50]

Found = dict[tuple[str, int], tuple[list[int], str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    make_qwen3(path)
    return path


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


def requests(count: int = 3, lengths: Seq[int] = LENGTHS, **changes: Any) -> list[GenerationRequest]:
    return [
        GenerationRequest(f"r{n}", p, tuple(range(count)), replace(PARAMS[n % len(PARAMS)], **changes))
        for n, p in enumerate(random_prompts(list(lengths)))
    ]


def host_engine(folder: Path) -> StageEngine:
    options = EngineOptions(str(folder), num_kv_blocks=400, max_num_seqs=64, max_num_batched_tokens=256)
    return StageEngine(options, 0, LoopbackTransport())


def rollout(engine: StageEngine, batch: list[GenerationRequest]) -> Found:
    made: list[Candidate] = [candidate for ended in engine.rollout(batch) for candidate in ended]
    for c in made:
        assert len(c.token_ids) == len(c.logprobs) == len(c.sampling_logprobs)
    found = {(c.request_id, c.index): (c.token_ids, c.finish_reason, c.text) for c in made}
    assert len(found) == len(made) == sum(len(request.candidate_indices) for request in batch)
    assert engine.scheduler.pool.num_used == 0
    return found


TIGHT = {"block_size": 4, "num_kv_blocks": 40, "max_num_seqs": 9, "max_num_batched_tokens": 16}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"num_scheduler_steps": 1},
        {"num_scheduler_steps": 7, "prefix_sharing": False},
        TIGHT,
        TIGHT | {"num_scheduler_steps": 1},
        TIGHT | {"micro_batches": 3, "num_scheduler_steps": 2},
        {"max_num_seqs": 1, "max_num_batched_tokens": 8},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_eager_runner(folder: Path, options: dict[str, Any]) -> None:
    host, (device, _) = host_engine(folder), doubled_engine(folder, **options)
    some = tuple(token for token in range(2, 258, 25))
    for changes in (
        {},
        {"max_tokens": 1},
        {"stop_token_ids": some[:3]},
        {"stop_token_ids": some},
        {"stop": ("a", "é")},
    ):
        batch = requests(**changes)
        expected = rollout(host, batch)
        assert rollout(device, batch) == expected, changes
        assert rollout(device, batch) == expected, f"{changes}, with what is cached"
    if "num_kv_blocks" in options:
        assert device.counters()["preemptions"] > 0


def test_graphs_are_made_anew_where_the_buffers_grew(folder: Path) -> None:
    host, (device, runner) = host_engine(folder), doubled_engine(folder, block_size=1, max_num_seqs=2)
    expected = []
    captures = [0]
    for length in (5, 100, 250, 5):  # there is room for 64 prompt blocks a row at first, then for twice what was needed
        batch = requests(2, [length])
        expected.append(rollout(host, batch))
        assert rollout(device, batch) == expected[-1]
        captures.append(len(runner.captures))
    assert captures[0] < captures[1] <= captures[2] < captures[3] == captures[4]


def test_graphs_serve_adapters_of_all_shapes_in_any_order(folder: Path) -> None:
    host, (device, _) = host_engine(folder), doubled_engine(folder)
    batch = requests(temperature=0.0)
    for version, rank in enumerate((4, 6, 4, 0, 8, 6, 0, 4), start=1):
        for engine in (host, device):
            if rank:
                engine.stage_adapter(random_adapter(folder, version, seed=version, rank=rank))
            engine.commit_adapter(version if rank else 0)
        assert rollout(device, batch) == rollout(host, batch), f"version {version} of rank {rank}"


@pytest.mark.parametrize("share", [3, 5, 6, 7])
def test_any_number_of_query_heads_may_share_a_kv_head(share: int) -> None:
    buffers = DecodeBuffers(64, 16, share, "cpu")
    group = PromptGroup((5, 6), 0, 16, 0, False, block_table=[0])
    for count in range(1, 65):
        rows = [
            Sequence(group, 0, "r", n, n, PARAMS[0], 0, 14, block_table=[n + 1], num_computed=1) for n in range(count)
        ]
        buffers.prepare(rows, [1] * count)
        buffers.fill({"slot": np.arange(count, dtype=np.int32)})
        groups = buffers.groups
        items = groups.items[: int(groups.num_items)]
        assert int(items[:, 1].max()) * share <= ITEM_QUERY_ROWS, "more query rows than the kernel takes"
        assert groups.heads_per_kv_head == share and int(items[:, 1].sum()) == count


def test_a_row_finds_no_counts_of_the_one_that_ended_there() -> None:
    buffers = DecodeBuffers(8, 16, 2, "cpu")
    group = PromptGroup((5, 6), 0, 16, 0, False, block_table=[0])
    row = Sequence(group, 0, "r", 0, 0, PARAMS[0], 0, 14, block_table=[1], num_computed=1)
    assert buffers.groups.arrivals.numel(), "an engine of few rows counts"
    buffers.groups.arrivals.fill_(1)
    buffers.prepare([row], [1])
    buffers.fill({"slot": np.zeros(1, np.int32)})
    assert not buffers.groups.arrivals.any()
    buffers.groups.arrivals.fill_(1)
    buffers.clear()
    assert not buffers.groups.arrivals.any()


def fail_at(engine: StageEngine, runner: Any, step: int, fault: BaseException) -> Any:
    """Makes the runner fail behind so many plans; returns what undoes it."""
    run, seen = runner.run, []

    def failing(plan: Any) -> Any:
        seen.append(plan)
        pending = run(plan)
        if len(seen) == step:
            raise fault
        return pending

    runner.run = failing
    return lambda: setattr(runner, "run", run)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 7])
def test_after_a_failure_in_the_middle_the_engine_serves_as_before(folder: Path, step: int) -> None:
    device, runner = doubled_engine(folder, **TIGHT)
    batch, others = requests(), requests(2, [50, 20, 16], seed=8)
    expected = rollout(device, batch), rollout(device, others)
    device, runner = doubled_engine(folder, **TIGHT)
    for fault in (KeyboardInterrupt(), RuntimeError("out of memory")):
        undo = fail_at(device, runner, step, fault)
        with pytest.raises(type(fault)):
            rollout(device, batch)
        undo()
        assert device.scheduler.pool.num_used == 0 and not device.scheduler.has_work
        assert rollout(device, others) == expected[1]
        assert rollout(device, batch) == expected[0]
    running = device.rollout(batch)
    next(running)
    running.close()
    assert rollout(device, others) == expected[1]


def test_an_interrupt_while_a_rollout_ends_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = doubled_engine(folder)
    expected = rollout(doubled_engine(folder)[0], requests(2, [20], seed=8))

    def interrupted() -> None:
        raise KeyboardInterrupt

    running = device.rollout(requests(2, [50], ignore_eos=True))
    next(running)
    with monkeypatch.context() as now, pytest.raises(KeyboardInterrupt):
        now.setattr(torch.cuda, "synchronize", interrupted)
        running.close()
    assert rollout(device, requests(2, [20], seed=8)) == expected
    device.stage_adapter(random_adapter(folder))
    device.commit_adapter(1)


def test_logits_that_are_not_finite_give_the_batch_up_and_no_other(folder: Path) -> None:
    device, _ = doubled_engine(folder)
    expected = rollout(device, requests())
    for name in ("good", "bad"):
        update = random_adapter(folder, 1 if name == "good" else 2)
        if name == "bad":
            for key in update.tensors:
                update.tensors[key].mul_(1e30)
        device.stage_adapter(update)
        device.commit_adapter(update.version)
        if name == "good":
            adapted = rollout(device, requests())
            continue
        with pytest.raises(ModelError, match="policy version 2 gives logits that are not finite"):
            rollout(device, requests())
    device.commit_adapter(1)
    assert rollout(device, requests()) == adapted
    device.commit_adapter(0)
    assert rollout(device, requests()) == expected


def test_stop_ids_beyond_the_vocabulary_stop_nothing(folder: Path) -> None:
    host, (device, _) = host_engine(folder), doubled_engine(folder)
    batch = requests(stop_token_ids=(-1, -7, 300, 2**31, 2**70))
    assert rollout(device, batch) == rollout(host, batch)


def test_aborts_end_their_request_with_plans_in_flight(folder: Path) -> None:
    device, _ = doubled_engine(folder, **TIGHT | {"num_scheduler_steps": 3})
    batch = requests(ignore_eos=True)
    expected = rollout(device, batch)
    for name in ("r0", "r2", "r5"):
        found: Found = {}
        for ended in device.rollout(batch):
            device.abort(name)
            found |= {(c.request_id, c.index): (c.token_ids, c.finish_reason, c.text) for c in ended}
        assert found.keys() == expected.keys() and device.scheduler.pool.num_used == 0
        assert all(found[key] == expected[key] for key in found if key[0] != name)
        for (request_id, index), (token_ids, reason, _) in found.items():
            if request_id == name and reason == "abort":
                assert token_ids == expected[request_id, index][0][: len(token_ids)]
