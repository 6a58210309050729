"""The one-process engine: sharing, randomness, ends, preemption, policies."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from ember_ray.engine.llm import LLM
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.request import GenerationRequest, RequestOutput
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.engine.scheduler import RequestError
from ember_ray.model.lora import AdapterError, AdapterUpdate, load_peft_adapter
from ember_ray.model.qwen3_config import ModelError
from tests.support.peft_adapters import make_adapter
from tests.support.qwen3 import EOS, all_logits, make_qwen3, random_prompts, stage_model

FREE = SamplingParams(max_tokens=24, ignore_eos=True, seed=11)


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


def engine(folder: Path, **options: Any) -> LLM:
    return LLM(EngineOptions(str(folder), **options))


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[candidate.token_ids for candidate in output.candidates] for output in outputs]


def test_a_prompt_is_computed_once_for_its_candidates(folder: Path) -> None:
    llm = engine(folder)
    prompts = random_prompts([37, 5, 64])
    llm.generate(prompts, 8, FREE)
    counters = llm.engine.counters()
    assert counters["prefill_tokens"] == 37 + 5 + 64
    assert counters["prefix_hit_tokens"] == 7 * (37 + 5 + 64)
    assert counters["generated_tokens"] == 3 * 8 * 24
    assert counters["kv_blocks_used"] == 0
    llm.generate(prompts, 8, FREE)  # the same policy: full blocks are still there
    assert llm.engine.counters()["prefill_tokens"] - counters["prefill_tokens"] == 5 + 5 + 16


def test_without_sharing_every_candidate_pays(folder: Path) -> None:
    llm = engine(folder, prefix_sharing=False)
    llm.generate(random_prompts([37, 5]), 8, FREE)
    assert llm.engine.counters()["prefill_tokens"] == 8 * 42
    assert llm.engine.counters()["prefix_hit_tokens"] == 0


def test_a_prefix_common_to_different_prompts_is_computed_once(folder: Path) -> None:
    stem, *tails = random_prompts([48, 7, 20, 33])
    llm = engine(folder)
    llm.generate([stem + tail for tail in tails], 2, FREE)
    assert llm.engine.counters()["prefill_tokens"] == 48 + 7 + 20 + 33


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_sharing": False},
        {"num_kv_blocks": 22, "max_num_seqs": 9, "max_num_batched_tokens": 16},
        {"block_size": 5, "max_num_batched_tokens": 200},
        {"micro_batches": 3},
        {"micro_batches": 9, "max_num_seqs": 5, "max_num_batched_tokens": 7},
    ],
    ids=str,
)
def test_float32_tokens_do_not_depend_on_what_else_runs(options: dict[str, Any], folder: Path) -> None:
    prompts = random_prompts([37, 5, 64, 64, 90])
    expected = engine(folder).generate(prompts, 6, FREE)
    llm = engine(folder, **options)
    other = llm.generate(prompts[::-1], 6, FREE)[::-1]
    assert tokens(other) == tokens(expected)
    alone = engine(folder).generate(prompts[2:3], 6, FREE)
    assert tokens(alone) == tokens(expected)[2:3]
    for mine, theirs in zip(expected, other, strict=True):
        for a, b in zip(mine.candidates, theirs.candidates, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=5e-5)
    if "num_kv_blocks" in options:
        assert llm.engine.counters()["preemptions"] > 0


def test_a_subset_of_candidates_gets_the_same_tokens(folder: Path) -> None:
    prompts = random_prompts([30])
    whole = engine(folder).generate(prompts, 5, FREE)[0]
    llm = engine(folder)
    part = GenerationRequest("x", prompts[0], (1, 4), FREE)
    made = {c.index: c.token_ids for ended in llm.engine.rollout([part]) for c in ended}
    assert made == {index: whole.candidates[index].token_ids for index in (1, 4)}


def test_randomness_comes_from_seed_prompt_candidate_and_position(folder: Path) -> None:
    prompts = random_prompts([20, 21])
    one = tokens(engine(folder).generate(prompts, 4, FREE))
    assert one == tokens(engine(folder, seed=5).generate(prompts, 4, FREE))
    assert len({tuple(c) for output in one for c in output}) == 8
    other = tokens(engine(folder).generate(prompts, 4, dataclasses.replace(FREE, seed=12)))
    assert all(a != b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    unseeded = dataclasses.replace(FREE, seed=None)
    llm = engine(folder, seed=5)
    first, second = (tokens(llm.generate(prompts, 1, unseeded)) for _ in range(2))
    assert first != second
    assert first == tokens(engine(folder, seed=5).generate(prompts, 1, unseeded))


def test_both_logprobs_are_what_a_direct_forward_says(folder: Path) -> None:
    params = SamplingParams(temperature=0.7, top_k=9, max_tokens=30, ignore_eos=True, seed=3)
    _, model = stage_model(folder)
    for output in engine(folder).generate(random_prompts([17, 40]), 3, params):
        start = len(output.prompt_token_ids)
        for candidate in output.candidates:
            made = torch.tensor(candidate.token_ids)[:, None]
            logits = all_logits(model, [*output.prompt_token_ids, *candidate.token_ids])[start - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, made)[:, 0]
            torch.testing.assert_close(torch.tensor(candidate.logprobs), expected, rtol=0, atol=1e-4)
            scaled = logits / 0.7
            scaled[scaled < scaled.topk(9).values[:, -1:]] = -torch.inf
            expected = scaled.log_softmax(-1).gather(-1, made)[:, 0]
            torch.testing.assert_close(torch.tensor(candidate.sampling_logprobs), expected, rtol=0, atol=1e-4)


def test_ends(folder: Path) -> None:
    prompts = random_prompts([12])
    llm = engine(folder)
    params = SamplingParams(max_tokens=200, seed=1, temperature=1.3)
    candidates = llm.generate(prompts, 32, params)[0].candidates
    stopped = [c for c in candidates if c.finish_reason == "stop"]
    assert stopped, "no candidate drew the end token; choose another seed"
    assert all(c.token_ids[-1] == EOS and EOS not in c.token_ids[:-1] for c in stopped)
    assert all(len(c.token_ids) == 200 for c in candidates if c.finish_reason == "length")
    assert all(len(c.token_ids) == len(c.logprobs) == len(c.sampling_logprobs) for c in candidates)

    free = engine(folder).generate(prompts, 1, dataclasses.replace(params, ignore_eos=True))[0].candidates[0]
    assert free.finish_reason == "length"
    token = free.token_ids[9]
    ended = llm.generate(prompts, 1, dataclasses.replace(params, ignore_eos=True, stop_token_ids=(token,)))
    first = free.token_ids.index(token)
    assert ended[0].candidates[0].token_ids == free.token_ids[: first + 1]
    assert ended[0].candidates[0].finish_reason == "stop"
    assert ended[0].candidates[0].text == llm.tokenizer.decode(free.token_ids[:first])


def test_stop_strings_cut_the_text_and_may_span_tokens(folder: Path) -> None:
    llm = engine(folder)
    prompts = random_prompts([12])
    params = SamplingParams(max_tokens=120, seed=4, ignore_eos=True)
    free = llm.generate(prompts, 1, params)[0].candidates[0]
    letters = [(place, free.text[place : place + 2]) for place in range(10, 100)]
    place, stop = next((p, s) for p, s in letters if s.isascii() and s.isprintable() and "\ufffd" not in s)
    ended = llm.generate(prompts, 1, dataclasses.replace(params, stop=("never this", stop)))[0].candidates[0]
    assert ended.finish_reason == "stop_sequence"
    assert ended.text == free.text[: free.text.find(stop)]
    assert ended.token_ids == free.token_ids[: len(ended.token_ids)] and len(ended.token_ids) < 120
    assert stop in llm.tokenizer.decode(ended.token_ids)
    assert stop not in llm.tokenizer.decode(ended.token_ids[:-1])


def test_an_aborted_request_ends_with_what_it_has_and_disturbs_nobody(folder: Path) -> None:
    prompts = random_prompts([20, 30, 40])
    requests = [GenerationRequest(f"r{n}", p, (0, 1), FREE) for n, p in enumerate(prompts)]
    short = GenerationRequest("short", random_prompts([9], seed=8)[0], (0,), dataclasses.replace(FREE, max_tokens=3))
    expected = tokens(engine(folder).generate(prompts, 2, FREE))
    llm = engine(folder)
    made = []
    for ended in llm.engine.rollout([*requests, short]):
        made += ended
        if any(candidate.request_id == "short" for candidate in ended):
            llm.engine.abort("r1")
            llm.engine.abort("unknown")
    by_name = {(c.request_id, c.index): c for c in made}
    assert len(made) == len(by_name) == 7
    for number, index in ((0, 0), (0, 1), (2, 0), (2, 1)):
        assert by_name[f"r{number}", index].token_ids == expected[number][index]
    for index in (0, 1):
        aborted = by_name["r1", index]
        assert aborted.finish_reason == "abort" and 3 <= len(aborted.token_ids) < 24
        assert aborted.token_ids == expected[1][index][: len(aborted.token_ids)]
        assert len(aborted.logprobs) == len(aborted.token_ids)
    assert llm.engine.counters()["kv_blocks_used"] == 0


def test_an_abort_between_batches_does_not_reach_the_next_one(folder: Path) -> None:
    llm = engine(folder)
    prompts = random_prompts([20])
    expected = tokens(llm.generate(prompts, 2, FREE))
    llm.engine.abort("0")  # too late for the batch that was; the next one uses the same id
    outputs = llm.generate(prompts, 2, FREE)
    assert {c.finish_reason for c in outputs[0].candidates} == {"length"} and tokens(outputs) == expected


@pytest.mark.parametrize("lanes", [1, 2])
def test_candidates_aborted_before_they_began_have_no_tokens(folder: Path, lanes: int) -> None:
    """Two places only, so most of what is aborted still waits; more aborts at once than a step has room for."""
    llm = engine(folder, max_num_seqs=2, micro_batches=lanes)
    prompts = random_prompts([8, 9, 10, 11, 12, 13, 14])
    requests = [GenerationRequest(f"r{n}", p, (0, 1), FREE) for n, p in enumerate(prompts)]
    first = GenerationRequest("first", prompts[0][:5], (0, 1), dataclasses.replace(FREE, max_tokens=2))
    made = []
    for ended in llm.engine.rollout([first, *requests]):
        made += ended
        if len(made) == len(ended):
            for number in range(6):
                llm.engine.abort(f"r{number}")
                llm.engine.abort(f"r{number}")
    by_name = {(c.request_id, c.index): c for c in made}
    assert len(made) == len(by_name) == 16
    assert {by_name["r6", index].finish_reason for index in (0, 1)} == {"length"}
    aborted = [c for c in made if c.finish_reason == "abort"]
    assert len(aborted) == 12 and sum(c.token_ids == [] for c in aborted) >= 6
    assert all(len(c.token_ids) == len(c.logprobs) == len(c.sampling_logprobs) for c in made)
    assert all(c.text == "" for c in aborted if not c.token_ids)
    assert llm.engine.counters()["generated_tokens"] == sum(len(c.token_ids) for c in made)
    assert llm.engine.counters()["requests_waiting"] == 0


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 5, -(2**200)])
def test_any_whole_number_is_a_seed(folder: Path, seed: int) -> None:
    params = dataclasses.replace(FREE, seed=seed, max_tokens=8)
    prompts = random_prompts([9])
    assert tokens(engine(folder).generate(prompts, 3, params)) == tokens(engine(folder).generate(prompts, 3, params))
    other = dataclasses.replace(params, seed=seed + 1)
    assert tokens(engine(folder).generate(prompts, 3, params)) != tokens(engine(folder).generate(prompts, 3, other))


def test_frequencies_of_the_engine_fit_the_model(folder: Path) -> None:
    """20,000 first tokens of one prompt against the softmax of the model's logits (Pearson's chi-square)."""
    count = 20_000
    llm = engine(folder, max_num_seqs=4096, max_num_batched_tokens=4096, num_kv_blocks=5000)
    (prompt,) = random_prompts([12])
    params = SamplingParams(temperature=1.4, max_tokens=1, seed=5)
    drawn = [c.token_ids[0] for c in llm.generate([prompt], count, params)[0].candidates]
    counts = torch.bincount(torch.tensor(drawn), minlength=300).double()
    expected = count * (all_logits(stage_model(folder)[1], prompt)[-1].double() / 1.4).softmax(-1)
    likely = expected >= 5
    counts, expected = (torch.cat((t[likely], t[~likely].sum()[None])) for t in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2) > 1e-4
    assert llm.engine.counters()["prefill_tokens"] == 12


def test_logits_that_are_not_finite_are_an_error_that_names_the_policy(folder: Path) -> None:
    llm = engine(folder, dtype="float16")
    shape = llm.engine.config.linear_shapes["down_proj"]
    name = "model.layers.1.mlp.down_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.full((1, shape[1]), 6e4),
        f"{name}.lora_B.weight": torch.full((shape[0], 1), 6e4),
    }
    llm.publish(AdapterUpdate(1, tensors, {name: 1.0}))
    with pytest.raises(ModelError, match="version 1 gives logits that are not finite in float16"):
        llm.generate(random_prompts([9]), 1, FREE)
    llm.rollback(0)
    assert llm.generate(random_prompts([9]), 1, FREE)[0].candidates[0].finish_reason == "length"


def test_a_rollout_left_half_way_leaves_a_clean_engine(folder: Path) -> None:
    prompts = random_prompts([20, 30])
    llm = engine(folder)
    requests = [
        GenerationRequest(str(n), p, (0,), dataclasses.replace(FREE, max_tokens=2 + 20 * n))
        for n, p in enumerate(prompts)
    ]
    rollout = llm.engine.rollout(requests)
    next(rollout)
    with pytest.raises(RuntimeError, match="in a rollout already"):
        next(llm.engine.rollout(requests))
    with pytest.raises(AdapterError, match="while a rollout is running"):
        llm.rollback(0)
    rollout.close()
    assert llm.engine.counters()["kv_blocks_used"] == 0
    assert tokens(llm.generate(prompts, 2, FREE)) == tokens(engine(folder).generate(prompts, 2, FREE))


def test_an_engine_that_is_let_go_frees_its_memory_at_once(folder: Path) -> None:
    llm = engine(folder)
    llm.generate(random_prompts([20]), 2, FREE)
    llm.score(random_prompts([20]))
    memory = weakref.ref(llm.engine.kv_cache), weakref.ref(llm.engine.model)
    gc.disable()
    try:
        del llm
        assert all(one() is None for one in memory), "something of it refers to itself"
    finally:
        gc.enable()


def test_a_gpu_that_is_not_the_current_one_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda_ext.device.require_cuda", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match="'cuda:1' is not the GPU .* works on .0.; .* CUDA_VISIBLE_DEVICES=1 and"):
        engine(folder, device="cuda:1")


@pytest.mark.parametrize("name", ["max_model_len", "num_kv_blocks", "max_num_seqs", "micro_batches", "block_size"])
def test_options_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        EngineOptions("a folder", **{name: 0})


def test_answers_end_at_the_context_and_too_long_prompts_are_refused(folder: Path) -> None:
    llm = engine(folder, max_model_len=40)
    candidate = llm.generate(random_prompts([30]), 1, FREE)[0].candidates[0]
    assert candidate.finish_reason == "length" and len(candidate.token_ids) == 10
    candidate = llm.generate(random_prompts([39]), 1, FREE)[0].candidates[0]
    assert candidate.finish_reason == "length" and len(candidate.token_ids) == 1
    with pytest.raises(RequestError, match="40 tokens, the context holds 40"):
        llm.generate(random_prompts([30, 40]), 1, FREE)
    with pytest.raises(RequestError, match="KV blocks"):
        engine(folder, num_kv_blocks=2).generate(random_prompts([30]), 1, FREE)
    assert llm.engine.counters()["kv_blocks_used"] == 0


def test_switch_serves_the_new_policy_and_rollback_the_old_one_exactly(folder: Path, adapter: AdapterUpdate) -> None:
    llm = engine(folder)
    prompts = random_prompts([37, 64])
    base = llm.generate(prompts, 3, FREE)
    assert {c.policy_version for o in base for c in o.candidates} == {0}
    llm.publish(adapter)
    moved = llm.generate(prompts, 3, FREE)
    assert {c.policy_version for o in moved for c in o.candidates} == {1}
    assert all(c.cache_exact for o in moved for c in o.candidates)
    _, model = stage_model(folder)
    for output in moved:  # warm cache of version 0 in the pool: none of it may be served
        start = len(output.prompt_token_ids)
        for c in output.candidates:
            logits = all_logits(model, [*output.prompt_token_ids, *c.token_ids], adapter)[start - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(c.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(c.logprobs), expected, rtol=0, atol=1e-4)
    before = llm.engine.counters()["prefill_tokens"]
    llm.rollback(0)
    again = llm.generate(prompts, 3, FREE)
    assert tokens(again) == tokens(base)
    for mine, first in zip(again, base, strict=True):
        for a, b in zip(mine.candidates, first.candidates, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-5)
    # version 0's blocks are found again, and only the ends of the prompts are computed anew
    assert llm.engine.counters()["prefill_tokens"] - before == 5 + 16


def test_an_adapter_folder_is_served_under_a_version_of_its_own(folder: Path, tmp_path: Path) -> None:
    make_adapter(make_qwen3(tmp_path / "model"), tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["v_proj"])
    llm = engine(folder)
    prompts = random_prompts([37])
    base = tokens(llm.generate(prompts, 3, FREE))
    assert llm.load_adapter(tmp_path / "adapter") == 1
    moved = llm.generate(prompts, 3, FREE)
    assert tokens(moved) != base and moved[0].candidates[0].policy_version == 1
    llm.rollback(0)
    assert llm.load_adapter(tmp_path / "adapter") == 2
    assert tokens(llm.generate(prompts, 3, FREE)) == tokens(moved)
    with pytest.raises(AdapterError, match="is missing"):
        llm.load_adapter(tmp_path / "model")
    assert llm.engine.policy_version == 2


def test_prompts_may_be_text_tokens_or_chats(folder: Path) -> None:
    llm = engine(folder)
    text = "user: hello\nassistant: "
    chat = [{"role": "user", "content": "hello"}]
    outputs = llm.generate([text, llm.tokenizer.encode(text), chat], 2, FREE)
    assert tokens(outputs)[0] == tokens(outputs)[1] == tokens(outputs)[2]
    assert llm.engine.counters()["prefill_tokens"] == len(text)
    with pytest.raises(ValueError, match="not one string"):
        llm.generate("hello", 1, FREE)
    with pytest.raises(ValueError, match="2 prompts, but 1"):
        llm.generate(["a", "b"], 1, [FREE])


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"min_p": 1.5}, {"top_k": -1},
     {"max_tokens": 0}, {"stop": ("",)}, {"stop": "x"}],
    ids=str,
)  # fmt: skip
def test_parameters_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)).split("_")[0]):
        SamplingParams(**bad)
