"""Requests of the running batch that are to end early, noted from any thread."""

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
