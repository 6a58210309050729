"""The SQL verdict as a whole, on real databases."""

import sqlite3

import pytest

from verifiers import sql
from verifiers.sql import COMPONENTS, SqlItem, SqlLimits, SqlRewardDesign, Verdict, check_gold, verify, verify_batch

GOLD = "SELECT name, pay FROM staff WHERE pay > 2"
ROWS = [(1, "Ann", 1.5, "x"), (2, "Bea", 2.5, "x"), (3, "Cid", 3.5, None), (4, "Dan", 3.5, "y")]


def make(path, rows):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE staff (id INTEGER PRIMARY KEY, name TEXT, pay REAL, team TEXT)")
    connection.execute("CREATE VIEW rich AS SELECT name FROM staff WHERE pay > 3")
    connection.executemany("INSERT INTO staff VALUES (?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    return path


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sql")
    return [make(folder / "a #1?.db", ROWS), make(folder / "b.db", [(5, "Eve", 9.0, "y"), (6, "Flo", 1.0, "y")])]


def test_an_exact_answer(databases):
    verdict = verify("SELECT pay, name FROM staff WHERE 2 < pay ORDER BY pay DESC", GOLD, databases)
    assert verdict.components == dict.fromkeys(COMPONENTS, 1.0)
    assert (verdict.reward, verdict.reason) == (1.0, None)
    assert verdict.query == "SELECT pay, name FROM staff WHERE 2 < pay ORDER BY pay DESC"


def test_a_query_that_is_right_by_chance_on_one_instance(databases):
    query = "SELECT name, pay FROM staff WHERE id > 1"
    assert verify(query, GOLD, databases[:1]).components["exact_match"] == 1.0
    verdict = verify(query, GOLD, databases)
    assert verdict.components["exact_match"] == 0.0
    assert verdict.components["rows"] == pytest.approx((1 + 2 / 3) / 2)
    assert verdict.reason == "2 rows instead of 1 (database 2 of 2)"


@pytest.mark.parametrize(
    ("text", "components", "reason"),
    [
        ("I do not know.", (0, 0, 0, 0, 0), "no statement that begins"),
        ("SELECT FROM WHERE", (0, 0, 0, 0, 0), "syntax error"),
        ("SELECT nam FROM staff", (1, 0, 0, 0, 0), "no such column: nam"),
        ("SELECT name FROM stuff", (1, 0, 0, 0, 0), "no such table: stuff"),
        ("SELECT name FROM staff", (1, 1, 2 / 3, 0, 0), "1 column instead of 2"),
        ("SELECT name, team FROM staff", (1, 1, 0.5, 0, 0), "4 rows instead of 3"),
        ("SELECT name, pay FROM staff", (1, 1, 1, 6 / 7, 0), "4 rows instead of 3"),
        ("SELECT name, pay + 1 AS pay FROM staff WHERE pay > 2", (1, 1, 1, 0, 0), "3 rows of 3 wrong"),
    ],
)
def test_graded_answers(text, components, reason, databases):
    verdict = verify(text, GOLD, databases[:1])
    assert verdict.components == pytest.approx(dict(zip(COMPONENTS, components, strict=True)))
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("gold", "query", "exact"),
    [
        # Order counts where the gold has a top-level ORDER BY only.
        ("SELECT name FROM staff ORDER BY id", "SELECT name FROM staff ORDER BY id DESC", False),
        ("SELECT name FROM (SELECT * FROM staff ORDER BY id)", "SELECT name FROM staff ORDER BY id DESC", True),
        ("SELECT name FROM staff", "SELECT name FROM staff ORDER BY id DESC", True),
        (
            "SELECT id FROM staff UNION SELECT 9 ORDER BY 1",
            "SELECT id FROM staff UNION SELECT 9 ORDER BY id DESC",
            False,
        ),
        # Ties under it do not: plain, by alias, by position, aggregated, in a union, distinct.
        ("SELECT name FROM staff ORDER BY pay DESC", "SELECT name FROM staff ORDER BY pay DESC, id DESC", True),
        ("SELECT name FROM staff ORDER BY pay DESC", "SELECT name FROM staff ORDER BY pay, id", False),
        ("SELECT name, pay AS p FROM staff ORDER BY p", "SELECT name, pay FROM staff ORDER BY pay, id DESC", True),
        ("SELECT name, pay FROM staff ORDER BY 2", "SELECT name, pay FROM staff ORDER BY pay, id DESC", True),
        (
            "SELECT team FROM staff GROUP BY team ORDER BY COUNT(*)",
            "SELECT team FROM staff GROUP BY team ORDER BY COUNT(*), team DESC",
            True,
        ),
        (
            "SELECT name, pay FROM staff UNION SELECT 'Zoe', 3.5 ORDER BY pay",
            "SELECT name, pay FROM staff UNION SELECT 'Zoe', 3.5 ORDER BY pay, name DESC",
            True,
        ),
        (
            "SELECT name, pay FROM staff UNION SELECT 'Zoe', 3.5 ORDER BY 2",
            "SELECT name, pay FROM staff UNION SELECT 'Zoe', 3.5 ORDER BY pay, name DESC",
            True,
        ),
        ("SELECT DISTINCT pay, id FROM staff ORDER BY pay", "SELECT pay, id FROM staff ORDER BY 1, 2 DESC", True),
        # A sort key that is not among the columns of a DISTINCT cannot be asked for: as the rows stand.
        ("SELECT DISTINCT name FROM staff ORDER BY pay", "SELECT name FROM staff ORDER BY pay, id DESC", False),
        # Duplicates count.
        ("SELECT team FROM staff WHERE pay < 3", "SELECT DISTINCT team FROM staff WHERE pay < 3", False),
        # Types count.
        ("SELECT id FROM staff", "SELECT CAST(id AS TEXT) FROM staff", False),
        ("SELECT id FROM staff", "SELECT id * 1.0 FROM staff", True),
        ("SELECT team FROM staff WHERE id = 3", "SELECT 'NULL'", False),
        ("SELECT team FROM staff WHERE id = 3", "SELECT NULL", True),
        ("SELECT SUM(pay) / COUNT(*) FROM staff", "SELECT AVG(pay) FROM staff", True),
        ("SELECT x'61'", "SELECT 'a'", False),
        # What a question may need is allowed.
        ("SELECT name FROM rich", "WITH r AS (SELECT * FROM staff WHERE pay > 3) SELECT name FROM r", True),
        ("SELECT 4", "WITH r AS (SELECT * FROM staff) SELECT COUNT(*) FROM r", True),
        ("SELECT 9", "WITH RECURSIVE r(i) AS (SELECT 1 UNION SELECT i + 1 FROM r LIMIT 9) SELECT MAX(i) FROM r", True),
        ("SELECT 3", "SELECT COUNT(*) FROM json_each('[1, 2, 3]')", True),
        ("SELECT id, 1 FROM staff WHERE id = 1", "SELECT id, ROW_NUMBER() OVER (ORDER BY id) FROM staff LIMIT 1", True),
        ("SELECT '2025'", "SELECT STRFTIME('%Y', '2025-03-01')", True),
    ],
)  # fmt: skip
def test_what_counts_as_equal(gold, query, exact, databases):
    verdict = verify(query, gold, databases[:1])
    assert verdict.components["execute"] == 1.0, verdict.reason
    assert verdict.components["exact_match"] == float(exact)
    assert verify(gold, gold, databases).reward == 1.0


