"""What a JSON answer says without its gold, to choose among several; and its fields counted, to average over them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from verifiers.compare import CompareOptions, compare, leaves
from verifiers.find_json import Found, Kind, NotFound, find_json, kind_of
from verifiers.normalize import normal_string
from verifiers.schema import compile_schema


class JsonReading(NamedTuple):
    """A text looked at without its gold.

    Attributes:
        valid: JSON was found and satisfies the schema (without a schema: it was found).
        key: canonical form of the JSON, equal for answers that differ only in the order of keys, the spelling of
            numbers (1 and 1.0) or white space; None if none was found.
    """

    valid: bool
    key: str | None


def read_json(text: str, schema: dict[str, Any] | None = None) -> JsonReading:
    """Look at `text` without knowing the right answer. It is found by the rules of `find_json.py`.

    Which kind of value is expected is what the schema's ``type`` says; any kind, if it does not. Raises ValueError for
    a fault of the schema, never for anything in `text`.
    """
    found = find_json(text, _expected(schema))
    if isinstance(found, NotFound):
        return JsonReading(False, None)
    valid = schema is None or compile_schema(schema).fault(found.value) is None
    return JsonReading(valid, json.dumps(_canonical(found.value), sort_keys=True))


def count_fields(
    text: str,
    gold: object,
    schema: dict[str, Any] | None = None,
    options: CompareOptions = CompareOptions(),  # noqa: B008 (frozen)
) -> tuple[int, int, int]:
    """Leaf fields that are right, all of the answer's, all of the gold's; found and compared as `verify` does.

    Over many answers their sums give micro-averaged precision (right over answered) and recall (right over expected).
    """
    found = find_json(text, kind_of(gold))
    if not isinstance(found, Found):
        return 0, 0, len(leaves(gold))
    result = compare(gold, found.value, options, None if schema is None else compile_schema(schema))
    right = len(result.right)
    both = right + len(result.wrong)
    return right, both + len(result.invented), both + len(result.missing)


def _expected(schema: dict[str, Any] | None) -> Kind | None:
    kind = (schema or {}).get("type")
    return kind if kind in ("object", "array") else None


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, str):
        return normal_string(value, nfkc=False, collapse_whitespace=True, casefold=False)
    return int(value) if isinstance(value, float) and value.is_integer() else value
