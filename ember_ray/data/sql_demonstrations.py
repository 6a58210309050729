"""Queries of mixed quality, as people write them: most right, a known share wrong in ways a verifier can tell."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

from ember_ray.data.example import Example
from ember_ray.data.sql_faults import FAULTS
from ember_ray.data.sql_results import Databases

INTRODUCTIONS = ("Here is the query: ", "Sure! ", "The answer is ")
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


def with_sql_demonstrations(examples: Sequence[Example], mix: SqlDemonstrationMix, seed: int) -> list[Example]:
    """The same examples with a demonstration as ``completion``: the gold query, with faults at the rates of ``mix``.

    A row's demonstration depends on its id and the seed only, not on the rows beside it.

    Raises:
        ValueError: a row has no gold query or no databases.
        OSError: a database cannot be read.
    """
    opened: dict[tuple[str, ...], Databases] = {}
    shown: list[Example] = []
    for example in examples:
        paths = example.columns.get("databases")
        if not isinstance(example.gold, str) or not paths:
            raise ValueError(f"row {example.id} needs a gold query and databases for a SQL demonstration")
        key = tuple(cast(Sequence[str], paths))
        if key not in opened:
            opened[key] = Databases.open(list(key))
        rng = random.Random(f"sql demonstration/{seed}/{example.id}")
        shown.append(replace(example, completion=_demonstrate(example.gold, opened[key], mix, rng)))
    return shown


def _demonstrate(gold: str, databases: Databases, mix: SqlDemonstrationMix, rng: random.Random) -> str:
    happens = {part.name: rng.random() < getattr(mix, part.name) for part in fields(mix)}
    text = gold
    if any(happens[fault] for fault in FAULTS):
        results, columns = databases.run_all(gold), databases.columns()

        def shows(fault: str, query: str) -> bool:
            if fault == "broken_syntax":
                return databases.run(0, query) is None
            return databases.differs(query, gold, results)

        for fault, edits in FAULTS.items():
            if happens[fault]:
                edited = edits(text, columns)
                rng.shuffle(edited)
                text = next((query for query in edited if shows(fault, query)), text)
    if happens["chatter"]:
        text = rng.choice(INTRODUCTIONS) + text if rng.random() < 0.5 else text + rng.choice(FAREWELLS)
    return text
