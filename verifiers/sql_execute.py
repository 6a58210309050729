"""Runs one query on one SQLite file, allowed to read and nothing else. Used inside the sandbox process only.

The file is opened read-only and immutable, so SQLite takes no lock and makes no journal. An authorizer allows SELECT,
recursion, the tables and views of the file (and `json_each`, `json_tree`), and the functions of a list; so there is
no ATTACH, no PRAGMA in any form, no extension, no file access, no write, no randomness. What SQLite has to put aside
while it sorts stays in memory.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from verifiers.sql_limits import MAX_COLUMNS, MAX_HEAP_BYTES, MAX_RESULT_BYTES, MAX_SQL_CHARS, MAX_VALUE_BYTES

Row = tuple[Any, ...]
FileKey = tuple[str, int, int]
"""Path, time of the last change in nanoseconds, bytes."""

_STEPS_A_CALL = 1_000
_CONNECTIONS = 64
_CACHE_KIB = 1_000

_FUNCTIONS = frozenset(
    # scalar
    "-> ->> abs char coalesce concat concat_ws format glob hex if ifnull iif instr length like likelihood likely lower "
    "ltrim max min nullif octet_length printf quote replace round rtrim sign soundex substr substring trim typeof "
    "unicode unhex unlikely upper "
    # date and time
    "current_date current_time current_timestamp date datetime julianday strftime time timediff unixepoch "
    # aggregate and window
    "avg count cume_dist dense_rank first_value group_concat lag last_value lead median nth_value ntile percent_rank "
    "percentile percentile_cont percentile_disc rank row_number string_agg sum total "
    # mathematical
    "acos acosh asin asinh atan atan2 atanh ceil ceiling cos cosh degrees exp floor ln log log10 log2 mod pi pow power "
    "radians sin sinh sqrt tan tanh trunc "
    # JSON
    "json json_array json_array_length json_error_position json_extract json_group_array json_group_object json_insert "
    "json_object json_patch json_quote json_remove json_replace json_set json_type json_valid".split()
)
# SQLite's own tables and virtual tables.
_BUILT_IN_TABLE = re.compile(
    r"sqlite_|pragma_|dbstat|fts[0-9]|rtree|geopoly|bytecode|tables_used|completion|generate_series|fsdir|zipfile|csv",
    re.IGNORECASE,
)
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: MAX_VALUE_BYTES,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4 * MAX_SQL_CHARS,
    sqlite3.SQLITE_LIMIT_COLUMN: MAX_COLUMNS,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 100_000,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 64,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}


class QueryFailed(Exception):
    """The query did not run to its end; the text says why, in one sentence.

    Attributes:
        started: SQLite had accepted the statement, and it was stopped at a limit.
    """

    def __init__(self, message: str, started: bool = False) -> None:
        super().__init__(message)
        self.started = started


class BadDatabase(Exception):
    """The file cannot be opened or is no SQLite database."""


@dataclass(frozen=True)
class Table:
    """A result: the names that SQLite gives its columns, and its rows."""

    names: tuple[str, ...]
    rows: list[Row]


class Meter:
    """What a query has left of its limits, over all instances.

    Attributes:
        stopped: why the query was stopped, None if it was not.
        by_clock: it was the clock that stopped it.
    """

    def __init__(self, time_s: float, max_steps: int, max_rows: int) -> None:
        self.deadline = time.monotonic() + time_s
        self.calls_left = max(1, max_steps // _STEPS_A_CALL)
        self.max_rows = max_rows
        self.max_steps, self.time_s = max_steps, time_s
        self.stopped: str | None = None
        self.by_clock = False

    def tick(self) -> int:
        """SQLite's progress handler: not 0 stops the query."""
        self.calls_left -= 1
        if self.calls_left < 0:
            self.stopped = f"the query takes more than {self.max_steps} steps"
        elif time.monotonic() > self.deadline:
            self.stopped, self.by_clock = f"the query takes longer than {self.time_s:g} s", True
        return self.stopped is not None


