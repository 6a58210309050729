"""A strict JSON reader that starts anywhere in a text, says where a value ends, and never recurses.

The standard library's reader takes NaN, keeps the last of duplicate keys silently and recurses as deep as the text
says. This one follows RFC 8259 and, where that leaves a choice, RFC 7493 (I-JSON): duplicate keys, lone surrogates
and numbers beyond the range of a double are errors. It reads every character once.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from verifiers import limits
from verifiers.parse_json_quick import read_quickly

_SPACE = r"[ \t\n\r]*+"
# Possessive quantifiers: a failed match gives nothing back, so each try is linear. The closing quote is optional, so
# that an unfinished string is one token and the reader knows how far it went.
# No group is possessive: before Python 3.11.5 one that fails half way keeps what it took (python/cpython#106052).
_TOKEN = re.compile(
    _SPACE
    + r"""(?:
        (?P<mark>[{}\[\],:])
      | (?P<string>"[^"\\\x00-\x1f]*+(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*+)*)(?P<close>"?)
      | (?P<number>-?(?:0|[1-9][0-9]*+)(?P<fraction>(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?)(?![0-9A-Za-z_.+-]))
      | (?P<word>(?:true|false|null)(?![0-9A-Za-z_]))
    )""",
    re.VERBOSE,
)
_WORDS = {"true": True, "false": False, "null": None}
_BLANK = re.compile(_SPACE)
_NOT_JSON = re.compile(r"-?(?:NaN|Infinity)\b")
# What other languages write where JSON has something else: an attempt at JSON, not prose.
_ALMOST_VALUE = re.compile(r"""['"]|-?(?:NaN|Infinity)\b""")
_ALMOST_KEY = re.compile(r"""['"]|[A-Za-z_][A-Za-z0-9_]*+[ \t]*+:""")
_SURROGATE = re.compile("[\ud800-\udfff]")


class MalformedJson(ValueError):
    """The text stops being JSON.

    Attributes:
        position: the character (from 0) where it does.
        depth: how many containers were open there.
        serious: it was an attempt at JSON, not a bracket in prose: a key or value had been read, or what follows is
            JSON of another language (single quotes, bare keys, NaN), or the text ended.
    """

    def __init__(self, message: str, position: int, depth: int, serious: bool) -> None:
        super().__init__(message)
        self.position = position
        self.depth = depth
        self.serious = serious


class OverLimit(ValueError):
    """A cap of `limits.py` was reached; the message names it."""


class Budget:
    """Counts the values read in one search of a text."""

    def __init__(self, values: int = limits.MAX_VALUES) -> None:
        self.left = values

    def spend(self) -> None:
        """Take one value off. Raises OverLimit when none is left."""
        self.left -= 1
        if self.left < 0:
            raise OverLimit(f"more than {limits.MAX_VALUES} JSON values in the output")


def skip_space(text: str, start: int) -> int:
    """Position of the first character at or after `start` that is not JSON white space."""
    match = _BLANK.match(text, start)
    return match.end() if match else start


def parse_json(text: str, start: int, budget: Budget) -> tuple[Any, int]:
    """Read the one JSON value that starts at `start` (white space before it is skipped).

    Returns the value and the position after its last character.
    Raises MalformedJson where the text is not JSON, and OverLimit at a cap.
    """
    quickly = read_quickly(text, start, budget.left)
    if quickly is not None:
        value, end, values = quickly
        budget.left -= values
        return value, end
    return _Reader(text, start, budget).read()


class _Reader:
    """One pass over the tokens with an explicit stack of the open containers."""

    def __init__(self, text: str, start: int, budget: Budget) -> None:
        self.text = text
        self.start = start
        self.position = start
        self.budget = budget
        self.stack: list[dict[str, Any] | list[Any]] = []
        self.keys: list[str] = []  # one pending key for every open object
        self.serious = False

    def read(self) -> tuple[Any, int]:
        may_close = False  # right after an opening bracket
        while True:
            container = self.stack[-1] if self.stack else None
            if isinstance(container, dict):
                if self._key(may_close):
                    value: Any = self._close()
                else:
                    value = self._value(False)
            else:
                value = self._value(may_close)
            may_close = value is _OPENED
            if may_close:
                continue
            # `value` is complete: put it in its container, then close every container that ends here.
            while True:
                self.serious = self.serious or bool(self.stack)
                if not self.stack:
                    return value, self.position
                self._put(value)
                if not self._ends():
                    break
                value = self._close()

    def _fail(self, message: str, position: int) -> MalformedJson:
        at_end = skip_space(self.text, position) >= len(self.text)
        almost = _ALMOST_KEY if self.stack and isinstance(self.stack[-1], dict) else _ALMOST_VALUE
        serious = self.serious or at_end or almost.match(self.text, position) is not None
        return MalformedJson(message, position, len(self.stack), serious)

    def _token(self, wanted: str) -> re.Match[str]:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            position = skip_space(self.text, self.position)
            found = self.text[position : position + 12]
            not_json = _NOT_JSON.match(self.text, position)
            if position >= len(self.text):
                raise self._fail("truncated: the output ends inside the JSON", position)
            if not_json is not None:
                raise self._fail(f"{not_json.group()} is not JSON, at character {position}", position)
            raise self._fail(f"malformed: expected {wanted} at character {position}, found {found!r}", position)
        if match.end() - self.start > limits.MAX_JSON_CHARS:
            raise OverLimit(f"a JSON value of more than {limits.MAX_JSON_CHARS} characters")
        return match

    def _unexpected(self, match: re.Match[str], wanted: str) -> MalformedJson:
        position = skip_space(self.text, match.start())
        return self._fail(
            f"malformed: expected {wanted} at character {position}, found {self.text[position : position + 12]!r}",
            position,
        )

    def _value(self, may_close: bool) -> Any:
        match = self._token("a value")
        mark = match["mark"]
        if mark is not None:
            if mark == "]" and may_close:
                self.position = match.end()
                return self._close()
            if mark not in "{[":
                raise self._unexpected(match, "a value")
            if len(self.stack) >= limits.MAX_DEPTH:
                raise OverLimit(f"JSON nested deeper than {limits.MAX_DEPTH} levels")
            self.budget.spend()
            self.position = match.end()
            if mark == "{":
                self.stack.append({})
                self.keys.append("")
            else:
                self.stack.append([])
            return _OPENED
        self.budget.spend()
        if match["string"] is not None:
            return self._string(match)
        if match["word"] is not None:
            self.position = match.end()
            return _WORDS[match["word"]]
        return self._number(match)

    def _key(self, may_close: bool) -> bool:
        """Read `"key":`, or, where allowed, the closing brace: then return True."""
        wanted = "a key or }" if may_close else "a key in double quotes"
        match = self._token(wanted)
        if match["mark"] == "}" and may_close:
            self.position = match.end()
            return True
        if match["string"] is None:
            raise self._unexpected(match, wanted)
        key_start = match.start("string")
        key = self._string(match)
        if len(key) > limits.MAX_KEY_CHARS:
            raise OverLimit(f"an object key of more than {limits.MAX_KEY_CHARS} characters")
        self.serious = True
        colon = self._token("a colon")
        if colon["mark"] != ":":
            raise self._unexpected(colon, "a colon")
        self.position = colon.end()
        container = self.stack[-1]
        if key in container:
            raise self._fail(f"duplicate key {key!r} at character {key_start}", self.position)
        self.keys[-1] = key
        return False

    def _put(self, value: Any) -> None:
        container = self.stack[-1]
        if isinstance(container, dict):
            container[self.keys[-1]] = value
        else:
            container.append(value)

    def _ends(self) -> bool:
        """After a value: True at the container's closing bracket, False at a comma."""
        close = "}" if isinstance(self.stack[-1], dict) else "]"
        match = self._token(f"a comma or {close}")
        if match["mark"] not in (",", close):
            raise self._unexpected(match, f"a comma or {close}")
        self.position = match.end()
        return match["mark"] == close

    def _close(self) -> dict[str, Any] | list[Any]:
        container = self.stack.pop()
        if isinstance(container, dict):
            self.keys.pop()
        return container

    def _string(self, match: re.Match[str]) -> str:
        if not match["close"]:
            stopped = match.end()
            last = len(self.text) - 1
            if stopped > last or (stopped == last and self.text[last] == "\\"):
                raise self._fail("truncated: the output ends inside a string", len(self.text))
            # The position is the string's start, so that whoever goes on from there sees the opening quote.
            raise self._fail(f"malformed: control character in a string at character {stopped}", match.start("string"))
        self.position = match.end()
        raw = match["string"][1:]
        if "\\" in raw:
            try:
                raw = json.loads(f'"{raw}"')
            except ValueError:
                start = match.start("string")
                raise self._fail(f"malformed: bad escape in the string at character {start}", start) from None
        if not raw.isascii() and _SURROGATE.search(raw):
            start = match.start("string")
            raise self._fail(f"malformed: lone surrogate in the string at character {start}", start)
        return raw

    def _number(self, match: re.Match[str]) -> int | float:
        literal = match["number"]
        self.position = match.end()
        if len(literal) <= limits.MAX_NUMBER_CHARS:
            number = float(literal)
            if math.isfinite(number):
                return number if match["fraction"] else int(literal)
        self.serious = True
        raise self._fail(f"malformed: number out of range at character {match.start('number')}", self.position)


_OPENED = object()  # what `_value` returns for an opening bracket
