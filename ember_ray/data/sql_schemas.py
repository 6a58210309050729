"""The databases that generated SQL questions are about: two tables each, the second named by a key in the first.

Within one schema no column name occurs twice but the key's, so that queries need no qualified names. Numbers have two
digits and words are few, for the sake of very small models. Numbers are different within a table, so no ORDER BY has
ties.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["label", "word", "number"]


@dataclass(frozen=True)
class Column:
    """Attributes:
    name: its name in the database.
    kind: ``label``: text, different in every row; ``word``: text from a few; ``number``: an integer, different in
        every row.
    phrases: what questions call it; its name may be any of them.
    values: what its cells are drawn from.
    """

    name: str
    kind: Kind
    phrases: tuple[str, ...]
    values: tuple[str, ...] | range


@dataclass(frozen=True)
class Table:
    """Attributes:
    name: its name in the database.
    noun: what questions call its rows, plural.
    columns: all but the key; the first is the label.
    """

    name: str
    noun: str
    columns: tuple[Column, ...]

    def of_kind(self, *kinds: Kind) -> list[Column]:
        return [column for column in self.columns if column.kind in kinds]


@dataclass(frozen=True)
class Schema:
    """Attributes:
    name: names the database files.
    child: the table with the foreign key, its last column.
    parent: the table that the key is of, its first column.
    key: the key's name, the same in both.
    """

    name: str
    child: Table
    parent: Table
    key: str

    def text(self) -> str:
        """The schema as a prompt shows it: ``staff(name, job, team_id) team(team_id, unit)``."""
        child = [*(column.name for column in self.child.columns), self.key]
        parent = [self.key, *(column.name for column in self.parent.columns)]
        return f"{self.child.name}({', '.join(child)}) {self.parent.name}({', '.join(parent)})"

    def identity(self, query: str) -> str:
        """What a query asks for, the same whatever names the columns have; names the rows that it is about."""
        plain = {column.name: column.phrases[0] for table in (self.child, self.parent) for column in table.columns}
        asked = re.sub(r"\w+", lambda word: plain.get(word[0], word[0]), query)
        return f"{self.child.noun}|{asked}"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _label(name: str, phrase: str, values: tuple[str, ...]) -> Column:
    return Column(name, "label", (phrase,), values)


def _word(name: str, phrases: str, values: str) -> Column:
    return Column(name, "word", _words(phrases), _words(values))


def _number(name: str, phrases: str, first: int, last: int) -> Column:
    return Column(name, "number", _words(phrases), range(first, last + 1))


PEOPLE = _words(
    "Ada Alan Alice Amir Anna Ben Carla Chen Clara Daniel David Elena Emma Eric Fatima Felix Grace Hana Henry Igor "
    "Ines Ivan Jana Jonas Julia Karim Laura Leo Lina Lucas Maria Marta Max Mia Nadia Noah Olga Omar Paul Rosa"
)
ITEMS = tuple(f"{thing} {size}" for thing in _words("chair desk lamp tent") for size in range(1, 11))
COUNTRIES = "Brazil Canada France India Japan Kenya Peru Spain"

_SUBJECTS: tuple[Schema, ...] = (
    Schema(
        "company",
        Table(
            "staff",
            "employees",
            (
                _label("name", "name", PEOPLE),
                _word("job", "job role", "baker driver editor lawyer nurse painter teacher writer"),
                _number("age", "age", 20, 69),
                _number("pay", "pay salary", 20, 99),
            ),
        ),
        Table(
            "team",
            "teams",
            (
                _label("unit", "unit", _words("Audit Design Export Legal Press Repair Sales Supply Travel Web")),
                _number("floor", "floor level", 10, 40),
                _number("budget", "budget funds", 10, 99),
            ),
        ),
        "team_id",
    ),
    Schema(
        "shop",
        Table(
            "product",
            "products",
            (
                _label("item", "item", ITEMS),
                _word("color", "color shade", "black blue brown green red silver white yellow"),
                _number("price", "price cost", 10, 99),
                _number("stock", "stock supply", 10, 99),
            ),
        ),
        Table(
            "maker",
            "makers",
            (
                _label("brand", "brand", _words("Acme Alpine Amber Atlas Cedar Cobalt Delta Echo Harbor Maple")),
                _word("country", "country origin", COUNTRIES),
                _number("workers", "workers staff", 10, 99),
            ),
        ),
        "maker_id",
    ),
    Schema(
        "library",
        Table(
            "book",
            "books",
            (
                _label("title", "title", tuple(f"Life of {name}" for name in PEOPLE)),
                _word("genre", "genre kind", "comedy crime drama fantasy history horror poetry romance"),
                _number("pages", "pages length", 10, 99),
                _number("copies", "copies stock", 10, 99),
            ),
        ),
        Table(
            "author",
            "authors",
            (
                _label("writer", "writer", _words("Abbott Becker Costa Diaz Fischer Garcia Jensen Kaya Novak Sato")),
                _word("language", "language", "Arabic Dutch English French German Greek Hindi Polish"),
                _number("prizes", "prizes awards", 10, 60),
            ),
        ),
        "author_id",
    ),
    Schema(
        "league",
        Table(
            "player",
            "players",
            (
                _label("player_name", "name", PEOPLE),
                _word("role", "role position", "back centre forward guard keeper libero striker winger"),
                _number("goals", "goals", 10, 70),
                _number("weight", "weight mass", 50, 99),
            ),
        ),
        Table(
            "club",
            "clubs",
            (
                _label(
                    "club_name", "club", _words("Arrows Bears Comets Eagles Hawks Kings Lions Rovers Sharks Tigers")
                ),
                _word("city", "city", "Berlin Boston Cairo Lima London Madrid Oslo Tokyo"),
                _number("trophies", "trophies titles", 10, 50),
            ),
        ),
        "club_id",
    ),
    Schema(
        "travel",
        Table(
            "flight",
            "flights",
            (
                _label("code", "code", tuple(f"{letter}{number}" for letter in "ABCD" for number in range(10, 20))),
                _word("destination", "destination target", "Athens Dublin Geneva Lisbon Milan Paris Rome Vienna"),
                _number("seats", "seats places", 10, 99),
                _number("fare", "fare price", 20, 99),
            ),
        ),
        Table(
            "airline",
            "airlines",
            (
                _label("carrier", "carrier", _words("Aero Breeze Cirrus Dart Express Falcon Gull Jet Orbit Swift")),
                _number("planes", "planes fleet", 10, 80),
                _number("routes", "routes lines", 10, 99),
            ),
        ),
        "airline_id",
    ),
    Schema(
        "school",
        Table(
            "pupil",
            "pupils",
            (
                _label("pupil_name", "name", PEOPLE),
                _word("hobby", "hobby pastime", "chess dance football music photo reading sailing tennis"),
                _number("score", "score points", 20, 99),
                _number("absences", "absences misses", 10, 60),
            ),
        ),
        Table(
            "course",
            "courses",
            (
                _label(
                    "subject", "subject", _words("Art Biology Drama English French History Latin Maths Music Sport")
                ),
                _number("room", "room hall", 10, 60),
                _number("hours", "hours time", 10, 90),
            ),
        ),
        "course_id",
    ),
)


def _renamed(schema: Schema) -> Schema:
    """The same with other names for the columns that have two."""

    def rename(table: Table) -> Table:
        columns = tuple(replace(column, name=column.phrases[-1]) if len(column.phrases) > 1 else column
                        for column in table.columns)  # fmt: skip
        return replace(table, columns=columns)

    return replace(schema, name=f"{schema.name}_2", child=rename(schema.child), parent=rename(schema.parent))


SCHEMAS: tuple[Schema, ...] = tuple(made for schema in _SUBJECTS for made in (schema, _renamed(schema)))
"""Every subject twice, with other column names: which one to write, the schema in the prompt says."""
