"""Questions about a schema with the queries that answer them, at four levels of difficulty.

Every pattern draws the parts of a query and writes it twice, in words and in SQL. Values come from the databases, so
that a filter has something to find and ``>=`` differs from ``>``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ember_ray.data.sql_schemas import Column, Schema, Table

Values = Mapping[str, Sequence[object]]
"""Column name to the cells that one instance has in it."""

COMPARISONS = (
    (">", ("over", "above")),
    ("<", ("under", "below")),
    (">=", ("at least",)),
    ("<=", ("at most",)),
)
AGGREGATES = (("AVG", ("average", "mean")), ("SUM", ("total",)), ("MAX", ("highest",)), ("MIN", ("lowest",)))


@dataclass(frozen=True)
class Question:
    """Attributes:
    schema: what it is about.
    level: 1 to 4.
    pattern: the name of the function that made it.
    text: the question in words.
    query: the query that answers it.
    """

    schema: Schema
    level: int
    pattern: str
    text: str
    query: str


class Drawer:
    """Draws parts of questions about one schema."""

    def __init__(self, schema: Schema, values: Values, rng: random.Random) -> None:
        self.schema, self.values, self.rng = schema, values, rng
        self.child, self.parent, self.key = schema.child, schema.parent, schema.key
        self.join = f"{self.child.name} JOIN {self.parent.name} USING ({self.key})"

    def phrase(self, column: Column) -> str:
        return self.rng.choice(column.phrases)

    def table(self) -> Table:
        return self.child if self.rng.random() < 0.6 else self.parent

    def number(self, table: Table, besides: Sequence[Column] = ()) -> Column:
        return self.rng.choice([column for column in table.of_kind("number") if column not in besides])

    def compare(self, subject: str, words: str, value: object) -> tuple[str, str]:
        operator, phrases = self.rng.choice(COMPARISONS)
        return f"{words} {self.rng.choice(phrases)} {value}", f"{subject} {operator} {value}"

    def condition(self, column: Column) -> tuple[str, str]:
        """A condition in words and in SQL."""
        value = self.rng.choice(self.values[column.name])
        if column.kind == "number":
            return self.compare(column.name, self.phrase(column), value)
        return f"{self.phrase(column)} {value}", f"{column.name} = '{value}'"

    def filters(self, table: Table, besides: Sequence[Column] = (), two: float = 0.25) -> tuple[str, str, list[Column]]:
        """One or two conditions on different columns, in words and in SQL, and their columns."""
        columns = [column for column in table.of_kind("word", "number") if column not in besides]
        used = self.rng.sample(columns, min(len(columns), 2 if self.rng.random() < two else 1))
        parts = [self.condition(column) for column in used]
        return " and ".join(words for words, _ in parts), " AND ".join(sql for _, sql in parts), used

    def outputs(self, table: Table, besides: Sequence[Column]) -> tuple[str, str]:
        """One or two columns to show, in words and in SQL."""
        columns = [column for column in table.columns if column not in besides]
        shown = self.rng.sample(columns, min(len(columns), 2 if self.rng.random() < 0.4 else 1))
        return " and ".join(map(self.phrase, shown)), ", ".join(column.name for column in shown)


def show(d: Drawer) -> tuple[str, str]:
    table = d.table()
    words, where, used = d.filters(table)
    asked, columns = d.outputs(table, used)
    text = d.rng.choice(("List the {asked} of {noun} with {words}.", "Which {noun} have {words}? Give the {asked}."))
    return (
        text.format(asked=asked, noun=table.noun, words=words),
        f"SELECT {columns} FROM {table.name} WHERE {where}",
    )


def count(d: Drawer) -> tuple[str, str]:
    table = d.table()
    words, where, _ = d.filters(table)
    text = d.rng.choice(("How many {noun} have {words}?", "Count the {noun} with {words}."))
    return text.format(noun=table.noun, words=words), f"SELECT COUNT(*) FROM {table.name} WHERE {where}"


def aggregate(d: Drawer) -> tuple[str, str]:
    table = d.table()
    column = d.number(table)
    words, where, _ = d.filters(table, [column], two=0.1)
    function, names = d.rng.choice(AGGREGATES)
    text = d.rng.choice(("What is the {name} {asked} of {noun} with {words}?", "Give the {name} {asked} of {noun} with "
                         "{words}."))  # fmt: skip
    return (
        text.format(name=d.rng.choice(names), asked=d.phrase(column), noun=table.noun, words=words),
        f"SELECT {function}({column.name}) FROM {table.name} WHERE {where}",
    )


def top(d: Drawer) -> tuple[str, str]:
    table = d.table()
    by = d.number(table)
    words, where, used = d.filters(table, [by], two=0.0)
    if d.rng.random() < 0.4:
        words, where, used = "", "", []
    asked, columns = d.outputs(table, [by, *used])
    extreme, order = d.rng.choice((("highest", " DESC"), ("lowest", "")))
    limit = d.rng.randint(2, 6)
    return (
        f"List the {asked} of the {limit} {table.noun} with the {extreme} {d.phrase(by)}"
        f"{f' among those with {words}' if words else ''}.",
        f"SELECT {columns} FROM {table.name}{f' WHERE {where}' if where else ''} ORDER BY {by.name}{order} "
        f"LIMIT {limit}",
    )


def ordered(d: Drawer) -> tuple[str, str]:
    table = d.table()
    by = d.number(table)
    words, where, used = d.filters(table, [by], two=0.0)
    asked, columns = d.outputs(table, [by, *used])
    name, order = d.rng.choice((("falling", " DESC"), ("rising", "")))
    return (
        f"List the {asked} of {table.noun} with {words}, by {name} {d.phrase(by)}.",
        f"SELECT {columns} FROM {table.name} WHERE {where} ORDER BY {by.name}{order}",
    )


def join_filter(d: Drawer) -> tuple[str, str]:
    words, where, _ = d.filters(d.parent, two=0.0)
    asked, columns = d.outputs(d.child, [])
    return (
        f"List the {asked} of {d.child.noun} whose {d.parent.name} has {words}.",
        f"SELECT {columns} FROM {d.join} WHERE {where}",
    )


def join_show(d: Drawer) -> tuple[str, str]:
    words, where, used = d.filters(d.child, two=0.0)
    asked, column = d.outputs(d.child, used)[0], d.rng.choice(d.parent.columns)
    asked = d.phrase(d.child.columns[0])
    return (
        f"List the {asked} of {d.child.noun} with {words} and the {d.phrase(column)} of their {d.parent.name}.",
        f"SELECT {d.child.columns[0].name}, {column.name} FROM {d.join} WHERE {where}",
    )


def _measure(d: Drawer, besides: Sequence[Column] = ()) -> tuple[str, str, list[Column]]:
    """A number for a group of the child's rows: how many, or an aggregate of a column."""
    if d.rng.random() < 0.4:
        return "count", "COUNT(*)", []
    column = d.number(d.child, besides)
    function, names = d.rng.choice(AGGREGATES)
    return f"{d.rng.choice(names)} {d.phrase(column)}", f"{function}({column.name})", [column]


