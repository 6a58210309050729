"""Which policy version was which adapter, over all sessions of a run: a number never names two policies."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "versions.jsonl"


class VersionJournal:
    """One line a version in a file of the learner's folder, written before the version is published.

    A round that is learnt again after a loss, with the same result to the bit, gets the number that it had. With
    another result it gets a new one, higher than any before.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / FILE
        self._digests: dict[int, str] = {}
        text = self._path.read_text() if self._path.is_file() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the process was killed while it wrote the line: that version was never published
                continue
            self._digests[row["version"]] = row["digest"]
        self._begin = "\n" if text and not text.endswith("\n") else ""

    def number(self, wanted: int, digest: str) -> int:
        """The number of an adapter.

        Args:
            wanted: the number to give if nothing is in its way.
            digest: tells adapters apart.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._digests.get(wanted) == digest:
            return wanted
        version = max(wanted, max(self._digests, default=0) + 1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(f"{self._begin}{json.dumps({'version': version, 'digest': digest})}\n")
        self._begin = ""
        self._digests[version] = digest
        return version
