"""Where metrics go beside ``metrics.jsonl``: W&B, TensorBoard or nowhere, behind one small interface."""

from __future__ import annotations

import importlib.util
import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlparse

from ember_ray.config.errors import UserError
from ember_ray.tracking.files import plain, write_text

Kind = Literal["auto", "none", "wandb", "tensorboard"]


class Tracker(Protocol):
    """What a recipe needs of a tracker."""

    where: str
    """Where to look at it, for people; empty for ``none``."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Numbers of one step; names with ``/`` are grouped. Values that are not numbers are left out."""

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of samples; all rows have the same keys."""

    def finish(self) -> None:
        """Writes out what is pending. Nothing may be logged afterwards; a second call does nothing."""


def make_tracker(kind: Kind, run_dir: str | Path, name: str, config: Mapping[str, Any]) -> Tracker:
    """Starts a tracker whose files lie in the run folder.

    Args:
        kind: ``auto`` is wandb where it is installed. wandb runs online when the user is logged in
            (``WANDB_API_KEY``, ``wandb login`` or ``WANDB_MODE=online``), else offline; ``WANDB_MODE``
            decides when it is set.
        run_dir: the run folder.
        name: of the run, as the tracker shows it.
        config: the resolved configuration as plain values.

    Raises:
        UserError: the tracker asked for is not installed; the text says how to get it.
    """
    if kind == "none" or (kind == "auto" and importlib.util.find_spec("wandb") is None):
        return NoTracker()
    if kind == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "tracker=tensorboard needs the package tensorboard; pip install tensorboard, or use tracker=none"
            )
        return TensorBoardTracker(Path(run_dir), config)
    if importlib.util.find_spec("wandb") is None:
        raise UserError("tracker=wandb needs the package wandb; pip install wandb, or use tracker=none")
    return WandbTracker(Path(run_dir), name, config)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The values that can be drawn as a curve."""
    flat = {key: plain(value) for key, value in metrics.items()}
    return {key: float(value) for key, value in flat.items() if isinstance(value, (int, float)) and value is not None}


class NoTracker:
    """Keeps nothing; ``metrics.jsonl`` is written anyway."""

    where = ""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        return None

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        return None

    def finish(self) -> None:
        return None


class TensorBoardTracker:
    """Event files in ``<run>/tensorboard``."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), flush_secs=5)
        self.where = f"tensorboard --logdir {run_dir / 'tensorboard'}"
        self._writer.add_text(
            "config", _markdown([{"key": key, "value": value} for key, value in _flat(config).items()]), 0
        )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            self._writer.add_text("samples", _markdown(rows), step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbTracker:
    """A W&B run, offline unless the user is logged in; its files in ``<run>/wandb``.

    Its id lies in ``<run>/wandb_run_id``: a run that is resumed goes on as the same run of W&B.
    """

    def __init__(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        mode = _wandb_mode()
        try:
            self._run: Any = self._start(run_dir, name, config, mode)
        except Exception as fault:
            if mode != "online":
                raise
            # No network, or a key that the server refuses: the run matters more than its upload.
            print(f"W&B cannot be reached ({' '.join(str(fault).split())[:120]}); the run is tracked offline")
            mode = "offline"
            self._run = self._start(run_dir, name, config, mode)
        # W&B's own step would hold back the newest row until the next one begins, and drop rows of an earlier step.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.where = f"wandb sync {self._run.settings.sync_dir}" if mode == "offline" else (self._run.url or "")

    def _start(self, run_dir: Path, name: str, config: Mapping[str, Any], mode: str) -> Any:
        import wandb

        _writable_wandb_home(run_dir)
        # W&B takes our package `verifiers` for another of that name and advertises Weave for it.
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        wanted = {
            "x_transaction_log_flush_interval": 1.0,  # by default a killed run keeps nothing of its last 15 s
            "console": "off",  # the console redraws itself; copying it makes a log that nobody can read
            "silent": True,
            "disable_code": True,
            "disable_job_creation": True,
            "x_save_requirements": False,
            "init_timeout": 30.0,
        }
        if mode == "offline":
            # Nothing that looks beyond this process: no git remote, no probing of the machine.
            wanted |= {
                "disable_git": True,
                "x_disable_meta": True,
                "x_disable_machine_info": True,
                "x_disable_stats": True,
            }
        known = {key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ember-ray"),
            name=name,
            id=_run_id(run_dir),
            resume="allow" if mode == "online" else None,  # offline W&B says that it cannot, and joins runs of one id
            dir=str(run_dir),
            config=dict(config),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(**known),
        )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._run.log({**numbers(metrics), "step": step})

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        if rows:
            columns = list(rows[0])
            table = wandb.Table(columns=columns, data=[[_cell(row[column]) for column in columns] for row in rows])
            self._run.log({"samples": table, "step": step})

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def _run_id(run_dir: Path) -> str:
    """The id of the run in this folder; a new one is written down before it is used."""
    path = run_dir / "wandb_run_id"
    if not path.is_file():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _writable_wandb_home(run_dir: Path) -> None:
    """W&B stages tables below the home folder; where that cannot be written, below the run folder instead."""
    for variable, default in (("WANDB_DATA_DIR", "~/.local/share/wandb"), ("WANDB_CACHE_DIR", "~/.cache/wandb")):
        if variable not in os.environ:
            try:
                os.makedirs(os.path.expanduser(default), exist_ok=True)
            except OSError:
                os.environ[variable] = str((run_dir / "wandb").resolve())


def _wandb_mode() -> str:
    asked = os.environ.get("WANDB_MODE", "")
    if asked:
        return asked
    return "online" if os.environ.get("WANDB_API_KEY") or _wandb_login() else "offline"


def _wandb_login() -> bool:
    """Whether ``wandb login`` has left a key for the server in the user's netrc file."""
    import wandb

    hosts = {urlparse(wandb.Settings().base_url).hostname or "", "api.wandb.ai"}
    for file in (os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc"):
        path = os.path.expanduser(file)
        try:
            if file and os.path.isfile(path) and any(netrc.netrc(path).authenticators(host) for host in hosts):
                return True
        except (netrc.NetrcParseError, OSError):
            continue
    return False


def _cell(value: Any) -> Any:
    value = plain(value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    def cell(value: Any) -> str:
        text = str(value).replace("|", "\\|").replace("`", "'")
        return "`" + text.replace("\n", " ⏎ ") + "`" if text else " "

    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)
