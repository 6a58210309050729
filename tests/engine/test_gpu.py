"""The engine on a GPU makes the tokens that it makes on the CPU, with one stage or two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ember_ray.engine.options import EngineOptions
from ember_ray.engine.request import Candidate, GenerationRequest
from ember_ray.engine.sampling_params import SamplingParams
from tests.support.adapters import random_adapter
from tests.support.qwen3 import make_qwen3, random_prompts
from tests.support.stages import Pipeline

pytestmark = pytest.mark.gpu

PARAMS = [
    SamplingParams(max_tokens=24, seed=3),
    SamplingParams(max_tokens=24, seed=3, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01),
    SamplingParams(max_tokens=24, temperature=0.0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    make_qwen3(path)
    return path


def generate(folder: Path, device: str, split: tuple[int, ...]) -> list[dict[tuple[str, int], Candidate]]:
    """All candidates under the base model and under the adapter, with a pool so small that some are preempted."""
    requests = [
        GenerationRequest(f"r{n}", p, (0, 1, 2, 3), PARAMS[n % len(PARAMS)])
        for n, p in enumerate(random_prompts([5, 37, 64, 16, 16, 17, 90]))
    ]
    options = EngineOptions(
        str(folder), device=device, block_size=4, num_kv_blocks=60, max_num_seqs=12, max_num_batched_tokens=32
    )
    with Pipeline(options, split) as pipeline:
        base = pipeline.rollout(requests)
        for engine in pipeline.engines:
            engine.stage_adapter(random_adapter(folder))
            engine.commit_adapter(1)
        moved = pipeline.rollout(requests)
        assert pipeline.engines[0].counters()["preemptions"] > 0
        assert all(engine.kv_cache.device.type == device for engine in pipeline.engines)
    return [base, moved]


@pytest.mark.parametrize("split", [(3,), (1, 2)], ids=str)
def test_tokens_equal_those_of_the_cpu(folder: Path, split: tuple[int, ...]) -> None:
    for mine, theirs in zip(generate(folder, "cuda", split), generate(folder, "cpu", split), strict=True):
        assert mine.keys() == theirs.keys() and len(mine) == 28
        for name, candidate in mine.items():
            assert candidate.token_ids == theirs[name].token_ids
            torch.testing.assert_close(
                torch.tensor(candidate.logprobs), torch.tensor(theirs[name].logprobs), rtol=0, atol=1e-4
            )
