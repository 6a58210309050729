"""Runs the cells of a comparison, some at a time, each in processes of its own; a finished one is a row on disk."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ember_ray.config.compare_schema import CompareConfig
from ember_ray.config.errors import UserError
from ember_ray.config.load import load_config
from ember_ray.config.schema import LearnConfig
from ember_ray.data.example import Example
from ember_ray.data.formats import load_dataset_rows
from ember_ray.data.splits import hold_out
from ember_ray.tracking.comparison_cells import Cell, recipe_class, runs_of
from ember_ray.tracking.comparison_rows import QUALITY, cell_row, find_run, gpus_to_share, machine_words
from ember_ray.tracking.files import json_line, read_jsonl, told_plainly, write_jsonl
from recipes.readers import reader_of
from recipes.tasks import task_of

CELLS, FAILURES = "cells.jsonl", "failed.jsonl"
POLL_S = 0.2
READERS = 4
"""Processes that make rows of ended cells: pass@k and intervals take seconds, in which the next cells should begin."""
GRACE_S = 20.0
"""What a cell that is told to end gets for its clean-up."""


@dataclass
class Running:
    """A cell that has been started."""

    cell: Cell
    process: subprocess.Popen[bytes]
    started: float
    log: Path
    gpu: str | None


class Comparison:
    """The cells of one output folder; use as a context manager, so that nothing runs on when it is left.

    Attributes:
        rows: of finished cells, by the cell's id.
        failed: reasons, by the cell's id, of this call.
    """

    def __init__(self, config: CompareConfig, cells: list[Cell]) -> None:
        self.config, self.cells = config, cells
        self.folder = Path(config.output_dir)
        self.rows: dict[str, dict[str, Any]] = {row["cell"]: row for row in whole_rows(self.folder / CELLS)}
        self.failed: dict[str, str] = {}
        self._running: list[Running] = []
        self._measured: list[tuple[Cell, Future[dict[str, Any]]]] = []
        self._pool = ProcessPoolExecutor(READERS, multiprocessing.get_context("spawn"), _only_by_parent, (os.getpid(),))
        self._machine, self._gpus = machine_words(), gpus_to_share()
        for cell in cells:
            row = self.rows.get(cell.id)
            if row is not None and row["settings"] != list(cell.settings):
                differing = sorted(set(row["settings"]) ^ set(cell.settings))
                raise UserError(
                    f"'{self.folder / CELLS}' has cell {cell.id} made with other settings ({', '.join(differing)}); "
                    "choose another output_dir or give the settings that it was made with"
                )

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *fault: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        stop([running.process for running in self._running])

    def run(self) -> None:
        """All cells that have no row yet, as far as the time goes; those that wait for a failed one fail with it."""
        begun, limit = time.monotonic(), self.config.time_limit_s
        waiting = [cell for cell in self.cells if cell.id not in self.rows]
        print(
            f"{len(self.cells)} cells, {len(self.cells) - len(waiting)} of them finished, {self.config.at_once} at a "
            f"time; what they say is in {self.folder / 'logs'}",
            flush=True,
        )
        while waiting or self._running or self._measured:
            for cell in list(waiting):
                if cell.start in self.failed:
                    waiting.remove(cell)
                    self._fail(cell, f"cell {cell.start}, which it starts from, failed")
                elif len(self._running) < self.config.at_once and (cell.start is None or cell.start in self.rows):
                    waiting.remove(cell)
                    self._running.append(self._begin(cell))
            time.sleep(POLL_S)
            if limit is not None and time.monotonic() - begun > limit:
                for cell, row in self._measured:
                    self._finish(cell, row)
                missing = len(waiting) + len(self._running)
                print(f"time_limit_s={limit:g} is over; {missing} cells are missing", flush=True)
                return
            for running in list(self._running):
                self._look_at(running)
            for cell, row in list(self._measured):
                if row.done():
                    self._measured.remove((cell, row))
                    self._finish(cell, row)

    def _begin(self, cell: Cell) -> Running:
        runs, log = runs_of(self.folder, cell.id), self.folder / "logs" / f"{cell.id}.log"
        start_run = None if cell.start is None else self.folder / self.rows[cell.start]["run"]
        with told_plainly(log):
            if runs.exists():
                shutil.rmtree(runs)  # what an attempt that did not finish left
            log.parent.mkdir(parents=True, exist_ok=True)
            output = open(log, "wb")
        environment = os.environ | {"OMP_NUM_THREADS": str(self.config.threads)}
        gpu = self._free_gpu()
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with output:
            process = subprocess.Popen(
                [sys.executable, *cell.arguments(self.folder, start_run)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(_end_with_parent, os.getpid()),
            )
        print(f"begun     {cell.id}", flush=True)
        return Running(cell, process, time.monotonic(), log, gpu)

    def _free_gpu(self) -> str | None:
        """The GPU on which the fewest cells run; None where there is none."""
        used = [running.gpu for running in self._running]
        return min(self._gpus, key=used.count, default=None)

    def _look_at(self, running: Running) -> None:
        cell, wall = running.cell, time.monotonic() - running.started
        status = running.process.poll()
        if status is None and wall < self.config.cell_timeout_s:
            return
        if status is None:
            stop([running.process])
            self._fail(cell, f"it took longer than cell_timeout_s={self.config.cell_timeout_s:g}")
        elif status:
            self._fail(cell, f"{last_words(running.log)} (exit status {status})")
        else:
            arguments = (self.config, cell, wall, self._machine, len(self._gpus))
            self._measured.append((cell, self._pool.submit(made_row, *arguments)))
        self._running.remove(running)

    def _finish(self, cell: Cell, made: Future[dict[str, Any]]) -> None:
        try:
            row = made.result()
        except UserError as fault:
            self._fail(cell, str(fault))
            return
        append(self.folder / CELLS, row)
        self.rows[cell.id] = row
        low, high = row["gain"][f"{QUALITY}_interval"]
        print(
            f"finished  {cell.id}: exact match {row['before'][QUALITY]:.3f} to {row['after'][QUALITY]:.3f}, gain "
            f"{row['gain'][QUALITY]:+.3f} [{low:+.3f}, {high:+.3f}], {row['generated_tokens']:,} tokens, "
            f"{row['wall_seconds']:.0f} s ({len(self.rows)} of {len(self.cells)})",
            flush=True,
        )

    def _fail(self, cell: Cell, reason: str) -> None:
        self.failed[cell.id] = reason
        append(self.folder / FAILURES, {"cell": cell.id, "reason": reason})
        print(f"FAILED    {cell.id}: {reason}", flush=True)


def made_row(config: CompareConfig, cell: Cell, wall_seconds: float, machine: str, gpus: int) -> dict[str, Any]:
    """The row of a cell whose process has ended well.

    Raises:
        UserError: see `cell_row`.
    """
    folder = Path(config.output_dir)
    run = find_run(runs_of(folder, cell.id))
    return cell_row(
        cell,
        run,
        folder,
        reader=reader_of(cell.task, held_out(load_config(recipe_class(cell), run / "config.yaml"))),
        wall_seconds=wall_seconds,
        at_once=config.at_once,
        gpus=gpus,
        gpu_price_per_hour=config.gpu_price_per_hour,
        token_budget=config.token_budget,
        machine=machine,
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder of a comparison, for this call alone.

    Raises:
        UserError: it cannot be written, or another call is at work in it.
    """
    with told_plainly(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another comparison runs in '{folder}'; wait for it or choose another output_dir"
            ) from None
        yield


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a JSONL file; half a row at its end, which a killed process left, is cut off the file."""
    rows = read_jsonl(path)
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        write_jsonl(path, rows)
    return rows


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One row more, by a single write, on disk when this returns."""
    with told_plainly(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, json_line(row).encode("utf-8", "backslashreplace"))
            os.fsync(file)
        finally:
            os.close(file)


def held_out(config: LearnConfig) -> list[Example]:
    """The rows on which a run was measured."""
    data = config.data
    if data.eval is not None:
        return load_dataset_rows(data.eval)
    if data.train is not None:
        return hold_out(load_dataset_rows(data.train), data.eval_prompts, config.seed)[1]
    return task_of(config).generate(config, "test", data.eval_prompts)


def last_words(log: Path) -> str:
    """The line of a log that says best why a command failed: its last error, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends commands that lead a process group: asks them to, and after `GRACE_S` kills the groups."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    end = time.monotonic() + GRACE_S
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent(parent: int) -> None:
    """In a new process: SIGTERM when its parent dies, also by SIGKILL (Linux; elsewhere without effect).

    Args:
        parent: number of the parent's process, which may have died before its death could be asked for.
    """
    if sys.platform == "linux":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of Python's would be lost with the program
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def _only_by_parent(parent: int) -> None:
    """In a process of the pool: Ctrl-C is its parent's to hear, with whom it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent(parent)
