"""Schemas are checked once, fetch nothing, and cannot be made to run long."""

import json
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from verifiers import limits
from verifiers.schema import compile_schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objec"}, "not valid at type"),
        ({"properties": {"a": {"minimum": "x"}}}, "not valid at properties.a.minimum"),
        ({"pattern": "("}, "not valid at pattern"),
        ({"$schema": 7}, r"\$schema must be a string"),
        ({"$ref": "https://example.org/other.json"}, "remote schemas are not fetched"),
        ({"properties": {"a": {"$ref": "#/$defs/missing"}}}, "'#/\\$defs/missing' is not in the schema"),
        ({"$ref": "#/components/x", "components": {"x": {"properties": {"a": {"$ref": "file:///etc/x"}}}}}, "file:///"),
        ([], "must be a JSON object"),
        ({"const": {1, 2}}, "not JSON itself"),
    ],
)
def test_a_faulty_schema_is_the_users_error(schema, message, monkeypatch):
    def no_socket(*args, **kwargs):
        raise AssertionError("a schema reached for the network")

    monkeypatch.setattr(socket, "socket", no_socket)
    with pytest.raises(ValueError, match=message):
        compile_schema(schema)


def test_a_schema_that_refers_to_itself_without_end_is_refused_with_its_gold():
    with pytest.raises(ValueError, match="too deeply nested"):
        compile_schema({"$ref": "#"}).check_gold({})


def test_compiled_once_whatever_the_order_of_its_keys():
    assert compile_schema({"type": "object", "title": "a"}) is compile_schema({"title": "a", "type": "object"})


@pytest.mark.parametrize(
    ("schema", "value", "fault"),
    [
        ({"type": "object"}, {}, None),
        ({"type": "number"}, "1", "the top level: '1' is not of type 'number'"),
        ({"properties": {"a": {"type": "integer"}}}, {"a": "x"}, "schema: a: 'x'"),
        ({"format": "date"}, "2025-03-03", None),
        ({"format": "date"}, "3 March 2025", "is not a 'date'"),
        ({"format": "date"}, 5, None),
        ({"format": "date-time"}, "2025-03-03T00:00:00Z", None),
        ({"format": "date-time"}, "2025-03-03", "is not a 'date-time'"),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "definitions": {"n": {"type": "null"}},
                "items": [{"$ref": "#/definitions/n"}],
            },
            [1],
            "0: 1 is not of type 'null'",
        ),
        ({"uniqueItems": True}, [1, True, "1", [1], {"a": 1}, {"a": True}], None),
        ({"uniqueItems": True}, [1, 1.0], "not unique"),
        ({"uniqueItems": True}, [{"a": [1, {}], "b": 2}, {"b": 2.0, "a": [1, {}]}], "not unique"),
        ({"multipleOf": 5e-324}, 10**300, None),
        ({"multipleOf": 0.5}, 10**300 + 0.25, None),
        ({"multipleOf": 2}, 10**300 + 1, "not a multiple"),
        ({"pattern": "b+$"}, "aab", None),
        ({"pattern": "b+$"}, "aa", "does not match"),
        ({"pattern": "a"}, "a" * (limits.MAX_PATTERN_CHARS + 1), "a pattern is tried on"),
        (
            {"required": [], "$id": "https://example.org/me.json", "$ref": "me.json#/$defs/a", "$defs": {"a": True}},
            1,
            None,
        ),
    ],
)
def test_faults(schema, value, fault):
    found = compile_schema(schema).fault(value)
    assert found is None if fault is None else fault in found


@settings(deadline=None)
@given(
    st.lists(
        st.none()
        | st.booleans()
        | st.integers(-2, 2)
        | st.sampled_from([0.0, 1.0, 0.5, "1", "a"])
        | st.lists(st.integers(0, 1), max_size=2)
        | st.dictionaries(st.sampled_from("ab"), st.integers(0, 1)),
        max_size=4,
    )
)
def test_unique_items_agrees_with_jsonschema(items):
    schema = {"uniqueItems": True}
    assert (compile_schema(schema).fault(items) is None) == Draft202012Validator(schema).is_valid(items)


def test_a_validation_without_end_is_cut_off():
    tree = {"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "number"}]}
    wide = json.loads("[" * 5 + ",".join(["[1,1,1,1]"] * 400) + "]" * 5)
    assert "not decided within" in compile_schema(tree).fault(wide)
    assert compile_schema(tree).fault([[1]]) is None  # and the next one starts afresh


def test_long_messages_are_cut():
    assert len(compile_schema({"type": "number"}).fault("x" * 10_000)) < 250


def test_gold_is_checked_against_its_schema():
    compiled = compile_schema({"required": ["total"]})
    compiled.check_gold({"total": 1})
    with pytest.raises(ValueError, match="gold answer does not satisfy its own schema .*'total' is a required"):
        compiled.check_gold({})
