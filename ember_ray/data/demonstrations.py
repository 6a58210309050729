"""Answers of mixed quality, as people write them: most right, a known share wrong in ways a verifier can name."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from datetime import date

from ember_ray.data.example import Example
from ember_ray.data.values import DATE_FORMS, write_date

OTHER_KEYS = {
    "invoice_number": "invoice_id",
    "vendor": "vendor_name",
    "date": "day",
    "total": "amount",
    "purchase_order": "order",
    "order_id": "order_number",
    "customer": "customer_name",
    "item": "product",
    "quantity": "pieces",
    "ship_date": "shipping",
    "title": "event",
    "city": "place",
    "price": "ticket",
    "seats": "places",
    "name": "person",
    "birth_date": "born",
    "job": "work",
    "employer": "company",
}
"""Spellings that people use in place of the key asked for; other keys turn into camelCase or get a capital letter."""

INTRODUCTIONS = ("Here is the JSON: ", "Sure! ", "The answer is ")
FAREWELLS = (" Done.", " I hope this helps.")
EXTRA_FIELDS = (("note", "none"), ("currency", "USD"), ("status", "open"))

_ISO_DAY = re.compile(r"\d{4}-\d{2}-\d{2}\Z")


@dataclass(frozen=True)
class DemonstrationMix:
    """Probability, for each fault, that an answer has it; drawn one by one, so an answer may have several.

    A fault that an answer gives no room for (no date, no number) leaves it as it is.

    Attributes:
        raw_date: one date is left as the document writes it.
        wrong_key: one key is spelled otherwise.
        dropped_field: one field is missing.
        text_number: one number is written as a string with a unit.
        extra_field: a field that nobody asked for is added.
        broken_json: the closing bracket is missing or quotes are single.
        chatter: a sentence before or after the JSON.
    """

    raw_date: float = 0.0
    wrong_key: float = 0.0
    dropped_field: float = 0.0
    text_number: float = 0.0
    extra_field: float = 0.0
    broken_json: float = 0.0
    chatter: float = 0.0

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"demonstration mix: {part.name} must be between 0 and 1, not {value}")

    def clean_share(self) -> float:
        """The least share of answers without any fault."""
        share = 1.0
        for part in fields(self):
            share *= 1.0 - getattr(self, part.name)
        return share


CLEAN = DemonstrationMix()


def _objects(value: object) -> list[dict]:
    """All objects of a JSON value that have fields, outermost first."""
    found: list[dict] = []
    if isinstance(value, dict):
        found += [value] if value else []
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            found += _objects(part)
    return found


def _places(answer: object, fits: Callable[[object], bool]) -> list[tuple[dict, str]]:
    return [(owner, key) for owner in _objects(answer) for key, value in owner.items() if fits(value)]


def _is_day(value: object) -> bool:
    return isinstance(value, str) and _ISO_DAY.match(value) is not None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_written(day: str, document: str) -> str:
    """The day in the form that the document uses; unchanged where the document has it in ISO form or not at all."""
    forms = (write_date(date.fromisoformat(day), form) for form in DATE_FORMS)
    return next((form for form in forms if form in document), day)


def _respell(key: str) -> str:
    if key in OTHER_KEYS:
        return OTHER_KEYS[key]
    head, *rest = key.split("_")
    return head + "".join(part.capitalize() for part in rest) if rest else key.capitalize()


def _rename(owner: dict, old: str, new: str) -> None:
    """Renames a key in place and keeps the order."""
    items = [(new if key == old else key, value) for key, value in owner.items()]
    owner.clear()
    owner.update(items)


def demonstrate(example: Example, rng: random.Random, mix: DemonstrationMix = CLEAN) -> str:
    """Writes one answer to an example: the gold answer as JSON, with faults at the rates of ``mix``."""
    happens = {part.name: rng.random() < getattr(mix, part.name) for part in fields(mix)}
    answer = copy.deepcopy(example.gold)
    document = example.messages[-1]["content"]

    if happens["raw_date"] and (places := _places(answer, _is_day)):
        owner, key = rng.choice(places)
        owner[key] = _as_written(owner[key], document)
    if happens["text_number"] and (places := _places(answer, _is_number)):
        owner, key = rng.choice(places)
        is_money = f"${owner[key]}" in document
        owner[key] = f"${owner[key]}" if is_money else f"{owner[key]} pieces"
    if happens["dropped_field"] and (places := _places(answer, lambda value: True)):
        owner, key = rng.choice(places)
        del owner[key]
    if happens["wrong_key"] and (places := _places(answer, lambda value: True)):
        owner, key = rng.choice(places)
        _rename(owner, key, _respell(key))
    if happens["extra_field"] and (owners := _objects(answer)):
        key, value = rng.choice(EXTRA_FIELDS)
        owners[0].setdefault(key, value)

    text = json.dumps(answer, ensure_ascii=False)
    if happens["broken_json"]:
        text = text[:-1] if rng.random() < 0.5 else text.replace('"', "'")
    if happens["chatter"]:
        text = rng.choice(INTRODUCTIONS) + text if rng.random() < 0.5 else text + rng.choice(FAREWELLS)
    return text


def with_demonstrations(examples: Iterable[Example], mix: DemonstrationMix = CLEAN, seed: int = 0) -> list[Example]:
    """The examples with an answer in ``completion``; rows that have one keep it.

    What a row gets depends on its id, ``mix`` and ``seed`` only, not on its place or on the other rows.

    Raises:
        ValueError: a row has neither a completion nor a gold value to write one of.
    """
    filled = []
    for example in examples:
        if example.completion is None:
            if example.gold is None:
                raise ValueError(f"row '{example.id}' has neither 'completion' nor 'gold' to write one of")
            rng = random.Random(f"{seed}/{example.id}")
            example = replace(example, completion=demonstrate(example, rng, mix))
        filled.append(example)
    return filled
