"""Rollouts on one GPU or several: the rows of the design's table, one JSON line each.

    python -m benchmarks.rollout [--rows NAME ...] [--engine ember transformers vllm] [--breakdown] [--gpus 2]

A row's batch runs once to warm up (which also captures CUDA graphs), then ``--repetitions`` times; ``seconds`` is the
median, and prefill_s, decode_s and ms_per_step are those of the median repetition. It covers everything from token
ids in to all token ids and both log-probabilities on the host; nothing is decoded to text. Every repetition brings
prompts that the engine has never seen, sampled at temperature 1 with a seed, and goes on after EOS. The weights are
random, of the right scale; ``--model`` names a real folder instead.

A row is refused, loudly, where an engine made fewer tokens than asked for, log-probabilities that are not finite, or
computed another number of prompt tokens than the arithmetic says.

Keys that need a word:
  bandwidth_share   the fewest bytes that the decode steps must move (weights once a step, K and V of a prompt once a
                    group and step, of answers once a candidate and step) over decode_s, as a share of the measured
                    copy bandwidth
  gemm_share        operations of all matrix products of the row, attention's included, over seconds, as a share of the
                    measured rate of large bf16 products
  floor_seconds     what these two rates allow at best, see rollout_rows.least_work; floor_share = floor over seconds
  peak_gib          most memory that torch held at once, the KV pool included
  prefill_tokens, prefix_hit_tokens   of one repetition, as the engine counted
  breakdown         milliseconds of one decode step by kind of work, see rollout_breakdown
  gpus              above 1: a stage of the layers on each, floor and shares count them all, targets do not apply;
                    ``stage_gpu_ms`` is what a decode step takes on each stage's GPU, of ``ms_per_step``

Rows that the output has already for this commit, engine, GPU and model are skipped, so an interrupted run goes on
where it was; ``--again`` measures them anew.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rollout_attention import layer_calls, piece_tokens, time_calls
from benchmarks.rollout_attention_peers import PEERS, peer_calls, peer_version
from benchmarks.rollout_breakdown import step_breakdown
from benchmarks.rollout_engines import (
    SHAPES,
    Answer,
    EmberEngine,
    Engine,
    Prompts,
    Refused,
    TransformersEngine,
    VllmEngine,
    synchronize,
    write_model_folder,
)
from benchmarks.rollout_rows import ROWS, Hardware, Row, expected_tokens, least_work
from benchmarks.rollout_stages import StagesEngine
from ember_ray.model.qwen3_config import Qwen3Config, read_model_config
from ember_ray.tracking.files import json_line, read_jsonl, write_jsonl
from ember_ray.tracking.summary import git_state

ENGINES = ("ember", "transformers", "vllm", *PEERS)
LEAST_REPETITIONS = 3
"""A median of fewer says little; such rows are not kept."""

COUNTS = ("decode_steps", "prefill_tokens", "prefix_hit_tokens")

SAME_ROW = ("engine", "row", "git_commit", "gpu", "gpus", "model", "dtype")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="default: all; " + " ".join(r.name for r in ROWS))
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=["ember"])
    parser.add_argument("--model", type=Path, help="a real model folder instead of random weights")
    parser.add_argument(
        "--shape", choices=SHAPES, default="qwen3-4b", help="tiny: a small shape and rows, to try it out"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", type=int, default=1, help="stages of ember, each on a GPU of its own")
    parser.add_argument("--micro-batches", type=int, help="in flight at once; default: as many as stages")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=3, help="fewer than 3 is a try: printed, not written down")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, help="default: reports/rollout_<gpu>_<date>/rollout.jsonl; none with --shape tiny"
    )
    parser.add_argument("--again", action="store_true", help="measure rows that the output has already")
    parser.add_argument("--breakdown", action="store_true", help="add the parts of a decode step (ember on a GPU)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--gpu-memory-utilization", type=float, help="default: the engine's own")
    parser.add_argument("--copy-bandwidth", type=float, default=Hardware.copy_tb_s, help="TB/s, measured")
    parser.add_argument("--gemm-rate", type=float, default=Hardware.gemm_tflop_s, help="TFLOP/s, measured")
    parser.add_argument("--git-commit", help="for a copy of the tree without its history")
    options = parser.parse_args(given)
    known = [row.name for row in ROWS]
    unknown = set(options.rows or ()) - set(known)
    if unknown:
        parser.error(f"there is no row {min(unknown)!r}; rows: {', '.join(known)}")
    if options.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    if options.gpus < 1 or (options.gpus > 1 and options.engine != ["ember"]):
        parser.error("--gpus must be at least 1, and more than one is for --engine ember alone")
    if options.device == "cpu" and options.shape != "tiny" and options.model is None:
        parser.error("there is no CUDA device here; --shape tiny runs the benchmark itself on a CPU")
    return options


def gpu_name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def short_name(gpu: str) -> str:
    """``NVIDIA H200`` -> ``h200``, for a folder's name."""
    words = gpu.lower().split()
    return "_".join(word for word in words if word not in ("nvidia", "geforce", "tesla")) or "gpu"


