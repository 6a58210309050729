"""Finds the JSON in a model's output.

What counts as found, in this order:

1. The whole output, white space aside, is one JSON value of any kind: that value.
2. Otherwise the **last code fence** (a line of three backticks, with or without a language, up to the next such line
   or the end of the output) whose whole content is one JSON value of the expected kind.
3. Otherwise the **last object or array** that stands in the text outside any other, the last of the expected kind if
   there is one. Numbers, strings and words in prose are never taken for JSON.
4. Otherwise nothing, with the reason: where the last attempt breaks off, or that there was none.

The expected kind (object, array, scalar) is the gold answer's, so that a citation like ``[1]`` does not hide an
object. Last, because reasoning and drafts come before the answer; never the best of several, because then spraying
guesses would pay.

A value that breaks off (malformed, truncated, duplicate key, NaN) counts as a whole: nothing inside it is found, and
the search goes on after the bracket that would have closed it. A bracket with nothing JSON-like after it is prose.
Quotes are honoured, so brackets inside strings mean nothing. Every character is read a bounded number of times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from verifiers import limits
from verifiers.parse_json import Budget, MalformedJson, OverLimit, parse_json, skip_space

Kind = Literal["object", "array", "scalar"]

_FENCE_LINE = re.compile(r"^[ \t]*+```[^\n`]*+$", re.MULTILINE)
# An opening bracket followed by what could begin its content (in JSON or nearly), or by the end of the text.
_OPENER = re.compile(
    r"""\{(?=[ \t\n\r]*+(?:["'}]|[A-Za-z_][A-Za-z0-9_]*+[ \t]*+:|\Z))"""
    r"""|\[(?=[ \t\n\r]*+(?:["'{\[\]0-9tfnNI-]|\Z))"""
)
# The closing quote is optional: an unfinished string is swallowed whole instead of being tried again at every quote.
_BRACKET = re.compile(r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*"?|(?P<open>[{\[])|(?P<close>[}\]])')
_FENCE_OPEN = re.compile(r"```[A-Za-z0-9_+-]*")


@dataclass(frozen=True)
class Found:
    """A JSON value and where it stood.

    Attributes:
        value: the parsed value.
        start, end: it is ``text[start:end]``.
        clean: only white space, or one code fence, stands around it.
    """

    value: Any
    start: int
    end: int
    clean: bool


@dataclass(frozen=True)
class NotFound:
    """No JSON, and why: one sentence."""

    reason: str


def kind_of(value: object) -> Kind:
    """The JSON kind of a parsed value."""
    if isinstance(value, dict):
        return "object"
    return "array" if isinstance(value, list) else "scalar"


def find_json(text: str, expect: Kind | None = None) -> Found | NotFound:
    """Find the JSON in `text` by the rules of this module's docstring; `expect` None takes any kind.

    Never raises, whatever the text is; a text over a cap of `limits.py` is NotFound.
    """
    if len(text) > limits.MAX_TEXT_CHARS:
        return NotFound(f"output of {len(text)} characters, more than {limits.MAX_TEXT_CHARS}")
    try:
        whole = _document(text, Budget())
        if whole is not None:
            return Found(*whole, clean=True)
        return _in_fences(text, expect) or _in_text(text, expect)
    except OverLimit as over:
        return NotFound(str(over))


def _document(text: str, budget: Budget) -> tuple[Any, int, int] | None:
    """The one value that `text` consists of, with its start and end; None if it is not just one value."""
    start = skip_space(text, 0)
    try:
        value, end = parse_json(text, start, budget)
    except MalformedJson:
        return None
    return (value, start, end) if skip_space(text, end) == len(text) else None


def _in_fences(text: str, expect: Kind | None) -> Found | None:
    budget = Budget()
    starts, ends = [], []  # of the fence lines
    for line in _FENCE_LINE.finditer(text):
        budget.spend()
        starts.append(line.start())
        ends.append(line.end())
    starts.append(len(text))  # closes a fence that the output left open
    for index in range((len(ends) - 1) // 2 * 2, -1, -2):
        inside = _document(text[ends[index] : starts[index + 1]], budget)
        if inside is not None and expect in (None, kind_of(inside[0])):
            value, start, end = inside
            start, end = start + ends[index], end + ends[index]
            return Found(value, start, end, _is_clean(text, start, end))
    return None


def _in_text(text: str, expect: Kind | None) -> Found | NotFound:
    budget = Budget()
    best: Found | None = None
    reason = "no JSON in the output"
    opener = _OPENER.search(text)
    while opener is not None:
        position = opener.start()
        budget.spend()
        try:
            value, end = parse_json(text, position, budget)
            if best is None or expect is None or kind_of(value) == expect or kind_of(best.value) != expect:
                best = Found(value, position, end, False)
        except MalformedJson as broken:
            end = broken.position
            if broken.serious:
                reason = str(broken)
                end = _skip_broken(text, broken)
        opener = _OPENER.search(text, max(end, position + 1))
    if best is None:
        return NotFound(reason)
    return Found(best.value, best.start, best.end, _is_clean(text, best.start, best.end))


def _skip_broken(text: str, broken: MalformedJson) -> int:
    """Position after the bracket that would have closed a broken value, or the end of the text."""
    depth = broken.depth
    for token in _BRACKET.finditer(text, broken.position):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth -= 1
            if depth <= 0:
                return token.end()
    return len(text)


def _is_clean(text: str, start: int, end: int) -> bool:
    before, after = text[:start].strip(), text[end:].strip()
    if not before:
        return not after
    return _FENCE_OPEN.fullmatch(before) is not None and after in ("```", "")
