"""Several stages over the real transport make what one stage makes."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ember_ray.engine.kv_memory import KvMemoryError, agreed_kv_blocks
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.request import GenerationRequest
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.engine.scheduler import RequestError
from ember_ray.engine.stage_engine import StageEngine
from ember_ray.engine.transport import LoopbackTransport, ProcessGroupTransport, TransportError
from ember_ray.model.lora import AdapterUpdate, load_peft_adapter
from tests.support.peft_adapters import make_adapter
from tests.support.qwen3 import make_qwen3, random_prompts
from tests.support.stages import Pipeline, free_port

PARAMS = SamplingParams(max_tokens=24, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    make_qwen3(path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> AdapterUpdate:
    model, path = tmp_path_factory.mktemp("qwen3"), tmp_path_factory.mktemp("adapter")
    make_adapter(make_qwen3(model), path, r=4, lora_alpha=8, target_modules="all-linear")
    return load_peft_adapter(path, 1)


def requests(count: int = 7, params: SamplingParams = PARAMS) -> list[GenerationRequest]:
    lengths = [5, 37, 64, 16, 16, 17, 90][:count]
    return [GenerationRequest(f"r{n}", p, (0, 1, 2, 3), params) for n, p in enumerate(random_prompts(lengths))]


@pytest.fixture(scope="module")
def expected(folder: Path, adapter: AdapterUpdate) -> list[dict[tuple[str, int], list[int]]]:
    """Tokens of one stage under the base model and under the adapter."""
    with Pipeline(EngineOptions(str(folder)), (3,)) as pipeline:
        base = pipeline.rollout(requests())
        pipeline.engines[0].stage_adapter(adapter)
        pipeline.engines[0].commit_adapter(1)
        moved = pipeline.rollout(requests())
    assert len(base) == 28
    return [{name: c.token_ids for name, c in made.items()} for made in (base, moved)]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_kv_blocks": 20, "max_num_seqs": 9, "max_num_batched_tokens": 16},
    {"micro_batches": 1},
    {"micro_batches": 4},
]
QUICK = [((1, 2), options) for options in SETTINGS] + [((1, 1, 1), {})]
CASES = QUICK + [
    pytest.param(split, options, marks=pytest.mark.slow)
    for split in ((2, 1), (1, 1, 1))
    for options in SETTINGS
    if (split, options) not in QUICK
]


@pytest.mark.parametrize(("split", "options"), CASES, ids=str)
def test_stages_make_equal_tokens(
    split: tuple[int, ...], options: dict[str, Any], folder: Path, adapter: AdapterUpdate, expected: list
) -> None:
    with Pipeline(EngineOptions(str(folder), **options), split) as pipeline:
        assert {name: c.token_ids for name, c in pipeline.rollout(requests()).items()} == expected[0]
        for engine in pipeline.engines:
            engine.stage_adapter(adapter)
            engine.commit_adapter(1)
        made = pipeline.rollout(requests())
        assert {name: c.token_ids for name, c in made.items()} == expected[1]
        assert {c.policy_version for c in made.values()} == {1}
        counters = [engine.counters() for engine in pipeline.engines]
        assert all(other == counters[0] for other in counters), "the copies of the scheduler went apart"
        assert len(pipeline.engines[-1].scheduler.running) == options.get("micro_batches", len(split))


@pytest.mark.parametrize("options", [SETTINGS[1], {"micro_batches": 3}], ids=str)
def test_results_that_are_told_when_the_next_step_is_due_change_nothing(
    options: dict[str, Any], folder: Path, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between GPUs, where the last stage's host is ahead of its device."""
    monkeypatch.setattr(ProcessGroupTransport, "is_ahead", True)
    with Pipeline(EngineOptions(str(folder), **options), (1, 1, 1)) as pipeline:
        assert {name: c.token_ids for name, c in pipeline.rollout(requests()).items()} == expected[0]
        assert not any(engine.transport._sending for engine in pipeline.engines)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stages_of_half_precision_make_equal_tokens(dtype: str, folder: Path) -> None:
    """Equal lanes make equal batches, and then nothing may be lost between the stages."""
    made = []
    for split in ((3,), (1, 2), (1, 1, 1)):
        with Pipeline(EngineOptions(str(folder), dtype=dtype, micro_batches=2), split) as pipeline:
            made.append({n: (c.token_ids, c.logprobs) for n, c in pipeline.rollout(requests()).items()})
    assert made[0] == made[1] == made[2]


def test_all_stages_work_at_once(folder: Path) -> None:
    """While stage 0 waits for the results of a step, another of its steps is with stage 1."""
    with Pipeline(EngineOptions(str(folder), micro_batches=2), (1, 2)) as pipeline:
        transport = pipeline.engines[0].transport
        in_flight, seen = 0, []
        send, receive = transport.send, transport.receive

        def sent(*arguments: Any) -> None:
            nonlocal in_flight
            in_flight += 1
            send(*arguments)

        def received(*arguments: Any) -> Any:
            nonlocal in_flight
            seen.append(in_flight)
            in_flight -= 1
            return receive(*arguments)

        transport.send, transport.receive = sent, received
        pipeline.rollout(requests(params=dataclasses.replace(PARAMS, ignore_eos=True)))
    assert seen.count(2) > 0.9 * len(seen)


