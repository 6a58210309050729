"""Stage actors on GPUs: a GPU each and NCCL between them, or two that share one; against one engine in one process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from actors import cluster as clusters
from actors.calls import StageLost
from actors.messages import CoordinatorSettings, Limits
from actors.pipeline import Pipeline
from ember_ray.engine.llm import LLM
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.request import Candidate, GenerationRequest
from ember_ray.engine.sampling_params import SamplingParams
from tests.support.qwen3 import make_qwen3, random_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

TWO_GPUS = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two CUDA devices, this machine has {torch.cuda.device_count()}"
)
LAYERS = (2, 2)
GREEDY = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=48, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    """Of one stage, in float32."""
    folder = tmp_path_factory.mktemp("qwen3")
    make_qwen3(
        folder, head_dim=64, num_attention_heads=8, num_key_value_heads=2, hidden_size=256, intermediate_size=512,
        num_hidden_layers=sum(LAYERS),
    )  # fmt: skip
    return EngineOptions(str(folder), device="cuda", num_kv_blocks=1024, max_num_seqs=64, max_num_batched_tokens=256)


@pytest.fixture(scope="module", params=[pytest.param(1.0, marks=TWO_GPUS), 0.5], ids=["a GPU each", "half a GPU each"])
def share(request: pytest.FixtureRequest) -> float:
    return float(request.param)


@pytest.fixture(scope="module")
def placed(share: float) -> Iterator[clusters.Cluster]:
    """A Ray with a place for two stages; for those that share a GPU it offers only one."""
    with pytest.MonkeyPatch.context() as patch:
        if share < 1:
            patch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
        with clusters.start(2, gpus_per_stage=share, run="test", dashboard=False) as made:
            yield made


@contextmanager
def stages(placed: clusters.Cluster, options: EngineOptions, transport_s: float = 60.0) -> Iterator[Pipeline]:
    limits = Limits(transport=transport_s)
    settings = CoordinatorSettings(replace(options, layer_split=LAYERS), threads=1, limits=limits)
    pipeline = Pipeline(settings, placed.placement)
    pipeline.start()
    try:
        yield pipeline
    finally:
        pipeline.stop()


def requests(params: SamplingParams) -> list[GenerationRequest]:
    lengths = [5, 37, 64, 16, 16, 17, 90, 33]
    return [GenerationRequest(f"r{n}", p, (0, 1, 2, 3), params) for n, p in enumerate(random_prompts(lengths))]


def rollout(
    pipeline: Pipeline, batch: list[GenerationRequest], look: Callable[[], None] = lambda: None
) -> list[Candidate]:
    import ray

    running, made = pipeline.begin(batch), []
    while not running.done:
        ready, _ = ray.wait(running.waitables, timeout=1.0)
        look()
        made += running.take(ready)
        running.watch()
    return made


def by_name(made: list[Candidate]) -> dict[tuple[str, int], list[int]]:
    found = {(candidate.request_id, candidate.index): candidate.token_ids for candidate in made}
    assert len(found) == len(made) == 32
    return found


def of_one_process(options: EngineOptions, params: SamplingParams) -> list[Candidate]:
    return [candidate for ended in LLM(options).engine.rollout(requests(params)) for candidate in ended]


def test_stages_make_the_tokens_of_one_process(placed: clusters.Cluster, options: EngineOptions, share: float) -> None:
    with stages(placed, options) as pipeline:
        uuids = pipeline.call_all(
            "__ray_call__", lambda actor: str(torch.cuda.get_device_properties(actor._engine.kv_cache.device).uuid)
        )
        assert len(set(uuids)) == (2 if share == 1 else 1)
        ways = pipeline.call_all("__ray_call__", lambda actor: actor._transport.is_ahead)
        assert ways == [share == 1] * 2, "NCCL where each has a GPU, the host's memory where they share one"
        for params in (GREEDY, DRAWN, replace(DRAWN, temperature=0.7, top_k=9, top_p=0.9)):
            assert by_name(rollout(pipeline, requests(params))) == by_name(of_one_process(options, params)), params
        assert [counted["kv_blocks_used"] for counted in pipeline.counters()] == [0, 0]


def test_forced_tokens_score_within_the_noise_of_bfloat16(placed: clusters.Cluster, options: EngineOptions) -> None:
    """Two stages are no farther from float32 than one stage is."""
    half = replace(options, dtype="bfloat16")
    prompts = {request.request_id: request.prompt_token_ids for request in requests(DRAWN)}
    answers = [
        (prompts[candidate.request_id], tuple(candidate.token_ids)) for candidate in of_one_process(options, DRAWN)
    ]
    rows, lengths = [[*prompt, *answer] for prompt, answer in answers], [len(prompt) for prompt, _ in answers]
    exact, one = (torch.tensor(LLM(each).score(rows, lengths)) for each in (options, half))
    with stages(placed, half) as pipeline:
        two = torch.tensor(pipeline.score(answers, 0, sum(map(len, rows))))
        counts = pipeline.counters()
    assert two.shape == one.shape == (32, 48) and counts[0]["kv_blocks_used"] == 0
    for share in (0.5, 0.95):
        assert (two - exact).abs().quantile(share) <= 1.1 * (one - exact).abs().quantile(share) + 1e-3
    assert (one - exact).abs().median() > 1e-4, "bfloat16 must round for this to say anything"


@pytest.mark.parametrize("lost", [0, 1])
def test_a_stage_that_dies_is_told_and_nobody_hangs(
    placed: clusters.Cluster, options: EngineOptions, lost: int
) -> None:
    long = requests(replace(DRAWN, max_tokens=400))
    with stages(placed, options, transport_s=5.0) as pipeline:
        pids = pipeline.call_all("pid")
        other: Any = pipeline.stages[1 - lost]

        def kill() -> None:
            if pids[lost] and pipeline.counters()[0]["steps"] > 20:
                os.kill(pids[lost], signal.SIGKILL)
                pids[lost] = 0

        start = time.monotonic()
        with pytest.raises(StageLost):
            rollout(pipeline, long, kill)
        assert pids[lost] == 0, "it was lost before it was killed"
        # the one that is left comes out of its rollout by itself, GPU and host
        import ray

        assert ray.get(other.__ray_call__.remote(_is_idle), timeout=60)
        assert time.monotonic() - start < 120
    with stages(placed, options) as pipeline:
        assert by_name(rollout(pipeline, requests(GREEDY)))


def _is_idle(actor: Any) -> bool:
    torch.cuda.synchronize()
    return not actor._engine.scheduler.has_work
