"""Rows of a comparison put together over seeds: one line a task, learner and reward design."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from ember_ray.tracking.comparison_cells import LEARNERS

Row = Mapping[str, Any]

NAMES = {
    "base": "base model",
    "sft": "SFT",
    "best_of_n": "best-of-N",
    "dpo": "DPO",
    "grpo": "GRPO",
    "sft_clean": "SFT on clean answers",
}
"""Learners in the order in which tables and figures show them; the last is the upper line."""

TASK_NAMES = {"extract": "JSON extraction", "sql": "text-to-SQL"}

OWN_MEASURES = {"extract": ("f1", "field F1"), "sql": ("rows", "overlap of rows")}
"""The measure that only this task has."""


@dataclass(frozen=True)
class Spread:
    """A measure over seeds.

    Attributes:
        mean: over seeds.
        low, high: the least and the greatest seed; of a single seed its own 95 % interval, or None if it has none.
        seeds: how many have it.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class Line:
    """What the seeds of one learner came to.

    Attributes:
        task, algorithm, design: which; ``base`` is what SFT started from.
        rows: its cells, one a seed.
        part: of the rows that is its quality.
    """

    task: str
    algorithm: str
    design: str | None
    rows: tuple[Row, ...]
    part: Literal["before", "after"] = "after"

    @property
    def name(self) -> str:
        return NAMES[self.algorithm]

    def quality(self, measure: str) -> Spread | None:
        """A measure of the evaluation; None where no seed has it."""
        return _spread([row[self.part] for row in self.rows], measure)

    def gain(self, measure: str) -> Spread | None:
        """What was gained over the starting checkpoint; None for the base model."""
        return None if self.algorithm == "base" else _spread([row["gain"] for row in self.rows], measure)

    def number(self, key: str) -> Spread | None:
        """A number of the row itself, such as ``training_seconds``; None for the base model."""
        return None if self.algorithm == "base" else _spread(self.rows, key)

    def pass_at(self, k: int) -> Spread | None:
        """pass@k; None where fewer samples were drawn."""
        points = [_point(row[self.part].get("pass_at_k", ()), k) for row in self.rows]
        return _spread([point for point in points if point], "mean", "interval")

    def best_of(self, selector: str, size: int) -> Spread | None:
        """Exact match of the candidate that a selector takes out of ``size``; None where fewer samples were drawn."""
        curves = [row[self.part].get("best_of_n", {}).get(selector, {}) for row in self.rows]
        points = [_point(curve.get("points", ()), size) for curve in curves]
        return _spread([point for point in points if point], "mean", "interval")

    def mismatch(self, key: str) -> Spread | None:
        """``mean``, ``p95``, ``max`` or ``outside`` of the train/inference mismatch (see `cell_row`)."""
        return None if self.algorithm == "base" else _spread([row["mismatch"] for row in self.rows], key)

    def count(self, flag: str) -> int:
        """For how many seeds a truth value of the row holds."""
        return sum(bool(row[flag]) for row in self.rows)


def lines_of(rows: Sequence[Row], task: str, designs: Sequence[str]) -> list[Line]:
    """The lines of a task that have rows, in the order of `NAMES`; learners once for each of the designs."""
    of_task = sorted((row for row in rows if row["task"] == task), key=lambda row: row["seed"])

    def line(algorithm: str, design: str | None, part: Literal["before", "after"] = "after") -> Line:
        wanted = ("sft" if algorithm == "base" else algorithm, design)
        found = tuple(row for row in of_task if (row["algorithm"], row["design"]) == wanted)
        return Line(task, algorithm, design, found, part)

    lines = [line("base", None, "before"), line("sft", None)]
    lines += [line(algorithm, design) for algorithm in LEARNERS for design in designs]
    return [found for found in [*lines, line("sft_clean", None)] if found.rows]


def _point(points: Sequence[Row], size: int) -> Row | None:
    return next((point for point in points if point["n"] == size), None)


def _spread(parts: Sequence[Row], key: str, interval_key: str | None = None) -> Spread | None:
    found = [(part[key], part.get(interval_key or f"{key}_interval")) for part in parts if part.get(key) is not None]
    if not found:
        return None
    values = [value for value, _ in found]
    low, high = (min(values), max(values)) if len(values) > 1 else found[0][1] or (None, None)
    return Spread(fmean(values), low, high, len(values))
