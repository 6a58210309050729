"""The answers of an endpoint on disk, as they come: what was paid for is not asked again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from ember_ray.config.errors import UserError
from ember_ray.engine.request import Candidate
from ember_ray.evaluation.endpoint import Answered, ChatPrompt
from ember_ray.tracking.files import json_line, read_jsonl, told_plainly, write_jsonl


class AnswerLog:
    """``answers.jsonl`` of an evaluation, one line an answered request: its ``kind`` (``sampled`` or ``greedy``), a
    digest of the prompt, the fields of ``Answered`` and ``seconds``, the time spent on asking when it came.

    Args:
        path: read if it is there. A last line without its end, which a killed process leaves, is dropped.
        prompts: what is asked.

    Attributes:
        earlier: by kind, what earlier sessions were answered, in the order in which it came.
        requests: how many are kept.
        seconds: of asking, up to the last answer, those of earlier sessions included.

    Raises:
        UserError: the file cannot be written, was changed, or has answers to a row that is no longer asked so.
    """

    def __init__(self, path: Path, prompts: Sequence[ChatPrompt]) -> None:
        self._path = path
        rows = read_jsonl(path)
        self.requests, self.seconds = len(rows), 0.0
        self.earlier: dict[str, list[Answered]] = {}
        digests = {prompt.request_id: _digest(prompt) for prompt in prompts}
        try:
            for row in rows:
                if digests.get(row["request_id"]) != row["prompt"]:
                    raise UserError(
                        f"resume: row '{row['request_id']}' is not the one that '{path}' has answers to; "
                        "go on with the rows as they were, or start a new evaluation"
                    )
                self.earlier.setdefault(row["kind"], []).append(_answered(row))
                self.seconds = float(row["seconds"])
        except (KeyError, TypeError, ValueError) as fault:
            what = f"{type(fault).__name__}: {fault}"
            raise UserError(f"resume: '{path}' was changed ({what}); start a new evaluation") from fault
        write_jsonl(path, rows)
        self._begun = time.monotonic() - self.seconds
        with told_plainly(path):
            self._file = open(path, "a", encoding="utf-8", errors="backslashreplace")

    def append(self, kind: str, prompt: ChatPrompt, answered: Answered) -> None:
        """Writes the line; it is with the operating system when this returns.

        Raises:
            UserError: the disk is full.
        """
        seconds = time.monotonic() - self._begun
        row = {"kind": kind, "prompt": _digest(prompt), **dataclasses.asdict(answered), "seconds": seconds}
        with told_plainly(self._path):
            self._file.write(json_line(row))
            self._file.flush()
        self.requests, self.seconds = self.requests + 1, seconds

    def close(self) -> None:
        """Closes the file."""
        with told_plainly(self._path):
            self._file.close()


def _answered(row: dict) -> Answered:
    fields = {field.name: row[field.name] for field in dataclasses.fields(Answered)}
    candidates = [Candidate(**one) for one in fields.pop("candidates")]
    for candidate in candidates:  # JSON has no infinity
        candidate.logprobs = [float("-inf") if value is None else value for value in candidate.logprobs]
    return Answered(**fields, candidates=candidates)


def _digest(prompt: ChatPrompt) -> str:
    return hashlib.sha256(json.dumps(prompt.messages, sort_keys=True).encode()).hexdigest()[:16]
