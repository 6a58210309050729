"""When two result tables are equal, and how near they are otherwise."""

import itertools
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifiers.sql_compare import GoldTable, compare_tables, tie_blocks
from verifiers.sql_execute import Table

VALUES = st.sampled_from([None, 0, 1, 2, -1, 1.5, "a", "b", "1", "", b"a", b""])


@st.composite
def tables(draw, min_rows=0, min_width=1, max_width=4):
    width = draw(st.integers(min_width, max_width))
    rows = draw(st.lists(st.tuples(*[VALUES] * width), min_size=min_rows, max_size=6))
    return table(rows, width)


def table(rows, width=None, names=None):
    width = len(rows[0]) if width is None else width
    return Table(tuple(names or (f"c{index}" for index in range(width))), list(rows))


def multiset(rows, **options):
    return GoldTable(table(rows, **options), None)


def ordered(rows, keys=None):
    keys = [(index,) for index in range(len(rows))] if keys is None else keys
    return GoldTable(table(rows), tie_blocks(keys))


def reordered(found, columns):
    return Table(
        tuple(found.names[index] for index in columns), [tuple(row[index] for index in columns) for row in found.rows]
    )


def equal(gold, rows, **options):
    return compare_tables(gold, table(rows, **options)).equal


@given(tables(), st.data())
def test_the_order_of_rows_and_columns_does_not_matter_without_an_order(gold, data):
    rows = data.draw(st.permutations(gold.rows))
    candidate = reordered(Table(gold.names, rows), data.draw(st.permutations(range(len(gold.names)))))
    match = compare_tables(GoldTable(gold, None), candidate)
    assert (match.equal, match.columns, match.rows, match.reason) == (True, 1.0, 1.0, None)


@given(tables(), st.data())
def test_the_order_of_columns_does_not_matter_with_an_order(gold, data):
    blocks = list(range(len(gold.rows)))
    candidate = reordered(gold, data.draw(st.permutations(range(len(gold.names)))))
    assert compare_tables(GoldTable(gold, blocks), candidate).equal


@given(tables(min_rows=1), st.data())
def test_a_changed_value_breaks_equality(gold, data):
    row = data.draw(st.integers(0, len(gold.rows) - 1))
    column = data.draw(st.integers(0, len(gold.names) - 1))
    changed = [list(values) for values in gold.rows]
    changed[row][column] = "changed"
    match = compare_tables(GoldTable(gold, None), table([tuple(values) for values in changed]))
    assert not match.equal and match.rows < 1.0 and match.reason is not None


@given(tables(min_rows=1), st.data())
def test_a_row_twice_or_left_out_breaks_equality(gold, data):
    row = data.draw(st.integers(0, len(gold.rows) - 1))
    for rows in (gold.rows + [gold.rows[row]], gold.rows[:row] + gold.rows[row + 1 :]):
        match = compare_tables(GoldTable(gold, None), Table(gold.names, rows))
        assert not match.equal
        common = (Counter(rows) & Counter(gold.rows)).total()
        assert match.rows == pytest.approx(2 * common / (len(rows) + len(gold.rows)))


@st.composite
def similar_tables(draw):
    width, height = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    rows = st.lists(st.tuples(*[st.sampled_from([1, "1", None])] * width), min_size=height, max_size=height)
    return table(draw(rows), width), table(draw(rows), width)


@given(similar_tables(), st.booleans())
def test_equality_is_what_trying_every_order_of_columns_finds(pair, in_order):
    gold, candidate = pair
    blocks = list(range(len(gold.rows))) if in_order else None
    expected = False
    for columns in itertools.permutations(range(len(gold.names))):
        rows = reordered(candidate, columns).rows
        expected = expected or (rows == gold.rows if in_order else Counter(rows) == Counter(gold.rows))
    assert compare_tables(GoldTable(gold, blocks), candidate).equal == expected


@given(tables(min_width=2, max_width=3), st.data())
def test_tables_of_shuffled_columns_are_told_apart(gold, data):
    # Each column has the gold's values, shuffled: the columns' signatures agree, only whole rows can differ.
    columns = [data.draw(st.permutations([row[index] for row in gold.rows])) for index in range(len(gold.names))]
    candidate = Table(gold.names, list(zip(*columns, strict=True)))
    expected = any(
        Counter(reordered(candidate, order).rows) == Counter(gold.rows)
        for order in itertools.permutations(range(len(gold.names)))
    )
    assert compare_tables(GoldTable(gold, None), candidate).equal == expected


def test_values_compare_by_type():
    for one, other in [(None, "NULL"), (None, ""), (None, 0), (1, "1"), ("a", b"a"), (1, True and "True"), ("a", "A")]:
        assert not equal(multiset([(one,)]), [(other,)])
        assert not equal(multiset([(other,)]), [(one,)])
    assert equal(multiset([(1,), (2.0,)]), [(2,), (1.0,)])
    assert equal(multiset([(None,)]), [(None,)])


