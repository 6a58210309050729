import re
from collections import Counter
from dataclasses import fields, replace

import pytest

from ember_ray.data.example import Example
from ember_ray.data.sql_demonstrations import SQL_CLEAN, SqlDemonstrationMix, with_sql_demonstrations
from ember_ray.data.sql_examples import generate_sql_examples
from ember_ray.data.sql_faults import (
    broken_syntax,
    missing_filter,
    missing_order,
    wrong_aggregate,
    wrong_column,
    wrong_operator,
)
from verifiers.sql import SqlItem, verify_batch

PLACES = {"missing_filter": "WHERE|HAVING", "wrong_operator": "WHERE|HAVING", "missing_order": "ORDER BY",
          "wrong_aggregate": r"\((\*|\w+)\)( FROM|,|$)"}  # fmt: skip
FAULT_NAMES = [part.name for part in fields(SqlDemonstrationMix)]
COLUMNS = {"staff": [("name", "TEXT"), ("pay", "INTEGER"), ("team_id", "INTEGER")],
           "team": [("team_id", "INTEGER"), ("unit", "TEXT")]}  # fmt: skip


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[Example]:
    return generate_sql_examples("train", 400, 0, tmp_path_factory.mktemp("databases"))


def _components(shown: list[Example]) -> list[dict[str, float]]:
    items = [SqlItem(e.completion, e.gold, e.columns["databases"]) for e in shown]
    return [verdict.components for verdict in verify_batch(items)]


def test_clean_demonstrations_are_the_gold_queries(examples):
    shown = with_sql_demonstrations(examples, SQL_CLEAN, 0)
    assert [example.completion for example in shown] == [example.gold for example in examples]


def test_a_row_gets_the_same_whatever_stands_beside_it(examples):
    mix = SqlDemonstrationMix(wrong_column=0.5, chatter=0.5)
    shown = with_sql_demonstrations(examples, mix, 3)
    assert with_sql_demonstrations(examples[100:150], mix, 3) == shown[100:150]
    assert with_sql_demonstrations(examples, mix, 4) != shown
    own = [replace(examples[0], completion="SELECT 1")]
    assert with_sql_demonstrations(own, mix, 3) == own


@pytest.mark.parametrize("fault", FAULT_NAMES)
def test_a_fault_alone_comes_at_its_rate_and_is_wrong_on_execution(examples, fault):
    always = with_sql_demonstrations(examples, SqlDemonstrationMix(**{fault: 1.0}), 0)
    changed = [e for e in always if e.completion != e.gold]
    places = [e for e in examples if re.search(PLACES.get(fault, "SELECT"), e.gold)]
    assert len(changed) >= 0.98 * len(places) and len(places) >= 40
    components = _components(changed)
    assert all(one["exact_match"] == 0.0 for one in components)
    if fault in ("broken_syntax", "chatter"):
        assert all(one["execute"] == 0.0 for one in components)
    elif fault != "wrong_column":
        assert sum(one["execute"] for one in components) > 0.9 * len(components)
    half = with_sql_demonstrations(places, SqlDemonstrationMix(**{fault: 0.4}), 1)
    assert 0.2 < sum(e.completion != e.gold for e in half) / len(half) < 0.6


def test_mixed_demonstrations_are_right_or_wrong_as_their_text_says(examples):
    mix = SqlDemonstrationMix(*[0.15] * len(FAULT_NAMES))
    shown = with_sql_demonstrations(examples, mix, 0)
    right = [one["exact_match"] == 1.0 for one in _components(shown)]
    assert right == [e.completion == e.gold for e in shown]
    assert 0.35 < sum(right) / len(right) < 0.6
    assert Counter(e.columns["level"] for e, good in zip(shown, right, strict=True) if good).keys() == {1, 2, 3, 4}


def test_edits_of_a_query():
    query = "SELECT name FROM staff WHERE pay > 30 AND name = 'pay' ORDER BY pay DESC"
    assert wrong_column(query, COLUMNS)[:2] == [query.replace("name", "pay", 1), query.replace("name", "unit", 1)]
    assert not any("'name'" in edit or "'unit'" in edit for edit in wrong_column(query, COLUMNS)), "values stay"
    assert set(missing_filter(query, COLUMNS)) == {query.replace(" AND name = 'pay'", ""),
                                                   query.replace("pay > 30 AND ", "")}  # fmt: skip
    assert missing_filter("SELECT a FROM t WHERE k IN (SELECT k FROM u WHERE AVG(b) > 2)", COLUMNS) == [
        "SELECT a FROM t", "SELECT a FROM t WHERE k IN (SELECT k FROM u)"]  # fmt: skip
    assert set(wrong_operator(query, COLUMNS)) == {query.replace(">", "<"), query.replace(">", ">="),
                                                   query.replace(" = ", " != ")}  # fmt: skip
    assert missing_order(query, COLUMNS) == [query.replace(" ORDER BY pay DESC", "")]
    assert (
        wrong_aggregate("SELECT COUNT(*), MAX(pay) FROM staff", COLUMNS)[-1] == "SELECT COUNT(*), SUM(pay) FROM staff"
    )
    assert "SELECT SUM(pay) FROM staff" in wrong_aggregate("SELECT COUNT(*) FROM staff", COLUMNS)
    assert broken_syntax("SELECT a FROM t WHERE b = 'x y'", COLUMNS)[1] == "SELECT a FROM t WHERE b ="
    assert wrong_aggregate(query, COLUMNS) == [] and missing_order("SELECT a FROM t", COLUMNS) == []


def test_rows_without_a_gold_query_are_refused(examples):
    with pytest.raises(ValueError, match="row 'x' needs a gold query and databases"):
        with_sql_demonstrations(
            [Example(id="x", messages=[], gold={"a": 1}, columns={"databases": ["d"]})], SQL_CLEAN, 0
        )
    with pytest.raises(ValueError, match="row 'x' needs a gold query and databases"):
        with_sql_demonstrations([Example(id="x", messages=[], gold="SELECT 1")], SQL_CLEAN, 0)


def test_a_mix_out_of_range_is_refused():
    with pytest.raises(ValueError, match="chatter must be between 0 and 1, not 1.5"):
        SqlDemonstrationMix(chatter=1.5)
