"""Judging in a process of its own, for where there is no Ray: a candidate on which a reward function hangs costs only
itself. The pool of verifier actors (``actors/verifier.py``) does the same for rollouts, with several processes.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from verifiers.judge import Batch, Judge, Judgement
from verifiers.reward_functions import RewardFunction


class _Silent(Exception):
    """No answer within the limit."""


class IsolatedJudge:
    """A ``Judge`` in a child process, which is replaced when it hangs or dies; close it after use.

    The child has this process's environment and import path, writes to the same terminal, is not reached by Ctrl-C
    and ends with this process.

    Args:
        functions: as for ``Judge``.
        limit_s: for one candidate, and for a batch as well.
        start_limit_s: for the functions to be imported.

    Raises:
        ValueError: a function does not exist, cannot be called as TRL does or cannot be imported within the limit.
    """

    def __init__(self, functions: Sequence[RewardFunction], limit_s: float, start_limit_s: float = 60.0) -> None:
        self._functions, self._limit_s, self._start_limit_s = tuple(functions), limit_s, start_limit_s
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._started()

    def judge(self, batch: Batch) -> list[Judgement]:
        """One judgement a candidate, in order.

        If the child does not judge a batch within the limit or dies of it, the candidates are judged one by one. The
        one that then hangs, or kills the child twice, gets no reward.

        Raises:
            ValueError: the child cannot be started again.
        """
        for _ in range(2):
            try:
                connection = self._started()
                connection.send(batch)
                return self._received(connection, self._limit_s)
            except (_Silent, EOFError, OSError) as fault:
                self.close()
                if len(batch) > 1:
                    return [judgement for index in range(len(batch)) for judgement in self.judge(batch.only([index]))]
                if isinstance(fault, _Silent):
                    return [Judgement(None, {}, f"the verifier took longer than {self._limit_s:g} s")]
        return [Judgement(None, {}, "the verifier's process died twice on this candidate")]

    def close(self) -> None:
        """Ends the child; a later batch starts another."""
        if self._child is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)  # with what a function may have started
            self._child.wait()
        if self._connection is not None:
            self._connection.close()
        self._child = self._connection = None

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        ours, theirs = Pipe()
        self._connection = ours
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "verifiers.isolated_judge", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                start_new_session=True,
            )
        try:
            ours.send(self._functions)
            refusal = self._received(ours, self._start_limit_s)
        except _Silent:
            refusal = f"the reward functions cannot be imported within {self._start_limit_s:g} s"
        except (EOFError, OSError):
            assert self._child is not None
            refusal = f"the reward functions' process ended with {self._child.wait()} while they were imported"
        if refusal is not None:
            self.close()
            raise ValueError(refusal)
        return ours

    @staticmethod
    def _received(connection: Connection, limit_s: float) -> Any:
        if not connection.poll(limit_s):
            raise _Silent
        return connection.recv()


def _serve(connection: Connection) -> None:
    """The child: functions in, None or what is wrong with them out; then judgements for batches."""
    threading.Thread(target=_end_with_parent, args=(connection.fileno(),), daemon=True).start()
    try:
        judge = Judge(connection.recv())
    except ValueError as refusal:
        connection.send(str(refusal))
        return
    connection.send(None)
    while True:
        connection.send(judge.judge(connection.recv()))


def _end_with_parent(descriptor: int) -> None:
    """Also while a function hangs."""
    hung_up = select.poll()
    hung_up.register(descriptor, 0)  # a hang-up is told without being asked for
    hung_up.poll()
    os._exit(1)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
