"""Says in a few microseconds that a value satisfies a plain schema; for anything else jsonschema decides.

Most answers are valid, and most schemas of extraction tasks use a handful of keywords of which there is one reading.
For such a schema (draft 2020-12; `type`, `properties`, `required`, `additionalProperties`, `items`, `enum` of texts,
`pattern`, ``format: date`` and ``date-time``, least and greatest lengths, counts and numbers) a value is checked here
first. The count of steps is that of `schema_keywords.py`, so a value is called valid only if the full validation would
call it so within its bounds.
"""

from __future__ import annotations

import math
from typing import Any

from verifiers import limits, patterns
from verifiers.normalize import is_date_time, is_full_date
from verifiers.schema_keywords import instance_cost, keyword_cost, pattern_cost

_SAYS_NOTHING = frozenset(("$schema", "title", "description", "default", "examples", "$comment", "deprecated"))
_LEAST = ("minLength", "minItems", "minimum")
_GREATEST = ("maxLength", "maxItems", "maximum")
_FORMATS = {"date": is_full_date, "date-time": is_date_time}
_TYPES = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


class NotPlain(Exception):
    """The schema says something that this module does not know."""


class QuickCheck:
    """One subschema and those below it. Raises NotPlain if it is not plain; the schema must be a valid one."""

    def __init__(self, schema: Any) -> None:
        if not isinstance(schema, dict):
            raise NotPlain
        self.keywords = 0
        self.further_cost = 0
        self.types: frozenset[type] | None = None
        self.properties: dict[str, QuickCheck] = {}
        self.required: tuple[str, ...] = ()
        self.others: QuickCheck | None = None  # of additionalProperties
        self.no_others = False
        self.items: QuickCheck | None = None
        self.enum: frozenset[str | None] | None = None
        self.format: Any = None
        self.pattern: str | None = None
        self.bounds: dict[str, float] = dict.fromkeys(_LEAST, -math.inf) | dict.fromkeys(_GREATEST, math.inf)
        for name, keyword in schema.items():
            if name in _SAYS_NOTHING:
                continue
            self.keywords += 1
            if isinstance(keyword, dict | list):
                self.further_cost += keyword_cost(keyword)
            self._read(name, keyword)

    def _read(self, name: str, keyword: Any) -> None:
        if name == "type":
            names = [keyword] if isinstance(keyword, str) else keyword
            self.types = frozenset(kind for known in names for kind in _TYPES[known])
        elif name == "properties":
            self.properties = {key: QuickCheck(inner) for key, inner in keyword.items()}
        elif name == "required":
            self.required = tuple(keyword)
        elif name == "additionalProperties":
            self.no_others = keyword is False
            self.others = None if isinstance(keyword, bool) else QuickCheck(keyword)
        elif name == "items":
            self.items = QuickCheck(keyword)
        elif name in self.bounds:
            self.bounds[name] = keyword
        elif name == "pattern":
            self.pattern = keyword
        elif name == "enum" and all(value is None or isinstance(value, str) for value in keyword):
            self.enum = frozenset(keyword)
        elif name == "format" and isinstance(keyword, str):
            self.format = _FORMATS.get(keyword)  # others are not checked
        else:
            raise NotPlain

    def is_valid(self, value: Any) -> bool:
        """True if `value` satisfies the schema for certain; False if it does not, or the full validation must say.

        Raises patterns.PatternTooSlow; `schema_keywords.start_counting` comes first.
        """
        return self._steps(value) <= limits.MAX_SCHEMA_STEPS

    def _steps(self, value: Any) -> int:
        """Steps that the full validation takes; more than there are if the value is not valid."""
        kind = type(value)
        if self.types is not None and kind not in self.types:  # 1.0 for an integer is for the full validation
            return _INVALID
        steps = self.keywords * instance_cost(value) + self.further_cost
        if self.enum is not None and (kind not in (str, type(None)) or value not in self.enum):
            return _INVALID
        if kind is str:
            if not self.bounds["minLength"] <= len(value) <= self.bounds["maxLength"]:
                return _INVALID
            if self.format is not None and not self.format(value):
                return _INVALID
            if self.pattern is not None:
                if len(value) > limits.MAX_PATTERN_CHARS or not patterns.found(self.pattern, value):
                    return _INVALID
                steps += pattern_cost(value)
        elif kind is int or kind is float:
            if not self.bounds["minimum"] <= value <= self.bounds["maximum"]:
                return _INVALID
        elif kind is dict:
            for key in self.required:
                if key not in value:
                    return _INVALID
            for key, member in value.items():
                inner = self.properties.get(key)
                if inner is None:
                    if self.no_others:
                        return _INVALID
                    inner = self.others
                if inner is not None:
                    steps += inner._steps(member)
        elif kind is list:
            if not self.bounds["minItems"] <= len(value) <= self.bounds["maxItems"]:
                return _INVALID
            if self.items is not None:
                for item in value:
                    steps += self.items._steps(item)
        return steps


_INVALID = limits.MAX_SCHEMA_STEPS + 1
