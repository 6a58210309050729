"""The quick check never calls a value valid that the full validation would not."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers import limits
from verifiers.schema import CompiledSchema
from verifiers.schema_keywords import start_counting
from verifiers.schema_quick import NotPlain, QuickCheck

KEYS = st.sampled_from(["a", "b", "c"])
TEXTS = st.sampled_from(["", "a", "abc", "2025-03-03", "2025-02-30", "2025-03-03T10:00:00Z", "é" * 5])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([1.0, 0.5, -0.0, 1e300]) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
TYPES = st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"])


def optional(**keywords):
    return st.fixed_dictionaries({}, optional=keywords)


SCHEMAS = st.recursive(
    optional(
        type=TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True),
        minLength=st.integers(0, 4),
        maxLength=st.integers(0, 4),
        minimum=st.integers(-2, 2),
        maximum=st.sampled_from([0, 0.5, 2]),
        pattern=st.sampled_from(["^a", "[0-9]{2}", "b|c"]),
        format=st.sampled_from(["date", "date-time", "email"]),
        enum=st.lists(st.none() | TEXTS, min_size=1, max_size=3, unique=True),
        title=st.just("x"),
    ),
    lambda inner: optional(
        type=TYPES,
        properties=st.dictionaries(KEYS, inner, max_size=3),
        required=st.lists(KEYS, max_size=2, unique=True),
        additionalProperties=st.booleans() | inner,
        items=inner,
        minItems=st.integers(0, 2),
        maxItems=st.integers(0, 3),
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(SCHEMAS, VALUES)
def test_the_quick_check_and_the_full_validation_agree(schema, value):
    compiled = CompiledSchema(schema)
    assert compiled._quick is not None
    start_counting()
    quick = compiled._quick.is_valid(value)
    compiled._quick = None
    full = compiled.fault(value) is None
    assert full or not quick
    # What it leaves to the full validation though it is valid: reals that are integers.
    assert quick or not full or ".0" in json.dumps(value) or "e+" in json.dumps(value)


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "integer"}, 1, True),
        ({"type": ["string", "null"]}, None, 1),
        ({"properties": {"a": {"type": "string"}}}, {"a": "x", "b": 1}, {"a": 1}),
        ({"required": ["a"]}, {"a": 1}, {"b": 1}),
        ({"properties": {"a": {}}, "additionalProperties": False}, {"a": 1}, {"a": 1, "b": 2}),
        ({"additionalProperties": {"type": "null"}}, {"a": None}, {"a": 1}),
        ({"items": {"type": "null"}}, [None], [None, 1]),
        ({"minItems": 1, "maxItems": 2}, [1], [1, 2, 3]),
        ({"minLength": 1}, "a", ""),
        ({"maxLength": 1}, "a", "ab"),
        ({"minimum": 1, "maximum": 2}, 2, 2.5),
        ({"pattern": "^a"}, "ab", "ba"),
        ({"enum": ["a", None]}, None, "b"),
        ({"format": "date"}, "2025-03-03", "2025-02-30"),
        ({"format": "date-time"}, "2025-03-03T10:00:00Z", "2025-03-03"),
    ],
)
def test_each_keyword(schema, valid, invalid):
    compiled = CompiledSchema(schema)
    start_counting()
    assert compiled._quick.is_valid(valid) and not compiled._quick.is_valid(invalid)
    assert compiled.fault(valid) is None and compiled.fault(invalid) is not None


@pytest.mark.parametrize("size", range(700, 800, 7))
def test_the_bound_on_steps_is_the_same(size):
    # Four keyword checks an item and a few above: the bound falls between the sizes.
    schema = {"type": "array", "items": {"type": "string", "minLength": 1, "pattern": "x", "maxLength": 9}}
    value = ["x"] * size
    compiled = CompiledSchema(schema)
    start_counting()
    quick = compiled._quick.is_valid(value)
    compiled._quick = None
    assert quick == (compiled.fault(value) is None) == (4 * size + 2 * (1 + size // 100) <= limits.MAX_SCHEMA_STEPS)


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": []},
        {"$ref": "#"},
        {"const": 1},
        {"enum": [1]},
        {"items": True},
        {"properties": {"a": True}},
        {"not": {}},
    ],
)
def test_other_schemas_are_left_to_the_full_validation(schema):
    with pytest.raises(NotPlain):
        QuickCheck(schema)


def test_other_drafts_are_left_to_the_full_validation():
    assert CompiledSchema({"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"})._quick is None
    assert CompiledSchema({"type": "object"})._quick is not None