class Databases:
    """Open connections by file. A file that changed is opened anew."""

    def __init__(self) -> None:
        self._open: OrderedDict[FileKey, sqlite3.Connection] = OrderedDict()

    def key(self, path: str) -> FileKey:
        """Raises BadDatabase if there is no such file."""
        try:
            found = Path(path).stat()
        except (OSError, ValueError) as fault:
            raise BadDatabase(f"the database '{path}' cannot be read: {fault}") from None
        return path, found.st_mtime_ns, found.st_size

    def run(self, key: FileKey, query: str, meter: Meter) -> Table:
        """The whole result of `query`.

        Raises QueryFailed for whatever the query does wrong, BadDatabase if the file is no database.
        """
        connection = self._connection(key)
        connection.set_progress_handler(meter.tick, _STEPS_A_CALL)
        cursor: sqlite3.Cursor | None = None
        try:
            cursor = connection.execute(query)
            if cursor.description is None:
                raise QueryFailed("the statement gives no result")
            return Table(tuple(str(column[0]) for column in cursor.description), _fetch(cursor, meter))
        except MemoryError:
            self._drop(key)
            raise QueryFailed("the query needs too much memory", started=True) from None
        except sqlite3.DatabaseError as fault:
            if meter.stopped is not None:
                raise QueryFailed(meter.stopped, started=True) from None
            if not isinstance(fault, sqlite3.OperationalError) and "not a database" in str(fault):
                raise BadDatabase(f"'{key[0]}' is not a SQLite database") from None
            raise QueryFailed(_sentence(fault)) from None
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as fault:
            raise QueryFailed(_sentence(fault)) from None
        finally:
            if cursor is not None:
                cursor.close()

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def _drop(self, key: FileKey) -> None:
        connection = self._open.pop(key, None)
        if connection is not None:
            connection.close()

    def _connection(self, key: FileKey) -> sqlite3.Connection:
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        while len(self._open) >= _CONNECTIONS:
            self._open.popitem(last=False)[1].close()
        self._open[key] = _connect(key[0])
        return self._open[key]


def _connect(path: str) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            f"file:{quote(str(Path(path).absolute()))}?mode=ro&immutable=1",
            uri=True,
            isolation_level=None,
            cached_statements=16,
        )
    except sqlite3.Error as fault:
        raise BadDatabase(f"the database '{path}' cannot be opened: {fault}") from None
    try:
        for pragma in (
            f"hard_heap_limit = {MAX_HEAP_BYTES}",
            f"cache_size = -{_CACHE_KIB}",
            "temp_store = MEMORY",
            "trusted_schema = OFF",
            "query_only = ON",
        ):
            connection.execute(f"PRAGMA {pragma}").close()
        names = connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall()
        # The first use of a table-valued function declares it, which the authorizer would have to allow.
        connection.execute("SELECT count(*) FROM json_each('[]'), json_tree('[]')").close()
    except sqlite3.Error as fault:
        connection.close()
        raise BadDatabase(f"'{path}' cannot be read as a SQLite database: {fault}") from None
    connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
    for category, limit in _LIMITS.items():
        connection.setlimit(category, limit)
    readable = frozenset(name.lower() for (name,) in names) | {"json_each", "json_tree"}
    connection.set_authorizer(partial(_authorize, readable))
    return connection


def _authorize(readable: frozenset[str], action: int, first: Any, second: Any, database: Any, source: Any) -> int:
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
        allowed = True
    elif action == sqlite3.SQLITE_READ:
        # The rows of a common table expression are counted under its name, with no column and no database.
        rows_only = not second and database is None
        allowed = (first or "").lower() in readable or (rows_only and _BUILT_IN_TABLE.match(first or "") is None)
    else:
        allowed = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FUNCTIONS
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _fetch(cursor: sqlite3.Cursor, meter: Meter) -> list[Row]:
    rows: list[Row] = []
    size = 0
    for row in cursor:
        rows.append(row)
        if len(rows) > meter.max_rows:
            raise QueryFailed(f"the result has more than {meter.max_rows} rows", started=True)
        for value in row:
            if type(value) is str or type(value) is bytes:
                size += len(value)
        if size > MAX_RESULT_BYTES:
            raise QueryFailed(f"the result has more than {MAX_RESULT_BYTES} characters", started=True)
    return rows


def _sentence(fault: Exception) -> str:
    text = " ".join(str(fault).split())
    return f"SQLite: {text[:200]}" if text else f"SQLite: {type(fault).__name__}"
