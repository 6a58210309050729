import hashlib
import json
import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ember_ray.data.splits import SPLITS
from ember_ray.data.sql_databases import CHILD_ROWS, INSTANCES, build_instance, write_databases
from ember_ray.data.sql_examples import generate_sql_examples
from ember_ray.data.sql_faults import near_misses
from ember_ray.data.sql_questions import LEVELS, PATTERNS
from ember_ray.data.sql_results import Databases, fingerprint, is_ordered
from ember_ray.data.sql_schemas import SCHEMAS
from verifiers.sql import SqlItem, check_gold, verify_batch

DATABASES_DIGEST = "4d76551391acb078"
EXAMPLES_DIGEST = "8e1a7a5789cf4200"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("databases")


def _movable(examples) -> list:
    """Without the folder's name, which is the caller's."""
    return [
        replace(e, columns={**e.columns, "databases": [Path(path).name for path in e.columns["databases"]]})
        for e in examples
    ]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def test_same_seed_same_examples_and_a_longer_call_begins_with_them(folder, tmp_path):
    first = generate_sql_examples("train", 60, 7, folder)
    assert first == generate_sql_examples("train", 90, 7, folder)[:60]
    assert _movable(first) == _movable(generate_sql_examples("train", 60, 7, tmp_path / "elsewhere"))
    assert [e.gold for e in first] != [e.gold for e in generate_sql_examples("train", 60, 8, folder)]
    assert len({example.id for example in first}) == len({example.gold for example in first}) == 60


def test_examples_and_databases_are_those_that_the_shipped_model_was_trained_on():
    """Golden digests: other machines, other hash seeds and other versions of SQLite make the same."""
    made = b"".join(build_instance(schema, instance) for schema in SCHEMAS for instance in range(INSTANCES))
    assert _digest(made) == DATABASES_DIGEST


def test_questions_are_those_that_the_shipped_model_was_trained_on(folder):
    rows = [vars(example) for example in _movable(generate_sql_examples("train", 100, 0, folder))]
    assert _digest(json.dumps(rows).encode()) == EXAMPLES_DIGEST


def test_databases_are_written_once_and_mended(tmp_path):
    paths = [Path(path) for names in write_databases(tmp_path).values() for path in names]
    assert len(paths) == len(SCHEMAS) * INSTANCES == len(list(tmp_path.iterdir()))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in paths}
    paths[3].write_bytes(b"half a fi")
    write_databases(tmp_path)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in paths}
    assert [path for path in paths if after[path][:2] != before[path][:2]] == [paths[3]]
    assert after[paths[3]][2] == before[paths[3]][2] and paths[3].stat().st_mode & 0o777 == 0o644


def test_instances_are_sound_and_differ(folder):
    for schema in SCHEMAS:
        contents = []
        for path in write_databases(folder)[schema.name]:
            connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            [key] = connection.execute(f"PRAGMA foreign_key_list({schema.child.name})").fetchall()
            assert key[2:5] == (schema.parent.name, schema.key, schema.key)
            rows = connection.execute(f"SELECT * FROM {schema.child.name}").fetchall()
            assert len(rows) == CHILD_ROWS
            for column, cells in zip(schema.child.columns, zip(*rows, strict=True), strict=False):
                assert column.kind == "word" or len(set(cells)) == CHILD_ROWS, "an ORDER BY has no ties"
            contents.append(rows)
            connection.close()
        assert all(not set(one) & set(other) for one in contents for other in contents if one is not other)


def test_no_column_name_occurs_twice_in_a_schema():
    for schema in SCHEMAS:
        names = [column.name for table in (schema.child, schema.parent) for column in table.columns] + [schema.key]
        assert len(names) == len(set(names))


def test_splits_share_no_question_and_no_query(folder):
    queries, prompts = {}, {}
    for split in SPLITS:
        examples = [e for seed in (0, 1) for e in generate_sql_examples(split, 500, seed, folder)]
        queries[split] = {(e.template.split("/")[0], e.gold) for e in examples}
        prompts[split] = {e.messages[-1]["content"].split("\n")[1] for e in examples}
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not (queries[one] & queries[other] or prompts[one] & prompts[other])


