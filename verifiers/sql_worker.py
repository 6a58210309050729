"""The sandbox process of the SQL verifier: ``python -m verifiers.sql_worker``, started by `sandbox.py`.

Requests come as lines of JSON on standard input, replies go out as lines of JSON on standard output, in order. A
thread reads, so that the end of the input, which is the end of the parent, ends this process at once, whatever query
it is at.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from verifiers.sql_judge import Judge
from verifiers.sql_limits import MAX_PROCESS_BYTES


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, and its end is ours
    logging.disable()  # sqlglot warns of statements that it does not know
    _limit_this_process()
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    judge = Judge()
    _write({"ready": True})
    while True:
        request = requests.get()
        _write(judge.judge(request, lambda: _write({"mark": "gold"})))


def _limit_this_process() -> None:
    for name, limit in (
        (resource.RLIMIT_AS, MAX_PROCESS_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 256),
    ):
        with suppress(ValueError, OSError):  # some systems refuse a limit; SQLite's own hold everywhere
            hard = resource.getrlimit(name)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(name, (limit, limit))


def _read(requests: SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os._exit(0)


def _write(reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode() + b"\n"
    while data:
        try:
            data = data[os.write(1, data) :]
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    main()
