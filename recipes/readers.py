"""How the evaluation reads the answers of each task: what it may know of them without the gold, and their fields."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ember_ray.data.example import Example
from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.tracking.evaluation_curves import FieldCounts, Reading, TaskReader
from verifiers.json_answers import count_fields, read_json
from verifiers.sql_answers import result_classes
from verifiers.sql_find import FoundSql, find_sql


def reader_of(task: str, examples: Iterable[Example]) -> TaskReader:
    """The reader of a task (``extract`` or ``sql``), for groups of these rows."""
    by_id = {example.id: example for example in examples}
    return _extract_reader(by_id) if task == "extract" else _sql_reader(by_id)


def _extract_reader(examples: dict[str, Example]) -> TaskReader:
    def read(group: ScoredGroup, candidates: Sequence[ScoredCandidate]) -> list[Reading]:
        schema = examples[group.request_id].schema
        return [Reading(*read_json(scored.candidate.text, schema)) for scored in candidates]

    def count(group: ScoredGroup, scored: ScoredCandidate) -> FieldCounts:
        example = examples[group.request_id]
        return FieldCounts(*count_fields(scored.candidate.text, example.gold, example.schema))

    return TaskReader(("parse", "schema"), read, count)


def _sql_reader(examples: dict[str, Example]) -> TaskReader:
    """A query is valid if it executes, which the verdict says; queries with equal results are one answer."""

    def read(group: ScoredGroup, candidates: Sequence[ScoredCandidate]) -> list[Reading]:
        databases: Any = examples[group.request_id].columns["databases"]
        queries = [_query(scored) for scored in candidates]
        classes = result_classes(queries, databases)
        return [Reading(query is not None, key) for query, key in zip(queries, classes, strict=True)]

    return TaskReader(("parse", "execute"), read)


def _query(scored: ScoredCandidate) -> str | None:
    """The query, if it executes."""
    found = find_sql(scored.candidate.text)
    return found.query if isinstance(found, FoundSql) and scored.components.get("execute") == 1.0 else None
