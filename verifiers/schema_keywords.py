"""The keywords of JSON Schema in bounded time: each check pays before it runs, and the costly ones are made anew.

One validation may take `limits.MAX_SCHEMA_STEPS` steps. A keyword check is one step, and more for long strings, large
containers and keywords with many values (an `enum` of thousands); a fault costs extra, for its message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import local
from typing import Any

from jsonschema import ValidationError

from verifiers import limits, patterns

# An error object with its message takes about as long as three keyword checks; branches of anyOf collect many.
_ERROR_COST = 3
_steps = local()


class OutOfSteps(Exception):
    """A validation used up `limits.MAX_SCHEMA_STEPS`."""


def start_counting() -> None:
    """Begin a validation: all its steps and all its searches for patterns are still to come."""
    _steps.left = limits.MAX_SCHEMA_STEPS
    patterns.start_clock()


def bounded_keywords(keywords: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """jsonschema's `keywords`, each counted. They raise OutOfSteps, or patterns.PatternTooSlow, at a bound."""
    sizes: dict[int, int] = {}  # of the keywords' values, which live as long as the schema that holds them
    return {name: _counted(name, check, sizes) for name, check in keywords.items()}


def instance_cost(instance: Any) -> int:
    """Steps of one keyword on one instance, of most keywords: a message prints it."""
    if isinstance(instance, str):
        return 1 + len(instance) // 1_000
    return 1 + len(instance) // 100 if isinstance(instance, dict | list) else 1


def _counted(name: str, check: Callable[..., Any], sizes: dict[int, int]) -> Callable[..., Iterator[ValidationError]]:
    """The keyword `check` that pays before it runs."""
    own: dict[str, Callable[..., Any]] = {
        "uniqueItems": _unique_items,
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties(check),
    }
    check = own.get(name, check)

    def counted(validator: Any, keyword: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        cost = instance_cost(instance)
        if isinstance(keyword, dict | list):
            size = sizes.get(id(keyword))
            if size is None:
                size = sizes[id(keyword)] = keyword_cost(keyword)
            cost += size
        elif name == "pattern" and isinstance(instance, str):
            cost += pattern_cost(instance)
        _spend(cost)
        for error in check(validator, keyword, instance, schema) or ():
            _spend(_ERROR_COST)
            yield error

    return counted


def pattern_cost(instance: str) -> int:
    """Further steps of ``pattern`` on a string: it may be searched in quadratic time."""
    length = min(len(instance), limits.MAX_PATTERN_CHARS)
    return length * length // 2_000


def keyword_cost(keyword: Any) -> int:
    """Steps for the size of a keyword's value: none up to a hundred values in it, then one for every twenty."""
    values, waiting = 0, [keyword]
    while waiting:
        node = waiting.pop()
        values += 1 + (len(node) // 100 if isinstance(node, str) else 0)
        if isinstance(node, dict):
            values += len(node)
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
    return max(0, values - 100) // 20


def _spend(steps: int) -> None:
    _steps.left -= steps
    if _steps.left < 0:
        raise OutOfSteps


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, str):
        return
    if len(instance) > limits.MAX_PATTERN_CHARS:
        yield ValidationError(
            f"a string of {len(instance)} characters, and a pattern is tried on {limits.MAX_PATTERN_CHARS} at most"
        )
    elif not patterns.found(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, keyword: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    for pattern, subschema in keyword.items():
        for key, value in instance.items():
            if patterns.found(pattern, key):
                yield from validator.descend(value, subschema, path=key, schema_path=pattern)


def _additional_properties(check: Callable[..., Any]) -> Callable[..., Iterator[ValidationError]]:
    def additional_properties(validator: Any, keyword: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        by_pattern = schema.get("patternProperties")
        if not by_pattern or not isinstance(instance, dict):
            yield from check(validator, keyword, instance, schema) or ()
            return
        properties = schema.get("properties", {})
        extras = [
            key
            for key in instance
            if key not in properties and not any(patterns.found(pattern, key) for pattern in by_pattern)
        ]
        if isinstance(keyword, dict):
            for key in extras:
                yield from validator.descend(instance[key], keyword, path=key)
        elif not keyword and extras:
            shown, verb = ", ".join(map(repr, sorted(extras))), "does" if len(extras) == 1 else "do"
            regexes = ", ".join(map(repr, sorted(by_pattern)))
            yield ValidationError(f"{shown} {verb} not match any of the regexes: {regexes}")

    return additional_properties


def _unique_items(validator: Any, unique: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """`uniqueItems` in linear time; jsonschema compares objects pair by pair."""
    if not unique or not isinstance(instance, list):
        return
    _spend(_values(instance) // 20)
    if len({_identity(item) for item in instance}) < len(instance):
        yield ValidationError("the items of an array are not unique")


def _values(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_values, value.values()))
    return 1 + sum(map(_values, value)) if isinstance(value, list) else 1


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
