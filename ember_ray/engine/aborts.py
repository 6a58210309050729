"""What the running batch is told from any thread: requests that are to end early, and another policy."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class Aborts:
    """Between batches it notes nothing: a later batch may use the same names."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}
        self._noted: list[str] = []

    def begin(self, request_ids: Iterable[str]) -> None:
        """A batch begins; its requests are numbered as given."""
        with self._lock:
            self._numbers = {name: number for number, name in enumerate(request_ids)}

    def note(self, request_id: str) -> None:
        """A request is to end; nothing happens where it is not in the batch."""
        with self._lock:
            if request_id in self._numbers and request_id not in self._noted:
                self._noted.append(request_id)

    def take(self, most: int) -> list[int]:
        """Numbers of at most so many requests, those first that were noted first; they are not given again."""
        with self._lock:
            taken, self._noted = self._noted[:most], self._noted[most:]
            return [self._numbers[name] for name in taken]

    def end(self) -> None:
        """The batch has ended."""
        with self._lock:
            self._numbers, self._noted = {}, []


class SwitchNote:
    """The policy version that a batch is to go on under; the last one noted counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version = -1

    def note(self, version: int) -> None:
        with self._lock:
            self._version = version

    def take(self) -> int:
        """The version, once; -1 for none."""
        with self._lock:
            version, self._version = self._version, -1
            return version
