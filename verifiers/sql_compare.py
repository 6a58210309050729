"""Compares two result tables as the text-to-SQL field does: execution accuracy, with graded parts beside it.

Two tables are equal if they have the same number of columns and, for **one** order of the candidate's columns, the
same rows: as a multiset, or, where the gold query has a top-level ORDER BY, in the gold's order. That is the rule of
the Spider and test-suite evaluations (Yu et al., EMNLP 2018; Zhong, Yu and Klein, EMNLP 2020), with three differences:

- Rows that tie under the gold's ORDER BY may stand in any order among themselves (the field asks for the order that
  SQLite happened to give). Rows that a LIMIT cut off in the middle of a tie stay cut off.
- Numbers within a tolerance are equal: sums of the same numbers in another order are.
- Two empty tables with different numbers of columns are not equal.

Values compare by type: NULL equals NULL only, text never equals a number or a blob, integers and reals compare by
value, two integers must be equal exactly. Texts are equal if all characters are. Names of columns do not matter for
equality.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from verifiers.normalize import numbers_equal
from verifiers.sql_execute import Row, Table

RELATIVE_TOLERANCE = 1e-9
ABSOLUTE_TOLERANCE = 1e-9

_TYPES = {int: "number", float: "number", str: "text", bytes: "blob"}
# Cells read in the search for an order of the columns. Only tables whose columns are shuffles of one another need
# more than a few times their own size.
_MAX_SEARCH_CELLS = 1_000_000


@dataclass(frozen=True)
class GoldTable:
    """What the gold query gives.

    Attributes:
        table: names and rows, in the query's order.
        blocks: for each row the number of its group of ties, rising from 0; None where order does not matter.
    """

    table: Table
    blocks: list[int] | None


@dataclass(frozen=True)
class TableMatch:
    """How near the candidate's table comes to the gold's.

    Attributes:
        equal: the tables are equal by the rule of this module.
        columns: F1 of the columns, 0 to 1. A column is right if its values are those of a column of the gold (as a
            multiset), or it has the name of one (case aside) and values of the same type; each counts once.
        rows: F1 of the multisets of rows, order aside, 0 to 1; 0 if the numbers of columns differ. The candidate's
            columns are taken in their own order, or in the order in which they match the gold's best: what gives more.
        reason: the first difference, None if there is none.
    """

    equal: bool
    columns: float
    rows: float
    reason: str | None


def compare_tables(gold: GoldTable, candidate: Table) -> TableMatch:
    """Compare the candidate's table with the gold's; see `TableMatch`."""
    if gold.table.rows == candidate.rows and len(gold.table.names) == len(candidate.names):
        return TableMatch(True, 1.0, 1.0, None)
    gold_rows, rows = _same_numbers(gold.table.rows, candidate.rows)
    width, gold_width = len(candidate.names), len(gold.table.names)
    gold_columns, columns = _columns(gold_rows, gold_width), _columns(rows, width)
    if width == gold_width and len(rows) == len(gold_rows):
        blocks = [0] * len(rows) if gold.blocks is None else gold.blocks
        if _some_order_equal(gold_columns, columns, blocks):
            return TableMatch(True, 1.0, 1.0, None)
    matches = _match_columns(gold.table.names, gold_columns, candidate.names, columns)
    columns_f1 = _f1(sum(match is not None for match in matches), gold_width, width)
    if width != gold_width:
        return TableMatch(False, columns_f1, 0.0, f"{_count(width, 'column')} instead of {gold_width}")
    orders = [list(range(width))]
    if (best := _fill(matches)) != orders[0]:
        orders.append(best)
    counted = Counter(gold_rows)
    common = max((counted & Counter(_reorder(rows, order))).total() for order in orders)
    rows_f1 = 1.0 if not rows and not gold_rows else _f1(common, len(gold_rows), len(rows))
    if len(rows) != len(gold_rows):
        reason = f"{_count(len(rows), 'row')} instead of {len(gold_rows)}"
    elif common == len(rows):
        reason = "the rows in another order"
    else:
        reason = f"{_count(len(rows) - common, 'row')} of {len(rows)} wrong"
    return TableMatch(False, columns_f1, rows_f1, reason)


def tie_blocks(keys: Sequence[Row]) -> list[int]:
    """The number of each row's group of ties: neighbours with equal sort keys are in one group."""
    blocks: list[int] = []
    for index, key in enumerate(keys):
        blocks.append(blocks[-1] + (key != keys[index - 1]) if index else 0)
    return blocks


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _f1(common: int, one: int, other: int) -> float:
    return 2 * common / (one + other) if common else 0.0


def _columns(rows: list[Row], width: int) -> list[tuple[Any, ...]]:
    return list(zip(*rows, strict=True)) if rows else [()] * width


def _reorder(rows: list[Row], order: list[int]) -> list[Row]:
    if order == list(range(len(order))):
        return rows
    return [tuple([row[index] for index in order]) for row in rows]


