"""The rollout benchmark itself: its arithmetic, its checks, and a whole run of a small shape on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rollout
from benchmarks.rollout_attention import BLOCK, piece_tokens
from benchmarks.rollout_attention_peers import PEERS, peer_calls
from benchmarks.rollout_breakdown import Kernel, by_kind, decode_steps, kind_of, own_times, read_trace
from benchmarks.rollout_engines import EmberEngine, Refused, TransformersEngine, write_model_folder
from benchmarks.rollout_rows import ROWS, Hardware, Row, expected_tokens, least_work
from ember_ray.engine.decode_buffers import DecodeBuffers
from ember_ray.model.qwen3_config import Qwen3Config, read_model_config

KEYS = {
    "engine", "prompts", "n", "prompt", "gen", "common_prefix", "lora_rank", "lora_mode", "seconds", "seconds_min",
    "seconds_max", "gen_tok_s", "prefill_s", "decode_s", "ms_per_step", "bandwidth_share", "gemm_share", "peak_gib",
    "gpus", "git_commit", "prefill_tokens", "prefix_hit_tokens", "attention", "sampling", "temperature", "seed",
    "floor_seconds", "floor_share", "target_seconds", "gpu",
}  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}


@pytest.fixture(scope="module")
def qwen3_4b(tmp_path_factory: pytest.TempPathFactory) -> Qwen3Config:
    return read_model_config(write_model_folder(tmp_path_factory.mktemp("model"), "qwen3-4b"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"), "tiny")


# -- arithmetic ----------------------------------------------------------------------------------------------------


def test_the_shape_is_that_of_qwen3_4b(qwen3_4b: Qwen3Config) -> None:
    parameters = 36 * qwen3_4b.layer_parameters + 151936 * 2560 + 2560
    assert round(parameters / 1e9, 2) == 4.02


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("1x1_2048_128", 0.27),
        ("1x8_2048_128", 0.28),
        ("100x8_512_256", 4.6),
        ("100x8_2048_128", 4.9),
        ("100x8_4096_64", 6.7),
        ("100x16_2048_128", 6.4),
        ("prefill_100x2048", 2.47),
        ("group_attention_100x8_2048_64", 0.244e-3),
    ],
)
def test_floors_are_those_of_the_design(name: str, seconds: float, qwen3_4b: Qwen3Config) -> None:
    assert least_work(BY_NAME[name], qwen3_4b, Hardware()).seconds == pytest.approx(seconds, rel=0.05)


def test_the_work_of_a_small_row_counted_by_hand(tiny: Path) -> None:
    """One prompt of 3 tokens, one candidate of 2: three tokens are read, then one step attends to 4 positions."""
    config = read_model_config(tiny)
    work = least_work(Row("r", 1, 1, 3, 2), config, Hardware(1.0, 1.0))
    linear = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 160)
    head, kv = 1024 * 64, 2 * 2 * 2 * 16 * 2
    assert work.decode_bytes == 2 * (linear + head) + 4 * kv
    causal = 2 * 2 * 4 * 16 * 3**2
    assert work.flops == 2 * linear * 4 + 2 * head * 2 + causal + 4 * 2 * 4 * 16 * 4
    slots = least_work(Row("r", 1, 1, 3, 2, lora_rank=1, lora_mode="slots"), config, Hardware())
    extra = 2 * (128 + 96 + 96 + 128 + 3 * 224)
    assert slots.flops == work.flops + 2 * extra * 4
    merged = least_work(Row("r", 1, 1, 3, 2, lora_rank=1, lora_mode="merged"), config, Hardware())
    assert merged.flops == work.flops


def test_expected_tokens() -> None:
    assert expected_tokens(BY_NAME["100x8_2048_128"], 16) == (204800, 700 * 2048)
    assert expected_tokens(BY_NAME["100x8_2048_128_common1024"], 16) == (2048 + 99 * 1024, 700 * 2048 + 99 * 1024)
    # whole blocks only
    assert expected_tokens(Row("r", 2, 1, 100, 1, common_prefix=50), 16) == (200 - 48, 48)


def test_all_rows_of_the_table_are_there() -> None:
    assert len(BY_NAME) == len(ROWS)
    work = {(r.prompts, r.n, r.prompt, r.gen, r.lora_mode, r.common_prefix, r.top_k, r.attention_only) for r in ROWS}
    for prompts, n, prompt, gen in (
        (1, 1, 2048, 128), (1, 8, 2048, 128), (100, 8, 512, 256), (100, 8, 2048, 128), (100, 8, 4096, 64),
        (100, 16, 2048, 128), (100, 1, 2048, 1),
    ):  # fmt: skip
        assert (prompts, n, prompt, gen, None, 0, 0, False) in work
    for special in (("merged", 0, 0, False), ("slots", 0, 0, False), (None, 1024, 0, False), (None, 0, 50, False)):
        assert (100, 8, 2048, 128, *special) in work
    assert (100, 8, 2048, 64, None, 0, 0, True) in work


def test_no_prompt_comes_twice() -> None:
    """Not in a batch, not in another repetition, not in another row; a common prefix is new each time."""
    shared = BY_NAME["100x8_2048_128_common1024"].shrunk()
    rows = [BY_NAME["100x8_2048_128"].shrunk(), BY_NAME["8x8_2048_128"].shrunk(), shared]
    batches = {(row.name, rep): rollout.make_prompts(row, rep, 1024, 1) for row in rows for rep in range(4)}
    prompts = [prompt for batch in batches.values() for prompt in batch]
    assert len({prompt[:16] for prompt in prompts}) == 2 * 4 * 3 + 4
    for repetition in range(4):
        batch = batches[shared.name, repetition]
        assert len({prompt[: shared.common_prefix] for prompt in batch}) == 1
        assert len({prompt[shared.common_prefix :] for prompt in batch}) == 3
    assert batches == {key: rollout.make_prompts(BY_NAME[key[0]].shrunk(), key[1], 1024, 1) for key in batches}


# -- checks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda answers: answers[:-1], "3 candidates came back instead of 4"),
        (lambda answers: [(answers[0][0][:-1], *answers[0][1:]), *answers[1:]], "instead of 32"),
        (lambda answers: [([1024] * 32, *answers[0][1:]), *answers[1:]], "outside the vocabulary"),
        (lambda answers: [(answers[0][0], [float("nan")] * 32, answers[0][2]), *answers[1:]], "not finite"),
        (lambda answers: [(answers[0][0], answers[0][1], [0.5] * 32), *answers[1:]], "above 0"),
        (lambda answers: [answers[1], *answers[1:]], "same tokens"),
    ],
    ids=["missing", "short", "vocabulary", "nan", "positive", "equal"],
)
def test_answers_that_cannot_be_are_refused(broken: Any, words: str) -> None:
    row = Row("r", 2, 2, 8, 32)
    answers = [(list(range(start, start + 32)), [-1.0] * 32, [-1.0] * 32) for start in range(4)]
    rollout.check_answers(answers, row, 1024, random_weights=True)
    with pytest.raises(Refused, match=words):
        rollout.check_answers(broken(answers), row, 1024, random_weights=True)


def test_an_engine_that_reads_prompts_twice_is_refused(tiny: Path) -> None:
    row = replace(BY_NAME["100x8_2048_128"].shrunk(), gen=2)
    options = rollout.arguments(["--shape", "tiny", "--device", "cpu"])
    wasteful = {"prefix_sharing": False, "num_kv_blocks": 256}
    engine = EmberEngine(tiny, [row], "cpu", "float32", "dummy", wasteful)
    with pytest.raises(Refused, match="the engine counted 768 prefill and .* the arithmetic says 192 and 576"):
        rollout.measure(engine, row, read_model_config(tiny), options)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--rows", "2x2"], "there is no row '2x2'; rows: 1x1_2048_128"),
        (["--repetitions", "0"], "--repetitions must be at least 1"),
        (["--device", "cpu"], "--shape tiny runs the benchmark itself on a CPU"),
    ],
)
def test_bad_arguments(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rollout.arguments(given)
    assert words in capsys.readouterr().err


# -- the whole thing -----------------------------------------------------------------------------------------------


def test_all_rows_run_and_a_second_call_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "reports" / "rollout.jsonl"
    call = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--output", str(output), "--git-commit", "c0"]
    few = ["1x8_2048_128", "100x8_2048_128_common1024"]
    assert rollout.main([*call, "--rows", *few]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert printed == lines and [line["row"] for line in lines] == few
    for line in lines:
        assert KEYS <= line.keys()
        assert line["seconds_min"] <= line["seconds"] <= line["seconds_max"] and line["repetitions"] == 3
        assert line["gen_tok_s"] == pytest.approx(line["prompts"] * line["n"] * line["gen"] / line["seconds"], rel=1e-3)
        assert line["floor_share"] == pytest.approx(line["floor_seconds"] / line["seconds"], rel=1e-3)
    assert (lines[1]["prefill_tokens"], lines[1]["prefix_hit_tokens"]) == (64 + 2 * 32, 3 * 3 * 64 + 2 * 32)

    # a line that a killed process left half written is no row
    with output.open("a") as file:
        file.write('{"engine": "ember", "row": "1x1_2048_12')
    assert rollout.main([*call, "--engine", "ember", "transformers"]) == 0
    rows = [(line["engine"], line["row"]) for line in map(json.loads, output.read_text().splitlines())]
    assert sorted(rows) == sorted(
        (name, row.name) for row in ROWS for name in row.engines if name in ("ember", "transformers")
    )
    slots = next(line for line in map(json.loads, output.read_text().splitlines()) if line["lora_mode"] == "slots")
    assert slots["publish_s"] > 0 and slots["lora_rank"] == 4
    assert rollout.main([*call, "--rows", few[0], "--again"]) == 0
    assert len(output.read_text().splitlines()) == len(rows) + 1


def test_what_fails_is_told_and_takes_nothing_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rollout.jsonl"
    call = ["--shape", "tiny", "--device", "cpu", "--output", str(output), "--rows", "1x1_2048_128"]
    assert rollout.main([*call, "--engine", "ember", "transformers", "--breakdown"]) == 1
    error = capsys.readouterr().err
    assert "ember, breakdown of 1x1_2048_128: the breakdown of a step needs a GPU" in error and "1 failed" in error
    assert [json.loads(line)["engine"] for line in output.read_text().splitlines()] == ["ember", "transformers"]
    assert rollout.main([*call, "--engine", "ember", "transformers", "--dtype", "float15"]) == 1
    error = capsys.readouterr().err
    assert "ember, 1x1_2048_128:" in error and "dtype must be float32" in error and "2 failed" in error
    assert len(output.read_text().splitlines()) == 2


def test_a_try_is_printed_but_not_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call = ["--shape", "tiny", "--device", "cpu", "--rows", "1x1_2048_128"]
    assert rollout.main([*call, "--repetitions", "1", "--output", "rollout.jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["repetitions"] == 1
    assert rollout.main(call) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("engine", "package"), [("vllm", "vllm"), ("flash_attn_two_part", "flash_attn")])
def test_a_peer_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str, package: str
) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed here")
    call = ["--shape", "tiny", "--device", "cpu", "--output", str(tmp_path / "r.jsonl"), "--engine", engine]
    assert rollout.main(call) == 1
    assert f"{package}: it is not installed here" in capsys.readouterr().err


def test_attention_alone_is_cut_as_in_the_engine(tiny: Path) -> None:
    whole, config = BY_NAME["group_attention_100x8_2048_64"], read_model_config(tiny)
    for row in (whole, whole.shrunk()):
        engine = DecodeBuffers(row.candidates, BLOCK, config.share, "cpu")
        assert piece_tokens(row) == engine.groups.split_tokens
    assert piece_tokens(whole) == 1024


@pytest.mark.gpu
@pytest.mark.parametrize("peer", PEERS)
def test_flash_attn_computes_what_it_is_measured_against(peer: str, qwen3_4b: Qwen3Config, tmp_path: Path) -> None:
    pytest.importorskip("flash_attn")
    row = replace(BY_NAME["group_attention_100x8_2048_64"], prompts=3, n=5, prompt=512, gen=37)
    (call,) = peer_calls(peer, row, qwen3_4b, "cuda", torch.bfloat16)  # compares itself with ours
    assert call().shape == (15, 32, 128)
    with pytest.raises(Refused, match="no whole pages of 256"):
        peer_calls(peer, replace(row, prompt=500), qwen3_4b, "cuda", torch.bfloat16)


@pytest.mark.slow
def test_stages_run_the_rows_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU: two actors and gloo between them."""
    call = ["--shape", "tiny", "--device", "cpu", "--gpus", "2", "--output", str(tmp_path / "r.jsonl")]
    assert rollout.main([*call, "--rows", "8x8_2048_128", "100x8_2048_128_slots"]) == 1
    assert "slots: several GPUs are measured without an adapter only" in capsys.readouterr().err
    (line,) = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert KEYS <= line.keys() and line["transport"] == "gloo" and line["layer_split"] == "1+1"
    assert line["target_seconds"] is None and line["prefill_tokens"] == 3 * 64
    assert line["prefill_s"] + line["decode_s"] <= line["seconds"] and line["decode_steps"] >= line["gen"] - 1


