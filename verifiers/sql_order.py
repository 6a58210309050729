"""What sqlglot says about a query: whether it is one, whether its rows have an order, and which of them tie.

Used inside the sandbox process only: sqlglot is a parser in Python, and the text may be hostile.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError


@dataclass(frozen=True)
class RowOrder:
    """How the top-level ORDER BY of a query sorts its rows.

    Attributes:
        probe: a query with the same rows in the same order, whose further columns at the end are the sort keys; None
            if the keys could not be had that way.
        keys: where the keys stand in a row of `probe`; negative numbers count from its end.
    """

    probe: str | None
    keys: tuple[int, ...] = ()


def read_query(sql: str) -> exp.Query:
    """The parsed query. Raises ValueError if `sql` is not one SELECT (WITH, UNION, ... too) in SQLite's dialect."""
    try:
        statements = sqlglot.parse(sql, read="sqlite")
    except SqlglotError as fault:
        raise ValueError(" ".join(str(fault).split())[:200]) from None
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if len(statements) != 1 or not isinstance(statements[0], exp.Query):
        raise ValueError("not one SELECT statement")
    return statements[0]


def row_order(query: exp.Query) -> RowOrder | None:
    """The top-level ORDER BY of `query`, None if it has none; one inside a subquery orders nothing."""
    order = query.args.get("order")
    if order is None:
        return None
    terms = [term.this if isinstance(term, exp.Ordered) else term for term in order.expressions]
    terms = [term.this if isinstance(term, exp.Collate) else term for term in terms]
    if isinstance(query, exp.Select):
        return _with_keys_appended(query, terms)
    return _keys_among_columns(query, terms)


def _with_keys_appended(query: exp.Select, terms: list[exp.Expression]) -> RowOrder:
    outputs = query.expressions
    named = {output.alias.lower(): output.this for output in outputs if isinstance(output, exp.Alias)}
    plain = [output.this if isinstance(output, exp.Alias) else output for output in outputs]
    keys: list[exp.Expression] = []
    for term in terms:
        if isinstance(term, exp.Literal) and term.is_int:
            number = int(term.name)
            if not 1 <= number <= len(plain) or any(part.is_star for part in plain[:number]):
                return RowOrder(None)
            term = plain[number - 1]
        elif isinstance(term, exp.Column) and not term.table:
            term = named.get(term.name.lower(), term)
        if query.args.get("distinct") is not None and term not in plain:
            return RowOrder(None)  # a further column would make more rows distinct
        keys.append(term.copy())
    return RowOrder(query.select(*keys, copy=True).sql(dialect="sqlite"), tuple(range(-len(keys), 0)))


def _keys_among_columns(query: exp.Query, terms: list[exp.Expression]) -> RowOrder:
    outputs = query.selects
    names = [output.alias_or_name.lower() for output in outputs]
    if any(output.is_star for output in outputs):
        return RowOrder(None)
    keys: list[int] = []
    for term in terms:
        if isinstance(term, exp.Literal) and term.is_int and 1 <= int(term.name) <= len(names):
            keys.append(int(term.name) - 1)
        elif isinstance(term, exp.Column) and not term.table and term.name.lower() in names:
            keys.append(names.index(term.name.lower()))
        else:
            return RowOrder(None)
    return RowOrder(query.sql(dialect="sqlite"), tuple(keys))
