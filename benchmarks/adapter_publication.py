"""How long a publication takes through real Ray actors, one JSON line each mode, rank and set of modules.

    python -m benchmarks.adapter_publication [--modes slots merged] [--ranks 16] [--modules all] ...

A learner actor takes real optimizer steps (fused AdamW) on the adapter's tensors, and the recipes' own way brings them
to one stage on the same GPU: the learner writes its next buffer, the stage reads it by CUDA IPC, all confirm, and
switch. Between two publications there is a rollout, a short one. ``publish_ms`` is wall time from the end of the
optimizer step, its kernels included, in the learner's process until the driver knows that the stage has switched; both
read the same clock of the host.

Keys that need a word:
  write_ms    of publish_ms, the learner's part inside its process: tensors into the buffer, with checksums
  call_ms     an empty call to the same learner, for what of publish_ms is Ray
  store_ms    the same publication through Ray's object store, as between hosts

The served policy is compared at the end: scores of the adapter that went through the learner's memory are equal to the
bit to those of the same adapter through the object store. A row is refused where they are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.adapter_swap import LEAST_REPETITIONS, MODES, MODULES, learner_adapter
from benchmarks.rollout import gpu_name, rounded, short_name
from benchmarks.rollout_engines import SHAPES, Refused, write_model_folder
from ember_ray.tracking.files import json_line, write_jsonl
from ember_ray.tracking.summary import git_state

WARM_UPS = 5


class Learner:
    """Adapter tensors and an optimizer in an actor of their own; the rest of a learner is not what is measured."""

    def __init__(
        self, folder: str, device: str, dtype: str, rank: int, modules: Sequence[str], coordinator: Any
    ) -> None:
        import torch

        from actors.publisher import Publisher
        from ember_ray.model.qwen3_config import read_model_config

        update = learner_adapter(read_model_config(folder), rank, modules, device, seed=rank)
        self._device, self._dtype = device, dtype
        self._parameters = [torch.nn.Parameter(tensor) for tensor in update.tensors.values()]
        own = dict(zip(update.tensors, (parameter.data for parameter in self._parameters), strict=True))
        self._update = dataclasses.replace(update, tensors=own)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-3, fused=device == "cuda")
        self._publisher = Publisher(folder, self._update, device, coordinator)
        self._write_ms = 0.0

    def step(self) -> float:
        """One optimizer step with random gradients; gives the moment of its end."""
        import torch

        for parameter in self._parameters:
            parameter.grad = torch.randn_like(parameter)
        self._optimizer.step()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def adapter_update(self, version: int) -> Any:
        begun = time.perf_counter()
        notice = self._publisher.write(version)
        self._write_ms = 1e3 * (time.perf_counter() - begun)
        return notice

    def packed(self, version: int) -> Any:
        """The same tensors for the object store, rounded as the buffers are."""
        import torch

        from actors.adapter_wire import pack_adapter

        tensors = {name: tensor.to(getattr(torch, self._dtype)) for name, tensor in self._update.tensors.items()}
        return pack_adapter(dataclasses.replace(self._update, version=version, tensors=tensors))

    def write_ms(self) -> float:
        return self._write_ms

    def nothing(self) -> None:
        """For the time of a call."""


class Publications:
    """Publications to one stage that serves in one mode."""

    def __init__(self, cluster: Any, mode: str, folder: Path, options: argparse.Namespace) -> None:
        from actors.messages import CoordinatorSettings
        from actors.rollouts import Rollouts
        from ember_ray.engine.options import EngineOptions
        from ember_ray.model.qwen3_config import read_model_config

        layers = read_model_config(folder).num_hidden_layers
        engine = EngineOptions(
            str(folder), device=options.device, dtype=options.dtype, load_format="dummy", layer_split=(layers,),
            lora_mode=mode, num_kv_blocks=256, max_num_seqs=8, max_model_len=512,
        )  # fmt: skip
        self._options, self._folder, self._mode = options, folder, mode
        begun = time.monotonic()
        self._rollouts = Rollouts(cluster, CoordinatorSettings(engine))
        self._rollouts.ready()
        print(f"{mode}: the stage was up after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        self._version = 0

    def measure(self, rank: int, modules: str) -> dict[str, Any]:
        import ray

        from actors.messages import PromptRow
        from ember_ray.data.example import Example
        from ember_ray.engine.sampling_params import SamplingParams

        options, rollouts = self._options, self._rollouts
        actor: Any = ray.remote(num_cpus=0, num_gpus=0.25 if options.device == "cuda" else 0)(Learner)
        learner = actor.remote(
            str(self._folder), options.device, options.dtype, rank, MODULES[modules], rollouts.handle
        )
        row = PromptRow(Example("row", [{"role": "user", "content": "any"}], {"total": 1}), tuple(range(5, 60)))
        publish, write, call, store = [], [], [], []
        for _ in range(WARM_UPS + options.repetitions):
            rollouts.rollout([row], 1, SamplingParams(max_tokens=8), self._version)
            ended = ray.get(learner.step.remote())
            rollouts.publish(learner.adapter_update.remote(self._next()))
            publish.append(1e3 * (time.monotonic() - ended))
            write.append(ray.get(learner.write_ms.remote()))
            begun = time.monotonic()
            ray.get(learner.nothing.remote())
            call.append(1e3 * (time.monotonic() - begun))
        answers = [(tuple(range(5, 60)), tuple(range(60, 90)))]
        there = rollouts.score(answers)
        for _ in range(3):
            begun = time.monotonic()
            rollouts.publish(learner.packed.remote(self._next()))
            store.append(1e3 * (time.monotonic() - begun))
        if rollouts.score(answers) != there or rollouts.stage_versions() != [self._version]:
            raise Refused("the adapter from the learner's memory is not the one from the object store")
        rollouts.rollback(0)
        if rollouts.score(answers) == there:
            raise Refused("the adapter changes nothing")
        ray.kill(learner)
        kept = publish[WARM_UPS:]
        return {
            "mode": self._mode, "source": "gpu" if options.device == "cuda" else "host", "rank": rank,
            "modules": modules, "publish_ms": statistics.median(kept), "publish_ms_max": max(kept),
            "write_ms": statistics.median(write[WARM_UPS:]), "call_ms": statistics.median(call[WARM_UPS:]),
            "store_ms": statistics.median(store), "repetitions": len(kept),
        }  # fmt: skip

    def close(self) -> None:
        self._rollouts.stop()

    def _next(self) -> int:
        self._version += 1
        return self._version


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="tiny: a small shape, to try it out")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=LEAST_REPETITIONS, help="fewer than 20 is only printed")
    parser.add_argument("--output", type=Path, help="default: reports/adapter_swap_<gpu>_<date>/publication.jsonl")
    parser.add_argument("--git-commit", help="for a copy of the tree without its history")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    from actors import cluster as clusters

    options = arguments(given)
    gpu = gpu_name(options.device)
    commit, dirty = git_state()
    common = {
        "model": options.shape, "dtype": options.dtype, "gpu": gpu, "git_commit": options.git_commit or commit,
        "git_dirty": dirty,
    }  # fmt: skip
    default = Path("reports") / f"adapter_swap_{short_name(gpu)}_{date.today().isoformat()}" / "publication.jsonl"
    keeps = options.repetitions >= LEAST_REPETITIONS and (options.shape != "tiny" or options.output is not None)
    output: Path = options.output or default
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model_folder(Path(folder), options.shape)
        share = 0.75 if options.device == "cuda" else 0.0
        with clusters.start(1, run="publication", gpus_per_stage=share, dashboard=False) as cluster:
            for mode in options.modes:
                publications = Publications(cluster, mode, model, options)
                for rank in options.ranks:
                    for modules in options.modules:
                        try:
                            measured = publications.measure(rank, modules)
                        except Refused as fault:
                            print(f"{mode} rank {rank} {modules}: {fault}", file=sys.stderr)
                            return 1
                        rows.append(rounded(measured | common))
                        print(json_line(rows[-1]), end="", flush=True)
                        if keeps:
                            output.parent.mkdir(parents=True, exist_ok=True)
                            write_jsonl(output, rows)
                publications.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