def test_texts_that_are_no_utf_8(tmp_path):
    path = make(tmp_path / "odd.db", [])
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO staff (name) VALUES (CAST(x'ff61' AS TEXT))")
    connection.commit()
    connection.close()
    gold = "SELECT name FROM staff"
    assert verify(gold, gold, [path]).reward == 1.0
    assert verify("SELECT 'a'", gold, [path]).components["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("SELECT nam FROM staff", "no such column: nam"),
        ("DELETE FROM staff", "not authorized"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("", "must be a text"),
        (None, "must be a text"),
        ("SELECT " + "1" * 10_000, "characters, more than"),
        ("WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT COUNT(*) FROM r", "steps"),
        ("EXPLAIN SELECT 1", "sqlglot cannot read the gold query"),
    ],
)
def test_a_gold_at_fault(gold, reason, databases):
    limits = SqlLimits(max_steps=100_000)
    with pytest.raises(ValueError, match=reason):
        check_gold(gold, databases, limits)
    for text in ("SELECT 1", "no query"):
        with pytest.raises(ValueError, match=reason):
            verify(text, gold, databases, limits=limits)


def test_a_gold_that_takes_too_long_is_a_fault_of_the_data(databases):
    hangs = "SELECT instr(printf('%.*c', 900000, 'a'), substr(printf('%.*c', 900000, 'a'), 1, 400000) || 'b')"
    endless = "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT COUNT(*) FROM r"
    for gold in (hangs, endless):
        verdict = verify_batch([SqlItem(GOLD, gold, databases)], limits=SqlLimits(time_s=0.3, max_steps=10**15))[0]
        assert verdict.reward is None and "longer than 0.3 s" in verdict.reason
    # A busy machine is no reason to give up a gold for good.
    assert "longer" in verify_batch([SqlItem(GOLD, endless, databases)], limits=SqlLimits(0.1, 10**15))[0].reason
    assert "steps" in verify_batch([SqlItem(GOLD, endless, databases)], limits=SqlLimits(max_steps=10**5))[0].reason


def test_databases_at_fault(databases, tmp_path):
    (tmp_path / "text.db").write_text("not a database " * 100)
    for bad, reason in [
        ([], "at least one"),
        (str(databases[0]), "must be a list"),
        ([tmp_path / "none.db"], "cannot be read"),
        ([databases[0], tmp_path / "text.db"], "SQLite database"),
        ([tmp_path], "SQLite database|cannot be opened"),
        ([3], "list of paths"),
    ]:
        with pytest.raises(ValueError, match=reason):
            check_gold(GOLD, bad)


