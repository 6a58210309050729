"""Reads sound JSON with the standard library's scanner, ten times as fast as `parse_json.py`, and nothing else.

What that scanner takes and strict JSON does not (NaN, duplicate keys, lone surrogates, numbers out of range), and what
is over a cap, is found out afterwards and left to the strict reader, which also says where a text stops being JSON.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from verifiers import limits

_SURROGATE = re.compile("[\ud800-\udfff]")
_LONG_NUMBER = re.compile(rf"[-+.0-9eE]{{{limits.MAX_NUMBER_CHARS + 1}}}")


class _Unsound(ValueError):
    """For the strict reader."""


def read_quickly(text: str, start: int, most_values: int) -> tuple[Any, int, int] | None:
    """The object or array that begins at `start`, the position after it, and how many values it has.

    None if it is no sound JSON within the caps, with more than `most_values` values, or neither object nor array.
    """
    if text[start : start + 1] not in ("{", "["):
        return None
    try:
        value, end = _SCANNER.raw_decode(text, start)
        if end - start > limits.MAX_JSON_CHARS or _LONG_NUMBER.search(text, start, end) is not None:
            return None
        return value, end, _count(value, most_values)
    except (ValueError, RecursionError):
        return None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Unsound
    return found


_SCANNER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _count(value: Any, most: int, depth: int = 1) -> int:
    """How many values there are in `value`, itself included. Raises _Unsound for what strict JSON does not have."""
    kind = type(value)
    if kind is str:
        if not value.isascii() and _SURROGATE.search(value) is not None:
            raise _Unsound
        return 1
    if kind is dict or kind is list:
        if depth > limits.MAX_DEPTH:
            raise _Unsound
        values = 1
        if kind is dict:
            for key, member in value.items():
                if len(key) > limits.MAX_KEY_CHARS or not (key.isascii() or _SURROGATE.search(key) is None):
                    raise _Unsound
                values += _count(member, most, depth + 1)
        else:
            for item in value:
                values += _count(item, most, depth + 1)
        if values > most:
            raise _Unsound
        return values
    if kind is float and not math.isfinite(value):
        raise _Unsound
    if kind is int and not -_GREATEST <= value <= _GREATEST:
        raise _Unsound
    return 1


# The greatest double, as an integer: one above it that still rounds to it is left to the strict reader.
_GREATEST = int(float.fromhex("0x1.fffffffffffffp+1023"))
