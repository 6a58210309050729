"""The values that documents are filled with: pools of names, dates and the ways to write them, amounts."""

from __future__ import annotations

import random
from datetime import date, timedelta

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

FIRST_NAMES = (
    "Ada Alan Alice Amir Anna Ben Carla Chen Clara Daniel David Elena Emma Eric Fatima Felix Grace Hana Henry "
    "Igor Ines Ivan Jana Jonas Julia Karim Laura Leo Lina Lucas Maria Marta Max Mia Nadia Noah Olga Omar Paul "
    "Rosa"
).split()
LAST_NAMES = (
    "Abbott Adler Baker Becker Bell Brown Carter Clark Costa Cruz Diaz Evans Fischer Fox Garcia Gray Green Haas "
    "Hill Ito Jensen Jones Kaya Keller King Kim Lang Lopez Mehta Moore Novak Okafor Park Reyes Rossi Sato Silva "
    "Stone Weber Young"
).split()
CITIES = (
    "Athens Berlin Bergen Boston Cairo Chicago Denver Dublin Geneva Ghent Hamburg Helsinki Kyoto Lagos Leeds Lima "
    "Lisbon London Lyon Madrid Milan Munich Nairobi Oslo Paris Porto Prague Quito Riga Rome Seoul Sydney Tokyo "
    "Toronto Turin Vienna Vilnius Warsaw York Zurich"
).split()
COMPANY_WORDS = (
    "Acme Alpine Amber Atlas Blue Cedar Cobalt Delta Echo Falcon Harbor Iron Lunar Maple Nordic Orion Pioneer "
    "Quartz River Silver Solar Summit Union Vertex"
).split()
COMPANY_KINDS = "Foods Labs Media Motors Office Paper Systems Tools".split()
ITEM_COLORS = "black blue brown green red silver white yellow".split()
ITEM_NAMES = (
    "backpack battery bottle cable camera chair clock desk drill helmet jacket keyboard kettle lamp mirror "
    "monitor mouse notebook printer ruler scanner speaker tent wallet"
).split()
EVENT_TOPICS = (
    "Art Book Chess City Climate Coffee Dance Data Design Energy Film Food Garden Health History Jazz Music Ocean "
    "Robot Space"
).split()
EVENT_KINDS = "Expo Fair Festival Forum Meeting Night Summit Workshop".split()
JOBS = (
    "actor architect baker chemist dentist designer driver editor engineer farmer judge lawyer manager nurse "
    "painter pilot plumber teacher tailor writer"
).split()

DATE_FORMS = ("day_month", "month_day", "short_month", "dotted", "iso")
"""How documents write a date; every form names one day only, whatever the reader's country."""


def write_date(day: date, form: str) -> str:
    """Writes a day in one of ``DATE_FORMS``; ``short_month`` abbreviates the month to three letters."""
    month = MONTHS[day.month - 1]
    if form == "day_month":
        return f"{day.day} {month} {day.year}"
    if form == "month_day":
        return f"{month} {day.day}, {day.year}"
    if form == "short_month":
        return f"{day.day} {month[:3]} {day.year}"
    if form == "dotted":
        return f"{day.day:02d}.{day.month:02d}.{day.year}"
    if form == "iso":
        return day.isoformat()
    raise ValueError(f"unknown date form '{form}' (known: {', '.join(DATE_FORMS)})")


def draw_date(rng: random.Random, first_year: int = 2020, last_year: int = 2026) -> date:
    """A day of the given years, both included."""
    start = date(first_year, 1, 1)
    return start + timedelta(days=rng.randrange((date(last_year, 12, 31) - start).days + 1))


def draw_person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def draw_company(rng: random.Random) -> str:
    return f"{rng.choice(COMPANY_WORDS)} {rng.choice(COMPANY_KINDS)}"


def draw_item(rng: random.Random) -> str:
    return f"{rng.choice(ITEM_COLORS)} {rng.choice(ITEM_NAMES)}"


def draw_title(rng: random.Random) -> str:
    return f"{rng.choice(EVENT_TOPICS)} {rng.choice(EVENT_KINDS)}"


def draw_amount(rng: random.Random, low: int = 10, high: int = 999) -> int | float:
    """An amount of money from ``low`` to ``high``; half of them have cents, never a trailing zero."""
    whole = rng.randrange(low, high)
    if rng.random() < 0.5:
        return whole
    return float(f"{whole}.{rng.choice(('25', '45', '49', '75', '95', '99'))}")


def write_amount(amount: int | float, thousands: bool = False) -> str:
    """The digits of an amount, ``1240.95`` or, with ``thousands``, ``1,240.95``."""
    return f"{amount:,}" if thousands else f"{amount}"