def make_prompts(row: Row, repetition: int, vocab: int, seed: int) -> Prompts:
    """Random prompts; no other row and no other repetition has the same."""
    generator = np.random.default_rng([seed, zlib.crc32(row.name.encode()), repetition])
    tokens = generator.integers(0, vocab, (row.prompts, row.prompt))
    tokens[:, : row.common_prefix] = tokens[0, : row.common_prefix]
    return [tuple(prompt) for prompt in tokens.tolist()]


def check_answers(answers: list[Answer], row: Row, vocab: int, random_weights: bool) -> None:
    """Raises Refused where a candidate, a token or a log-probability is missing or cannot be.

    Args:
        random_weights: no two long answers can be equal then, so many tokens are worth drawing.
    """
    if len(answers) != row.candidates:
        raise Refused(f"{len(answers)} candidates came back instead of {row.candidates}")
    for token_ids, logprobs, sampling_logprobs in answers:
        counts = {len(token_ids), len(logprobs), len(sampling_logprobs)}
        if counts != {row.gen}:
            raise Refused(f"a candidate has {sorted(counts)} tokens and log-probabilities instead of {row.gen}")
        if not all(0 <= token < vocab for token in token_ids):
            raise Refused("a token is outside the vocabulary")
        if not all(math.isfinite(value) and value <= 1e-3 for value in (*logprobs, *sampling_logprobs)):
            raise Refused("a log-probability is not finite or above 0")
    if random_weights and row.gen >= 32 and len({tuple(token_ids) for token_ids, _, _ in answers}) < len(answers):
        raise Refused("two candidates have the same tokens: they were not drawn independently")


def measure(engine: Engine, row: Row, config: Qwen3Config, options: argparse.Namespace) -> dict[str, Any]:
    """Warms up, repeats, and gives the measured keys of a row."""
    found = engine.prepare(row)
    runs: list[dict[str, Any]] = []
    for repetition in range(options.repetitions + 1):
        prompts = make_prompts(row, repetition, config.vocab_size, options.seed)
        if options.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        synchronize(options.device)
        start = time.perf_counter()
        made = engine.generate(prompts, options.seed)
        synchronize(options.device)
        seconds = time.perf_counter() - start
        check_answers(engine.answers(made), row, config.vocab_size, options.model is None)
        figures = engine.figures()
        if isinstance(engine, EmberEngine | StagesEngine):
            counted = (int(figures["prefill_tokens"]), int(figures["prefix_hit_tokens"]))
            wanted = expected_tokens(row, engine.block_size)
            if counted != wanted:
                raise Refused(
                    f"the engine counted {counted[0]} prefill and {counted[1]} prefix-hit tokens, "
                    f"the arithmetic says {wanted[0]} and {wanted[1]}"
                )
        if repetition:  # the first one warms up
            runs.append({"seconds": seconds} | figures)
    times = [run["seconds"] for run in runs]
    middle = min(runs, key=lambda run: abs(run["seconds"] - statistics.median(times)))
    whole = {name: int(middle[name]) if name in middle else None for name in COUNTS}
    steps = whole["decode_steps"]
    measured: dict[str, Any] = {
        "seconds": statistics.median(times),
        "seconds_min": min(times),
        "seconds_max": max(times),
        "repetitions": len(times),
        "prefill_s": middle.get("prefill_s"),
        "decode_s": middle.get("decode_s"),
        "ms_per_step": 1e3 * middle["decode_s"] / steps if steps else None,
        **whole,
        "peak_gib": None if options.device == "cpu" else torch.cuda.max_memory_allocated() / 2**30,
        **{name: middle[name] for name in ("peak_gib", "stage_gpu_ms") if name in middle},
    }
    return found | measured


