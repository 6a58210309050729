"""Validation against a JSON Schema in bounded time, and what a schema says about dates.

`jsonschema` does the validation; this module compiles a schema once, fetches nothing from the network, checks the
formats ``date`` and ``date-time``, and counts keyword checks so that no document can make a schema run for long.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from threading import local
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, ValidationError, validators
from jsonschema.exceptions import SchemaError
from jsonschema_specifications import REGISTRY as SPECIFICATIONS  # the metaschemas; it fetches nothing
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from verifiers import limits
from verifiers.normalize import is_date_time, is_full_date

_FORMATS = FormatChecker(formats=())
_FORMATS.checks("date")(lambda value: not isinstance(value, str) or is_full_date(value))
_FORMATS.checks("date-time")(lambda value: not isinstance(value, str) or is_date_time(value))

_GOLDS_REMEMBERED = 4_096
# An error object with its message takes about as long as three keyword checks; branches of anyOf collect many.
_ERROR_COST = 3
_steps = local()


class _OutOfSteps(Exception):
    """A validation used up `limits.MAX_SCHEMA_STEPS`."""


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
        plain = validators.validator_for(schema, default=Draft202012Validator)
        try:
            plain.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"the JSON Schema is not valid at {_where(error)}: {_short(error.message)}") from None
        _check_references(schema)
        self.schema = schema
        self.has_dates = any(node.get("format") in ("date", "date-time") for node in _objects(schema))
        counted = {name: _counted(name, check) for name, check in plain.VALIDATORS.items()}
        self._validator = validators.extend(plain, counted)(schema, registry=SPECIFICATIONS, format_checker=_FORMATS)
        self._golds: set[str] = set()

    def fault(self, value: object) -> str | None:
        """Why `value` does not satisfy the schema, the first fault as one sentence; None if it does."""
        _steps.left = limits.MAX_SCHEMA_STEPS
        try:
            error = next(self._validator.iter_errors(value), None)
        except _OutOfSteps:
            return f"schema: not decided within {limits.MAX_SCHEMA_STEPS} keyword checks"
        except RecursionError:
            return "schema: too deeply nested to be checked"
        return None if error is None else f"schema: {_where(error)}: {_short(error.message)}"

    def check_gold(self, gold: object) -> None:
        """Raise ValueError if `gold` does not satisfy the schema. A gold seen before costs only its serialization."""
        key = json.dumps(gold)
        if key in self._golds:
            return
        fault = self.fault(gold)
        if fault is not None:
            raise ValueError(f"the gold answer does not satisfy its own schema ({fault}): correct the one or the other")
        if len(self._golds) >= _GOLDS_REMEMBERED:
            self._golds.clear()
        self._golds.add(key)

    def children(self, schemas: tuple[Any, ...], key: str | int) -> tuple[Any, ...]:
        """The subschemas that apply to the member `key` of a value to which `schemas` apply.

        Follows properties, additionalProperties, prefixItems and items, through allOf, anyOf, oneOf and references
        inside the document (``#/...``): enough to know where dates stand, without deciding which branch holds.
        """
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
        return any(schema.get("format") in ("date", "date-time") for schema in self._expand(schemas))

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
        return _compile(json.dumps(schema, sort_keys=True))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the JSON Schema is not JSON itself: {error}") from None


@lru_cache(maxsize=256)
def _compile(text: str) -> CompiledSchema:
    return CompiledSchema(json.loads(text))


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


def _counted(name: str, check: Callable[..., Any]) -> Callable[..., Iterator[ValidationError]]:
    """The keyword `check` that pays before it runs; some keywords are made linear."""
    if name == "uniqueItems":
        check = _unique_items
    elif name == "pattern":
        check = _bounded_pattern(check)

    def counted(validator: Any, keyword: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        _spend(_cost(name, instance))
        for error in check(validator, keyword, instance, schema) or ():
            _spend(_ERROR_COST)
            yield error

    return counted


def _spend(steps: int) -> None:
    _steps.left -= steps
    if _steps.left < 0:
        raise _OutOfSteps


def _cost(name: str, instance: Any) -> int:
    """Steps of one keyword on one instance: messages print it, patterns may search it in quadratic time."""
    if isinstance(instance, str):
        size = min(len(instance), limits.MAX_PATTERN_CHARS)
        return 1 + len(instance) // 1_000 + (size * size // 2_000 if name == "pattern" else 0)
    return 1 + len(instance) // 100 if isinstance(instance, dict | list) else 1


def _bounded_pattern(check: Callable[..., Any]) -> Callable[..., Iterator[ValidationError]]:
    def pattern(validator: Any, keyword: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if isinstance(instance, str) and len(instance) > limits.MAX_PATTERN_CHARS:
            yield ValidationError(
                f"a string of {len(instance)} characters, and a pattern is tried on {limits.MAX_PATTERN_CHARS} at most"
            )
            return
        yield from check(validator, keyword, instance, schema) or ()

    return pattern


def _unique_items(validator: Any, unique: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """`uniqueItems` in linear time; jsonschema compares objects pair by pair."""
    if unique and isinstance(instance, list) and len({_identity(item) for item in instance}) < len(instance):
        yield ValidationError("the items of an array are not unique")


def _identity(value: Any) -> Any:
    """A hashable stand-in, equal for two values if JSON Schema calls them equal (1 and 1.0 are, 1 and true not)."""
    if isinstance(value, dict):
        return "object", frozenset((key, _identity(member)) for key, member in value.items())
    if isinstance(value, list):
        return "array", tuple(_identity(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return type(value).__name__, value
    # As text, because the hashes of integers are easy to make collide.
    return "number", str(int(value)) if value == int(value) else repr(value)


def _where(error: ValidationError | SchemaError) -> str:
    return _short(".".join(str(step) for step in error.absolute_path)) or "the top level"


def _short(text: str, length: int = 160) -> str:
    """`text` with its middle left out if it is long: a message begins with the value and ends with what is wrong."""
    return text if len(text) <= length else text[: length // 2] + "…" + text[-(length // 2 - 1) :]
