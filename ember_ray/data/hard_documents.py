"""Hard documents: nested objects and arrays, thousands separators, totals and dates beside those asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ember_ray.data.document import Document
from ember_ray.data.schemas import DATE, INTEGER, NUMBER, STRING, array_schema, object_schema, root_schema
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

TIME = {"type": "string", "pattern": "^[0-9]{2}:[0-9]{2}$"}

INVOICE = object_schema(
    {
        "invoice_number": STRING,
        "vendor": object_schema({"name": STRING, "city": STRING}),
        "issued": DATE,
        "due": DATE,
        "lines": array_schema(object_schema({"item": STRING, "quantity": INTEGER, "unit_price": NUMBER})),
        "discount": NUMBER,
    },
    optional=("discount",),
)
ORDER = object_schema(
    {
        "order_id": STRING,
        "customer": object_schema({"name": STRING, "city": STRING, "phone": STRING}, optional=("phone",)),
        "ordered": DATE,
        "items": array_schema(object_schema({"name": STRING, "quantity": INTEGER})),
        "gift": {"type": "boolean"},
    }
)
EVENT = object_schema(
    {
        "title": STRING,
        "place": object_schema({"city": STRING, "room": STRING}, optional=("room",)),
        "date": DATE,
        "sessions": array_schema(object_schema({"start": TIME, "title": STRING, "speaker": STRING})),
    }
)
PERSON = object_schema(
    {
        "name": STRING,
        "birth_date": DATE,
        "contact": object_schema({"email": STRING, "phone": STRING}, optional=("phone",)),
        "jobs": array_schema(object_schema({"job": STRING, "employer": STRING, "since": DATE})),
    }
)


def draw_different(rng: random.Random, draw: Callable[[random.Random], str], count: int) -> list[str]:
    """``count`` different values of one kind."""
    values: list[str] = []
    while len(values) < count:
        value = draw(rng)
        if value not in values:
            values.append(value)
    return values


def _draw_phone(rng: random.Random) -> str:
    return f"{rng.randrange(100, 1000)}-{rng.randrange(1000, 10000)}"


def _invoice(rng: random.Random, form: str, template: str) -> tuple[str, str, dict]:
    number, vendor, city = f"INV-{rng.randrange(10000, 100000)}", draw_company(rng), rng.choice(CITIES)
    issued = draw_date(rng)
    due = issued + timedelta(days=rng.choice((10, 14, 30, 45)))
    lines: list[dict[str, Any]] = [
        {"item": item, "quantity": rng.randrange(1, 40), "unit_price": draw_amount(rng, 5, 2500)}
        for item in draw_different(rng, draw_item, rng.randrange(2, 5))
    ]
    gold: dict = {
        "invoice_number": number,
        "vendor": {"name": vendor, "city": city},
        "issued": issued.isoformat(),
        "due": due.isoformat(),
        "lines": lines,
    }
    total = sum(line["quantity"] * line["unit_price"] for line in lines)
    if rng.random() < 0.5:
        gold["discount"] = rng.randrange(5, 60)
    discount = f"Discount: ${gold['discount']}\n" if "discount" in gold else ""
    sent, payable = write_date(issued, form), write_date(due, form)
    if template == "form":
        rows = "\n".join(
            f"{line['quantity']} x {line['item']} at ${write_amount(line['unit_price'], thousands=True)}"
            for line in lines
        )
        text = (
            f"{vendor}, {city}\nInvoice {number}\nIssued {sent}, payable until {payable}\n{rows}\n{discount}"
            f"Total before discount: ${total:,.2f}"
        )
    else:
        rows = "; ".join(
            f"{line['item']}, {line['quantity']} pieces, ${write_amount(line['unit_price'], thousands=True)} each"
            for line in lines
        )
        text = (
            f"With invoice {number} of {sent}, {vendor} in {city} bills you for: {rows}. "
            f"{discount.strip() + '. ' if discount else ''}Please pay by {payable}."
        )
    return number, text, gold


def _order(rng: random.Random, form: str, template: str) -> tuple[str, str, dict]:
    order_id = f"{rng.choice('ABCDEFGH')}{rng.randrange(10000, 100000)}"
    name, city = draw_person(rng), rng.choice(CITIES)
    customer = {"name": name, "city": city}
    if rng.random() < 0.6:
        customer["phone"] = _draw_phone(rng)
    ordered, shipped = draw_date(rng), rng.randrange(1, 9)
    items = [
        {"name": item, "quantity": rng.randrange(1, 30)} for item in draw_different(rng, draw_item, rng.randrange(2, 5))
    ]
    gift = rng.random() < 0.5
    gold = {"order_id": order_id, "customer": customer, "ordered": ordered.isoformat(), "items": items, "gift": gift}
    placed, sent = write_date(ordered, form), write_date(ordered + timedelta(days=shipped), form)
    if template == "form":
        rows = "\n".join(f"- {item['name']}: {item['quantity']}" for item in items)
        phone = f"\nPhone: {customer['phone']}" if "phone" in customer else ""
        text = (
            f"Order {order_id}\nPlaced: {placed}\nShipped: {sent}\nFor: {name}, {city}{phone}\n{rows}\n"
            f"Gift wrapping: {'yes' if gift else 'no'}"
        )
    else:
        rows = " and ".join(f"{item['quantity']} of {item['name']}" for item in items)
        phone = f" (call {customer['phone']})" if "phone" in customer else ""
        text = (
            f"On {placed} {name}{phone} from {city} ordered {rows} under {order_id}. It was shipped on {sent}"
            f"{', wrapped as a gift' if gift else ', in a plain box'}."
        )
    return order_id, text, gold


def _event(rng: random.Random, form: str, template: str) -> tuple[str, str, dict]:
    title, city, day = draw_title(rng), rng.choice(CITIES), draw_date(rng)
    place = {"city": city}
    if rng.random() < 0.6:
        place["room"] = f"{rng.choice('ABCD')}{rng.randrange(1, 60)}"
    starts = sorted(rng.sample(range(8, 20), rng.randrange(2, 5)))
    sessions = [
        {"start": f"{hour:02d}:{rng.choice(('00', '15', '30', '45'))}", "title": talk, "speaker": draw_person(rng)}
        for hour, talk in zip(starts, draw_different(rng, draw_title, len(starts)), strict=True)
    ]
    gold = {"title": title, "place": place, "date": day.isoformat(), "sessions": sessions}
    when, early = write_date(day, form), write_date(day - timedelta(days=rng.randrange(7, 40)), form)
    room = f", room {place['room']}" if "room" in place else ""
    if template == "form":
        rows = "\n".join(f"{session['start']} {session['title']} ({session['speaker']})" for session in sessions)
        text = f"{title}\n{when}, {city}{room}\nRegister before {early}\n{rows}"
    else:
        rows = ", then ".join(f"{s['speaker']} on {s['title']} at {s['start']}" for s in sessions)
        text = f"The {title} is on {when} in {city}{room}. Hear {rows}. Tickets are sold until {early}."
    return f"{title}|{city}", text, gold


def _person(rng: random.Random, form: str, template: str) -> tuple[str, str, dict]:
    name, born = draw_person(rng), draw_date(rng, 1960, 2000)
    contact = {"email": f"{name.lower().replace(' ', '.')}@{rng.choice(('post', 'mail', 'work'))}.example"}
    if rng.random() < 0.6:
        contact["phone"] = _draw_phone(rng)
    jobs: list[dict[str, Any]] = [
        {"job": rng.choice(JOBS), "employer": draw_company(rng), "since": draw_date(rng, 2005 + 5 * at, 2009 + 5 * at)}
        for at in range(rng.randrange(2, 4))
    ]
    written = [(job["job"], job["employer"], write_date(job["since"], form)) for job in jobs]
    gold = {
        "name": name,
        "birth_date": born.isoformat(),
        "contact": contact,
        "jobs": [{**job, "since": job["since"].isoformat()} for job in jobs],
    }
    phone = contact.get("phone")
    if template == "form":
        rows = "\n".join(f"{since}: {job}, {employer}" for job, employer, since in written)
        text = (
            f"{name}\nBorn {write_date(born, form)}\n{contact['email']}{f' / {phone}' if phone else ''}\nWork:\n{rows}"
        )
    else:
        rows = ", and ".join(f"as {job} for {employer} since {since}" for job, employer, since in written)
        text = (
            f"{name} (born {write_date(born, form)}) worked {rows}. Write to {contact['email']}"
            f"{f' or call {phone}' if phone else ''}."
        )
    return name, text, gold


_KINDS: dict[str, tuple[dict, Callable[[random.Random, str, str], tuple[str, str, dict]]]] = {
    "event": (EVENT, _event),
    "invoice": (INVOICE, _invoice),
    "order": (ORDER, _order),
    "person": (PERSON, _person),
}


def outline(schema: dict) -> str:
    """An object schema as people ask for it: ``{name, jobs: [{job, since}]}``."""
    if schema["type"] == "array":
        return f"[{outline(schema['items'])}]"
    if schema["type"] != "object":
        return ""
    parts = []
    for key, part in schema["properties"].items():
        inner = outline(part)
        parts.append(f"{key}: {inner}" if inner else key)
    return "{" + ", ".join(parts) + "}"


def hard_document(rng: random.Random) -> Document:
    """Draws one hard document of any kind."""
    kind = rng.choice(sorted(_KINDS))
    schema, build = _KINDS[kind]
    template = rng.choice(("form", "prose"))
    identity, text, gold = build(rng, rng.choice(DATE_FORMS), template)
    return Document(
        kind=kind,
        template=f"{kind}/hard-{template}",
        identity=f"{kind}|{identity}",
        instruction=(
            f"Extract {outline(schema)} as JSON. Write dates as YYYY-MM-DD, keep lists in the order of the text, and "
            "leave out what the text does not say."
        ),
        text=text,
        gold=gold,
        schema=root_schema(schema),
    )
