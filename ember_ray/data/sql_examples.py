"""The text-to-SQL task: seeded questions about SQLite databases, with gold queries."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ember_ray.data.example import Example
from ember_ray.data.splits import SPLITS, Split, split_of
from ember_ray.data.sql_databases import INSTANCES, build_instance, write_databases
from ember_ray.data.sql_faults import near_misses
from ember_ray.data.sql_questions import LEVELS, PATTERNS, Question, Values, draw_question
from ember_ray.data.sql_results import Databases, Result
from ember_ray.data.sql_schemas import SCHEMAS, Schema

MAX_TRIES = 20_000
"""Questions drawn in a row without a new one, after which there are no more."""


class Subject:
    """A schema with its instances in memory."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.databases = Databases([build_instance(schema, instance) for instance in range(INSTANCES)])
        self.columns = self.databases.columns()
        self.values: list[Values] = [
            {
                column.name: [
                    row[0] for row in self.databases.run(instance, f"SELECT {column.name} FROM {table.name}") or []
                ]
                for table in (schema.child, schema.parent)
                for column in table.columns
            }
            for instance in range(INSTANCES)
        ]

    def tells_answers_apart(self, query: str) -> bool:
        """Whether most instances have an answer, not all the same one, and near misses differ on one at least."""
        results = self.databases.run_all(query)
        if sum(map(has_content, results)) < INSTANCES - 1 or all(rows == results[0] for rows in results):
            return False
        return all(self.databases.differs(edited, query, results) for edited in near_misses(query, self.columns))


def has_content(rows: Result) -> bool:
    return bool(rows) and any(value is not None and value != 0 for row in rows or () for value in row)


@cache
def _subjects() -> tuple[Subject, ...]:
    return tuple(map(Subject, SCHEMAS))


def generate_sql_examples(
    split: Split, count: int, seed: int, folder: str | Path, levels: Sequence[int] = LEVELS
) -> list[Example]:
    """Makes ``count`` different questions, the same ones on every machine, and their databases.

    The first n of a longer call are those of a shorter one. What a question asks for, its values included, occurs in
    one split only, however it is worded and whatever the columns are called. The databases are the same for every
    split and seed.

    Args:
        split: ``train``, ``validation`` or ``test``.
        count: how many.
        seed: another one draws other questions of the same split.
        folder: where the SQLite files are; missing ones are made.
        levels: the levels to draw from, each as often as the others.

    Returns:
        Examples with the gold query as ``gold`` and, in ``columns``, ``databases`` (the paths of the instances) and
        ``level``.

    Raises:
        ValueError: an unknown split or level, a negative count, or a count that is more than there are questions.
        OSError: the databases cannot be written.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}' (known: {', '.join(SPLITS)})")
    if not levels:
        raise ValueError("at least one level is needed")
    if unknown := [str(level) for level in levels if level not in LEVELS]:
        raise ValueError(f"unknown level {', '.join(unknown)} (known: {', '.join(map(str, LEVELS))})")
    if count < 0:
        raise ValueError(f"count must be at least 0, not {count}")
    paths = write_databases(folder)
    name = "".join(map(str, sorted(set(levels))))
    rng = random.Random(f"sql/{split}/{name}/{seed}")  # a string seed goes through SHA-512
    examples: list[Example] = []
    seen: set[str] = set()
    while len(examples) < count:
        question = _next_question(split, tuple(sorted(set(levels))), rng, seen)
        if question is None:
            raise ValueError(
                f"there are only about {len(examples)} SQL questions of level {', '.join(name)} in split '{split}' "
                f"for seed {seed}; ask for fewer than {count}"
            )
        schema = question.schema
        seen.add(question.text)
        examples.append(
            Example(
                id=f"{split}-sql{name}-{seed}-{len(examples)}",
                messages=[{"role": "user", "content": f"{schema.text()}\n{question.text}"}],
                gold=question.query,
                template=f"{schema.name}/{question.pattern}",
                difficulty=f"level_{question.level}",
                columns={"databases": paths[schema.name], "level": question.level},
            )
        )
    return examples


def _next_question(split: Split, levels: Sequence[int], rng: random.Random, seen: set[str]) -> Question | None:
    """A question of this split that is new; None when none was found."""
    level = rng.choice(levels)
    pattern = rng.choice(PATTERNS[level])  # drawn once: those whose questions often tell too little are not rarer
    for _ in range(MAX_TRIES):
        subject = rng.choice(_subjects())
        question = draw_question(subject.schema, rng.choice(subject.values), level, pattern, rng)
        if question.text in seen or split_of(subject.schema.identity(question.query)) != split:
            continue
        if subject.tells_answers_apart(question.query):
            return question
    return None
