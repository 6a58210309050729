"""The text-to-SQL verifier: a model's output in, a reward and its parts out.

**What counts as found.** The whole output if it is one statement that begins with SELECT or WITH; else the last code
fence that is one; else the last such statement in the text; else nothing. `sql_find.py` has the fine print.

**What is exact.** `exact_match` is execution accuracy: on *every* database instance of the question the query gives
the table that the gold query gives, by the rules in `sql_compare.py`: row order counts only where the gold query has a
top-level ORDER BY, and there not among ties; duplicates count; columns may stand in another order; values compare by
type, numbers within a tolerance. Several instances with different rows make it unlikely that a wrong query passes.

**Untrusted input.** A query runs in a process of its own (`sandbox.py`, `sql_worker.py`) with limits on memory and
files, on a database that is opened read-only and immutable, behind an authorizer that allows reading the tables of
that database and nothing else (`sql_execute.py`). Limits on steps, rows and characters decide the same on any machine;
the clock (`SqlLimits.time_s`) stands behind them, and at 1.25 times that limit the process is killed. A query over a
limit scores as one that does not execute. Nothing in a model's output makes a function here raise.

**Faults of the data set** are told apart from faults of the output: a gold query that fails, runs over a limit or
cannot be read by sqlglot, a database that is missing or no SQLite file. `check_gold` and `verify` raise ValueError for
them; `verify_batch` gives the item a verdict whose reward is None. A gold query that gives another result every time
(``date('now')``, rows without an order under LIMIT) is not detected.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from verifiers.sandbox import Sandbox
from verifiers.sql_find import NoSql, find_sql
from verifiers.sql_limits import MAX_SQL_CHARS, SqlLimits
from verifiers.sql_rewards import SqlRewardDesign

__all__ = ["SqlItem", "SqlLimits", "SqlRewardDesign", "Verdict", "check_gold", "verify", "verify_batch"]

COMPONENTS = ("parse", "execute", "columns", "rows", "exact_match")

# The child stops a query at the limit; this is for one that does not come back, and leaves time to compare the result.
_KILL_FACTOR = 1.25


class SqlItem(NamedTuple):
    """One output to judge: the text, the gold query, the paths of the question's SQLite files."""

    text: str
    gold: str
    databases: Sequence[str | os.PathLike[str]]


@dataclass
class Verdict:
    """What the verifier says about one output.

    Attributes:
        reward: the scalar of the reward design, 0 to 1; None (from `verify_batch` only) if the data set is at fault.
        components: each 0 to 1: ``parse`` (a query was found, and SQLite or sqlglot can read it), ``execute`` (it runs
            on all instances within the limits), ``columns`` and ``rows`` (F1 against the gold's, the mean over the
            instances; `sql_compare.TableMatch`), ``exact_match``. Empty if the reward is None.
        reason: why it is no exact match, one sentence; None if it is.
        query: the query that was found; None if none was.
    """

    reward: float | None
    components: dict[str, float]
    reason: str | None = None
    query: str | None = None


def check_gold(
    gold: str,
    databases: Sequence[str | os.PathLike[str]],
    limits: SqlLimits = SqlLimits(),  # noqa: B008 (frozen)
) -> None:
    """Check a gold query once, when the data set is loaded.

    Raises ValueError, naming the fault, if there is no database, one is missing or no SQLite file, or `gold` is not one
    SELECT statement that sqlglot reads and that runs within `limits` on every one of them.
    """
    fault = _static_fault(gold, databases)
    if fault is None:
        [reply] = _sandbox().run([_request(None, gold, databases, limits)], limits.time_s * _KILL_FACTOR)
        fault = _fault(reply, limits)
    if fault is not None:
        raise ValueError(fault)


def verify(
    text: str,
    gold: str,
    databases: Sequence[str | os.PathLike[str]],
    design: SqlRewardDesign = SqlRewardDesign(),  # noqa: B008 (frozen)
    limits: SqlLimits = SqlLimits(),  # noqa: B008 (frozen)
) -> Verdict:
    """Score `text` against the query `gold` by the rules in this module's docstring.

    Args:
        text: a model's output, anything at all.
        gold: the gold query. Its results are remembered by file, time of change, size and query.
        databases: paths of the SQLite files of the question, one or several instances of the same schema.
        design: how the reward is made.
        limits: what one query may use over all instances together.

    Raises ValueError for a fault of the data set (see `check_gold`), SandboxError if no process can be started; never
    for anything in `text`.
    """
    [verdict] = verify_batch([SqlItem(text, gold, databases)], design, limits)
    if verdict.reward is None:
        raise ValueError(verdict.reason)
    return verdict


