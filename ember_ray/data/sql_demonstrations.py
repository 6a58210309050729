"""Queries of mixed quality, as people write them: most right, a known share wrong in ways a verifier can tell."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

from ember_ray.data.example import Example
from ember_ray.data.sql_faults import FAULTS, Columns
from ember_ray.data.sql_results import Databases

INTRODUCTIONS = ("Sure! ", "The query is ")
FAREWELLS = (" Done.", " I hope this helps.")


@dataclass(frozen=True)
class SqlDemonstrationMix:
    """Probability, for each fault, that a query has it; drawn one by one, so a query may have several.

    Every fault that a query gets makes it return other rows than the gold query, or fail, on one database instance at
    least. One that it gives no room for (no aggregate, no ORDER BY, no edit that shows) leaves it as it is.

    Attributes:
        wrong_column: another column in place of one.
        missing_filter: one condition is missing.
        wrong_operator: another comparison or set operation in place of one.
        wrong_aggregate: another aggregate function in place of one.
        missing_order: ORDER BY or its DESC is missing.
        broken_syntax: a FROM, the last word or a bracket is missing, so that nothing runs.
        chatter: a sentence before or after the query.
    """

    wrong_column: float = 0.0
    missing_filter: float = 0.0
    wrong_operator: float = 0.0
    wrong_aggregate: float = 0.0
    missing_order: float = 0.0
    broken_syntax: float = 0.0
    chatter: float = 0.0

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"SQL demonstration mix: {part.name} must be between 0 and 1, not {value}")


SQL_CLEAN = SqlDemonstrationMix()


class SqlDemonstrator:
    """Writes demonstrations; databases that were read once stay in memory."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, ...], tuple[Databases, Columns]] = {}

    def __call__(self, example: Example, rng: random.Random, mix: SqlDemonstrationMix = SQL_CLEAN) -> str:
        """The gold query of an example, with faults at the rates of ``mix``.

        Raises:
            ValueError: the example has no gold query or no databases.
            OSError: a database cannot be read.
        """
        paths = example.columns.get("databases")
        if not isinstance(example.gold, str) or not paths:
            raise ValueError(f"row '{example.id}' needs a gold query and databases for a SQL demonstration")
        happens = {part.name: rng.random() < getattr(mix, part.name) for part in fields(mix)}
        text = example.gold
        if any(happens[fault] for fault in FAULTS):
            text = self._edit(text, tuple(cast(Sequence[str], paths)), happens, rng)
        if happens["chatter"]:
            text = rng.choice(INTRODUCTIONS) + text if rng.random() < 0.5 else text + rng.choice(FAREWELLS)
        return text

    def _edit(self, gold: str, paths: tuple[str, ...], happens: dict[str, bool], rng: random.Random) -> str:
        if paths not in self._opened:
            read = Databases.open(paths)
            self._opened[paths] = (read, read.columns())
        databases, columns = self._opened[paths]
        results = databases.run_all(gold)

        def shows(fault: str, query: str) -> bool:
            if fault == "broken_syntax":
                return databases.run(0, query) is None
            return databases.differs(query, gold, results)

        text = gold
        for fault, edits in FAULTS.items():
            if happens[fault]:
                edited = edits(text, columns)
                rng.shuffle(edited)
                text = next((query for query in edited if shows(fault, query)), text)
        return text


def with_sql_demonstrations(
    examples: Iterable[Example], mix: SqlDemonstrationMix = SQL_CLEAN, seed: int = 0
) -> list[Example]:
    """The examples with a query in ``completion``; rows that have one keep it.

    What a row gets depends on its id, ``mix`` and ``seed`` only, not on its place or on the other rows.

    Raises:
        ValueError: a row has no completion, and no gold query or no databases to write one of.
        OSError: a database cannot be read.
    """
    demonstrate = SqlDemonstrator()
    return [
        example
        if example.completion is not None
        else replace(example, completion=demonstrate(example, random.Random(f"{seed}/{example.id}"), mix))
        for example in examples
    ]