def test_transformers_serves_the_same_weights(tiny: Path) -> None:
    """Log-probabilities of our tokens under transformers' model; a weight apart would show at once."""
    row, config = replace(BY_NAME["8x8_2048_128"].shrunk(), gen=5), read_model_config(tiny)
    prompts = rollout.make_prompts(row, 0, config.vocab_size, 1)
    ours = EmberEngine(tiny, [row], "cpu", "float32", "dummy", {})
    theirs = TransformersEngine(tiny, "cpu", "float32", "dummy")
    ours.prepare(row)
    theirs.prepare(row)
    answers = ours.answers(ours.generate(prompts, 1))
    rollout.check_answers(theirs.answers(theirs.generate(prompts, 1)), row, config.vocab_size, True)
    for number, (token_ids, logprobs, sampling_logprobs) in enumerate(answers):
        whole = torch.tensor([[*prompts[number // row.n], *token_ids]])
        with torch.inference_mode():
            logits = theirs._network(whole).logits[0, row.prompt - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)
        assert sampling_logprobs == pytest.approx(logprobs, abs=1e-5)


# -- the breakdown of a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "gemm"),
        ("void ember::skinny::(anonymous namespace)::skinny_linear_kernel<2>(Problem)", "gemm"),
        ("void ember::lora_expand_kernel<__nv_bfloat16>(LoraExpand<__nv_bfloat16>)", "gemm"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention_prefix"),
        ("void ember::decode::(anonymous namespace)::split_kernel<128>(Problem)", "attention_prefix"),
        ("void ember::decode::(anonymous namespace)::finish_kernel<128>(Problem)", "attention_suffix"),
        ("void ember::sampling::(anonymous namespace)::partials_kernel<float>(Args)", "sampling"),
        ("void ember::decode_inputs_kernel(int const*, int*)", "rest"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "rest"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_parts_add_up_to_the_step(tmp_path: Path) -> None:
    """Two launches of a graph after a prefill; the second kernel of a step is on the chip before the first is done."""

    def event(name: str, ts: float, dur: float, launch: int, cat: str = "kernel") -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": launch}}

    events = [event("prefill_gemm", 0.0, 100.0, 1), {"ph": "M", "name": "process_name", "args": {}}]
    for launch, start in ((7, 110.0), (8, 210.0), (9, 310.0)):
        events += [
            event("layer_gemm", start, 40.0, launch),
            event("ember::decode::split_kernel", start + 10.0, 45.0, launch),
            event("ember::decode::finish_kernel", start + 10.0, 50.0, launch),
            event("rms_norm_kernel", start + 65.0, 5.0, launch),
            event("ember::sampling::draw_kernel", start + 70.0, 20.0, launch),
            event("cudaGraphLaunch", start - 5.0, 3.0, launch, "cuda_runtime"),
        ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    kernels = read_trace(path)
    assert len(kernels) == 16 and all(isinstance(kernel, Kernel) for kernel in kernels)
    steps = decode_steps(kernels, least=5)
    assert [len(step) for step in steps] == [5, 5, 5]
    times, span = own_times(steps)
    assert span == pytest.approx(0.1)
    parts = by_kind(times, ms_per_step=0.098)
    assert parts == {
        "gemm": pytest.approx(0.04),
        "attention_prefix": pytest.approx(0.015),
        "attention_suffix": pytest.approx(0.005),
        "sampling": pytest.approx(0.02),
        "rest": pytest.approx(0.018),
    }
    assert sum(parts.values()) == pytest.approx(0.098)
    with pytest.raises(Refused, match="fewer than two decode steps"):
        own_times(decode_steps(kernels, least=6))


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_broken_down(tmp_path: Path) -> None:
    output = tmp_path / "rollout.jsonl"
    call = ["--shape", "tiny", "--device", "cuda", "--output", str(output), "--breakdown"]
    assert rollout.main([*call, "--rows", "100x8_512_256", "group_attention_100x8_2048_64"]) == 0
    lines = {line["row"]: line for line in map(json.loads, output.read_text().splitlines())}
    line = lines["100x8_512_256"]
    assert line["decode_steps"] >= line["gen"] - 1
    assert line["prefill_s"] > 0 and line["decode_s"] > 0
    assert line["prefill_s"] + line["decode_s"] < 1.1 * line["seconds"]
    assert line["ms_per_step"] == pytest.approx(1e3 * line["decode_s"] / line["decode_steps"], rel=1e-3)
    assert sum(line["breakdown"].values()) == pytest.approx(line["ms_per_step"], rel=1e-2)
    assert set(line["breakdown"]) == {"gemm", "attention_prefix", "attention_suffix", "sampling", "rest"}
    assert all(line["breakdown"][part] > 0 for part in ("gemm", "attention_prefix", "sampling"))
    assert line["peak_gib"] > 0 and line["gpus"] == 1 and line["gpu"] != "cpu"
    assert 0 < lines["group_attention_100x8_2048_64"]["seconds"] < 0.01
