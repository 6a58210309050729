"""Easy documents: a few lines of text, a flat object of four or five fields.

In a template ``{field}`` is a value as the document writes it, ``[...]`` a part that is there only when the optional
field in it is, and ``{noise}`` a remark beside the point that now and then names a second date or number.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

from ember_ray.data.document import Document
from ember_ray.data.schemas import DATE, INTEGER, NUMBER, STRING, object_schema, root_schema
from ember_ray.data.values import (
    CITIES,
    DATE_FORMS,
    JOBS,
    draw_amount,
    draw_company,
    draw_date,
    draw_item,
    draw_person,
    draw_title,
    write_amount,
    write_date,
)

OPTIONAL_SHARE = 0.6
NOISE_SHARE = 0.4


@dataclass(frozen=True)
class EasyKind:
    """Attributes:
    properties: field name to its schema, in the order of the answer.
    optional: the one field that a document may leave out.
    identity: the fields that name the subject.
    draw: makes the values, dates as ``datetime.date``.
    templates, noise: texts by name; what the module's docstring says.
    """

    properties: dict[str, dict]
    optional: str
    identity: tuple[str, ...]
    draw: Callable[[random.Random], dict[str, object]]
    templates: dict[str, str]
    noise: tuple[str, ...]


def _draw_invoice(rng: random.Random) -> dict[str, object]:
    return {
        "invoice_number": f"{rng.choice(('INV', 'BILL', 'R'))}-{rng.randrange(1000, 10000)}",
        "vendor": draw_company(rng),
        "date": draw_date(rng),
        "total": draw_amount(rng),
        "purchase_order": f"PO-{rng.randrange(10, 100)}",
    }


def _draw_order(rng: random.Random) -> dict[str, object]:
    return {
        "order_id": f"{rng.choice('ABCDEFGH')}{rng.randrange(1000, 10000)}",
        "customer": draw_person(rng),
        "item": draw_item(rng),
        "quantity": rng.randrange(2, 60),
        "ship_date": draw_date(rng),
    }


def _draw_event(rng: random.Random) -> dict[str, object]:
    return {
        "title": draw_title(rng),
        "city": rng.choice(CITIES),
        "date": draw_date(rng),
        "price": draw_amount(rng, 5, 99),
        "seats": rng.randrange(20, 1000),
    }


def _draw_person(rng: random.Random) -> dict[str, object]:
    return {
        "name": draw_person(rng),
        "birth_date": draw_date(rng, 1960, 2005),
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
        "employer": draw_company(rng),
    }


KINDS: dict[str, EasyKind] = {
    "invoice": EasyKind(
        {"invoice_number": STRING, "vendor": STRING, "date": DATE, "total": NUMBER, "purchase_order": STRING},
        "purchase_order",
        ("invoice_number",),
        _draw_invoice,
        {
            "form": "Invoice {invoice_number}\nFrom: {vendor}\nDate: {date}\n[Your order: {purchase_order}\n]"
            "Total: ${total}{noise}",
            "letter": "{vendor} sent invoice {invoice_number} on {date}[ for order {purchase_order}]. "
            "Amount due: ${total}.{noise}",
            "ledger": "{date}: {vendor}, invoice {invoice_number}, ${total}[, order {purchase_order}].{noise}",
            "reminder": "Please pay ${total} to {vendor}.{noise} Invoice {invoice_number} is dated {date}"
            "[, order {purchase_order}].",
        },
        (" Printed {date}.", " Shipping is ${amount} extra.", " Call desk {small} for help.", " Thank you."),
    ),
    "order": EasyKind(
        {"order_id": STRING, "customer": STRING, "item": STRING, "quantity": INTEGER, "ship_date": DATE},
        "ship_date",
        ("order_id",),
        _draw_order,
        {
            "form": "Order {order_id}\nCustomer: {customer}\nItem: {item}\nQuantity: {quantity}[\nShips: {ship_date}]"
            "{noise}",
            "letter": "{customer} ordered {quantity} of {item} (order {order_id}).[ Shipping on {ship_date}.]{noise}",
            "warehouse": "Pack {quantity} x {item} for order {order_id}.{noise} Customer is {customer}."
            "[ Send by {ship_date}.]",
            "mail": "Dear {customer}, we got your order {order_id}: {item}, {quantity} pieces."
            "[ It leaves on {ship_date}.]{noise}",
        },
        (" Placed {date}.", " Price ${amount} each.", " Shelf {small}.", " Handle with care."),
    ),
    "event": EasyKind(
        {"title": STRING, "city": STRING, "date": DATE, "price": NUMBER, "seats": INTEGER},
        "seats",
        ("title", "city"),
        _draw_event,
        {
            "form": "Event: {title}\nWhere: {city}\nWhen: {date}\nTicket: ${price}[\nSeats: {seats}]{noise}",
            "news": "The {title} comes to {city} on {date}. A ticket costs ${price}.[ There are {seats} seats.]{noise}",
            "poster": "{city}, {date}: {title}![ {seats} seats,] ${price}.{noise}",
            "mail": "Join us for the {title} on {date} in {city}.{noise} Entry is ${price}"
            "[ and we have {seats} seats].",
        },
        (" Book before {date}.", " Parking ${amount}.", " Use gate {small}.", " All are welcome."),
    ),
    "person": EasyKind(
        {"name": STRING, "birth_date": DATE, "city": STRING, "job": STRING, "employer": STRING},
        "employer",
        ("name",),
        _draw_person,
        {
            "form": "Name: {name}\nBorn: {birth_date}\nCity: {city}\nJob: {job}[\nEmployer: {employer}]{noise}",
            "bio": "{name}, born on {birth_date}, lives in {city} and works as {job}[ for {employer}].{noise}",
            "register": "{name} ({city}), {job}[ at {employer}], date of birth {birth_date}.{noise}",
            "news": "The {job} {name} from {city} was born on {birth_date}.{noise}[ The employer is {employer}.]",
        },
        (" Joined {date}.", " Earned ${amount}.", " Lives at number {small}.", " Speaks French."),
    ),
}


def _write(value: object, form: str) -> str:
    if isinstance(value, date):
        return write_date(value, form)
    return write_amount(value) if isinstance(value, int | float) else str(value)


def _noise(kind: EasyKind, rng: random.Random, form: str) -> str:
    if rng.random() >= NOISE_SHARE:
        return ""
    return rng.choice(kind.noise).format(
        date=write_date(draw_date(rng), form), amount=write_amount(draw_amount(rng)), small=rng.randrange(2, 60)
    )


def easy_document(rng: random.Random) -> Document:
    """Draws one easy document of any kind."""
    name = rng.choice(sorted(KINDS))
    kind = KINDS[name]
    values = kind.draw(rng)
    identity = "|".join(str(values[field]) for field in kind.identity)
    if rng.random() >= OPTIONAL_SHARE:
        del values[kind.optional]
    template = rng.choice(sorted(kind.templates))
    form = rng.choice(DATE_FORMS)
    optional_part = r"\1" if kind.optional in values else ""
    text = re.sub(r"\[([^\]]*)\]", optional_part, kind.templates[template])
    text = text.format(noise=_noise(kind, rng, form), **{field: _write(value, form) for field, value in values.items()})
    gold = {field: value.isoformat() if isinstance(value, date) else value for field, value in values.items()}
    return Document(
        kind=name,
        template=f"{name}/{template}",
        identity=f"{name}|{identity}",
        instruction=f"Extract {', '.join(kind.properties)} as JSON.",
        text=text,
        gold=gold,
        schema=root_schema(object_schema(kind.properties, optional=(kind.optional,))),
    )
