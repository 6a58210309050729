"""One copy of the model for rollout and learning against two, with real training steps: one JSON line a cell.

    python -m benchmarks.unified_backend [--cells NAME ...]

A cell is an engine and a GRPO learner (TRL, PEFT) on one GPU, a process each:

  unified_slots    the learner's model is built on the engine's base weights; adapters beside them, published through
                   the GPU's memory
  unified_merged   the same, with adapters merged into live weights of the engine's own
  dual_file        two copies; the adapter goes through a PEFT folder
  dual_full        two copies; all weights, with the adapter merged into them, go from the learner's process into the
                   engine's through the GPU's memory, in buckets

Rounds of rollout, one optimizer step, publication and the first token of a short prompt; the first one warms up. Then
rollouts of a larger batch with a publication before each, without learning. Weights are random, prompts never repeat.

Keys that need a word:
  base_gb, kv_gb         the engine's base weights and its KV cache (10^9 bytes, as all)
  loaded_gb              what torch holds in both processes once they are up, KV cache included
  peak_gb                sum of the most that torch held in each
  gpu_loaded_gb, gpu_peak_gb   of the whole GPU as the driver tells it, CUDA contexts included; the peak is the highest
                         of the looks after each phase, with what torch's allocators keep
  first_token_s          from the end of the optimizer step to the first token under the new policy: median, and
                         publish_s of it until the engine has switched
  tokens_per_s           generated tokens of a round over all of its seconds
  alone_tokens_per_s     generated tokens of the larger rollouts over their seconds and those of their publications

On a CPU memory is PSS, the process's share of what it has mapped, and ``gpu_*`` are 0.

Behind the last publication the engine's log-probabilities are compared with the learner's (``mismatch``, the mean
absolute difference); a cell where they are of two policies is refused. ``moved`` is the same against log-probabilities
of the policy that the run started from.

Cells that the output has already for this commit and GPU are skipped; ``--again`` measures them anew. The figure is
made of all lines of the output.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import unified_processes as there
from benchmarks.rollout import gpu_name, rounded, short_name
from benchmarks.rollout_engines import SHAPES, Refused, write_model_folder
from benchmarks.unified_figure import write_figure
from ember_ray.model.qwen3_config import read_model_config
from ember_ray.tracking.files import json_line, read_jsonl, write_jsonl
from ember_ray.tracking.summary import git_state

CELLS = ("unified_slots", "unified_merged", "dual_file", "dual_full")
BUCKET_BYTES = 2**30
LARGEST_MISMATCH = 0.1
"""Of bf16 arithmetic it is a fifth of this."""

SAME_CELL = ("cell", "git_commit", "gpu", "model", "dtype", "work")
ENGINE_IMPORTS = ("ember_ray.engine.llm", "ember_ray.model.adapter_outbox", "ember_ray.data.scored_group")
LEARNER_IMPORTS = ("ember_ray.train.grpo_trainer", "ember_ray.train.grpo", "peft", "ember_ray.model.adapter_outbox")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="tiny: a small shape, to try it out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="measured ones, after one to warm up")
    shape = ("PROMPTS", "N", "PROMPT", "GEN")
    parser.add_argument("--work", type=int, nargs=4, default=(4, 8, 512, 128), metavar=shape)
    parser.add_argument("--alone", type=int, nargs=4, default=(100, 8, 512, 128), metavar=shape)
    parser.add_argument("--alone-rounds", type=int, default=2, help="0: none")
    parser.add_argument("--first-prompt", type=int, default=16, help="tokens of the prompt whose first token is timed")
    parser.add_argument("--batch", type=int, default=4, help="candidates in one forward and backward")
    parser.add_argument("--output", type=Path, help="default: reports/unified_backend_<gpu>_<date>/unified.jsonl")
    parser.add_argument("--again", action="store_true", help="measure cells that the output has already")
    parser.add_argument("--git-commit", help="for a copy of the tree without its history")
    options = parser.parse_args(given)
    if options.device == "cpu" and options.shape != "tiny":
        parser.error("there is no CUDA device here; --shape tiny runs the benchmark itself on a CPU")
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


class Cell:
    """An engine and a learner, each in a process of its own, which import meanwhile."""

    def __init__(self, name: str) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.engine, self.learner = (ProcessPoolExecutor(1, context) for _ in range(2))
        self._ready = [
            self.engine.submit(there.warm_imports, *ENGINE_IMPORTS),
            self.learner.submit(there.warm_imports, *LEARNER_IMPORTS),
        ]

    def close(self) -> None:
        """Ends both processes and waits for them."""
        for pool in (self.learner, self.engine):
            pool.shutdown(cancel_futures=True)

    def _say(self, what: str) -> None:
        print(f"{self.name}: {what} {time.monotonic() - self._begun:.1f} s", file=sys.stderr, flush=True)

    def measure(self, model: Path, options: argparse.Namespace) -> dict[str, Any]:
        """Everything of a row but what all rows have."""
        self._begun = time.monotonic()
        for ready in self._ready:
            ready.result()
        self._say("imported")
        self._model, self._options, self._version = str(model), options, 0
        self._looks: list[float] = []
        vocab = read_model_config(model).vocab_size
        work, alone = options.work, options.alone
        engine = self.engine.submit(there.start_engine, self._engine_options()).result()
        self._say("engine loaded")
        learner = self.learner.submit(
            there.start_learner, self._model, engine["handles"] if self.name.startswith("unified") else None,
            options.dtype, options.device, options.rank, options.batch, -(-work[0] * work[1] // options.batch), work[3],
        ).result()  # fmt: skip
        if self.name == "dual_full":
            self._handles, self._plan = self.learner.submit(
                there.make_buckets, options.dtype, BUCKET_BYTES if options.device != "cpu" else 2**20
            ).result()
        loaded = self._memory()
        self._say("loaded")
        rounds = [self._round(number, vocab) for number in range(options.rounds + 1)]
        first, rounds = rounds[0], rounds[1:]
        self._say("learnt")
        row: dict[str, Any] = {
            "base_gb": engine["base"],
            "kv_gb": engine["kv"],
            "loaded_gb": loaded["engine"]["now"] + loaded["learner"]["now"],
            "gpu_loaded_gb": loaded["engine"]["gpu"],
        }
        for key in ("rollout_s", "learn_s", "publish_s", "first_token_s", "tokens_per_s", "loss"):
            row[key] = statistics.median(one[key] for one in rounds)
        row["first_token_s_all"] = [one["first_token_s"] for one in rounds]
        if options.alone_rounds:
            times = [self._alone(_prompts(alone, 100 + number, vocab)) for number in range(options.alone_rounds + 1)]
            times = times[1:]
            row["alone_rollout_s"] = statistics.median(one["rollout_s"] for one in times)
            row["alone_publish_s"] = statistics.median(one["publish_s"] for one in times)
            row["alone_tokens_per_s"] = sum(one["tokens"] for one in times) / sum(
                one["rollout_s"] + one["publish_s"] for one in times
            )
        peak = self._memory()
        row["engine_peak_gb"], row["learner_peak_gb"] = peak["engine"]["peak"], peak["learner"]["peak"]
        row["engine_loaded_gb"], row["learner_loaded_gb"] = loaded["engine"]["now"], learner["memory"]["now"]
        row["peak_gb"] = peak["engine"]["peak"] + peak["learner"]["peak"]
        row["gpu_peak_gb"] = max(self._looks)
        self._say("measured")
        now = self.engine.submit(there.rollout, _prompts(work, 999, vocab), work[1], work[3], 999).result()
        row["mismatch"] = self.learner.submit(there.mismatch, now["groups"]).result()
        row["moved"] = self.learner.submit(there.mismatch, first["groups"]).result()
        if not row["mismatch"] < min(LARGEST_MISMATCH, row["moved"]):
            print(json_line(rounded(row)), end="", file=sys.stderr)  # what is wrong with it may show
            raise Refused(f"engine and learner have two policies: {row['mismatch']:g} apart, {row['moved']:g} learnt")
        return row

    def _engine_options(self) -> dict[str, Any]:
        options = self._options
        blocks = [
            p * -(-prompt // 16) + p * n * (-(-gen // 16) + 1) for p, n, prompt, gen in (options.work, options.alone)
        ]
        candidates = max(p * n for p, n, _, _ in (options.work, options.alone))
        return {
            "model": self._model,
            "dtype": options.dtype,
            "device": options.device,
            "load_format": "dummy",
            "lora_mode": "merged" if self.name == "unified_merged" else "slots",
            "num_kv_blocks": max(blocks) + 16,
            "max_num_seqs": candidates,
            "max_model_len": max(prompt + gen for _, _, prompt, gen in (options.work, options.alone)),
            "max_num_batched_tokens": max(8192 if options.device != "cpu" else 2048, candidates),
        }

    def _memory(self) -> dict[str, dict[str, float]]:
        found = {
            "engine": self.engine.submit(there.engine_memory).result(),
            "learner": self.learner.submit(there.learner_memory).result(),
        }
        self._looks.append(found["engine"]["gpu"])
        return found

    def _round(self, number: int, vocab: int) -> dict[str, Any]:
        options = self._options
        prompts = _prompts(options.work, number, vocab)
        made = self.engine.submit(there.rollout, prompts, options.work[1], options.work[3], number).result()
        learnt = self.learner.submit(there.learn, made["groups"]).result()
        self._publish()
        switched = time.monotonic()
        short = _prompts((1, 1, options.first_prompt, 1), 1000 + number, vocab)[0]
        first = self.engine.submit(there.first_token, short).result() - learnt["ended"]
        self._memory()
        return {
            "rollout_s": made["seconds"],
            "learn_s": learnt["seconds"],
            "publish_s": switched - learnt["ended"],
            "first_token_s": first,
            "tokens_per_s": made["tokens"] / (made["seconds"] + learnt["seconds"] + switched - learnt["ended"]),
            "loss": learnt["loss"],
            "groups": made["groups"],
        }

    def _alone(self, prompts: there.Prompts) -> dict[str, float]:
        begun = time.monotonic()
        self._publish()
        published = time.monotonic() - begun
        options = self._options
        made = self.engine.submit(there.rollout, prompts, options.alone[1], options.alone[3], len(prompts)).result()
        self._memory()
        return {"publish_s": published, "rollout_s": made["seconds"], "tokens": made["tokens"]}

    def _publish(self) -> None:
        """The learner's policy, as it is now, becomes the engine's, in the cell's own way."""
        self._version += 1
        options = self._options
        if self.name.startswith("unified"):
            notice = self.learner.submit(there.write_notice, self._model, options.dtype, self._version).result()
            self.engine.submit(there.take_notice, notice).result()
        elif self.name == "dual_file":
            folder = str(Path(self._model) / "adapter")
            self.learner.submit(there.save_folder, folder).result()
            self.engine.submit(there.take_folder, folder, self._version).result()
        else:
            plan, taken = self._plan, []
            for number, places in enumerate(plan):
                if number > 1:
                    taken[number - 2].result()  # the bucket is free again
                self.learner.submit(there.fill_bucket, number % 2, places).result()
                last = number == len(plan) - 1
                taken.append(
                    self.engine.submit(there.take_weights, number % 2, self._handles[number % 2], places, last)
                )
            for one in taken:
                one.result()


