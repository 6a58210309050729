"""What queries of known databases return, for the makers of questions and demonstrations.

Judging an answer of a policy is the SQL verifier's work, in a process of its own: what runs here is only what this
package wrote or a dataset's gold query.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path

Result = list[tuple] | None
"""Rows, or None where the query fails."""


class Databases:
    """The instances of one schema, read into memory: nothing here can change a file.

    Args:
        contents: the database files' contents, one an instance.
    """

    def __init__(self, contents: Sequence[bytes]) -> None:
        self.connections: list[sqlite3.Connection] = []
        for content in contents:
            connection = sqlite3.connect(":memory:")
            connection.deserialize(content)
            connection.execute("PRAGMA query_only = 1")
            self.connections.append(connection)

    @classmethod
    def open(cls, paths: Sequence[str]) -> Databases:
        """Raises OSError where a file cannot be read."""
        return cls([Path(path).read_bytes() for path in paths])

    def run(self, instance: int, query: str) -> Result:
        try:
            return self.connections[instance].execute(query).fetchall()
        except (sqlite3.Error, sqlite3.Warning):
            return None

    def run_all(self, query: str) -> list[Result]:
        return [self.run(instance, query) for instance in range(len(self.connections))]

    def differs(self, query: str, gold_query: str, gold_results: list[Result]) -> bool:
        """Whether an instance tells the query from the gold one, whatever the order of its columns."""
        ordered = is_ordered(gold_query)
        return any(not _same(self.run(instance, query), gold, ordered) for instance, gold in enumerate(gold_results))

    def columns(self) -> dict[str, list[tuple[str, str]]]:
        """Table name to its columns, (name, type)."""
        tables = self.connections[0].execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        return {
            table: [
                (name, kind)
                for name, kind in self.connections[0].execute("SELECT name, type FROM pragma_table_info(?)", (table,))
            ]
            for (table,) in tables.fetchall()
        }


def is_ordered(query: str) -> bool:
    """Whether rows come in an order that was asked for: an ORDER BY outside all parentheses."""
    inner = re.compile(r"\([^()]*\)")
    while inner.search(query):
        query = inner.sub("", query)
    return re.search(r"\bORDER BY\b", query, re.IGNORECASE) is not None


def fingerprint(rows: Result, ordered: bool) -> object:
    """Equal for two results that hold the same rows in some order of columns (and of rows, if not ``ordered``).

    Each row's cells are sorted by themselves, so results that are not the same may look so, never the other way.
    """
    if rows is None:
        return None
    plain = [tuple(sorted(map(_cell, row))) for row in rows]
    return plain if ordered else sorted(plain)


def _same(rows: Result, others: Result, ordered: bool) -> bool:
    if rows is None or others is None or len(rows) != len(others):
        return rows is others
    return rows == others or fingerprint(rows, ordered) == fingerprint(others, ordered)


def _cell(value: object) -> str:
    return f"{value:.9g}" if isinstance(value, float | int) else f"{type(value).__name__} {value}"
