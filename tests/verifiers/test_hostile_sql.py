"""Whatever query a model writes: its own score, 1.5 times the time limit at most, nothing changed or left behind."""

import hashlib
import os
import sqlite3
import time
from pathlib import Path

import pytest

from verifiers.sql import SqlItem, SqlLimits, verify, verify_batch

LIMITS = SqlLimits(time_s=2.0, max_steps=3_000_000, max_rows=1_000)
GOLD = "SELECT name FROM staff WHERE pay > 20 ORDER BY id"
FOREVER = "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r)"
DOUBLING = "WITH RECURSIVE r(i, s) AS (SELECT 1, 'bomb' UNION ALL SELECT i + 1, {} FROM r WHERE i < 60)"
BIG = "printf('%.*c', 900000, 'a')"


def nested(opening, middle, closing, depth):
    return "SELECT " + opening * depth + middle + closing * depth


QUERIES = {
    "endless recursion": f"{FOREVER} SELECT count(*) FROM r",
    "endless rows": f"{FOREVER} SELECT i FROM r",
    "endless rows, sorted": f"{FOREVER} SELECT i FROM r ORDER BY i DESC",
    "endless rows, grouped": f"{FOREVER} SELECT i % 7, sum(i) FROM r GROUP BY 1",
    "endless rows, distinct": f"{FOREVER} SELECT DISTINCT i * 2 FROM r LIMIT 1 OFFSET 100000000",
    "endless rows of blobs": f"{FOREVER} SELECT zeroblob(1000000) FROM r",
    "endless wide texts": f"{FOREVER} SELECT {BIG} || i FROM r",
    "endless texts, sorted": f"{FOREVER} SELECT {BIG} || i AS t FROM r ORDER BY t",
    "endless window": f"{FOREVER} SELECT sum(i) OVER (ORDER BY i) FROM r",
    "cartesian explosion": "SELECT count(*) FROM " + ", ".join(f"staff AS t{index}" for index in range(12)),
    "cartesian explosion of rows": "SELECT * FROM " + ", ".join(f"staff AS t{index}" for index in range(12)),
    "cartesian explosion, sorted": "SELECT t0.name FROM "
    + ", ".join(f"staff AS t{index}" for index in range(8))
    + " ORDER BY random()",
    "a join of 65 tables": "SELECT 1 FROM " + ", ".join(f"staff AS t{index}" for index in range(65)),
    "a join of 60 tables": "SELECT 1 FROM "
    + " JOIN ".join(f"staff AS t{index}" + f" ON t{index}.id = t{index - 1}.boss" * (index > 0) for index in range(60)),
    "a blob of 1 GB": "SELECT zeroblob(1000000000)",
    "random blobs": "SELECT randomblob(1000000), randomblob(1000000)",
    "a long printf": "SELECT printf('%.*c', 2000000000, 'x')",
    "a long float": "SELECT printf('%.999999999f', 1.0)",
    "a wide row of long texts": "SELECT " + ", ".join([BIG] * 250),
    "doubling by concatenation": DOUBLING.format("s || s") + " SELECT max(length(s)) FROM r",
    "doubling by replace": DOUBLING.format("replace(s, 'b', 'bb')") + " SELECT s FROM r",
    "doubling by hex": DOUBLING.format("hex(s)") + " SELECT s FROM r",
    "doubling by quote": DOUBLING.format("quote(s || s)") + " SELECT s FROM r",
    "doubling by group_concat": "SELECT group_concat(a.name || b.name || c.name) FROM staff a, staff b, staff c",
    "replace of much by much": f"SELECT replace({BIG}, 'a', {BIG})",
    "replace, quadratic": f"SELECT replace({BIG}, substr({BIG}, 1, 400000) || 'b', 'c')",
    "instr, quadratic": f"SELECT instr({BIG}, substr({BIG}, 1, 400000) || 'b')",
    "trim, quadratic": f"SELECT trim({BIG}, {BIG})",
    "like bomb": f"SELECT {BIG} LIKE '{'%a' * 90}b'",
    "glob bomb": f"SELECT {BIG} GLOB '{'*a' * 90}b'",
    "a like pattern of 5000": f"SELECT name LIKE '{'%a' * 2500}' FROM staff",
    "json bomb": "SELECT json(printf('%.*c', 900000, '[') || printf('%.*c', 900000, ']'))",
    "a deep json": "SELECT * FROM json_tree(printf('%.*c', 1000, '[') || printf('%.*c', 1000, ']'))",
    "regexp": "SELECT name FROM staff WHERE name REGEXP '(a+)+$'",
    "attach": "ATTACH DATABASE 'made.db' AS made",
    "attach behind a select": "SELECT 1; ATTACH DATABASE 'made.db' AS made",
    "pragma": "PRAGMA writable_schema = ON",
    "pragma function": "SELECT * FROM pragma_table_info('staff')",
    "pragma that writes": "SELECT * FROM pragma_journal_mode('wal')",
    "load_extension": "SELECT load_extension('/lib/x86_64-linux-gnu/libc.so.6')",
    "readfile": "SELECT readfile('/etc/passwd')",
    "writefile": "SELECT writefile('made.txt', 'x')",
    "edit": "SELECT edit('x', 'touch made.txt')",
    "fts3_tokenizer": "SELECT fts3_tokenizer('simple', x'0000000000000000')",
    "generate_series": "SELECT value FROM generate_series(1, 1000000000)",
    "vacuum into": "VACUUM INTO 'made.db'",
    "create temp table": "CREATE TEMP TABLE made AS SELECT * FROM staff",
    "create virtual table": "CREATE VIRTUAL TABLE made USING fts5(a)",
    "create trigger": "CREATE TRIGGER made AFTER INSERT ON staff BEGIN DELETE FROM staff; END",
    "drop": "DROP TABLE staff",
    "stacked drop": "SELECT name FROM staff; DROP TABLE staff; --",
    "drop behind a comment": "SELECT name FROM staff -- \n; DROP TABLE staff",
    "drop in a fence": "```sql\nSELECT name FROM staff; DROP TABLE staff\n```",
    "delete with a table expression": "WITH x AS (SELECT 1) DELETE FROM staff",
    "insert with a table expression": "WITH x AS (SELECT 9, 'x', 1, 1) INSERT INTO staff SELECT * FROM x RETURNING id",
    "update returning": "UPDATE staff SET pay = 0 RETURNING name",
    "begin": "BEGIN EXCLUSIVE",
    "explain": "EXPLAIN SELECT name FROM staff",
    "the schema": "SELECT sql FROM sqlite_master",
    "the schema's rows": "SELECT count(*) FROM sqlite_schema",
    "the statement table": "SELECT * FROM sqlite_stmt",
    "page statistics": "SELECT * FROM dbstat",
    "random order": "SELECT name FROM staff ORDER BY random()",
    "a parameter": "SELECT name FROM staff WHERE id = ?",
    "deep parentheses": nested("(", "1", ")", 4_900),
    "deep selects": nested("(SELECT ", "1", ")", 900),
    "deep functions": nested("abs(", "1", ")", 1_900),
    "deep case": nested("CASE WHEN 1 THEN ", "1", " END", 400),
    "deep not": nested("NOT ", "1", "", 2_000),
    "deep minus": nested("- ", "1", "", 4_000),
    "a long sum": "SELECT 1" + " + 1" * 2_400,
    "a long union": "SELECT 1" + " UNION ALL SELECT 1" * 500,
    "many views of one expression": "WITH a AS (SELECT 1)"
    + "".join(f", a{i} AS (SELECT * FROM a{i - 1 if i else ''}, a{i - 1 if i else ''} AS b)" for i in range(40))
    + " SELECT * FROM a39",
    "many columns": "SELECT " + ", ".join(["1"] * 4_000),
    "a statement of 10 MB": "SELECT '" + "x" * 10_000_000 + "'",
    "10 MB of comments": "SELECT 1 /*" + "*" * 10_000_000 + "/",
    "an open comment": "SELECT name FROM staff /*",
    "comments that open and do not close": "SELECT 1 " + "/*" * 4_000,
    "quotes": "SELECT " + "'" * 9_001,
    "a NUL": "SELECT name FROM staff\0; DROP TABLE staff",
    "a NUL in a string": "SELECT 'a\0b'",
    "a lone surrogate": "SELECT '\ud800'",
    "a lone surrogate as a name": "SELECT \udfff FROM staff",
    "wide quotes": "SELECT name FROM staff WHERE name = ＇a＇ OR 1＝1",
    "a zero-width space": "SELECT\u200bname FROM staff",
    "right to left": "SELECT '\u202e' || name FROM staff",
    "a homoglyph": "SELECT nаme FROM staff",
    "combining marks": "SELECT '" + "e\u0316\u0301" * 3_000 + "'",
    "an infinite number": "SELECT 9e999, -9e999, 9e999 - 9e999 FROM staff",
    "integer overflow": "SELECT abs(-9223372036854775808), sum(9223372036854775807) FROM staff",
    "template injection": "SELECT '{{7*7}}', '${jndi:ldap://x}', '$(touch made.txt)'",
    "semicolons": "SELECT 1" + ";" * 100_000,
    "selects": "SELECT " * 1_400,
    "selects on lines": "SELECT\n" * 1_400,
    "selects on many lines": "SELECT 1\n\n" * 14_000,
    "fences": "```sql\nSELECT 1\n" * 9_000,
}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "staff.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE staff (id INTEGER PRIMARY KEY, name TEXT, pay REAL, boss INTEGER)")
        rows = [(index, f"name {index % 7}", 10.0 + index, index // 2) for index in range(40)]
        connection.executemany("INSERT INTO staff VALUES (?, ?, ?, ?)", rows)
    connection.close()
    verify(GOLD, GOLD, [path], limits=LIMITS)  # starts the sandbox, runs the gold query
    return path


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", QUERIES)
def test_a_hostile_query_costs_its_own_score_and_little_time(name, database, empty_folder):
    before, stat = digest(database), database.stat()
    start = time.monotonic()
    verdict = verify(QUERIES[name], GOLD, [database], limits=LIMITS)
    seconds = time.monotonic() - start
    assert verdict.components["exact_match"] == 0.0 and verdict.reason
    assert 0.0 <= verdict.reward < 1.0
    # A killed sandbox is started anew by the next call, which is not this query's cost.
    assert seconds < 1.5 * LIMITS.time_s, f"{seconds:.2f} s"
    assert digest(database) == before and database.stat().st_mtime_ns == stat.st_mtime_ns
    assert os.listdir(database.parent) == [database.name]  # no journal, no copy
    assert os.listdir(empty_folder) == [] and not Path("made.db").exists()
    assert verify(GOLD, GOLD, [database], limits=LIMITS).reward == 1.0


@pytest.mark.slow
def test_a_hostile_batch_leaves_the_others_their_verdicts(database):
    killers = ["instr, quadratic", "like bomb", "endless recursion", "a lone surrogate", "a wide row of long texts"]
    items = []
    for name in killers:
        items += [SqlItem(GOLD, GOLD, [database]), SqlItem(QUERIES[name], GOLD, [database])]
    items.append(SqlItem("SELECT name FROM staff", GOLD, [database]))
    verdicts = verify_batch(items, limits=LIMITS)
    assert [verdict.reward == 1.0 for verdict in verdicts] == [True, False] * len(killers) + [False]
    assert verdicts[-1].components["execute"] == 1.0