def _prompts(work: Sequence[int], number: int, vocab: int) -> there.Prompts:
    generator = np.random.default_rng([number, *work])
    return [tuple(row) for row in generator.integers(0, vocab, (work[0], work[2])).tolist()]


def main(given: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    options = arguments(given)
    commit, dirty = git_state()
    gpu = gpu_name(options.device)
    default = Path("reports") / f"unified_backend_{short_name(gpu)}_{date.today().isoformat()}" / "unified.jsonl"
    output = options.output or default
    common = {
        "model": options.shape, "dtype": options.dtype, "rank": options.rank, "work": list(options.work),
        "alone": list(options.alone), "rounds": options.rounds, "alone_rounds": options.alone_rounds,
        "first_prompt": options.first_prompt, "batch": options.batch, "gpu": gpu, "torch": torch.__version__,
        "git_commit": options.git_commit or commit, "git_dirty": dirty,
    }  # fmt: skip
    there_already = [] if options.again else read_jsonl(output)
    todo = [
        name for name in options.cells
        if not any(all(line.get(k) == ({"cell": name} | common)[k] for k in SAME_CELL) for line in there_already)
    ]  # fmt: skip
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model_folder(Path(folder), options.shape)
        ahead = 2 if options.device == "cpu" else len(todo)  # to import takes long, and has cores enough
        cells = [Cell(name) for name in todo[:ahead]]
        for place, name in enumerate(todo):
            cell = cells.pop(0)
            try:
                begun = time.monotonic()
                row = {"cell": name} | rounded(cell.measure(model, options)) | common
                row["cell_s"] = round(time.monotonic() - begun, 1)
                print(json_line(row), end="", flush=True)
                write_jsonl(output, [*read_jsonl(output), row])
            except Refused as refusal:
                print(f"{name}: {refusal}", file=sys.stderr)
                failed.append(name)
            except Exception:
                print(f"{name}:", file=sys.stderr)
                traceback.print_exc()
                failed.append(name)
            cell.close()
            if place + ahead < len(todo):
                cells.append(Cell(todo[place + ahead]))
    if output.exists():
        write_figure(read_jsonl(output), output.with_suffix(".svg"))
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
