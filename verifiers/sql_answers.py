"""Queries sorted by what they give, without the gold query: for a majority vote among a model's answers."""

from __future__ import annotations

import os
from collections.abc import Sequence

from verifiers.sql import SqlItem, SqlLimits, verify_batch


def result_classes(
    queries: Sequence[str | None],
    databases: Sequence[str | os.PathLike[str]],
    limits: SqlLimits = SqlLimits(),  # noqa: B008 (frozen)
) -> list[int | None]:
    """A number for each query, equal for queries that give the same table on every instance.

    Each is compared with the first query of each class, by the rules by which `verify` compares with the gold query
    (order counts where the first query of the class has a top-level ORDER BY). Raises SandboxError if no process can be
    started.

    Args:
        queries: in the order of their samples; None abstains and gets None.
        databases: paths of the question's SQLite files.
        limits: what one query may use; one that exceeds them is in a class of its own.
    """
    firsts: list[str] = []
    known: dict[str, int] = {}
    for query in queries:
        if query is None or query in known:
            continue
        verdicts = verify_batch([SqlItem(query, first, databases) for first in firsts], limits=limits)
        equal = [index for index, verdict in enumerate(verdicts) if verdict.components.get("exact_match") == 1.0]
        known[query] = equal[0] if equal else len(firsts)
        if not equal:
            firsts.append(query)
    return [None if query is None else known[query] for query in queries]
