"""How long a stage takes to switch to a new adapter, one JSON line each mode, source, rank and set of modules.

    python -m benchmarks.adapter_swap [--modes slots merged] [--sources gpu host file] [--ranks 8 16 32 64] ...

``ms`` is the median, by GPU events around both calls, of staging and switching: from the tensors at hand until the last
kernel of the switch has ended. All guards are in it: names, shapes, ranks and scales, values that are not finite, and,
for ``gpu`` and ``host``, the checksums of all tensors. The engine is idle, and every repetition brings other values.

Sources:
  gpu    a flat tensor on the stage's GPU, as a learner there publishes it (ember_ray/model/adapter_layout.py)
  host   the same in pinned host memory
  file   a PEFT folder with bf16 safetensors, in the page cache: it is read, and its configuration, in every repetition

Keys that need a word:
  commit_ms    the switch alone, between two versions that are held: what a running batch would wait for when the
               adapter is staged beside it
  pack_ms      (gpu) the learner's side: its float32 tensors written into the flat tensor, with checksums, by GPU events
  wall_ms      as ms by the host's clock, from an idle device until it is idle again
  adapter_mb   of the adapter in the serving dtype, in 10^6 bytes
  floor_ms     what the bytes that a swap moves at least take at the copy bandwidth: slots read and write the adapter
               twice (into the stage's own memory, then to the place that captured graphs read), merged also every
               adapted weight
  publish_ms, pause_ms   through actors and in a running batch; this command measures neither, so they are null

Every swap is checked: the places hold what was published and, where weights are merged, rows of a weight are the base
plus the product. A row is refused where they do not, or where an adapter with a NaN or a wrong checksum is taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.rollout import gpu_name, rounded, short_name
from benchmarks.rollout_engines import SHAPES, Refused, random_adapter, synchronize, write_model_folder
from benchmarks.rollout_rows import Hardware
from ember_ray.engine.llm import LLM
from ember_ray.engine.options import EngineOptions
from ember_ray.model.adapter_layout import AdapterPacker, FlatAdapter, module_path
from ember_ray.model.lora import AdapterError, AdapterUpdate, check_adapter, load_peft_adapter
from ember_ray.model.qwen3 import FUSED
from ember_ray.model.qwen3_config import Qwen3Config
from ember_ray.tracking.files import json_line, write_jsonl
from ember_ray.tracking.summary import git_state

MODES = ("slots", "merged")
SOURCES = ("gpu", "host", "file")
MODULES = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qkvo": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
Maker = Callable[[int], AdapterUpdate | FlatAdapter]
"""Version -> the adapter as it comes to the stage."""

WARM_UPS = 3
LEAST_REPETITIONS = 20
"""A median of fewer is a try: printed, not written down."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="tiny: a small shape, to try it out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=LEAST_REPETITIONS, help="fewer than 20 is only printed")
    parser.add_argument("--output", type=Path, help="default: reports/adapter_swap_<gpu>_<date>/swap.jsonl")
    parser.add_argument("--copy-bandwidth", type=float, default=Hardware.copy_tb_s, help="TB/s, measured")
    parser.add_argument("--git-commit", help="for a copy of the tree without its history")
    options = parser.parse_args(given)
    if options.repetitions < 1 or min(options.ranks) < 1:
        parser.error("--repetitions and --ranks must be at least 1")
    if options.device == "cpu" and options.shape != "tiny":
        parser.error("there is no CUDA device here; --shape tiny runs the benchmark itself on a CPU")
    return options


