"""What is odd about a dataset, found row by row; of the rows themselves only digests are kept."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from ember_ray.data.example import Example
from ember_ray.data.formats_row import KEYS, Row, Task, fit_task, guess_task

MAX_SHOWN = 20

KINDS = {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object"}
"""Types of values in words; all others go by the name of the type."""


@dataclass
class Finding:
    """One kind of oddity.

    Attributes:
        title: what it is, e.g. ``rows that cannot be used``.
        is_fault: whether it must be mended; else it is worth knowing.
        count: how often it was found.
        lines: the first ``MAX_SHOWN`` places, with row numbers.
    """

    title: str
    is_fault: bool = True
    count: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.count += 1
        if len(self.lines) < MAX_SHOWN:
            self.lines.append(line)


class Survey:
    """Looks at the rows of one dataset; about 250 bytes are kept of each.

    Attributes:
        task: the task asked for, else that of the first good row.
        is_guessed: whether nobody asked for a task.
        rows, usable: how many there are, and how many have no fault of their own.
        rows_of_file: rows by the file that they are in.
        forms: usable rows by TRL's name of their format.
        columns: of usable rows by name, how often each type of value was found.
        databases: the SQLite files that rows name.
        prompts: by digest, where a prompt was seen first.
    """

    def __init__(self, name: str, task: Task | None, seen: Survey | None = None) -> None:
        """``seen``: the dataset whose prompts must not come up again in this one."""
        self.name, self.task, self.is_guessed = name, task, task is None
        self.rows = self.usable = 0
        self.rows_of_file: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()
        self.columns: dict[str, Counter[str]] = defaultdict(Counter)
        self.databases: set[str] = set()
        self.prompts: dict[bytes, str] = {}
        self._seen = seen
        self._answers: dict[bytes, str] = {}
        self._first_places: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._faulty = Finding("rows that cannot be used")
        self._missing = Finding("missing fields")
        self._equal = Finding("answers without a preference")
        self._same_row = Finding("duplicates, same prompt and same answer")
        self._same_prompt = Finding("duplicates, same prompt and another answer")
        self._more_answers = Finding("prompts with several answers", is_fault=False)
        self._overlap = Finding("overlap, prompts that are training prompts too")

    def add(self, row: Row) -> None:
        """Takes the next row, read without a task."""
        self.rows += 1
        self.rows_of_file[row.file] += 1
        for fault in row.faults:
            self._faulty.add(f"{row.place}: {fault}")
        if row.example is not None:
            self._add_example(row, row.example)

    def _add_example(self, row: Row, example: Example) -> None:
        if self.is_guessed and not self.usable:
            self.task = guess_task(example)
        self.usable += 1
        self.forms[row.form] += 1
        for name, value in (row.raw or {}).items():
            kind = kind_name(value)
            self.columns[name][kind] += 1
            places = self._first_places[name, kind]
            if len(places) < MAX_SHOWN:
                places.append(str(row.number) if len(self.rows_of_file) == 1 else row.place)
        if self.task is not None:
            example, missing = fit_task(example, self.task)
            for what in missing:
                self._missing.add(f"{row.place}: {what}")
        if example.chosen is not None and example.chosen == example.rejected:
            self._equal.add(f"{row.place}: 'chosen' and 'rejected' are the same")
        databases = example.columns.get("databases")
        if isinstance(databases, tuple):
            self.databases.update(databases)
        answer = [example.gold, example.completion, example.chosen, example.rejected, databases]
        prompt = _digest(example.messages)
        whole = prompt + _digest(answer)
        first = self.prompts.setdefault(prompt, row.place)
        same = self._answers.setdefault(whole, row.place)
        if same != row.place:
            self._same_row.add(f"{row.place} is as {same}")
        elif first != row.place:
            several = example.completion is not None or example.chosen is not None
            (self._more_answers if several else self._same_prompt).add(f"{row.place} has the prompt of {first}")
        if self._seen is not None and prompt in self._seen.prompts:
            self._overlap.add(f"{row.place} has the prompt of {self._seen.prompts[prompt]}")

    def findings(self) -> list[Finding]:
        """All that was found, faults first."""
        found = [
            *(self._faulty, self._missing, self._mismatches(), self._equal, self._same_row, self._same_prompt),
            *(self._overlap, self._gaps(), self._more_answers, self._mixed()),
        ]
        return [one for one in found if one.count]

    def _mismatches(self) -> Finding:
        """Columns for reward functions whose values have several types."""
        finding = Finding("type mismatches")
        for name, kinds in self.columns.items():
            present = [kind for kind, _ in kinds.most_common() if kind != "null"]
            if name not in KEYS and len(present) > 1:
                others = (f"{kind} in {self._rows(name, kind)}" for kind in present[1:])
                finding.add(f"column '{name}' is {present[0]} in {kinds[present[0]]} rows, but {', '.join(others)}")
        return finding

    def _gaps(self) -> Finding:
        """Columns for reward functions that some rows lack."""
        finding = Finding("columns that some rows lack", is_fault=False)
        for name, kinds in self.columns.items():
            there = kinds.total() - kinds["null"]
            if name not in KEYS and 0 < there < self.usable:
                finding.add(f"column '{name}' is there in {there} of {self.usable} rows")
        return finding

    def _mixed(self) -> Finding:
        finding = Finding("rows of several formats", is_fault=False)
        if len(self.forms) > 1:
            finding.add(_counts(self.forms))
        return finding

    def _rows(self, name: str, kind: str) -> str:
        """The first rows where a column has values of a type."""
        places, count = self._first_places[name, kind], self.columns[name][kind]
        more = f" and {count - len(places)} more" if count > len(places) else ""
        return f"row{'s' if count > 1 else ''} {', '.join(places)}{more}"


def kind_name(value: object) -> str:
    """The type of a value in a word."""
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


def report(survey: Survey, path: str) -> Iterable[str]:
    """Lines for people."""
    task = survey.task or "none, prompts only"
    yield f"{survey.name}: {path}, {survey.rows} row{'' if survey.rows == 1 else 's'}, {survey.usable} usable"
    yield f"  task: {task}" + (", guessed from the first row; --task names another" if survey.is_guessed else "")
    yield f"  formats: {_counts(survey.forms) or 'none'}"
    columns = (f"{name} ({', '.join(kinds)})" for name, kinds in survey.columns.items())
    yield f"  columns: {', '.join(columns) or 'none'}"
    for finding in survey.findings():
        yield f"  {'FAULT' if finding.is_fault else 'note'}: {finding.title}: {finding.count}"
        yield from (f"    {line}" for line in finding.lines)
        if finding.count > len(finding.lines):
            yield f"    and {finding.count - len(finding.lines)} more"


def _counts(counter: Counter[str]) -> str:
    return "; ".join(f"{name}: {count}" for name, count in counter.most_common())


def _digest(value: object) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
