"""Ctrl-C and SIGTERM as one and the same wish: stop, clean up, save what there is."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME_WISH_S = 1.0


class StopSignals:
    """Makes SIGINT and SIGTERM raise ``KeyboardInterrupt`` in the main thread.

    A terminal and a supervisor (make, a batch system) may both send a signal for one Ctrl-C: what
    arrives within a second of the first is the same wish and must not break the clean-up that the
    first one began. A later one raises again, so that a clean-up that hangs can be left.

    Libraries that set their own SIGTERM handler (Ray, in ``ray.init``) undo this: call ``install``
    again after them.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.held = False
        self._last = 0.0
        self._before: dict[int, object] = {}

    def install(self) -> None:
        """Takes the two signals over; does nothing outside the main thread, where Python forbids it."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, self._handle)
            self._before.setdefault(number, previous)

    def restore(self) -> None:
        """Gives the signals back to whom they belonged."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in self._before.items():
            signal.signal(number, previous or signal.SIG_DFL)  # type: ignore[arg-type]
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None and now - self._last < _SAME_WISH_S:
            return
        again = self.received is not None
        self.received, self._last = number, now
        if again or not self.held:
            raise KeyboardInterrupt


_current: StopSignals | None = None


def begin() -> StopSignals:
    """Installs the handlers for one command line run and remembers them for ``reinstall``."""
    global _current
    _current = StopSignals()
    _current.install()
    return _current


def reinstall() -> None:
    """Call after ``ray.init``, which replaces the SIGTERM handler; without effect outside ``run_cli``."""
    if _current is not None:
        _current.install()


def check() -> None:
    """Raises KeyboardInterrupt if a stop was asked for: for loops, at points where it is good to stop.

    The one that the handler raised can be lost: it lands wherever the main thread is, and in a destructor or a
    callback from C Python only prints it.
    """
    if _current is not None and _current.received is not None and not _current.held:
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """Holds a stop back until the end of the block, for two things that must be done both or not at all.

    A second wish to stop, more than a second after the first, ends the block at once.
    """
    if _current is None:
        yield
        return
    _current.held = True
    try:
        yield
    finally:
        _current.held = False
    check()


def end(signals: StopSignals) -> None:
    """Undoes ``begin``."""
    global _current
    signals.restore()
    _current = None