def measure_attention(name: str, row: Row, config: Qwen3Config, options: argparse.Namespace) -> dict[str, Any]:
    """Decode attention of one layer, alone."""
    make = layer_calls if name == "ember" else partial(peer_calls, name)
    calls = make(row, config, options.device, getattr(torch, options.dtype))
    times = time_calls(calls, options.device, options.repetitions)
    known: dict[str, Any] = (
        {"split_tokens": piece_tokens(row)} if name == "ember" else {"engine_version": peer_version()}
    )
    return known | {
        "seconds": statistics.median(times),
        "seconds_min": min(times),
        "seconds_max": max(times),
        "repetitions": len(times),
    }


def finished_row(
    row: Row, name: str, measured: dict[str, Any], config: Qwen3Config, common: dict[str, Any], hardware: Hardware
) -> dict[str, Any]:
    """All keys of a JSON line."""
    work = least_work(row, config, hardware)
    seconds, decode = measured["seconds"], work.decode_seconds and measured.get("decode_s")
    if row.attention_only:
        decode = seconds
    generated = None if row.attention_only else row.candidates * row.gen
    return {
        "engine": name,
        "row": row.name,
        "prompts": row.prompts,
        "n": row.n,
        "prompt": row.prompt,
        "gen": row.gen,
        "common_prefix": row.common_prefix,
        "lora_rank": row.lora_rank,
        "lora_mode": row.lora_mode,
        "gen_tok_s": generated and generated / seconds,
        **measured,
        "bandwidth_share": work.decode_bytes / decode / (hardware.copy_tb_s * 1e12) if decode else None,
        "gemm_share": work.flops / seconds / (hardware.gemm_tflop_s * 1e12),
        "floor_seconds": work.seconds,
        "floor_share": work.seconds / seconds,
        "target_seconds": row.target_seconds,
        "temperature": 1.0,
        "top_k": row.top_k,
        "top_p": row.top_p,
        **common,
    }


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Five digits that count; times of kernels are far below a second."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def build(
    name: str, rows: Sequence[Row], model: Path, load_format: str, options: argparse.Namespace, folder: Path
) -> Engine:
    if name == "transformers":
        return TransformersEngine(model, options.device, options.dtype, load_format)
    if name == "vllm":
        return VllmEngine(model, rows, options.dtype, load_format, options.seed, folder)
    wanted: dict[str, Any] = {"max_num_batched_tokens": options.max_num_batched_tokens}
    if options.gpu_memory_utilization is not None:
        wanted["gpu_memory_utilization"] = options.gpu_memory_utilization
    if options.gpus > 1:
        wanted["micro_batches"] = options.micro_batches
        return StagesEngine(model, rows, options.gpus, options.device, options.dtype, load_format, wanted)
    return EmberEngine(model, rows, options.device, options.dtype, load_format, wanted)


