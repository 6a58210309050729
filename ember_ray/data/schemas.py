"""JSON Schemas (draft 2020-12) of the answers, built from a few words a field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

DIALECT = "https://json-schema.org/draft/2020-12/schema"

STRING: dict = {"type": "string", "minLength": 1}
DATE: dict = {"type": "string", "format": "date"}
NUMBER: dict = {"type": "number"}
INTEGER: dict = {"type": "integer"}


def object_schema(properties: Mapping[str, dict], optional: Sequence[str] = ()) -> dict:
    """An object with exactly these properties; those not named in ``optional`` are required."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def array_schema(items: dict) -> dict:
    """An array of any length, empty included."""
    return {"type": "array", "items": items}


def root_schema(schema: dict) -> dict:
    """The same schema with its dialect named, as the outermost one."""
    return {"$schema": DIALECT, **schema}
