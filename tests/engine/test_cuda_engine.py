"""The engine on one GPU: graphs, plans ahead of the results, kernels; against itself, the CPU and transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_ext.prefill_attention import BACKENDS
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.request import Candidate, GenerationRequest
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.engine.scorer import ScoreRequest
from ember_ray.engine.stage_engine import StageEngine
from ember_ray.engine.transport import LoopbackTransport
from tests.support.adapters import random_adapter
from tests.support.qwen3 import EOS, make_qwen3, random_prompts

pytestmark = pytest.mark.gpu

SHAPES: dict[str, dict[str, Any]] = {
    "dim16": {},
    "dim64": {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 256},
    "dim128": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512,
               "intermediate_size": 768, "max_position_embeddings": 4096},
}  # fmt: skip

PARAMS = [
    SamplingParams(max_tokens=24, seed=3),
    SamplingParams(max_tokens=21, seed=3, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01),
    SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True),
]

LENGTHS = [5, 37, 64, 16, 16, 17, 90]

Tokens = dict[tuple[str, int], Candidate]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    made = {}
    for name, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = (folder, make_qwen3(folder, **shape))
    return made


def requests(count: int = 4, lengths: Sequence[int] = LENGTHS, **changes: Any) -> list[GenerationRequest]:
    return [
        GenerationRequest(f"r{n}", p, tuple(range(count)), replace(PARAMS[n % len(PARAMS)], **changes))
        for n, p in enumerate(random_prompts(list(lengths)))
    ]


def engine(folder: Path, poison: bool = True, **options: Any) -> StageEngine:
    roomy = {"num_kv_blocks": 400, "max_num_seqs": 64, "max_num_batched_tokens": 256}
    made = StageEngine(EngineOptions(str(folder), **({"device": "cuda"} | roomy | options)), 0, LoopbackTransport())
    if poison:  # what nothing was written to must not be read
        made.kv_cache.fill_(torch.nan)
    return made


def rollout(made: StageEngine, batch: list[GenerationRequest]) -> Tokens:
    candidates = [candidate for ended in made.rollout(batch) for candidate in ended]
    found = {(c.request_id, c.index): c for c in candidates}
    assert len(found) == len(candidates) == sum(len(request.candidate_indices) for request in batch)
    return found


def tokens(made: Tokens) -> dict[tuple[str, int], list[int]]:
    return {name: candidate.token_ids for name, candidate in made.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_tokens_do_not_depend_on_how_they_are_computed(folders: dict, shape: str) -> None:
    folder, _ = folders[shape]
    expected = tokens(rollout(engine(folder, poison=False, device="cpu"), requests()))
    tight = {"block_size": 4, "num_kv_blocks": 60, "max_num_seqs": 12, "max_num_batched_tokens": 32}
    ways: dict[str, dict[str, Any]] = {
        "graphs": {},
        "no graphs": {"enforce_eager": True},
        "no sharing": {"prefix_sharing": False},
        "one step a plan": {"num_scheduler_steps": 1},
        "seven steps a plan": {"num_scheduler_steps": 7},
        "little memory": tight,
        "little memory, one step": tight | {"num_scheduler_steps": 1},
        "blocks of 32": {"block_size": 32},
    }
    for way, options in ways.items():
        made = engine(folder, **options)
        first = tokens(rollout(made, requests()))
        assert first == expected, way
        assert tokens(rollout(made, requests())) == expected, f"{way}, again with what is cached"
        assert made.scheduler.pool.num_used == 0
        if "little" in way:
            assert made.counters()["preemptions"] > 0
    alone = engine(folder)
    for request in requests():
        made_alone = tokens(rollout(alone, [request]))
        assert made_alone == {name: expected[name] for name in made_alone}, "alone in the batch"


@pytest.mark.parametrize("mode", ["slots", "merged"])
def test_adapters_serve_in_captured_graphs_and_leave_no_trace(folders: dict, mode: str) -> None:
    folder, _ = folders["dim64"]
    host, device = engine(folder, poison=False, device="cpu"), engine(folder, lora_mode=mode)
    base = tokens(rollout(device, requests()))
    before = {name: w.clone() for layer in device.model.decoder_layers for name, w in layer.weights.items()}
    for version, seed in ((1, 1), (2, 2)):
        for made in (host, device):
            made.stage_adapter(random_adapter(folder, version, seed))
            made.commit_adapter(version)
        expected = tokens(rollout(host, requests()))
        assert tokens(rollout(device, requests())) == expected != base
    device.commit_adapter(1)
    host.commit_adapter(1)
    assert tokens(rollout(device, requests())) == tokens(rollout(host, requests()))
    device.commit_adapter(0)
    assert tokens(rollout(device, requests())) == base
    after = {name: w for layer in device.model.decoder_layers for name, w in layer.weights.items()}
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_logprobs_are_those_of_transformers(folders: dict, shape: str) -> None:
    folder, network = folders[shape]
    made = rollout(engine(folder), requests())
    prompts = {request.request_id: request.prompt_token_ids for request in requests()}
    network = network.cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    for (name, _), candidate in made.items():
        whole = torch.tensor([[*prompts[name], *candidate.token_ids]], device="cuda")
        with torch.inference_mode():
            logits = network(whole).logits[0, len(prompts[name]) - 1 : -1]
        assert logits.std() >= 2
        theirs = logits.log_softmax(-1).gather(-1, whole[0, len(prompts[name]) :, None])[:, 0].cpu()
        torch.testing.assert_close(torch.tensor(candidate.logprobs), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", ["dim64", "dim128"])
def test_half_precision_is_no_farther_from_float32_than_transformers(folders: dict, shape: str, dtype: str) -> None:
    folder, network = folders[shape]
    lengths = [5, 37, 300, 16, 129, 17, 90]
    batch = requests(8, lengths, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, ignore_eos=True, max_tokens=48)
    made = rollout(engine(folder, dtype=dtype, max_num_batched_tokens=4096), batch)
    exact, half = network.cuda().float(), make_qwen3_like(network, getattr(torch, dtype))
    ours, theirs = [], []
    for request in batch:
        for index in request.candidate_indices:
            candidate = made[request.request_id, index]
            whole = torch.tensor([[*request.prompt_token_ids, *candidate.token_ids]], device="cuda")
            start = len(request.prompt_token_ids)
            with torch.inference_mode():
                want, got = (
                    model(whole).logits[0, start - 1 : -1].float().log_softmax(-1).gather(-1, whole[0, start:, None])
                    for model in (exact, half)
                )
            theirs.append((got - want)[:, 0].abs().cpu())
            ours.append((torch.tensor(candidate.logprobs) - want[:, 0].cpu()).abs())
    mine, other = torch.cat(ours), torch.cat(theirs)
    for share in (0.5, 0.95):
        assert mine.quantile(share) <= 1.05 * other.quantile(share), (
            share,
            mine.quantile(share),
            other.quantile(share),
        )


def make_qwen3_like(network: Any, dtype: torch.dtype) -> Any:
    from copy import deepcopy

    return deepcopy(network).to(device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_two_runs_of_one_seed_are_equal_to_the_bit(folders: dict, dtype: str) -> None:
    folder, _ = folders["dim128"]
    runs = []
    for _ in range(2):
        made = rollout(engine(folder, dtype=dtype), requests(8))
        runs.append({n: (c.token_ids, c.logprobs, c.sampling_logprobs) for n, c in made.items()})
    assert runs[0] == runs[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generated_tokens_score_as_they_were_drawn(folders: dict, dtype: str) -> None:
    folder, _ = folders["dim128"]
    made = engine(folder, dtype=dtype)
    batch = requests(4, ignore_eos=True)
    drawn = rollout(made, batch)
    rows = [
        ScoreRequest(
            (*request.prompt_token_ids, *drawn[request.request_id, index].token_ids), len(request.prompt_token_ids)
        )
        for request in batch
        for index in request.candidate_indices
    ]
    wanted = [torch.tensor(candidate.logprobs) for candidate in drawn.values()]
    by_name = {(r.request_id, i): n for n, (r, i) in enumerate((r, i) for r in batch for i in r.candidate_indices)}
    scores = made.score(rows)
    assert made.scheduler.pool.num_used == 0
    for (name, candidate), want in zip(drawn.items(), wanted, strict=True):
        mine = torch.tensor(scores[by_name[name]])
        assert mine.shape == want.shape == (len(candidate.token_ids),)
        if dtype == "float32":
            torch.testing.assert_close(mine, want, rtol=0, atol=1e-4)
        else:  # other kernels than in decoding: as far apart as two ways to round
            assert (mine - want).abs().median() < 0.03


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"sdpa"}))
def test_attention_over_prompts_is_the_one_asked_for_and_told_once(
    folders: dict, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    folder, _ = folders["dim128"]
    caplog.set_level(logging.INFO, "ember_ray.engine.stage_engine")
    made = engine(folder, dtype="bfloat16", prefill_attention=backend)
    rows = [ScoreRequest(prompt, 1) for prompt in random_prompts([300, 17, 129, 64])]
    scores = made.score(rows)
    told = [record.message for record in caplog.records if "attention over prompts" in record.message]
    assert told == [f"stage 0: attention over prompts by {backend} (as requested)"]
    assert made.implementation["prefill"] == backend
    wanted = engine(folder, dtype="bfloat16", prefill_attention="sdpa").score(rows)
    for mine, theirs in zip(scores, wanted, strict=True):
        assert (torch.tensor(mine) - torch.tensor(theirs)).abs().median() < 0.03


def test_candidates_end_where_the_host_would_end_them(folders: dict) -> None:
    folder, _ = folders["dim16"]
    host, device = engine(folder, poison=False, device="cpu"), engine(folder)
    free = rollout(host, requests(ignore_eos=True, max_tokens=40))
    one = next(iter(free.values()))
    stops = tuple(dict.fromkeys([one.token_ids[7], *range(2, 14)]))
    for changes in (
        {"stop_token_ids": (one.token_ids[9],)},
        {"stop_token_ids": stops, "ignore_eos": True},  # more than the device looks for
        {"stop": (one.text[3:5],), "ignore_eos": True},
        {"max_tokens": 1},
        {"max_tokens": 2},
    ):
        batch = requests(**changes)
        theirs, ours = rollout(host, batch), rollout(device, batch)
        assert {n: (c.token_ids, c.finish_reason, c.text) for n, c in ours.items()} == {
            n: (c.token_ids, c.finish_reason, c.text) for n, c in theirs.items()
        }
        assert all(len(c.token_ids) == len(c.logprobs) == len(c.sampling_logprobs) for c in ours.values())
        assert all(EOS not in c.token_ids[:-1] for c in ours.values() if not batch[0].sampling_params.ignore_eos)


def test_steps_behind_an_end_are_bounded(folders: dict) -> None:
    folder, _ = folders["dim16"]
    made = engine(folder, num_scheduler_steps=4)
    (free,) = rollout(made, requests(1, [16], ignore_eos=True, max_tokens=60)).values()
    before = made.counters()["steps"]
    stop = free.token_ids[20]
    (candidate,) = rollout(made, requests(1, [16], ignore_eos=True, max_tokens=60, stop_token_ids=(stop,))).values()
    steps = made.counters()["steps"] - before
    assert candidate.finish_reason == "stop" and len(candidate.token_ids) <= 21
    assert len(candidate.token_ids) <= steps < len(candidate.token_ids) + 2 * 4


def test_an_abort_ends_its_request_and_no_other(folders: dict) -> None:
    folder, _ = folders["dim16"]
    made = engine(folder)
    batch = requests(ignore_eos=True, max_tokens=300, temperature=1.0, seed=3)
    undisturbed = tokens(rollout(made, batch))
    found: Tokens = {}
    running = made.rollout(
        [*batch[:1], replace(batch[1], sampling_params=replace(PARAMS[0], max_tokens=2)), *batch[2:]]
    )
    for ended in running:
        made.abort("r0")
        found |= {(c.request_id, c.index): c for c in ended}
    assert made.scheduler.pool.num_used == 0
    for (name, index), candidate in found.items():
        if name == "r0":
            assert candidate.finish_reason == "abort" and len(candidate.token_ids) < 300
            assert candidate.token_ids == undisturbed[name, index][: len(candidate.token_ids)]
        elif name != "r1":
            assert candidate.token_ids == undisturbed[name, index]


def test_the_pool_takes_what_is_free_and_not_more(folders: dict) -> None:
    folder, _ = folders["dim128"]
    made = engine(folder, poison=False, num_kv_blocks=None, gpu_memory_utilization=0.5, dtype="bfloat16")
    rollout(made, requests(8))
    total = torch.cuda.mem_get_info()[1]
    assert 0.4 * total < torch.cuda.memory_reserved() < 0.52 * total  # of this process; others may be on the GPU too
    with pytest.raises(ValueError, match=r"no GPU memory is left for KV blocks: .* GiB in all"):
        engine(folder, poison=False, num_kv_blocks=None, gpu_memory_utilization=0.002)


def test_graphs_are_captured_anew_where_the_buffers_grew(folders: dict) -> None:
    folder, _ = folders["dim16"]
    host, device = engine(folder, poison=False, device="cpu"), engine(folder, block_size=1, max_num_seqs=2)
    for length in (5, 100, 250, 5):  # there is room for 64 prompt blocks a row at first, then for twice what was needed
        batch = requests(2, [length])
        assert tokens(rollout(device, batch)) == tokens(rollout(host, batch))


def test_graphs_serve_adapters_of_all_shapes_in_any_order(folders: dict) -> None:
    folder, _ = folders["dim64"]
    host, device = engine(folder, poison=False, device="cpu"), engine(folder)
    batch = requests(temperature=0.0)
    for version, rank in enumerate((4, 6, 4, 0, 8, 6, 0, 4), start=1):
        for made in (host, device):
            if rank:
                made.stage_adapter(random_adapter(folder, version, seed=version, rank=rank))
            made.commit_adapter(version if rank else 0)
        assert tokens(rollout(device, batch)) == tokens(rollout(host, batch)), f"version {version} of rank {rank}"


@pytest.mark.parametrize("share", [3, 5])
def test_any_number_of_query_heads_may_share_a_kv_head(tmp_path: Path, share: int) -> None:
    make_qwen3(tmp_path, head_dim=64, num_attention_heads=2 * share, num_key_value_heads=2, hidden_size=128)
    batch = requests(24, [37])
    host, device = engine(tmp_path, poison=False, device="cpu"), engine(tmp_path)
    assert tokens(rollout(device, batch)) == tokens(rollout(host, batch))
    rollout(engine(tmp_path, dtype="bfloat16"), batch)


def test_a_rollout_that_is_given_up_leaves_nothing_behind(folders: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = folders["dim16"]
    batch, others = requests(ignore_eos=True), requests(3, [50, 20, 16, 90], seed=8)
    fresh = {"num_kv_blocks": 60, "block_size": 4, "max_num_seqs": 12, "max_num_batched_tokens": 32}
    expected = tokens(rollout(engine(folder, **fresh), others))
    made = engine(folder, **fresh)
    running = made.rollout(batch)
    next(running)
    running.close()
    assert tokens(rollout(made, others)) == expected
    run, plans = made._runner.run, []

    def interrupted(plan: Any) -> Any:
        plans.append(plan)
        pending = run(plan)
        if len(plans) == 9:
            raise KeyboardInterrupt
        return pending

    with monkeypatch.context() as now, pytest.raises(KeyboardInterrupt):
        now.setattr(made._runner, "run", interrupted)
        rollout(made, batch)
    assert tokens(rollout(made, others)) == expected
