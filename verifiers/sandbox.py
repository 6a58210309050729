"""A process of its own for untrusted work: kept warm, killed when it does not answer, started anew.

The process is a fresh interpreter (no fork, so nothing of the parent is in it) that runs one module, reads requests
as lines of JSON and writes replies as lines of JSON, in order. It ends when its input ends, so it does not outlive its
parent. What it writes is data to its parent and is never run.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHUNK = 64
"""Requests handed to the process at once."""

_START_LIMIT_S = 60.0
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


class SandboxError(RuntimeError):
    """The process cannot be started."""


class _Silent(Exception):
    """No reply within the limit."""


class _Ended(Exception):
    """The process has ended."""


class Sandbox:
    """One process that runs `module`; it starts with the first request. Use it from any thread; calls wait in turn.

    Args:
        module: ``python -m <module>``; it writes ``{"ready": true}`` once it is up.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., Sandbox] | None = None
        self._owner = 0
        self._buffer = b""
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """The process, None while there is none."""
        return None if self._process is None else self._process.pid

    def run(self, requests: Sequence[dict[str, Any]], limit_s: float) -> list[dict[str, Any]]:
        """The reply to each request, in order.

        A request that gets no reply within `limit_s` loses the process: its reply is ``{"lost": "silent", "marks": n}``
        with the number of marks (replies with a key ``mark``, each of which starts its time anew) that came before.
        One on which the process ends twice gets ``{"lost": "ended", "marks": n}``. Other requests lose nothing.

        Raises SandboxError if the process cannot be started.
        """
        replies: list[dict[str, Any]] = [{}] * len(requests)
        waiting = deque(range(len(requests)))
        suspect: int | None = None
        with self._lock:
            while waiting:
                chunk = [waiting.popleft() for _ in range(1 if waiting[0] == suspect else min(CHUNK, len(waiting)))]
                at, marks = 0, 0
                try:
                    process = self._started()
                    self._send(process, [requests[index] for index in chunk])
                    while at < len(chunk):
                        reply = self._receive(process, limit_s)
                        if "mark" in reply:
                            marks += 1
                            continue
                        replies[chunk[at]] = reply
                        at, marks = at + 1, 0
                except (_Silent, _Ended) as fault:
                    self._kill()
                    culprit = chunk[at]
                    if isinstance(fault, _Silent) or suspect == culprit:
                        replies[culprit] = {"lost": "silent" if isinstance(fault, _Silent) else "ended", "marks": marks}
                        at += 1
                    else:  # perhaps something else ended it: once more, alone
                        suspect = culprit
                    waiting.extendleft(reversed(chunk[at:]))
                except BaseException:  # Ctrl-C, say: replies that nobody waits for must not stay in the pipe
                    self._kill()
                    raise
        return replies

    def close(self) -> None:
        """End the process; a later request starts another."""
        with self._lock:
            self._kill()

    def _started(self) -> subprocess.Popen[bytes]:
        # After a fork the process is the parent's: its pipes are not ours to use, nor its life ours to end.
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._kill()
        ours = str(Path(__file__).resolve().parents[1])
        folders = dict.fromkeys([ours, *(os.path.abspath(path) for path in sys.path)])
        kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**kept, "PYTHONPATH": os.pathsep.join(folders)},
            bufsize=0,
        )
        self._process, self._owner, self._buffer = process, os.getpid(), b""
        self._finalizer = weakref.finalize(self, _end, process, os.getpid())
        self.restarts += 1
        try:
            self._receive(process, _START_LIMIT_S)
        except (_Silent, _Ended) as fault:
            self._kill()
            what = "did not come up in time" if isinstance(fault, _Silent) else f"ended with {process.returncode}"
            raise SandboxError(f"the sandbox process 'python -m {self._module}' cannot be started: it {what}") from None
        return process

    def _send(self, process: subprocess.Popen[bytes], requests: list[dict[str, Any]]) -> None:
        assert process.stdin is not None
        data = memoryview(b"".join(json.dumps(request).encode() + b"\n" for request in requests))
        try:
            while data:
                data = data[process.stdin.write(data) :]
        except OSError:
            raise _Ended from None

    def _receive(self, process: subprocess.Popen[bytes], limit_s: float) -> dict[str, Any]:
        assert process.stdout is not None
        deadline = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1e3):
                raise _Silent
            data = os.read(process.stdout.fileno(), 65_536)
            if not data:
                raise _Ended
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            reply = json.loads(line)
        except ValueError:
            raise _Ended from None
        if not isinstance(reply, dict):
            raise _Ended
        return reply

    def _kill(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process, self._finalizer = None, None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill and reap `process`, and close its pipes; in the process that started it only."""
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