class Clock:
    """Milliseconds of work: by GPU events where there is a GPU, else by the host's clock."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device != "cpu":
            self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._first.record()  # an event comes to be where it is recorded first
            self._last.record()

    def time(self, work: Callable[[], None]) -> float:
        """Starts on an idle device; waits until it is idle again."""
        synchronize(self._device)
        if self._device == "cpu":
            begin = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - begin)
        self._first.record()
        work()
        self._last.record()
        torch.cuda.synchronize()
        return self._first.elapsed_time(self._last)


def learner_adapter(config: Qwen3Config, rank: int, modules: Sequence[str], device: str, seed: int) -> AdapterUpdate:
    """A random adapter as a learner on the device has it, in float32."""
    whole = random_adapter(config, rank, 1, device, seed)
    tensors = {name: tensor for name, tensor in whole.tensors.items() if name.split(".")[-3] in modules}
    scaling = {path: scale for path, scale in whole.scaling.items() if path.split(".")[-1] in modules}
    return AdapterUpdate(1, tensors, scaling)


def write_peft_folder(update: AdapterUpdate, folder: Path, rank: int, modules: Sequence[str]) -> None:
    """As PEFT saves a model that learns in bfloat16; a folder that is there has been written before."""
    if folder.exists():
        return
    folder.mkdir()
    tensors = {f"base_model.model.{name}": t.bfloat16().cpu().contiguous() for name, t in update.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


class Swaps:
    """One engine of one mode, and the swaps that are timed on it."""

    def __init__(self, mode: str, model: Path, options: argparse.Namespace) -> None:
        self.mode, self.options = mode, options
        self.llm = LLM(
            EngineOptions(
                str(model), dtype=options.dtype, device=options.device, load_format="dummy", lora_mode=mode,
                num_kv_blocks=16, max_model_len=64, enforce_eager=True,
            )
        )  # fmt: skip
        self.engine, self.config, self.clock = self.llm.engine, self.llm.engine.config, Clock(options.device)
        self.dtype = getattr(torch, options.dtype)
        self._version = 0
        self._base = self._some_weights()

    def _some_weights(self) -> dict[tuple[int, str], torch.Tensor]:
        layers = self.engine.model.decoder_layers
        picked = (0, len(layers) // 2, len(layers) - 1)
        return {(i, name): w.clone() for i in picked for name, w in layers[i].weights.items()}

    def measure(self, source: str, rank: int, modules: str, folder: Path) -> dict[str, Any]:
        """Warms up, repeats, checks, and gives the measured keys of a row."""
        device, names = self.options.device, MODULES[modules]
        shapes, depth = self.config.linear_shapes, self.config.num_hidden_layers
        learners = [learner_adapter(self.config, rank, names, device, seed) for seed in (1, 2)]
        packers = [AdapterPacker(check_adapter(one, shapes, depth), shapes, self.dtype) for one in learners]
        packed = [packer.pack(1) for packer in packers]
        makers: list[Maker]
        if source == "file":
            folders = [folder / f"{rank}_{modules}_{number}" for number in range(2)]
            for one, path in zip(learners, folders, strict=True):
                write_peft_folder(one, path, rank, names)
            makers = [lambda version, path=path: load_peft_adapter(path, version) for path in folders]  # type: ignore[misc]
        else:
            if source == "host":
                packed = [dataclasses.replace(one, flat=_on_host(one.flat)) for one in packed]
            makers = [lambda version, one=one: dataclasses.replace(one, version=version) for one in packed]  # type: ignore[misc]
        times, walls = [], []
        for repetition in range(WARM_UPS + self.options.repetitions):
            self._version += 1
            make = makers[repetition % 2]
            update = None if source == "file" else make(self._version)

            def swap(make: Maker = make, update: AdapterUpdate | FlatAdapter | None = update) -> None:
                self.engine.stage_adapter(make(self._version) if update is None else update)
                self.engine.commit_adapter(self._version)

            begin = time.perf_counter()
            times.append(self.clock.time(swap))
            walls.append(1e3 * (time.perf_counter() - begin))
        times, walls = times[WARM_UPS:], walls[WARM_UPS:]
        commits = self._time_commits()
        self._check(packed[(WARM_UPS + self.options.repetitions - 1) % 2])
        self._check_guards(packed[0], source)
        moved = self._least_bytes(packed[0].layout.numel, names)
        return {
            "ms": statistics.median(times),
            "ms_min": min(times),
            "ms_max": max(times),
            "commit_ms": statistics.median(commits),
            "wall_ms": statistics.median(walls),
            "pack_ms": self._time_packing(packers) if source == "gpu" else None,
            "publish_ms": None,
            "pause_ms": None,
            "adapter_mb": packed[0].layout.numel * self.dtype.itemsize / 1e6,
            "floor_ms": 1e3 * moved / (self.options.copy_bandwidth * 1e12),
            "repetitions": len(times),
        }

    def _time_commits(self) -> list[float]:
        """Switches between the two last versions; the last one serves in the end."""
        versions = [self._version - 1, self._version] * (WARM_UPS + self.options.repetitions // 2)
        times = [self.clock.time(partial(self.engine.commit_adapter, version)) for version in versions]
        return times[2 * WARM_UPS :] or times

    def _time_packing(self, packers: list[AdapterPacker]) -> float:
        out, times = torch.zeros_like(packers[0].pack(1).flat), []
        for repetition in range(WARM_UPS + self.options.repetitions):
            times.append(self.clock.time(lambda packer=packers[repetition % 2]: packer.pack(1, out)))  # type: ignore[misc]
        return statistics.median(times[WARM_UPS:])

    def _least_bytes(self, elements: int, names: Sequence[str]) -> int:
        """Read and written by a swap from GPU memory; the copy bandwidth counts both."""
        adapter = 4 * elements
        if self.mode == "slots":
            return adapter * self.dtype.itemsize
        shapes = self.config.linear_shapes
        weights = self.config.num_hidden_layers * sum(shapes[name][0] * shapes[name][1] for name in names)
        return (adapter + 2 * weights) * self.dtype.itemsize

    def _check(self, published: FlatAdapter) -> None:
        """Raises Refused where what serves is not what was published."""
        views = published.layout.views(published.flat.to(self.options.device))
        scales = dict(zip((module[:2] for module in published.layout.modules), published.scaling, strict=True))
        for (layer, fused), base in self._base.items():
            live = self.engine.model.decoder_layers[layer].weights[fused]
            adapted = [name for name in FUSED[fused] if (layer, name) in scales]
            paths = {name: module_path(layer, name) for name in adapted}
            pairs = {name: [views[f"{path}.lora_{half}.weight"] for half in "AB"] for name, path in paths.items()}
            if self.mode == "slots":
                if not torch.equal(live, base):
                    raise Refused(f"the base weight '{fused}' of layer {layer} was written")
                lora = self.engine._slots.active.get(layer, {}).get(fused)
                parts = lora.parts if lora is not None else ()
                if len(parts) != len(adapted):
                    raise Refused(f"{len(parts)} modules of '{fused}' of layer {layer} serve, {len(adapted)} should")
                for name, part in zip(adapted, parts, strict=True):
                    a, b = pairs[name]
                    if not (torch.equal(part.b, b) and torch.equal(lora.a[part.first_rank : part.last_rank], a)):
                        raise Refused(f"what serves at '{paths[name]}' is not what was published")
                continue
            expected, row = base.float(), 0
            for name in FUSED[fused]:
                rows = self.config.linear_shapes[name][0]
                if name in pairs:
                    a, b = (half.float() for half in pairs[name])
                    expected[row : row + rows] += scales[layer, name] * (b @ a)
                row += rows
            if not torch.allclose(live.float(), expected, rtol=2**-7, atol=1e-4):
                raise Refused(f"the merged weight '{fused}' of layer {layer} is not the base plus the product")

    def _check_guards(self, good: FlatAdapter, source: str) -> None:
        """Raises Refused where an adapter with a NaN, or with one bit changed, is taken."""
        for what in ("NaN", "checksum"):
            flat = good.flat.clone()
            if what == "NaN":
                flat[good.layout.pieces[-1].first] = torch.nan
            else:
                flat.view(torch.int16 if self.dtype.itemsize == 2 else torch.int32)[good.layout.pieces[0].first] ^= 1
            try:
                self.engine.stage_adapter(dataclasses.replace(good, flat=flat, version=self._version + 1))
            except AdapterError:
                continue
            raise Refused(f"an adapter with a bad {what} was taken ({source})")


def _on_host(flat: torch.Tensor) -> torch.Tensor:
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
    return host.copy_(flat)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    commit, dirty = git_state()
    gpu = gpu_name(options.device)
    common = {
        "model": options.shape, "dtype": options.dtype, "gpu": gpu, "torch": torch.__version__,
        "git_commit": options.git_commit or commit, "git_dirty": dirty,
    }  # fmt: skip
    default = Path("reports") / f"adapter_swap_{short_name(gpu)}_{date.today().isoformat()}" / "swap.jsonl"
    keeps = options.repetitions >= LEAST_REPETITIONS and (options.shape != "tiny" or options.output is not None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model_folder(folder, options.shape)
        for mode in options.modes:
            swaps = Swaps(mode, model, options)
            for modules in options.modules:
                for rank in options.ranks:
                    for source in options.sources:
                        try:
                            measured = swaps.measure(source, rank, modules, folder)
                        except Refused as fault:
                            print(f"{mode} {source} rank {rank} {modules}: {fault}", file=sys.stderr)
                            return 1
                        row = {"mode": mode, "source": source, "rank": rank, "modules": modules} | measured | common
                        rows.append(rounded(row))
                        print(json_line(rows[-1]), end="", flush=True)
            del swaps
            if options.device != "cpu":
                torch.cuda.empty_cache()
    if keeps:
        output: Path = options.output or default
        output.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