def _same_numbers(one: list[Row], other: list[Row]) -> tuple[list[Row], list[Row]]:
    """Both tables, with numbers within the tolerance replaced by one of them, so that Python's equality decides."""
    numbers: set[int | float] = set()
    some_real = False
    for row in (*one, *other):
        for value in row:
            if type(value) is float:
                some_real = True
                numbers.add(value)
            elif type(value) is int:
                numbers.add(value)
    if not some_real:
        return one, other
    stands_for = _clusters(numbers)

    def replaced(rows: list[Row]) -> list[Row]:
        kinds = (int, float)
        return [tuple([stands_for[value] if type(value) in kinds else value for value in row]) for row in rows]

    return replaced(one), replaced(other)


def _clusters(numbers: set[int | float]) -> dict[int | float, int | float]:
    """A representative for every number: neighbours within the tolerance share it, two integers never do."""
    stands_for: dict[int | float, int | float] = {}
    previous: int | float | None = None
    first: int | float = 0
    whole: int | float | None = None  # the integer of this cluster
    for number in sorted(numbers):
        near = previous is not None and numbers_equal(
            float(previous), float(number), RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE
        )
        is_whole = isinstance(number, int) or (abs(number) < 2**53 and number.is_integer())  # 3.0 is the integer 3
        if not near or (is_whole and whole is not None):
            first, whole = number, None
        if is_whole:
            whole = number
        stands_for[number] = first
        previous = number
    return stands_for


def _signature(column: Sequence[Hashable]) -> Hashable:
    return frozenset(Counter(column).items())


def _some_order_equal(gold: list[tuple[Any, ...]], columns: list[tuple[Any, ...]], blocks: list[int]) -> bool:
    """Whether some order of `columns` makes the rows, each with its block's number, the same multiset as the gold's.

    Columns are matched by the multiset of their (block, value) pairs first: most have one partner then. Where several
    are left, they are tried one column at a time, and a choice is kept only while the rows made of the columns chosen
    so far agree as multisets.
    """
    by_signature: defaultdict[Hashable, list[tuple[Any, ...]]] = defaultdict(list)
    for column in columns:
        by_signature[_signature(list(zip(blocks, column, strict=True)))].append(column)
    signatures = [_signature(list(zip(blocks, column, strict=True))) for column in gold]
    if Counter(signatures) != Counter({signature: len(group) for signature, group in by_signature.items()}):
        return False
    order = sorted(range(len(gold)), key=lambda index: len(by_signature[signatures[index]]))
    cells = 0

    def search(depth: int, gold_ids: list[int], ids: list[int]) -> bool:
        nonlocal cells
        if depth == len(order):
            return True
        group = by_signature[signatures[order[depth]]]
        tried: set[tuple[int, ...]] = set()
        for _ in range(len(group)):
            cells += 2 * len(blocks)
            if cells > _MAX_SEARCH_CELLS:
                return False
            column = group.pop(0)
            number = _numbering()
            next_gold = [number(pair) for pair in zip(gold_ids, gold[order[depth]], strict=True)]
            following = [number(pair) for pair in zip(ids, column, strict=True)]
            fresh = tuple(following) not in tried
            tried.add(tuple(following))
            if fresh and Counter(next_gold) == Counter(following) and search(depth + 1, next_gold, following):
                return True
            group.append(column)
        return False

    return search(0, blocks, blocks)


def _numbering() -> Callable[[Hashable], int]:
    numbers: dict[Hashable, int] = {}
    return lambda value: numbers.setdefault(value, len(numbers))


def _match_columns(
    gold_names: tuple[str, ...],
    gold: list[tuple[Any, ...]],
    names: tuple[str, ...],
    columns: list[tuple[Any, ...]],
) -> list[int | None]:
    """For each gold column the index of the candidate's that is right for it, or None."""
    free = dict.fromkeys(range(len(columns)))
    matches: list[int | None] = [None] * len(gold)
    signatures = [_signature(column) for column in columns]
    for by_values in (True, False):
        for index, column in enumerate(gold):
            if matches[index] is not None:
                continue
            signature = _signature(column)
            for other in free:
                same_name = _plain(gold_names[index]) == _plain(names[other])
                if (
                    signature == signatures[other] and (bool(column) or same_name)
                    if by_values
                    else same_name and _types_agree(column, columns[other])
                ):
                    matches[index] = other
                    del free[other]
                    break
    return matches


def _plain(name: str) -> str:
    """A column's name as it is compared: case, white space and quotes aside."""
    return "".join(char for char in name.casefold() if not char.isspace() and char not in "\"'`[]")


def _types_agree(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    first, second = ({_TYPES.get(type(value), "null") for value in column} - {"null"} for column in (one, other))
    return not first or not second or bool(first & second)


def _fill(matches: list[int | None]) -> list[int]:
    """An order of the candidate's columns: the matched ones in their places, the others in their order in between."""
    taken = {match for match in matches if match is not None}
    rest = iter(index for index in range(len(matches)) if index not in taken)
    return [next(rest) if match is None else match for match in matches]
