"""Judges one candidate query against the gold query, inside the sandbox process."""

from __future__ import annotations

import signal
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from verifiers.sql_compare import GoldTable, TableMatch, compare_tables, tie_blocks
from verifiers.sql_execute import BadDatabase, Databases, FileKey, Meter, QueryFailed
from verifiers.sql_order import read_query, row_order

# Results of gold queries are remembered up to this many cells in all, and this many results.
_GOLD_CELLS = 1_000_000
_GOLDS = 4_096
# CPU time; the longest statement that is read at all takes sqlglot a few hundredths of a second.
_PARSE_S = 0.5


class GoldFault(Exception):
    """The data set's own fault: the gold query or a database cannot be used."""


class _TooLong(Exception):
    """The alarm went off."""


class Judge:
    """Open databases, and the results of gold queries that were seen before."""

    def __init__(self) -> None:
        self._databases = Databases()
        self._golds: OrderedDict[tuple[FileKey, str, int, int], GoldTable | str] = OrderedDict()
        self._cells = 0

    def judge(self, request: dict[str, Any], gold_mark: Callable[[], None]) -> dict[str, Any]:
        """The reply to one request, as the sandbox sends it.

        Args:
            request: ``query`` (None to check the gold only), ``gold``, ``databases``, ``time_s``, ``max_steps``,
                ``max_rows``.
            gold_mark: called before a gold query is run for the first time, and again after it: the candidate's time
                begins then.

        Returns ``{"fault": sentence}`` for a fault of the data set; else ``parse``, ``execute``, ``columns``, ``rows``,
        ``exact_match`` and ``reason``.
        """
        try:
            golds = self._gold_tables(request, gold_mark)
        except (GoldFault, BadDatabase) as fault:
            return {"fault": str(fault)}
        if request["query"] is None:
            return {}
        try:
            return self._candidate(request, golds)
        except BadDatabase as fault:
            return {"fault": str(fault)}
        except MemoryError:
            return _reply(parse=1.0, reason="the result needs too much memory")

    def _candidate(self, request: dict[str, Any], golds: list[tuple[FileKey, GoldTable]]) -> dict[str, Any]:
        meter = _meter(request)
        matches: list[TableMatch] = []
        reason: str | None = None
        for number, (key, gold) in enumerate(golds, 1):
            where = f" (database {number} of {len(golds)})" if len(golds) > 1 else ""
            try:
                match = compare_tables(gold, self._databases.run(key, request["query"], meter))
            except QueryFailed as failure:
                parses = failure.started or bool(matches) or _parses(request["query"])
                return _reply(parse=float(parses), reason=f"{failure}{where}")
            matches.append(match)
            if match.reason is not None and reason is None:
                reason = match.reason + where
        return _reply(
            parse=1.0,
            execute=1.0,
            columns=sum(match.columns for match in matches) / len(matches),
            rows=sum(match.rows for match in matches) / len(matches),
            exact_match=float(all(match.equal for match in matches)),
            reason=reason,
        )

    def _gold_tables(self, request: dict[str, Any], gold_mark: Callable[[], None]) -> list[tuple[FileKey, GoldTable]]:
        gold, limits = request["gold"], (request["max_steps"], request["max_rows"])
        meter: Meter | None = None
        tables: list[tuple[FileKey, GoldTable]] = []
        known: GoldTable | str | None = None
        for path in request["databases"]:
            key = self._databases.key(path)
            known = self._golds.get((key, gold, *limits))
            if known is None:
                if meter is None:
                    gold_mark()
                    meter = _meter(request)
                known = self._run_gold(key, gold, meter)
                if not meter.by_clock:  # the machine may have been busy
                    self._remember((key, gold, *limits), known)
            if isinstance(known, str):
                break
            tables.append((key, known))
        if meter is not None:
            gold_mark()
        if isinstance(known, str):
            raise GoldFault(known)
        return tables

    def _run_gold(self, key: FileKey, gold: str, meter: Meter) -> GoldTable | str:
        try:
            table = self._databases.run(key, gold, meter)
        except QueryFailed as failure:
            return f"the gold query fails on '{key[0]}': {failure}"
        try:
            order = row_order(read_query(gold))
        except ValueError as fault:
            return f"sqlglot cannot read the gold query, so it is not known whether its rows have an order: {fault}"
        if order is None:
            return GoldTable(table, None)
        keys = None
        if order.probe is not None:
            try:
                probed = self._databases.run(key, order.probe, meter).rows
            except QueryFailed:
                probed = []
            width = len(table.names)
            # The same rows in the same order, or the probe means something else than the gold query.
            if [row[:width] for row in probed] == table.rows:
                keys = [tuple([row[index] for index in order.keys]) for row in probed]
        return GoldTable(table, list(range(len(table.rows))) if keys is None else tie_blocks(keys))

    def _remember(self, key: tuple[FileKey, str, int, int], known: GoldTable | str) -> None:
        self._golds[key] = known
        self._cells += _cells(known)
        while len(self._golds) > _GOLDS or self._cells > _GOLD_CELLS:
            self._cells -= _cells(self._golds.popitem(last=False)[1])


def _cells(known: GoldTable | str) -> int:
    if isinstance(known, str):
        return 1
    # A long text counts as many cells.
    values = (value for row in known.table.rows for value in row)
    return sum(1 + (len(value) // 64 if isinstance(value, str | bytes) else 0) for value in values)


def _meter(request: dict[str, Any]) -> Meter:
    return Meter(request["time_s"], request["max_steps"], request["max_rows"])


def _reply(
    parse: float = 0.0,
    execute: float = 0.0,
    columns: float = 0.0,
    rows: float = 0.0,
    exact_match: float = 0.0,
    reason: str | None = None,
) -> dict[str, Any]:
    return {
        "parse": parse,
        "execute": execute,
        "columns": columns,
        "rows": rows,
        "exact_match": exact_match,
        "reason": reason,
    }


def _parses(query: str) -> bool:
    """Whether sqlglot reads what SQLite refused."""
    try:
        with _alarm(_PARSE_S):
            read_query(query)
    except (ValueError, MemoryError, _TooLong):
        return False
    return True


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise _TooLong in this block after `seconds` of CPU time, however busy the machine is; main thread only."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