def test_an_abort_reaches_all_stages(folder: Path, expected: list) -> None:
    long = dataclasses.replace(PARAMS, max_tokens=400, ignore_eos=True)
    with Pipeline(EngineOptions(str(folder), max_num_seqs=6, micro_batches=2), (1, 2)) as pipeline:
        wanted = requests(5)
        wanted[1] = dataclasses.replace(wanted[1], sampling_params=long)
        aborter = threading.Timer(0.05, pipeline.engines[-1].abort, ("r1",))
        aborter.start()
        made = pipeline.rollout(wanted)
        aborter.join()
        assert {made["r1", index].finish_reason for index in range(4)} == {"abort"}
        for name, candidate in made.items():
            if name[0] != "r1":
                assert candidate.token_ids == expected[0][name]
        assert [e.counters()["kv_blocks_used"] for e in pipeline.engines] == [0, 0]
        assert {n: c.token_ids for n, c in pipeline.rollout(requests()).items()} == expected[0]


def test_a_batch_that_cannot_be_served_is_refused_by_all_stages_alike(folder: Path, expected: list) -> None:
    with Pipeline(EngineOptions(str(folder), max_model_len=100), (1, 2)) as pipeline:
        faults = []

        def run(stage: int) -> None:
            with pytest.raises(RequestError) as fault:
                list(
                    pipeline.engines[stage].rollout([*requests(), GenerationRequest("long", (5,) * 100, (0,), PARAMS)])
                )
            faults.append(str(fault.value))

        pipeline.each(run)
        assert faults[0] == faults[1] and "100 tokens" in faults[0]
        made = pipeline.rollout(requests())
        assert {n: c.token_ids for n, c in made.items() if n[0] != "r6"} == {
            n: t for n, t in expected[0].items() if n[0] != "r6"
        }


def test_a_lost_stage_is_an_error_not_a_hang(folder: Path) -> None:
    with Pipeline(EngineOptions(str(folder)), (1, 2)) as pipeline:
        long = dataclasses.replace(PARAMS, max_tokens=400, ignore_eos=True)

        def run(stage: int) -> None:
            if stage == 1:
                time.sleep(0.3)
                pipeline.engines[1].transport.close()
            else:
                list(pipeline.engines[0].rollout(requests(params=long)))

        start = time.monotonic()
        with pytest.raises(TransportError, match="stage 0"):
            pipeline.each(run)
        assert time.monotonic() - start < 20


def test_a_split_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="hold 2 layers together, the model has 3"):
        StageEngine(EngineOptions(str(folder), layer_split=(1, 1)), 0, LoopbackTransport())
    with pytest.raises(ValueError, match="stage 0 of 2 got a transport of 0/1"):
        StageEngine(EngineOptions(str(folder), layer_split=(1, 2)), 0, LoopbackTransport())


def test_a_peer_that_never_comes_is_an_error() -> None:
    with pytest.raises(TransportError, match="found no peers at 127.0.0.1"):
        ProcessGroupTransport(1, 2, "127.0.0.1", free_port(), timeout_s=1.0)


@pytest.mark.parametrize("lanes", [1, 3])
def test_what_was_delivered_is_let_go_while_a_batch_runs(folder: Path, lanes: int) -> None:
    held: dict[int, int] = {0: 0, 1: 0, 2: 0}
    with Pipeline(EngineOptions(str(folder), micro_batches=lanes), (1, 1, 1)) as pipeline:
        for engine in pipeline.engines:
            transport, send = engine.transport, engine.transport.send

            def watched(tensor: Any, to: int, tag: int, send: Any = send, transport: Any = transport) -> None:
                send(tensor, to, tag)
                held[transport.rank] = max(held[transport.rank], len(transport._sending))

            transport.send = watched
        pipeline.rollout(requests())
        assert pipeline.engines[0].counters()["steps"] > 20 * lanes
        # one step more than is in flight: what is sent now, before the next look; results go to two stages
        assert held[0] <= 2 * lanes + 1 and held[1] <= 2 * lanes + 1 and held[2] <= 2 * lanes + 2
        assert all(not engine.transport._sending for engine in pipeline.engines)


def test_stages_agree_on_the_smallest_pool(folder: Path) -> None:
    with Pipeline(EngineOptions(str(folder)), (1, 1, 1)) as pipeline:
        found: dict[int, int] = {}
        offers = {0: 700, 1: 300, 2: 500}

        def agree(stage: int) -> None:
            found[stage] = agreed_kv_blocks(pipeline.engines[stage].transport, lambda: offers[stage])

        pipeline.each(agree)
        assert found == {0: 300, 1: 300, 2: 300}


def test_all_stages_hear_at_once_that_nothing_fits_on_one(folder: Path) -> None:
    def fitting(stage: int) -> int:
        if stage == 1:
            raise KvMemoryError("no GPU memory is left")
        return 700

    with Pipeline(EngineOptions(str(folder)), (1, 2)) as pipeline:
        says: dict[int, str] = {}

        def agree(stage: int) -> None:
            with pytest.raises(KvMemoryError) as fault:
                agreed_kv_blocks(pipeline.engines[stage].transport, lambda: fitting(stage))
            says[stage] = str(fault.value)

        pipeline.each(agree)
    assert says[1] == "no GPU memory is left" and "700 KV blocks fit on stage 0, but none on another" in says[0]
