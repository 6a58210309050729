"""Validation against a JSON Schema in bounded time, and what a schema says about dates.

`jsonschema` does the validation; this module compiles a schema once, fetches nothing from the network, checks the
formats ``date`` and ``date-time``, and counts keyword checks so that neither a document nor a schema can make a
validation run for long.
"""

from __future__ import annotations

import json
import marshal
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, ValidationError, validators
from jsonschema.exceptions import SchemaError
from jsonschema_specifications import REGISTRY as SPECIFICATIONS  # the metaschemas; it fetches nothing
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from verifiers import limits
from verifiers.normalize import is_date_time, is_full_date
from verifiers.patterns import PatternTooSlow, check_pattern, patterns_of
from verifiers.schema_keywords import OutOfSteps, bounded_keywords, start_counting
from verifiers.schema_quick import NotPlain, QuickCheck

_FORMATS = FormatChecker(formats=())
_FORMATS.checks("date")(lambda value: not isinstance(value, str) or is_full_date(value))
_FORMATS.checks("date-time")(lambda value: not isinstance(value, str) or is_date_time(value))

_SCHEMAS_REMEMBERED = 256
_PLACES_REMEMBERED = 4_096


class CompiledSchema:
    """A schema ready for use. Make it with `compile_schema`, which remembers it.

    Attributes:
        schema: the schema itself.
        has_dates: some part of it says ``format: date`` or ``date-time``.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        """Raises ValueError if `schema` is no valid JSON Schema, or has a $ref that does not lead anywhere in it."""
        if not isinstance(schema.get("$schema", ""), str):
            raise ValueError(f"the JSON Schema's $schema must be a string, not {schema['$schema']!r}")
        _check_patterns(schema)
        plain = validators.validator_for(schema, default=Draft202012Validator)
        try:
            plain.check_schema(schema)
            _check_references(schema)
        except SchemaError as error:
            raise ValueError(f"the JSON Schema is not valid at {_where(error)}: {_short(error.message)}") from None
        except (RecursionError, OverflowError) as error:
            raise ValueError(f"the JSON Schema cannot be checked: {_short(str(error))}") from None
        self.schema = schema
        self.has_dates = any(node.get("format") in ("date", "date-time") for node in _objects(schema))
        keywords = bounded_keywords(dict(plain.VALIDATORS))
        self._validator = validators.extend(plain, keywords)(schema, registry=SPECIFICATIONS, format_checker=_FORMATS)
        self._quick: QuickCheck | None = None
        if plain is Draft202012Validator:
            with suppress(NotPlain):
                self._quick = QuickCheck(schema)
        self._children: dict[tuple[tuple[int, ...], str | int], tuple[Any, ...]] = {}
        self._dates: dict[tuple[int, ...], bool] = {}

    def fault(self, value: object) -> str | None:
        """Why `value` does not satisfy the schema, the first fault as one sentence; None if it does."""
        start_counting()
        try:
            if self._quick is not None and self._quick.is_valid(value):
                return None
            error = next(self._validator.iter_errors(value), None)
        except PatternTooSlow:
            return "schema: not decided, because a pattern backtracks for too long"
        except OutOfSteps:
            return f"schema: not decided within {limits.MAX_SCHEMA_STEPS} keyword checks"
        except RecursionError:
            return "schema: too deeply nested to be checked"
        return None if error is None else f"schema: {_where(error)}: {_short(error.message)}"

    def check_gold(self, gold: object) -> None:
        """Raise ValueError if `gold` does not satisfy the schema."""
        fault = self.fault(gold)
        if fault is not None:
            raise ValueError(f"the gold answer does not satisfy its own schema ({fault}): correct the one or the other")

    def children(self, schemas: tuple[Any, ...], key: str | int) -> tuple[Any, ...]:
        """The subschemas that apply to the member `key` of a value to which `schemas` apply.

        Follows properties, additionalProperties, prefixItems and items, through allOf, anyOf, oneOf and references
        inside the document (``#/...``): enough to know where dates stand, without deciding which branch holds.
        """
        # The schemas are parts of this one and live as long as it, so their ids name them.
        place = tuple(map(id, schemas)), key
        known = self._children.get(place)
        if known is None:
            if len(self._children) >= _PLACES_REMEMBERED:
                self._children.clear()
            known = self._children[place] = self._find_children(schemas, key)
        return known

    def _find_children(self, schemas: tuple[Any, ...], key: str | int) -> tuple[Any, ...]:
        found: list[Any] = []
        for schema in self._expand(schemas):
            if isinstance(key, str):
                properties = schema.get("properties", {})
                found.append(properties[key] if key in properties else schema.get("additionalProperties"))
            else:
                first = schema.get("prefixItems", [])
                found.append(first[key] if key < len(first) else schema.get("items"))
        return tuple(schema for schema in found if isinstance(schema, dict))

    def is_date(self, schemas: tuple[Any, ...]) -> bool:
        """Whether any of the schemas that apply says ``format: date`` or ``date-time``."""
        place = tuple(map(id, schemas))
        known = self._dates.get(place)
        if known is None:
            if len(self._dates) >= _PLACES_REMEMBERED:
                self._dates.clear()
            known = any(schema.get("format") in ("date", "date-time") for schema in self._expand(schemas))
            self._dates[place] = known
        return known

    def _expand(self, schemas: tuple[Any, ...]) -> list[dict[str, Any]]:
        expanded: list[dict[str, Any]] = []
        seen: set[int] = set()
        waiting = list(schemas)
        while waiting:
            schema = waiting.pop()
            if not isinstance(schema, dict) or id(schema) in seen:
                continue
            seen.add(id(schema))
            expanded.append(schema)
            for branch in ("allOf", "anyOf", "oneOf"):
                waiting.extend(schema.get(branch, ()))
            reference = schema.get("$ref")
            if isinstance(reference, str) and reference.startswith("#"):
                waiting.append(self._resolve(reference))
        return expanded

    def _resolve(self, reference: str) -> Any:
        resolver = SPECIFICATIONS.resolver_with_root(_resource(self.schema))
        return resolver.lookup(reference).contents


def compile_schema(schema: object) -> CompiledSchema:
    """The compiled form of `schema`, remembered by its content. Raises ValueError if it is not a valid schema."""
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON Schema must be a JSON object (a dict), not {type(schema).__name__}")
    try:
        key = marshal.dumps(schema, 2)  # faster than JSON; version 2, because later ones note which objects are shared
    except ValueError:  # something that is not plain Python, or nested deeply
        key = None
    known = _compiled.get(key) if key is not None else None
    if known is not None:
        return known
    try:
        compiled = _compile(json.dumps(schema, sort_keys=True))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the JSON Schema is not JSON itself: {error}") from None
    if key is not None:
        if len(_compiled) >= _SCHEMAS_REMEMBERED:
            _compiled.clear()
        _compiled[key] = compiled
    return compiled


_compiled: dict[bytes, CompiledSchema] = {}


@lru_cache(maxsize=_SCHEMAS_REMEMBERED)
def _compile(text: str) -> CompiledSchema:
    if len(text) > limits.MAX_SCHEMA_CHARS:
        raise ValueError(f"a JSON Schema of {len(text)} characters, more than {limits.MAX_SCHEMA_CHARS}")
    schema = json.loads(text)
    if _depth(schema) > limits.MAX_SCHEMA_DEPTH:
        raise ValueError(f"a JSON Schema nested deeper than {limits.MAX_SCHEMA_DEPTH} levels")
    return CompiledSchema(schema)


def _depth(schema: object) -> int:
    deepest, waiting = 0, [(schema, 1)]
    while waiting:
        node, depth = waiting.pop()
        deepest = max(deepest, depth)
        if isinstance(node, dict | list):
            waiting.extend((member, depth + 1) for member in (node.values() if isinstance(node, dict) else node))
    return deepest


def _check_patterns(schema: dict[str, Any]) -> None:
    """Raise ValueError for patterns that cannot be compiled or searched in bounded time."""
    found = set(patterns_of(schema))
    if len(found) > limits.MAX_PATTERNS or sum(map(len, found)) > 10 * limits.MAX_PATTERN_SOURCE_CHARS:
        raise ValueError(
            f"the JSON Schema has {len(found)} patterns; {limits.MAX_PATTERNS} and 20000 characters at most"
        )
    for pattern in found:
        check_pattern(pattern)
    names = {name for node in _objects(schema) for name in node}
    if {"patternProperties", "unevaluatedProperties"} <= names:
        raise ValueError(
            "the JSON Schema has unevaluatedProperties beside patternProperties, which cannot be checked in bounded "
            "time: use additionalProperties"
        )


def _resource(schema: Any) -> Resource[Any]:
    return Resource.from_contents(schema, default_specification=DRAFT202012)


def _check_references(schema: dict[str, Any]) -> None:
    """Raise ValueError for a $ref that leads to another document or nowhere."""
    root = _resource(schema)
    waiting = [(root, SPECIFICATIONS.resolver_with_root(root))]
    seen: set[int] = set()
    while waiting:
        resource, resolver = waiting.pop()
        contents = resource.contents
        if id(contents) in seen or not isinstance(contents, dict):
            continue
        seen.add(id(contents))
        waiting.extend((sub, resolver.in_subresource(sub)) for sub in resource.subresources())
        for keyword in ("$ref", "$dynamicRef"):
            reference = contents.get(keyword)
            if not isinstance(reference, str):
                continue
            try:
                target = resolver.lookup(reference)
            except Unresolvable:
                raise ValueError(
                    f"the JSON Schema's {keyword} {reference!r} is not in the schema: remote schemas are "
                    "not fetched, copy it into $defs"
                ) from None
            # Followed, because it may lead under a key that is no schema keyword, such as #/components/schemas.
            waiting.append((_resource(target.contents), target.resolver))


def _objects(schema: object) -> Iterator[dict[str, Any]]:
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _where(error: ValidationError | SchemaError) -> str:
    return _short(".".join(str(step) for step in error.absolute_path)) or "the top level"


def _short(text: str, length: int = 160) -> str:
    """`text` with its middle left out if it is long: a message begins with the value and ends with what is wrong."""
    return text if len(text) <= length else text[: length // 2] + "…" + text[-(length // 2 - 1) :]