def group(d: Drawer) -> tuple[str, str]:
    by = d.child.of_kind("word")[0]
    asked, measure, used = _measure(d)
    words, where, _ = d.filters(d.child, [by, *used], two=0.0)
    return (
        f"For each {d.phrase(by)} of {d.child.noun} with {words}, give the {asked}.",
        f"SELECT {by.name}, {measure} FROM {d.child.name} WHERE {where} GROUP BY {by.name}",
    )


def join_group(d: Drawer) -> tuple[str, str]:
    by = d.parent.columns[0]
    asked, measure, used = _measure(d)
    words, where, _ = d.filters(d.child, used, two=0.0)
    return (
        f"For each {d.phrase(by)} of {d.parent.noun}, give the {asked} of {d.child.noun} with {words}.",
        f"SELECT {by.name}, {measure} FROM {d.join} WHERE {where} GROUP BY {by.name}",
    )


def having(d: Drawer) -> tuple[str, str]:
    by = d.child.of_kind("word")[0]
    asked, measure, used = _measure(d)
    if used:
        value = int(str(d.rng.choice(d.values[used[0].name]))) * (d.rng.randint(1, 3) if "SUM" in measure else 1)
    else:
        value = d.rng.randint(1, 4)
    words, where, _ = d.filters(d.child, [by, *used], two=0.0)
    limit, condition = d.compare(measure, asked, value)
    return (
        f"For {d.child.noun} with {words}, which {d.phrase(by)} has {limit}?",
        f"SELECT {by.name} FROM {d.child.name} WHERE {where} GROUP BY {by.name} HAVING {condition}",
    )


def compared(d: Drawer) -> tuple[str, str]:
    """Rows compared with an aggregate of other rows."""
    column = d.number(d.child)
    words, where, used = d.filters(d.child, [column], two=0.0)
    asked, columns = d.outputs(d.child, [column, *used])
    operator, comparison = d.rng.choice(((">", "over"), ("<", "under")))
    function, names = d.rng.choice(AGGREGATES[:1] + AGGREGATES[2:])
    noun = d.child.noun
    return (
        f"List the {asked} of {noun} with {d.phrase(column)} {comparison} the {d.rng.choice(names)} of {noun} with "
        f"{words}.",
        f"SELECT {columns} FROM {d.child.name} WHERE {column.name} {operator} "
        f"(SELECT {function}({column.name}) FROM {d.child.name} WHERE {where})",
    )


def member(d: Drawer) -> tuple[str, str]:
    """Parents that have a child of some kind, or none."""
    words, where, _ = d.filters(d.child)
    asked, columns = d.outputs(d.parent, [])
    some, operator = d.rng.choice((("", "IN"), ("no ", "NOT IN")))
    return (
        f"List the {asked} of {d.parent.noun} that have {some}{d.child.noun} with {words}.",
        f"SELECT {columns} FROM {d.parent.name} WHERE {d.key} {operator} "
        f"(SELECT {d.key} FROM {d.child.name} WHERE {where})",
    )


def sets(d: Drawer) -> tuple[str, str]:
    label, name, noun = d.child.columns[0], d.child.name, d.child.noun
    first_words, first, used = d.filters(d.child, two=0.0)
    second_words, second, _ = d.filters(d.child, used, two=0.0)
    text, operator = d.rng.choice(
        (("either {} or {}", "UNION"), ("both {} and {}", "INTERSECT"), ("{} but not {}", "EXCEPT"))
    )
    return (
        f"List the {d.phrase(label)} of {noun} with {text.format(first_words, second_words)}.",
        f"SELECT {label.name} FROM {name} WHERE {first} {operator} SELECT {label.name} FROM {name} WHERE {second}",
    )


Pattern = Callable[[Drawer], tuple[str, str]]
"""Draws a question in words and in SQL."""

PATTERNS: dict[int, tuple[Pattern, ...]] = {
    1: (show,),
    2: (count, aggregate, top, ordered),
    3: (join_filter, join_show, group, join_group),
    4: (having, compared, member, sets),
}
LEVELS = tuple(PATTERNS)


def draw_question(schema: Schema, values: Values, level: int, pattern: Pattern, rng: random.Random) -> Question:
    """Draws a question; whether its answer tells anything is for the caller to find out."""
    text, query = pattern(Drawer(schema, values, rng))
    return Question(schema, level, pattern.__name__, text, query)