def test_numbers_within_the_tolerance_are_equal():
    assert equal(multiset([(0.1 + 0.2, "a"), (1.0, "b")]), [(1.0, "b"), (0.3, "a")])
    assert equal(multiset([(3,)]), [(2.9999999999999996,)])
    assert equal(multiset([(1e15 + 0.25,)]), [(1e15 + 0.5,)])
    assert equal(multiset([(float("inf"),)]), [(float("inf"),)])
    assert not equal(multiset([(float("inf"),)]), [(1e308,)])
    assert not equal(multiset([(0.3,)]), [(0.30001,)])
    # Integers are exact, whatever their size, also where reals stand beside them.
    assert not equal(multiset([(10**12, 0.5)]), [(10**12 + 1, 0.5)])
    assert not equal(multiset([(2**62, 0.5)]), [(2**62 + 1, 0.5)])
    assert not equal(multiset([(10**12,), (10**12 + 1,)]), [(10**12 + 0.5,), (10**12,)])


@given(st.lists(st.integers(-1000, 1000).map(lambda value: value / 7), min_size=1, max_size=8), st.data())
def test_noise_below_the_tolerance_changes_nothing(numbers, data):
    noise = [data.draw(st.floats(-1e-12, 1e-12)) for _ in numbers]
    noisy = [(number * (1 + error),) for number, error in zip(numbers, noise, strict=True)]
    assert equal(multiset([(number,) for number in numbers]), data.draw(st.permutations(noisy)))


def test_ordered_rows_must_stand_in_order():
    assert equal(ordered([(1, "a"), (2, "b")]), [("a", 1), ("b", 2)])
    match = compare_tables(ordered([(1,), (2,)]), table([(2,), (1,)]))
    assert (match.equal, match.columns, match.rows, match.reason) == (False, 1.0, 1.0, "the rows in another order")


def test_ties_may_stand_in_any_order():
    gold = ordered([("a", 1), ("b", 1), ("c", 2)], keys=[(1,), (1,), (2,)])
    assert equal(gold, [("b", 1), ("a", 1), ("c", 2)])
    assert not equal(gold, [("c", 2), ("a", 1), ("b", 1)])
    assert not equal(gold, [("a", 1), ("c", 2), ("b", 1)])
    # A key that comes again later is another group.
    assert tie_blocks([(1,), (2,), (2,), (1,)]) == [0, 1, 1, 2] and tie_blocks([]) == []


def test_empty_tables():
    assert compare_tables(multiset([], width=2), table([], 2)).equal
    match = compare_tables(multiset([], width=2), table([], 1))
    assert not match.equal and match.rows == 0.0 and match.columns == pytest.approx(2 / 3)
    match = compare_tables(multiset([(1,)]), table([], 1))
    assert (match.equal, match.rows, match.reason) == (False, 0.0, "0 rows instead of 1")


def test_columns_are_right_by_values_or_by_name_and_type():
    gold = multiset([("a", 1), ("b", 2)], names=("name", "COUNT(*)"))
    for rows, names, columns in [
        ([("b",), ("a",)], ("x",), 2 / 3),  # the values of one of two
        ([("c", 9)], ("name", "count( * )"), 1.0),  # the names
        ([("a", 1, 7), ("b", 2, 7)], ("name", "n", "z"), 4 / 5),
        ([(5, "x")], ("name", "COUNT(*)"), 0.0),  # the names on other types
        ([("a", "a"), ("b", "b")], ("name", "name"), 1 / 2),  # each column counts once
        ([(8, 9)], ("p", "q"), 0.0),
        ([(None, 3)], ('"Name"', "m"), 1 / 2),
    ]:
        match = compare_tables(gold, table(rows, names=names))
        assert match.columns == pytest.approx(columns), names
        assert not match.equal


def test_the_overlap_of_rows():
    gold = multiset([("a", 1), ("a", 1), ("b", 2), ("c", 3)])
    assert compare_tables(gold, table([("a", 1), ("b", 2)])).rows == pytest.approx(4 / 6)
    assert compare_tables(gold, table([(1, "a"), (2, "b")], names=("c1", "c0"))).rows == pytest.approx(4 / 6)
    assert compare_tables(gold, table([("a",), ("b",)])).rows == 0.0
    assert compare_tables(gold, table([("a", 1)] * 4)).rows == pytest.approx(4 / 8)


def test_hostile_tables_of_shuffled_columns_take_little_time():
    size, width = 40, 40
    gold = [tuple((row * (column + 1)) % 41 for column in range(width)) for row in range(1, size + 1)]
    candidate = [tuple((row * (column + 1) + 1) % 41 for column in range(width)) for row in range(1, size + 1)]
    same = [tuple(reversed(row)) for row in reversed(gold)]
    start = time.process_time()
    assert not equal(multiset(gold), candidate)
    assert equal(multiset(gold), same)
    assert equal(multiset([(1,) * 200] * 5), [(1,) * 200] * 5)
    assert not equal(multiset([(index, *range(100)) for index in range(50)]), [(0, *range(100))] * 50)
    assert time.process_time() - start < 5.0