def verify_batch(
    items: Sequence[SqlItem],
    design: SqlRewardDesign = SqlRewardDesign(),  # noqa: B008 (frozen)
    limits: SqlLimits = SqlLimits(),  # noqa: B008 (frozen)
) -> list[Verdict]:
    """One verdict an item, in order; see `verify`. An item whose gold or database is at fault has the reward None.

    Items with the same databases and gold are best kept together. Raises SandboxError if no process can be started.
    """
    verdicts: list[Verdict] = []
    requests: list[dict[str, Any]] = []
    asked: list[int] = []
    for index, item in enumerate(items):
        fault = _static_fault(item.gold, item.databases)
        if fault is not None:
            verdicts.append(Verdict(None, {}, fault))
            continue
        found = find_sql(item.text)
        if isinstance(found, NoSql):
            verdicts.append(Verdict(0.0, dict.fromkeys(COMPONENTS, 0.0), found.reason))
            # Whether the gold is sound must not depend on the text.
            requests.append(_request(None, item.gold, item.databases, limits))
        else:
            verdicts.append(Verdict(None, {}, None, found.query))
            requests.append(_request(found.query, item.gold, item.databases, limits))
        asked.append(index)
    replies = _sandbox().run(requests, limits.time_s * _KILL_FACTOR) if requests else []
    for index, reply in zip(asked, replies, strict=True):
        _settle(verdicts[index], reply, design, limits)
    return verdicts


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    """This process's sandbox, warm from its first use to the end of the process."""
    return Sandbox("verifiers.sql_worker")


def _request(
    query: str | None, gold: str, databases: Sequence[str | os.PathLike[str]], limits: SqlLimits
) -> dict[str, Any]:
    return {
        "query": query,
        "gold": gold,
        "databases": [os.path.abspath(path) for path in databases],
        "time_s": limits.time_s,
        "max_steps": limits.max_steps,
        "max_rows": limits.max_rows,
    }


def _static_fault(gold: object, databases: object) -> str | None:
    if not isinstance(gold, str) or not gold.strip():
        return f"the gold query must be a text, not {gold!r:.80}"
    if isinstance(databases, str | bytes | os.PathLike) or not isinstance(databases, Sequence) or not databases:
        return "`databases` must be a list of the paths of SQLite files, at least one"
    if not all(isinstance(path, str | os.PathLike) for path in databases):
        return "`databases` must be a list of paths"
    if len(gold) > MAX_SQL_CHARS:
        return f"the gold query has {len(gold)} characters, more than {MAX_SQL_CHARS}"
    return None


def _fault(reply: dict[str, Any], limits: SqlLimits) -> str | None:
    """The data set's fault that a reply tells of."""
    if "lost" in reply and reply["marks"] == 1:  # between the two marks around the gold query
        how = f"takes longer than {limits.time_s:g} s" if reply["lost"] == "silent" else "ends the sandbox process"
        return f"the gold query {how}"
    return reply.get("fault")


def _settle(verdict: Verdict, reply: dict[str, Any], design: SqlRewardDesign, limits: SqlLimits) -> None:
    """Complete `verdict` by the sandbox's reply."""
    fault = _fault(reply, limits)
    if fault is not None:
        verdict.reward, verdict.components, verdict.reason = None, {}, fault
        return
    if verdict.query is None:
        return
    if "lost" in reply:
        # It was running, or sqlglot was reading what SQLite had refused: not known which, so it counts as no query.
        how = f"takes longer than {limits.time_s:g} s" if reply["lost"] == "silent" else "ends the sandbox process"
        reply = {**dict.fromkeys(COMPONENTS, 0.0), "reason": f"the query {how}"}
    verdict.components = {name: reply[name] for name in COMPONENTS}
    verdict.reason = reply["reason"]
    verdict.reward = design.reward(verdict.components)
