"""The bounds of one candidate query.

What decides in ordinary cases is counted (steps of SQLite's virtual machine, rows, characters), so that a reward does
not depend on the machine or on how busy it is. The clock stands behind the counts, for the few single steps that can
take long (``replace`` or ``LIKE`` on long strings), and a process that does not answer is killed behind the clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Characters of the whole output. A reasoning model's 32k tokens are about 130,000.
MAX_TEXT_CHARS = 150_000
# Characters of the query itself.
MAX_SQL_CHARS = 10_000
# Bytes of one string or blob, also inside an expression.
MAX_VALUE_BYTES = 1_000_000
# Text and blobs of one result, in characters and bytes.
MAX_RESULT_BYTES = 16_000_000
# Result columns, and columns of a table.
MAX_COLUMNS = 500
# SQLite's own heap in the sandbox: page caches, sorting, results under way.
MAX_HEAP_BYTES = 192 * 1024 * 1024
# Address space of the sandbox process, Python and its modules (about 150 MiB) included.
MAX_PROCESS_BYTES = 1024 * 1024 * 1024


@dataclass(frozen=True)
class SqlLimits:
    """What one query may use, over all database instances together. The gold query has the same.

    Attributes:
        time_s: wall-clock seconds. The process is killed at 1.25 times this, if the query has not stopped by itself.
        max_steps: instructions of SQLite's virtual machine: 30 million take about half a second.
        max_rows: rows of the result on one instance.

    Raises ValueError for a limit that is not a finite number above 0.
    """

    time_s: float = 2.0
    max_steps: int = 30_000_000
    max_rows: int = 10_000

    def __post_init__(self) -> None:
        for name in ("time_s", "max_steps", "max_rows"):
            limit = getattr(self, name)
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
                raise ValueError(f"SqlLimits.{name} must be a finite number above 0, not {limit!r}")
