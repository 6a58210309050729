"""A stop whose exception was lost is not lost itself."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ember_ray.config import signals


class Swallows:
    """A destructor in which the signal arrives: Python prints its exception and goes on."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_a_destructor_swallowed_is_found_at_the_next_check() -> None:
    signals.check()  # outside a command line run: nothing
    stop = signals.begin()
    try:
        signals.check()
        swallowing = Swallows()
        del swallowing
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signals.check()
    finally:
        signals.end(stop)


def test_a_stop_is_held_back_until_both_things_are_done() -> None:
    stop, done = signals.begin(), []
    try:
        with pytest.raises(KeyboardInterrupt), signals.held():
            os.kill(os.getpid(), signal.SIGINT)
            signals.check()
            done.append("both")
        assert (done, stop.received, stop.held) == (["both"], signal.SIGINT, False)
    finally:
        signals.end(stop)


def test_a_second_wish_ends_what_held_back_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_SAME_WISH_S", 0.0)
    stop, done = signals.begin(), []
    try:
        with pytest.raises(KeyboardInterrupt), signals.held():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("not reached")
        assert done == []
    finally:
        signals.end(stop)
