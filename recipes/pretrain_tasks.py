"""What the pretraining recipe needs of a task: rows, demonstrations, and whether an answer is right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from ember_ray.data.demonstrations import CLEAN, DemonstrationMix, demonstrate
from ember_ray.data.example import Example
from ember_ray.data.extraction import Difficulty, generate_examples
from ember_ray.data.splits import Split
from ember_ray.data.sql_demonstrations import SQL_CLEAN, SqlDemonstrationMix, SqlDemonstrator
from ember_ray.data.sql_examples import generate_sql_examples


class PretrainTask(Protocol):
    """One task.

    Attributes:
        pieces: regular expression of what the tokenizer cuts texts into.
    """

    pieces: str

    def rows(self, split: Split, count: int) -> list[Example]:
        """The first ``count`` examples of a split."""

    def demonstrate(self, row: Example, mixed: bool) -> str:
        """The next demonstration of the run: of mixed quality or clean."""

    def exact_matches(self, rows: Sequence[Example], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """1 or 0 for each answer to each row, by the task's verifier."""


class ExtractTask:
    """JSON extraction."""

    # Digits in pairs, words with the space before them, JSON punctuation such as '": "' in one piece: short and few
    # different pieces are what two layers need to learn copying.
    pieces = r"\d{1,2}| ?[\p{L}_]+| ?[^\s\p{L}\d_]+ ?[^\s\p{L}\d_]*|\s"

    def __init__(self, difficulty: Difficulty, mix: DemonstrationMix, seed: int) -> None:
        self._difficulty, self._mix, self._seed = difficulty, mix, seed
        self._rng = random.Random(f"demonstrations/{seed}")

    def rows(self, split: Split, count: int) -> list[Example]:
        return generate_examples(split, self._difficulty, count, self._seed)

    def demonstrate(self, row: Example, mixed: bool) -> str:
        return demonstrate(row, self._rng, self._mix if mixed else CLEAN)

    def exact_matches(self, rows: Sequence[Example], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        from verifiers.json_extraction import verify

        return [
            [verify(text, row.gold, row.schema).components["exact_match"] for text in texts]
            for row, texts in zip(rows, answers, strict=True)
        ]


class SqlTask:
    """Text-to-SQL."""

    # As above, but a word or number always has the space before it, so that a question's "over 57" and a query's
    # "> 57" end in the same token.
    pieces = r" ?\d{1,2}| ?[\p{L}_]+| ?[^\s\p{L}\d_]+|\s"

    def __init__(self, levels: Sequence[int], databases: str, mix: SqlDemonstrationMix, seed: int) -> None:
        self._levels, self._databases, self._mix, self._seed = levels, databases, mix, seed
        self._rng = random.Random(f"sql demonstrations/{seed}")
        self._demonstrator = SqlDemonstrator()

    def rows(self, split: Split, count: int) -> list[Example]:
        return generate_sql_examples(split, count, self._seed, self._databases, self._levels)

    def demonstrate(self, row: Example, mixed: bool) -> str:
        return self._demonstrator(row, self._rng, self._mix if mixed else SQL_CLEAN)

    def exact_matches(self, rows: Sequence[Example], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        from verifiers.sql import SqlItem, verify_batch

        items = [
            SqlItem(text, str(row.gold), row.columns["databases"])  # type: ignore[arg-type]  # a list of paths
            for row, texts in zip(rows, answers, strict=True)
            for text in texts
        ]
        right = iter(verdict.components["exact_match"] for verdict in verify_batch(items))
        return [[next(right) for _ in texts] for texts in answers]