class Run:
    """One call of the command: measures row after row and writes each as soon as it is there."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.model, self.load_format = options.model, "auto"
        if self.model is None:
            self.model, self.load_format = write_model_folder(folder, options.shape), "dummy"
        self.config = read_model_config(self.model)
        self.hardware = Hardware(options.gpus * options.copy_bandwidth, options.gpus * options.gemm_rate)
        commit, dirty = git_state()
        gpu = gpu_name(options.device)
        self.common: dict[str, Any] = {
            "seed": options.seed,
            "dtype": options.dtype,
            "model": options.model.name if options.model else options.shape,
            "gpus": options.gpus * int(options.device != "cpu"),
            "gpu": gpu,
            "torch": torch.__version__,
            "git_commit": options.git_commit or commit,
            "git_dirty": dirty,
        }
        self.keeps = options.repetitions >= LEAST_REPETITIONS and (
            options.shape != "tiny" or options.output is not None
        )
        default = Path("reports") / f"rollout_{short_name(gpu)}_{date.today().isoformat()}" / "rollout.jsonl"
        self.output: Path = options.output or default
        self.failed: list[str] = []

    def __call__(self) -> int:
        rows = [row for row in ROWS if not self.options.rows or row.name in self.options.rows]
        if self.options.shape == "tiny":
            rows = [row.shrunk() for row in rows]
        if self.options.gpus > 1:
            rows = [replace(row, target_seconds=None) for row in rows if not row.attention_only]
        for name in self.options.engine:
            package = "flash_attn" if name in PEERS else name
            if name != "ember" and find_spec(package) is None:
                print(f"{package}: it is not installed here; install it, or leave it out of --engine", file=sys.stderr)
                self.failed.append(name)
                continue
            wanted = [row for row in rows if name in row.engines and not self._is_there(name, row)]
            for row in wanted:
                if row.attention_only:
                    with self._one_failure(name, row.name):
                        self._write(name, row, measure_attention(name, row, self.config, self.options), {})
            rest = [row for row in wanted if not row.attention_only]
            for _, same in groupby(rest, key=lambda row: row.lora_mode):
                self._measure_on_one_engine(name, list(same))
        if self.failed:
            print(f"{len(self.failed)} failed: {'; '.join(self.failed)}", file=sys.stderr)
        return 1 if self.failed else 0

    def _measure_on_one_engine(self, name: str, rows: list[Row]) -> None:
        with self._one_failure(name, ", ".join(row.name for row in rows)):
            engine = build(name, rows, self.model, self.load_format, self.options, self.folder)
            try:
                for row in rows:
                    with self._one_failure(name, row.name):
                        self._measure_row(name, row, engine)
            finally:
                engine.close()

    def _measure_row(self, name: str, row: Row, engine: Engine) -> None:
        measured = measure(engine, row, self.config, self.options)
        if self.options.breakdown and isinstance(engine, EmberEngine) and row.gen > 1:
            prompts = make_prompts(row, self.options.repetitions + 1, self.config.vocab_size, self.options.seed)
            with self._one_failure(name, f"breakdown of {row.name}"):
                measured |= step_breakdown(engine, self.config, prompts, measured["ms_per_step"], self.options)
        self._write(name, row, measured, engine.implementation)

    def _write(self, name: str, row: Row, measured: dict[str, Any], implementation: dict[str, str]) -> None:
        line = rounded(finished_row(row, name, measured, self.config, implementation | self.common, self.hardware))
        print(json_line(line), end="", flush=True)
        if self.keeps:
            write_jsonl(self.output, [*read_jsonl(self.output), line])

    def _is_there(self, name: str, row: Row) -> bool:
        if self.options.again or not self.keeps or self.common["git_commit"] is None:
            return False
        wanted = {"engine": name, "row": row.name} | self.common
        found = any(all(line.get(k) == wanted[k] for k in SAME_ROW) for line in read_jsonl(self.output))
        if found:
            print(f"{name}, {row.name}: in {self.output} already", file=sys.stderr)
        return found

    @contextmanager
    def _one_failure(self, name: str, what: str) -> Iterator[None]:
        """What fails must not take the other rows along; it is told, and the exit status is 1."""
        try:
            yield
        except Refused as refusal:
            print(f"{name}, {what}: {refusal}", file=sys.stderr)
            self.failed.append(f"{name}, {what}")
        except Exception:
            print(f"{name}, {what}:", file=sys.stderr)
            traceback.print_exc()
            self.failed.append(f"{name}, {what}")


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    with tempfile.TemporaryDirectory() as folder:
        return Run(options, Path(folder))()


if __name__ == "__main__":
    sys.exit(main())
