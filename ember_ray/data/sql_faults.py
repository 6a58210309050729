"""Ways in which people get a query wrong, as edits of its text.

The edits know the form that ``sql_questions.py`` writes (keywords in capitals, single spaces, no aliases). A query in
another form has fewer places that they fit; none is edited into something that was not meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

Columns = Mapping[str, Sequence[tuple[str, str]]]
"""Table name to its columns, (name, type)."""

_OPERATORS = {
    " > ": (" < ", " >= "),
    " < ": (" > ", " <= "),
    " >= ": (" <= ", " > "),
    " <= ": (" >= ", " < "),
    " = ": (" != ",),
    " IN ": (" NOT IN ",),
    " NOT IN ": (" IN ",),
    " UNION ": (" INTERSECT ",),
    " INTERSECT ": (" UNION ",),
    " EXCEPT ": (" INTERSECT ",),
}
_OPERATOR = re.compile(r" (?:>=|<=|>|<|=|NOT IN|IN|UNION|INTERSECT|EXCEPT) ")
_AGGREGATES = {"AVG": ("SUM", "MAX"), "SUM": ("AVG", "COUNT"), "MAX": ("MIN", "SUM"), "MIN": ("MAX", "AVG")}
_AGGREGATE = re.compile(r"\b(?:AVG|SUM|MAX|MIN)\(|\bCOUNT\(\*\)")
_INNER = r"\((?:[^()]|\([^()]*\))*\)"
_CONDITION = rf"[\w*()]+ (?:>=|<=|>|<|=|NOT IN|IN) (?:'[^']*'|\d+\b|{_INNER})"
_FILTERS = (
    re.compile(rf" WHERE {_CONDITION}(?! AND )"),
    re.compile(rf"(?<= WHERE ){_CONDITION} AND "),
    re.compile(rf" AND {_CONDITION}"),
    re.compile(rf" HAVING {_CONDITION}"),
)
_ORDER = re.compile(r" ORDER BY \w+(?: DESC)?| DESC\b")
_LAST = re.compile(r"\s*(?:'[^']*'|\w+|[^\w\s'])$")


def _cut(query: str, found: re.Match[str], instead: str = "") -> str:
    return query[: found.start()] + instead + query[found.end() :]


def _overlapping(pattern: re.Pattern[str], query: str) -> Iterator[re.Match[str]]:
    """All matches, those inside another one (a condition of a subquery) included."""
    found = pattern.search(query)
    while found:
        yield found
        found = pattern.search(query, found.start() + 1)


def wrong_column(query: str, columns: Columns) -> list[str]:
    """One column replaced by another one of the database, keys apart."""
    names = [name for table in columns.values() for name, _ in table]
    plain = [name for name in names if names.count(name) == 1]
    if not plain:
        return []
    return [
        _cut(query, found, other)
        for found in re.finditer(rf"\b(?:{'|'.join(map(re.escape, plain))})\b(?!')", query)
        for other in plain
        if other != found[0]
    ]


def missing_filter(query: str, columns: Columns) -> list[str]:
    """One condition of WHERE or HAVING left out."""
    return [_cut(query, found) for pattern in _FILTERS for found in _overlapping(pattern, query)]


def _replaced_operators(query: str, wanted: Callable[[str, str], bool]) -> list[str]:
    return [
        _cut(query, found, other)
        for found in _OPERATOR.finditer(query)
        for other in _OPERATORS[found[0]]
        if wanted(found[0], other)
    ]


def wrong_operator(query: str, columns: Columns) -> list[str]:
    """One comparison or set operation replaced."""
    return _replaced_operators(query, lambda old, new: True)


def wrong_aggregate(query: str, columns: Columns) -> list[str]:
    """One aggregate function replaced; ``COUNT(*)`` becomes the sum of a number column."""
    numbers = [name for table in columns.values() for name, kind in table if kind == "INTEGER"]
    edited: list[str] = []
    for found in _AGGREGATE.finditer(query):
        if found[0].startswith("COUNT"):
            edited += [_cut(query, found, f"SUM({name})") for name in numbers]
        else:
            edited += [_cut(query, found, f"{other}(") for other in _AGGREGATES[found[0][:-1]]]
    return edited


def missing_order(query: str, columns: Columns) -> list[str]:
    """ORDER BY or its DESC left out."""
    return [_cut(query, found) for found in _ORDER.finditer(query)]


def broken_syntax(query: str, columns: Columns) -> list[str]:
    """A FROM, the last word or a bracket forgotten."""
    return [query.replace(" FROM ", " ", 1), _LAST.sub("", query), query.replace(")", "", 1)]


FAULTS: dict[str, Callable[[str, Columns], list[str]]] = {
    "wrong_column": wrong_column,
    "missing_filter": missing_filter,
    "wrong_operator": wrong_operator,
    "wrong_aggregate": wrong_aggregate,
    "missing_order": missing_order,
    "broken_syntax": broken_syntax,
}
"""Each gives all edits of a query that have this fault; none where the query has no place for it."""

_HIDES_ONE_ROW = re.compile(r"\b(?:HAVING|MIN|MAX)\b|\(SELECT")


def near_misses(query: str, columns: Columns) -> list[str]:
    """Edits that must not return what a generated question's query returns.

    All with a filter, operator, aggregate or order at fault, but ``>=`` for ``>`` only where the one row more that it
    finds can be seen.
    """
    hidden = _HIDES_ONE_ROW.search(query) is not None
    return [
        *missing_filter(query, columns),
        *_replaced_operators(query, lambda old, new: not hidden or old.strip(" =") != new.strip(" =")),
        *wrong_aggregate(query, columns),
        *missing_order(query, columns),
    ]