def test_a_fault_of_the_data_costs_its_own_item_only(databases):
    items = [SqlItem(GOLD, "SELECT x", databases), SqlItem(GOLD, GOLD, databases), SqlItem("no", GOLD, ["/none.db"])]
    verdicts = verify_batch(items)
    assert [verdict.reward for verdict in verdicts] == [None, 1.0, None]
    assert "no such column: x" in verdicts[0].reason and verdicts[0].components == {}
    assert verify_batch([]) == []


def test_a_changed_database_is_read_anew(tmp_path):
    path = make(tmp_path / "a.db", ROWS)
    assert verify(GOLD, GOLD, [path]).reward == 1.0
    make_anew = [(index, "x", 5.0, None) for index in range(1_000)]
    path.unlink()
    make(path, make_anew)
    assert verify("SELECT 'x', 5 FROM staff", GOLD, [path]).components["exact_match"] == 1.0


def test_the_limits(databases):
    many = "SELECT a.id FROM " + ", ".join(f"staff AS {letter}" for letter in "abcdef")
    assert "more than 50 rows" in verify(many, GOLD, databases, limits=SqlLimits(max_rows=50)).reason
    counted = "SELECT COUNT(*) FROM " + ", ".join(f"staff AS {letter}" for letter in "abcdefg")
    assert verify(counted, GOLD, databases).components["execute"] == 1.0
    verdict = verify(counted, GOLD, databases, limits=SqlLimits(max_steps=10_000))
    assert verdict.components["execute"] == 0.0 and verdict.components["parse"] == 1.0
    assert "more than 10000 steps" in verdict.reason
    slow = "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT COUNT(*) FROM r"
    verdict = verify(slow, GOLD, databases, limits=SqlLimits(time_s=0.2, max_steps=10**15))
    assert "longer than 0.2 s" in verdict.reason and verdict.components["execute"] == 0.0
    # SQLite reads a CAST to no type and sqlglot does not: what SQLite runs has parsed.
    odd = slow.replace("COUNT(*)", "CAST(i AS)")
    assert verify(odd, GOLD, databases, limits=SqlLimits(max_rows=50)).components["parse"] == 1.0
    for limits in ({"time_s": 0}, {"max_rows": -1}, {"max_steps": float("inf")}, {"time_s": True}):
        with pytest.raises(ValueError, match="must be a finite number above 0"):
            SqlLimits(**limits)


def test_steps_are_counted_over_all_instances(tmp_path):
    one = make(tmp_path / "one.db", [(index, "x", 1.0, None) for index in range(2_000)])
    two = make(tmp_path / "two.db", [(index, "x", 1.0, None) for index in range(2_000)])
    query, limits = "SELECT COUNT(*) FROM staff WHERE pay + id + length(name) > 0", SqlLimits(max_steps=30_000)
    assert verify(query, "SELECT 1", [one], limits=limits).components["execute"] == 1.0
    assert "database 2 of 2" in verify(query, "SELECT 1", [one, two], limits=limits).reason


def test_reward_designs(databases):
    text = "SELECT name, pay FROM staff"  # rows 6/7, columns 1
    assert verify(text, GOLD, databases[:1], SqlRewardDesign("binary")).reward == 0.0
    assert verify(text, GOLD, databases[:1], SqlRewardDesign("weighted")).reward == pytest.approx((1 + 2 * 6 / 7) / 4)
    decomposed = 0.05 + 0.1 + 0.15 + 0.3 * 6 / 7
    assert verify(text, GOLD, databases[:1]).reward == pytest.approx(decomposed)
    halved = SqlRewardDesign("decomposed", {"exact_match": 0})
    assert verify(text, GOLD, databases[:1], halved).reward == pytest.approx(decomposed / 0.6)
    for name in ("binary", "weighted", "decomposed"):
        assert verify(GOLD, GOLD, databases, SqlRewardDesign(name)).reward == 1.0


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("graded", {}, "unknown reward design"),
        ("binary", {"rows": 1}, "takes no weights"),
        ("weighted", {"parse": 1}, "unknown share 'parse'"),
        ("weighted", {"rows": -1}, "finite number of at least 0"),
        ("decomposed", dict.fromkeys(COMPONENTS, 0), "must not all be 0"),
    ],
)
def test_a_bad_design(name, weights, message):
    with pytest.raises(ValueError, match=message):
        SqlRewardDesign(name, weights)


def test_verdicts_do_not_depend_on_the_batch(databases):
    texts = [GOLD, "SELECT name FROM staff", "x", "SELECT nam FROM staff", "SELECT name, pay FROM staff"] * 40
    items = [SqlItem(text, GOLD, databases) for text in texts]
    assert verify_batch(items) == [verify(text, GOLD, databases) for text in texts]


def test_the_sandbox_is_kept(databases):
    verify(GOLD, GOLD, databases)
    before = sql._sandbox().pid
    assert isinstance(verify(GOLD, GOLD, databases), Verdict) and sql._sandbox().pid == before
