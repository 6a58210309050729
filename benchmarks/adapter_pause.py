"""How long a running batch pauses for a switch of adapters in flight, one JSON line each mode and rank.

    python -m benchmarks.adapter_pause [--modes slots merged] [--ranks 16] [--prompts 100 --candidates 8] ...

The same batch is generated without and with switches: a second thread stages one adapter after the other beside the
batch, as a stage actor does, and lets the engine switch between two plans of decode steps. ``pause_ms`` is the time of
all decode steps on the GPU that came with the switches, divided by their number; staging beside the batch is in it.
``decode_step_ms`` is a step of the batch without them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapter_swap import MODES, MODULES, learner_adapter
from benchmarks.rollout import gpu_name, rounded, short_name
from benchmarks.rollout_engines import SHAPES, write_model_folder
from ember_ray.engine.llm import LLM
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.model.adapter_layout import AdapterPacker, FlatAdapter
from ember_ray.model.lora import check_adapter
from ember_ray.tracking.files import json_line, write_jsonl
from ember_ray.tracking.summary import git_state

BETWEEN_S = 0.03
"""From one switch to the staging of the next."""


class Swapper:
    """Stages and switches, one adapter after the other, until it is stopped."""

    def __init__(self, llm: LLM, adapters: list[FlatAdapter], version: int) -> None:
        self._engine, self._adapters = llm.engine, adapters
        self.version, self.switches = version, 0
        self.fault: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Swapper:
        self._thread.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._ended.set()
        self._thread.join()
        if self.fault is not None:
            raise self.fault

    def _run(self) -> None:
        engine = self._engine
        try:
            while not self._ended.wait(BETWEEN_S):
                version = self.version + 1
                with engine.beside():
                    engine.stage_adapter(replace(self._adapters[version % 2], version=version))
                engine.switch_in_flight(version)
                while engine.policy_version != version and not self._ended.wait(0.001):
                    pass
                if engine.policy_version == version:
                    self.version, self.switches = version, self.switches + 1
        except BaseException as fault:
            self.fault = fault


def measure(mode: str, rank: int, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    seqs = options.prompts * options.candidates
    llm = LLM(
        EngineOptions(
            str(model), device=options.device, dtype=options.dtype, load_format="dummy", lora_mode=mode,
            max_num_seqs=seqs, max_model_len=options.prompt_tokens + options.tokens,
        )
    )  # fmt: skip
    config = llm.engine.config
    adapters = []
    for seed in (1, 2):
        update = learner_adapter(config, rank, MODULES["all"], options.device, seed)
        checked = check_adapter(update, config.linear_shapes, config.num_hidden_layers)
        adapters.append(AdapterPacker(checked, config.linear_shapes, getattr(torch, options.dtype)).pack(seed))
    for adapter in adapters:
        llm.engine.stage_adapter(adapter)
        llm.engine.commit_adapter(adapter.version)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, config.vocab_size, (options.prompts, options.prompt_tokens), generator=generator).tolist()
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True, seed=1)

    def decode_seconds() -> tuple[float, float]:
        made = llm.generate(rows, options.candidates, params)
        assert all(len(one.token_ids) == options.tokens for output in made for one in output.candidates)
        timings = llm.engine.timings
        return timings["decode_seconds"], timings["decode_steps"]

    version = adapters[-1].version
    decode_seconds()  # captures
    calm, steps = decode_seconds()
    with Swapper(llm, adapters, version) as swapper:
        rough, _ = decode_seconds()
    again, _ = decode_seconds()
    without = (calm + again) / 2
    return {
        "mode": mode, "rank": rank, "modules": "all", "source": "gpu",
        "pause_ms": 1e3 * (rough - without) / max(1, swapper.switches), "switches": swapper.switches,
        "decode_step_ms": 1e3 * without / steps, "decode_seconds": [calm, rough, again],
        "prompts": options.prompts, "candidates": options.candidates, "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
    }  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b")
    parser.add_argument("--device", default="cuda", choices=["cuda"], help="decode steps are timed on a GPU only")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="default: reports/adapter_swap_<gpu>_<date>/pause.jsonl")
    parser.add_argument("--git-commit", help="for a copy of the tree without its history")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    commit, dirty = git_state()
    gpu = gpu_name(options.device)
    common = {
        "model": options.shape, "dtype": options.dtype, "gpu": gpu, "torch": torch.__version__,
        "git_commit": options.git_commit or commit, "git_dirty": dirty,
    }  # fmt: skip
    default = Path("reports") / f"adapter_swap_{short_name(gpu)}_{date.today().isoformat()}" / "pause.jsonl"
    output: Path = options.output or default
    rows: list[dict[str, Any]] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        model = write_model_folder(Path(name), options.shape)
        for mode in options.modes:
            for rank in options.ranks:
                rows.append(rounded(measure(mode, rank, model, options) | common))
                print(json_line(rows[-1]), end="", flush=True)
                output.parent.mkdir(parents=True, exist_ok=True)
                write_jsonl(output, rows)
                torch.cuda.empty_cache()
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
