"""Queries that give the same table are one answer, however they are written."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from verifiers.sql_answers import result_classes


@pytest.fixture
def databases(tmp_path: Path) -> list[Path]:
    """Two instances of one table; in the first all prices are equal, so that it alone cannot tell queries apart."""
    paths = [tmp_path / "one.sqlite", tmp_path / "two.sqlite"]
    for path, prices in zip(paths, ([2, 2, 2], [3, 1, 2]), strict=True):
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("create table item (name text, price integer)")
            connection.executemany("insert into item values (?, ?)", zip("abc", prices, strict=True))
    return paths


def test_queries_are_sorted_by_their_results(databases: list[Path]) -> None:
    classes = result_classes(
        [
            "SELECT name FROM item WHERE price > 1",
            "select i.name from item as i where i.price >= 2",
            "SELECT name FROM item",
            None,
            "SELECT name FROM item WHERE price > 1",
            "SELECT nothing FROM item",
            "SELECT name FROM item WHERE 1 = 1",
        ],
        databases,
    )
    assert classes == [0, 0, 1, None, 0, 2, 1]
    one_instance = result_classes(["SELECT name FROM item WHERE price > 1", "SELECT name FROM item"], databases[:1])
    assert one_instance == [0, 0]


def test_the_order_of_rows_counts_where_the_first_query_asks_for_one(databases: list[Path]) -> None:
    ordered, turned = "SELECT name FROM item ORDER BY price", "SELECT name FROM item ORDER BY price DESC"
    assert result_classes([ordered, turned], databases) == [0, 1]
    assert result_classes(["SELECT name FROM item", turned], databases) == [0, 0]
    assert result_classes([], databases) == []
