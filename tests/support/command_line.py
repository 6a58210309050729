"""Runs a recipe as a user does, and finds what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_MARK = "EMBER_TEST_RUN"


@dataclass
class Ended:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    left: list[str]


class Command:
    """A started command; every process below it carries a mark in its environment."""

    def __init__(self, *arguments: str, cwd: Path, **env: str) -> None:
        self.mark = uuid.uuid4().hex
        environment = os.environ | {"PYTHONPATH": str(ROOT), _MARK: self.mark} | env
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self, limit_s: float = 200) -> Ended:
        """Waits for it, then for up to five seconds for its other processes to go."""
        try:
            stdout, stderr = self.process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            raise
        seconds, end = time.monotonic() - self.started, time.monotonic() + 5
        while (left := self.family()) and time.monotonic() < end:
            time.sleep(0.2)
        return Ended(self.process.returncode, stdout, stderr, seconds, left)

    def family(self) -> list[str]:
        """Command lines of the living processes that carry the mark, the command itself aside."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = f"{_MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            if marked and state != "Z" and int(folder.name) != self.process.pid:
                found.append(line)
        return found


def run(*arguments: str, cwd: Path, limit_s: float = 200, **env: str) -> Ended:
    return Command(*arguments, cwd=cwd, **env).end(limit_s)
