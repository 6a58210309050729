"""A JSON Schema's regular expressions in bounded time.

A pattern may backtrack exponentially, and a schema may come from someone else. Patterns are searched by the `regex`
package, whose search gives up after a time that it reads from the clock of the CPU, so a busy machine changes nothing;
an ordinary pattern takes microseconds of the milliseconds there are. The dialect is that of Python's `re` (a schema's
patterns must compile there, as jsonschema asks), and all patterns are compiled when the schema is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import lru_cache
from threading import local
from typing import Any

import regex

from verifiers import limits

_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<open>\()|(?P<close>\))|\{(?P<least>[0-9]+)(?:,[0-9]*)?\}|.", re.S
)

_spent = local()


class PatternTooSlow(Exception):
    """The patterns of one validation used up `limits.MAX_PATTERN_SECONDS`."""


def start_clock() -> None:
    """Begin a validation: its searches share `limits.MAX_PATTERN_SECONDS` of CPU time."""
    _spent.left = limits.MAX_PATTERN_SECONDS


def found(pattern: str, text: str) -> bool:
    """Whether `pattern` matches anywhere in `text`. Raises PatternTooSlow when the time that there is is used up."""
    began = time.process_time()
    try:
        match = _compiled(pattern).search(text, timeout=max(_spent.left, 1e-6))
    except (TimeoutError, MemoryError):
        _spent.left = 0.0
        raise PatternTooSlow from None
    finally:
        _spent.left -= time.process_time() - began
    return match is not None


def check_pattern(pattern: str) -> None:
    """Raises ValueError if `pattern` cannot be compiled in bounded time; what `re` refuses is passed over."""
    shown = pattern if len(pattern) <= 80 else pattern[:79] + "…"
    if len(pattern) > limits.MAX_PATTERN_SOURCE_CHARS:
        raise ValueError(f"a pattern of {len(pattern)} characters, more than {limits.MAX_PATTERN_SOURCE_CHARS}")
    if _expanded_size(pattern) > limits.MAX_PATTERN_SIZE:
        raise ValueError(f"the repetitions of the pattern {shown!r} add up to more than {limits.MAX_PATTERN_SIZE}")
    try:
        re.compile(pattern)
    except re.error:
        return  # no pattern, or jsonschema says where in the schema it stands
    except (RecursionError, OverflowError, MemoryError) as fault:
        raise ValueError(f"the pattern {shown!r} cannot be compiled: {fault}") from None
    try:
        _compiled(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as fault:
        raise ValueError(f"the pattern {shown!r} cannot be compiled: {fault}") from None


def patterns_of(schema: Any) -> Iterator[str]:
    """Every text in `schema` that may be used as a pattern; a few that are not may be among them."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if isinstance(node.get("pattern"), str):
                yield node["pattern"]
            if isinstance(node.get("patternProperties"), dict):
                yield from node["patternProperties"]
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


@lru_cache(maxsize=1_024)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def _expanded_size(pattern: str) -> int:
    """How many single steps the pattern has once its ``{n}`` are written out, roughly: compiling writes them out."""
    sizes, last = [0], 0
    for token in _TOKEN.finditer(pattern):
        if token["open"]:
            sizes.append(0)
            last = 0
        elif token["close"]:
            last = sizes.pop() if len(sizes) > 1 else 0
            sizes[-1] += last
        elif token["least"]:
            # A longer number is beyond any bound, and converting it is slow.
            times = int(token["least"]) if len(token["least"]) <= 9 else 10**9
            sizes[-1] += last * (times - 1) if times else 0
            last *= max(1, times)
        else:
            sizes[-1] += 1
            last = 1
    return sum(sizes)
