"""What the evaluation sees of answers before it knows which are right."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from ember_ray.data.example import Example
from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.tracking.evaluation_curves import FieldCounts
from recipes.readers import reader_of


def group(*answers: tuple[str, dict[str, float]]) -> ScoredGroup:
    candidates = [
        ScoredCandidate(Candidate("q", index, [], [], [], text, "stop", 0), 0.0, components)
        for index, (text, components) in enumerate(answers)
    ]
    return ScoredGroup("q", "prompt", (), candidates)


def test_json_is_valid_by_its_schema_and_equal_by_its_value() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    reader = reader_of("extract", [Example("q", [], gold={"a": 1, "b": 2}, schema=schema)])
    # the verdicts say nothing, so nothing of them can have been used
    made = group(('{"a": 1, "c": 0}', {}), ('so: {"c": 0, "a": 1.0}', {}), ('{"a": "1"}', {}), ("none", {}))
    first, again, wrong, none = reader.read(made, made.candidates)
    assert first == again and first.valid and first.key is not None
    assert not wrong.valid and wrong.key not in (None, first.key)
    assert (none.valid, none.key) == (False, None)
    assert reader.count_fields is not None
    counts = [reader.count_fields(made, scored) for scored in made.candidates]
    assert counts == [FieldCounts(1, 2, 2), FieldCounts(1, 2, 2), FieldCounts(0, 1, 2), FieldCounts(0, 0, 2)]


def test_a_query_is_valid_if_it_executes_and_equal_by_its_result(tmp_path: Path) -> None:
    path = tmp_path / "one.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table t (a integer)")
        connection.execute("insert into t values (1), (2)")
    reader = reader_of("sql", [Example("q", [], gold="not looked at", columns={"databases": [str(path)]})])
    runs, fails = {"parse": 1.0, "execute": 1.0}, {"parse": 1.0, "execute": 0.0}
    made = group(
        ("SELECT a FROM t", runs),
        ("select t.a from t where a > 0", runs),
        ("SELECT max(a) FROM t", runs),
        ("SELECT nothing FROM t", fails),
        ("I do not know", {"parse": 0.0, "execute": 0.0}),
    )
    first, again, other, broken, none = reader.read(made, made.candidates)
    assert first == again and first.valid and other.valid and other.key not in (None, first.key)
    assert (broken.valid, broken.key) == (none.valid, none.key) == (False, None)
    assert reader.validity == ("parse", "execute") and reader.count_fields is None