def test_levels_come_equally_often_and_have_all_their_patterns(folder):
    examples = generate_sql_examples("train", 1200, 0, folder)
    counts = Counter(example.columns["level"] for example in examples)
    assert set(counts) == set(LEVELS) and all(240 < count < 360 for count in counts.values())
    for example in examples:
        schema, pattern = example.template.split("/")
        assert pattern in {function.__name__ for function in PATTERNS[example.columns["level"]]}
        assert example.difficulty == f"level_{example.columns['level']}"
    schemas, patterns = zip(*(example.template.split("/") for example in examples), strict=True)
    assert set(schemas) == {schema.name for schema in SCHEMAS}
    assert len(set(patterns)) == sum(map(len, PATTERNS.values()))
    only = generate_sql_examples("test", 50, 0, folder, levels=(2, 4))
    assert {example.columns["level"] for example in only} == {2, 4}
    words = {
        1: "WHERE",
        2: "COUNT( MAX( MIN( AVG( SUM( ORDER",
        3: "JOIN GROUP",
        4: "HAVING (SELECT UNION INTERSECT EXCEPT",
    }
    for example in examples:
        assert any(word in example.gold for word in words[example.columns["level"]].split())


def test_every_gold_query_is_right_for_the_verifier_and_has_rows(folder):
    examples = generate_sql_examples("validation", 300, 0, folder)
    for example in examples[:20]:
        check_gold(example.gold, example.columns["databases"])
    verdicts = verify_batch([SqlItem(e.gold, e.gold, e.columns["databases"]) for e in examples])
    assert all(verdict.components["exact_match"] == 1.0 for verdict in verdicts)
    for example in examples:
        results = Databases.open(example.columns["databases"]).run_all(example.gold)
        assert sum(bool(rows) for rows in results) >= INSTANCES - 1
        assert len({str(rows) for rows in results}) > 1, "a query that answers by heart fails"


def test_near_misses_are_told_apart_by_the_verifier(folder):
    items = []
    for example in generate_sql_examples("train", 80, 5, folder):
        columns = Databases.open(example.columns["databases"]).columns()
        edits = near_misses(example.gold, columns)
        assert edits and example.gold not in edits
        items += [SqlItem(edit, example.gold, example.columns["databases"]) for edit in edits]
    wrong = [verdict.components["exact_match"] == 0.0 for verdict in verify_batch(items)]
    assert len(wrong) > 300 and all(wrong)


def test_prompts_are_short_and_hold_schema_and_values_but_never_the_query(folder):
    for example in generate_sql_examples("train", 200, 3, folder):
        [turn] = example.messages
        head, question = turn["content"].split("\n")
        assert turn["role"] == "user" and len(turn["content"]) < 260
        assert "SELECT" not in turn["content"]
        literals = [part for part in example.gold.replace("'", " ").split() if part.isdigit()]
        assert all(literal in question or "SUM" in example.gold for literal in literals)
        [schema] = [schema for schema in SCHEMAS if schema.name == example.template.split("/")[0]]
        assert head == schema.text()


def test_results_compare_whatever_the_order_of_columns():
    assert fingerprint([(1, "a"), (2, "b")], False) == fingerprint([("b", 2.0), ("a", 1)], False)
    assert fingerprint([(1,), (2,)], True) != fingerprint([(2,), (1,)], True)
    assert fingerprint([], False) != fingerprint(None, False)
    assert fingerprint([("1",)], False) != fingerprint([(1,)], False)
    assert is_ordered("SELECT a FROM t ORDER BY a LIMIT 2")
    assert not is_ordered("SELECT a FROM t WHERE b IN (SELECT b FROM u WHERE (c > 1) ORDER BY b LIMIT 2)")


def test_databases_in_memory_cannot_be_changed(folder):
    databases = Databases.open(write_databases(folder)["shop"])
    assert databases.run(0, "DELETE FROM product") is None
    assert databases.run(0, "SELECT COUNT(*) FROM product") == [(CHILD_ROWS,)]


def test_unknown_names_are_refused(folder):
    with pytest.raises(ValueError, match="unknown split 'dev'.*validation"):
        generate_sql_examples("dev", 1, 0, folder)
    with pytest.raises(ValueError, match="unknown level 5.*1, 2, 3, 4"):
        generate_sql_examples("train", 1, 0, folder, levels=(1, 5))
    with pytest.raises(ValueError, match="at least one level"):
        generate_sql_examples("train", 1, 0, folder, levels=())
    with pytest.raises(ValueError, match="count must be at least 0"):
        generate_sql_examples("train", -1, 0, folder)


def test_more_questions_than_there_are_end_in_an_error(folder, monkeypatch):
    monkeypatch.setattr("ember_ray.data.sql_examples.MAX_TRIES", 1)
    with pytest.raises(ValueError, match=r"only about \d+ SQL questions of level 2 in split 'test'"):
        generate_sql_examples("test", 5000, 0, folder, levels=(2,))
