"""The folder of a run: what is in it, and how it is written so that a crash leaves whole files."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import yaml
from pydantic import BaseModel

from ember_ray.config.errors import UserError
from ember_ray.config.load import dump_yaml
from ember_ray.data.scored_group import ScoredGroup
from ember_ray.tracking.files import json_line, plain, read_jsonl, told_plainly, write_jsonl, write_text
from ember_ray.tracking.rows import group_row

NEEDED_BYTES = 64 * 2**20
"""Free space that a run asks for at its start; the default run leaves about 30 MiB."""


class RunFolder:
    """``<output_dir>/<name>_<YYYYmmdd-HHMMSS>/``.

    ``config.yaml``, ``metrics.jsonl``, ``rollouts/round_0001.jsonl``, ``eval/before.jsonl``,
    ``eval/after.jsonl``, ``adapter/`` (PEFT, written by the learner), ``summary.json``, ``report.html``
    and the tracker's own files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: IO[str] | None = None

    @classmethod
    def create(cls, output_dir: str | Path, name: str, needed_bytes: int = NEEDED_BYTES) -> RunFolder:
        """Makes the folder, and finds out now rather than after the rollouts whether it can be written.

        Two runs started in the same second get ``..._2`` and so on.

        Raises:
            UserError: the folder cannot be made or written, or its disk has less than ``needed_bytes`` free.
        """
        parent = Path(output_dir)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(parent).free
            if free < needed_bytes:
                raise UserError(
                    f"the disk of output_dir '{parent}' has {free / 2**20:.1f} MiB free and a run needs "
                    f"{needed_bytes / 2**20:.0f} MiB; free some or choose another output_dir"
                )
            path = cls._make_unique(parent, f"{name}_{stamp}")
            probe = path / ".probe"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as fault:
            reason = fault.strerror or str(fault)
            raise UserError(
                f"output_dir '{parent}' cannot be written: {reason}; choose another with output_dir=..."
            ) from fault
        return cls(path)

    @classmethod
    def reopen(cls, path: str | Path, config: BaseModel, may_differ: Collection[str]) -> RunFolder:
        """The folder of an unfinished run, to go on in it.

        Args:
            config: the settings to go on with; they must be the folder's own.
            may_differ: keys that do not matter to what comes out, as ``key`` or ``section.key``.

        Raises:
            UserError: there is no such run, it is finished, it was made with other settings, or it cannot be read.
        """
        folder = Path(path)
        if not (folder / "config.yaml").is_file():
            raise UserError(f"resume: there is no run in '{folder}' (no config.yaml)")
        try:
            was = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            summary = folder / "summary.json"
            status = json.loads(summary.read_text(encoding="utf-8"))["status"] if summary.exists() else None
        except (OSError, ValueError, KeyError, yaml.YAMLError) as fault:
            raise UserError(f"resume: the run in '{folder}' cannot be read: {' '.join(str(fault).split())}") from fault
        if status == "finished":
            raise UserError(f"resume: the run in '{folder}' is finished; start a new one")
        now = yaml.safe_load(dump_yaml(config))
        for settings in (was, now):
            for name in may_differ:
                section, _, key = name.rpartition(".")
                (settings.get(section, {}) if section else settings).pop(key, None)
        for key in now:
            if was.get(key) != now[key]:
                raise UserError(
                    f"resume: the run in '{folder}' was made with other settings of '{key}'; "
                    f"go on with its own: --config {folder / 'config.yaml'} resume={folder}"
                )
        return cls(folder)

    def keep_rounds(self, rounds: int) -> list[dict[str, Any]]:
        """Forgets metrics of rounds after the given number, which will be run again; gives those that stay."""
        path = self.path / "metrics.jsonl"
        rows = [row for row in read_jsonl(path) if row["round"] <= rounds] if path.exists() else []
        write_jsonl(path, rows)
        return rows

    @property
    def learner_path(self) -> Path:
        """Where the learner's state lies between rounds."""
        return self.path / "learner"

    @staticmethod
    def _make_unique(parent: Path, base: str) -> Path:
        for number in range(1, 10_000):
            path = parent / (base if number == 1 else f"{base}_{number}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue
        raise UserError(f"10,000 runs named '{base}' in '{parent}'; choose another name")

    @property
    def adapter_path(self) -> Path:
        """Where the learner saves the adapter in PEFT's format."""
        return self.path / "adapter"

    def write_config(self, config: BaseModel) -> None:
        """``config.yaml``: the resolved configuration, readable by ``--config``."""
        write_text(self.path / "config.yaml", dump_yaml(config))

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``, on disk when this returns; NaN and infinities become null."""
        path = self.path / "metrics.jsonl"
        with told_plainly(path):
            if self._metrics is None:
                self._metrics = open(path, "a", encoding="utf-8", errors="backslashreplace")
            self._metrics.write(json_line(dict(metrics)))
            self._metrics.flush()

    def write_rollouts(self, round_number: int, groups: Iterable[ScoredGroup]) -> Path:
        """``rollouts/round_0001.jsonl``: one prompt a line (see ``rows.group_row``)."""
        path = self.path / "rollouts" / f"round_{round_number:04d}.jsonl"
        write_jsonl(path, (group_row(group, round=round_number) for group in groups))
        return path

    def write_eval(
        self, when: Literal["before", "after"], sampled: Iterable[ScoredGroup], greedy: Iterable[ScoredGroup]
    ) -> Path:
        """``eval/before.jsonl`` or ``eval/after.jsonl``: rollout rows with ``kind`` ``sampled`` or ``greedy``."""
        path = self.path / "eval" / f"{when}.jsonl"
        rows = [group_row(group, kind="sampled") for group in sampled]
        rows += [group_row(group, kind="greedy") for group in greedy]
        write_jsonl(path, rows)
        return path

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """``summary.json``."""
        text = json.dumps(plain(dict(summary)), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(self.path / "summary.json", text + "\n")

    def files(self) -> dict[str, str]:
        """What is there now, by path below the folder, with its meaning (for the console)."""
        known = {
            "report.html": "the report; open it in a browser",
            "summary.json": "before and after, with intervals",
            "metrics.jsonl": "every round in numbers",
            "rollouts": "every candidate of every round",
            "eval": "held-out answers before and after",
            "adapter": "the adapter in PEFT format",
            "learner": "optimizer and schedule; resume= goes on from there",
            "config.yaml": "the configuration; rerun with --config",
            "wandb": "offline run; upload with wandb sync",
            "tensorboard": "tensorboard --logdir reads it",
        }
        found = {}
        for name, meaning in known.items():
            path = self.path / name
            if path.exists():
                found[f"{name}{os.sep if path.is_dir() else ''}"] = meaning
        return found

    def close(self) -> None:
        """Closes ``metrics.jsonl``."""
        if self._metrics is not None:
            with told_plainly(self.path / "metrics.jsonl"):
                self._metrics.close()
            self._metrics = None
