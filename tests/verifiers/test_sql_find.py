"""Which statement of an output is the query."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifiers.sql_find import FoundSql, NoSql, find_sql
from verifiers.sql_limits import MAX_SQL_CHARS, MAX_TEXT_CHARS

QUERY = "SELECT a FROM t"


@pytest.mark.parametrize(
    ("text", "query", "clean"),
    [
        (QUERY, QUERY, True),
        (f"  \n{QUERY} ;\n", QUERY, True),
        (f"-- a note\n/* another; one */ {QUERY}; -- done", QUERY, True),
        (f"/**/{QUERY}/***/", f"{QUERY}/***/", True),
        ("select 1", "select 1", True),
        ("SELECT ';', \"a;b\", [c;d] FROM t -- ; no\n;", "SELECT ';', \"a;b\", [c;d] FROM t -- ; no", True),
        ("SELECT 'it''s; fine'", "SELECT 'it''s; fine'", True),
        ("WITH x AS (SELECT 1)\nSELECT * FROM x", "WITH x AS (SELECT 1)\nSELECT * FROM x", True),
        (
            "with recursive r(i) as (select 1) select i from r",
            "with recursive r(i) as (select 1) select i from r",
            True,
        ),
        ("SELECT 1\n\nFROM t", "SELECT 1\n\nFROM t", True),
        ("SELECT 1\n\n\n", "SELECT 1", True),
        ("SELECT 1 FROM t\n\nFrom this we see it.", "SELECT 1 FROM t", False),
        # fences
        (f"```sql\n{QUERY};\n```", QUERY, True),
        (f"```\n{QUERY}\n```\n", QUERY, True),
        (f"```SQLite\n{QUERY}", QUERY, True),
        (f"It's this:\n```sql\n{QUERY}\n```\nok?", QUERY, False),
        (f"```sql\nSELECT 0\n```\nBetter:\n```sql\n{QUERY}\n```", QUERY, False),
        (f"```sql\n{QUERY}\n```\nIn Python:\n```python\nSELECT = 3\n```", QUERY, False),
        (f"```sql\n{QUERY}\n```\n```sql\nno query\n```", QUERY, False),
        (f"```sql\n{QUERY}\n```\nThat is: SELECT 0", QUERY, False),
        # text
        (f"The query is: {QUERY}; it lists all.", QUERY, False),
        (f"Use `{QUERY}` here.", QUERY, False),
        (f"First\nSELECT 0\n\nthen\n{QUERY}\n\nDone.", QUERY, False),
        (f"SELECT 0;\n{QUERY};", QUERY, False),
        (f"{QUERY}; DROP TABLE t", QUERY, False),
        ("SELECT a\nFROM (\nSELECT b FROM u\n)\n\nok, with the rows.", "SELECT a\nFROM (\nSELECT b FROM u\n)", False),
        (f"Answer:\n{QUERY}\nUNION\nSELECT b FROM u;\nok", f"{QUERY}\nUNION\nSELECT b FROM u", False),
        ("Here:\nSELECT `a b` FROM t;", "SELECT `a b` FROM t", False),
        (f"Select the rows with a name.\n{QUERY}", "Select the rows with a name.\nSELECT a FROM t", True),
        (f"I select.\nSelect the rows\n\n{QUERY}", QUERY, False),
        (f"Queries:\nwith the table in mind\n\n{QUERY}", QUERY, False),
        ("```json\n{}\n```\n" + f"SQL:\n{QUERY}\n```\n", QUERY, False),
    ],
)
def test_what_is_found(text, query, clean):
    assert find_sql(text) == FoundSql(query, clean)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no query",
        "DELETE FROM t",
        "selecting",
        "Use the select box",
        "With care",
        "EXPLAIN SELECT 1",
        "```sql\n```",
    ],
)
def test_nothing_is_found(text):
    assert find_sql(text) == NoSql("no statement that begins with SELECT or WITH in the output")


def test_caps():
    assert find_sql("SELECT " + "1" * (MAX_SQL_CHARS - 7)) == FoundSql("SELECT " + "1" * (MAX_SQL_CHARS - 7), True)
    assert "a query of" in find_sql("SELECT " + "1" * (MAX_SQL_CHARS - 6)).reason
    assert "output of" in find_sql("x" * (MAX_TEXT_CHARS + 1)).reason


@given(
    st.lists(
        st.sampled_from(
            ["SELECT", "select ", "WITH a AS (", "'", '"', "`", "```", "\n", ";", ":", "--", "/*", "*/", "[", "x", " "]
        )
    ).map("".join)
)
def test_what_is_found_stands_in_the_text_and_is_found_again(text):
    found = find_sql(text)
    if isinstance(found, FoundSql):
        assert found.query in text and found.query == found.query.strip()
        assert found.query[:4].lower() in ("sele", "with")
        again = find_sql(found.query)
        assert isinstance(again, FoundSql)


PIECES = [
    "SELECT ",
    "SELECT\n",
    "SELECT\n\n",
    "```\nSELECT 1\n",
    "/*",
    "* / ",
    "--\n",
    "-",
    "'",
    "SELECT '",
    "[",
    "[ ]",
]
PIECES += ["\n", "\n\t", "\n\nFROM", ": ", ";", "`SELECT 1`", "WITH a "]


@pytest.mark.parametrize("piece", PIECES)
def test_hostile_texts_are_searched_in_linear_time(piece):
    text = (piece * MAX_TEXT_CHARS)[:MAX_TEXT_CHARS]
    for before in ("", "SELECT 1 ", "Look:\n", "```sql\n"):
        seconds = []
        for _ in range(3):
            start = time.process_time()
            find_sql((before + text)[:MAX_TEXT_CHARS])
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.25
