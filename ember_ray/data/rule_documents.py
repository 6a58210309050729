"""Documents with a rule: of a list keep some rows, sort them by a key with a tie-break, answer with the first few."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

from ember_ray.data.document import Document
from ember_ray.data.hard_documents import draw_different
from ember_ray.data.schemas import DATE, INTEGER, NUMBER, STRING, array_schema, object_schema, root_schema
from ember_ray.data.values import (
    CITIES,
    DATE_FORMS,
    JOBS,
    draw_company,
    draw_date,
    draw_item,
    draw_person,
    draw_title,
    write_amount,
    write_date,
)


@dataclass(frozen=True)
class RuleKind:
    """Attributes:
    properties: the fields of a row; the first one names it, differs from row to row and breaks ties.
    draw_name, draw_row: make the first field and the others, dates in ISO form.
    draw_head: makes the identity and the first line of the text.
    line: a row as the document writes it; dates come written already.
    filter_field, limits: rows with a lower value than the limit, one of these, are left out.
    sort_fields: what rows may be sorted by; few different values, so that ties do occur.
    """

    properties: dict[str, dict]
    draw_name: Callable[[random.Random], str]
    draw_row: Callable[[random.Random], dict]
    draw_head: Callable[[random.Random], tuple[str, str]]
    line: str
    filter_field: str
    limits: tuple[int, ...]
    sort_fields: tuple[str, ...]


def _invoice_head(rng: random.Random) -> tuple[str, str]:
    number = f"INV-{rng.randrange(10000, 100000)}"
    return number, f"Invoice {number} of {draw_company(rng)}"


def _order_head(rng: random.Random) -> tuple[str, str]:
    order = f"{rng.choice('ABCDEFGH')}{rng.randrange(10000, 100000)}"
    return order, f"Order {order} for {draw_person(rng)}"


def _event_head(rng: random.Random) -> tuple[str, str]:
    title, city = draw_title(rng), rng.choice(CITIES)
    return f"{title}|{city}", f"Programme of the {title} in {city}"


def _person_head(rng: random.Random) -> tuple[str, str]:
    name = draw_person(rng)
    return name, f"The team of {name}"


def _draw_close_date(rng: random.Random) -> str:
    """One of a few days, in ISO form."""
    return date(2026, rng.randrange(1, 4), rng.choice((1, 15))).isoformat()


KINDS: dict[str, RuleKind] = {
    "invoice": RuleKind(
        {"item": STRING, "quantity": INTEGER, "unit_price": NUMBER},
        draw_item,
        lambda rng: {"quantity": rng.randrange(1, 9), "unit_price": rng.choice((5, 12.5, 40, 99.95))},
        _invoice_head,
        "{item}, {quantity} pieces, ${unit_price} each",
        "quantity",
        (2, 3, 4, 5),
        ("unit_price", "quantity"),
    ),
    "order": RuleKind(
        {"name": STRING, "quantity": INTEGER, "ship_date": DATE},
        draw_item,
        lambda rng: {"quantity": rng.randrange(1, 9), "ship_date": _draw_close_date(rng)},
        _order_head,
        "{quantity} x {name}, ships {ship_date}",
        "quantity",
        (2, 3, 4, 5),
        ("ship_date", "quantity"),
    ),
    "event": RuleKind(
        {"title": STRING, "seats": INTEGER, "price": NUMBER},
        draw_title,
        lambda rng: {"seats": 20 * rng.randrange(1, 9), "price": rng.choice((4, 9.5, 15, 20))},
        _event_head,
        "{title}: {seats} seats, ${price}",
        "seats",
        (40, 60, 80, 100),
        ("price", "seats"),
    ),
    "person": RuleKind(
        {"name": STRING, "job": STRING, "since": DATE, "level": INTEGER},
        draw_person,
        lambda rng: {
            "job": rng.choice(JOBS),
            "since": draw_date(rng, 2015, 2025).isoformat(),
            "level": rng.randrange(1, 6),
        },
        _person_head,
        "{name}, {job}, level {level}, since {since}",
        "level",
        (2, 3),
        ("level", "since"),
    ),
}


def apply_rule(
    rows: list[dict], filter_field: str, limit: int, sort_field: str, descending: bool, name_field: str, most: int
) -> list[dict]:
    """The rows with at least ``limit``, sorted, those that tie by name from A to Z, at most ``most`` of them."""
    kept = sorted((row for row in rows if row[filter_field] >= limit), key=lambda row: row[name_field])
    return sorted(kept, key=lambda row: row[sort_field], reverse=descending)[:most]  # stable, reversed or not


def rule_document(rng: random.Random) -> Document:
    """Draws one document with a rule, of any kind; the answer has at least one row."""
    name = rng.choice(sorted(KINDS))
    kind = KINDS[name]
    name_field, *_ = kind.properties
    identity, head = kind.draw_head(rng)
    form, template = rng.choice(DATE_FORMS), rng.choice(("list", "sentence"))
    limit, sort_field, descending = rng.choice(kind.limits), rng.choice(kind.sort_fields), rng.random() < 0.5
    most = rng.randrange(2, 5)
    answer: list[dict] = []
    while not answer:
        values = [
            {name_field: value, **kind.draw_row(rng)}
            for value in draw_different(rng, kind.draw_name, rng.randrange(4, 8))
        ]
        rows = [{field: row[field] for field in kind.properties} for row in values]
        answer = apply_rule(rows, kind.filter_field, limit, sort_field, descending, name_field, most)

    lines = [kind.line.format(**{field: _write(field, row[field], kind, form) for field in row}) for row in rows]
    if template == "list":
        text = "\n".join([head, *(f"- {line}" for line in lines)])
    else:
        text = f"{head}: {'; '.join(lines)}."
    direction = "latest or highest" if descending else "earliest or lowest"
    return Document(
        kind=name,
        template=f"{name}/rule-{template}",
        identity=f"{name}|{identity}",
        instruction=(
            f"List the rows whose {kind.filter_field} is at least {limit}, sorted by {sort_field}, {direction} first; "
            f"of rows that tie, {name_field} from A to Z. Give at most {most} of them as a JSON array of objects with "
            f"{', '.join(kind.properties)}. Write dates as YYYY-MM-DD."
        ),
        text=text,
        gold=answer,
        schema=root_schema(array_schema(object_schema(kind.properties))),
    )


def _write(field: str, value: object, kind: RuleKind, form: str) -> str:
    if kind.properties[field] is DATE:
        return write_date(date.fromisoformat(str(value)), form)
    return write_amount(value) if isinstance(value, int | float) else str(value)
