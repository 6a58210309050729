"""Fields are compared by type, and every leaf is counted once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers.compare import CompareOptions, compare, dotted, leaves
from verifiers.schema import compile_schema

OPTIONS = CompareOptions()


def counts(gold, value, options=OPTIONS, schema=None):
    result = compare(gold, value, options, compile_schema(schema) if schema is not None else None)
    return tuple(len(part) for part in (result.right, result.wrong, result.missing, result.invented))


def equal(gold, value, options=OPTIONS, schema=None):
    return counts(gold, value, options, schema) == (1, 0, 0, 0)


@pytest.mark.parametrize(
    ("gold", "value", "right"),
    [
        (1, 1.0, True),
        (1, True, False),
        (True, 1, False),
        (True, True, True),
        (False, None, False),
        (0, False, False),
        (12.5, "12.5", False),
        ("12.50", 12.5, False),
        ("a", "a", True),
        ("a", "A", False),
        ("a b", " a\n b ", True),
        (None, None, True),
        (None, "null", False),
        ("", None, False),
        (0, None, False),
        (1.0, 1.0 + 1e-10, True),
    ],
)
def test_scalars_by_type(gold, value, right):
    assert equal(gold, value) is right


@pytest.mark.parametrize(
    ("gold", "value", "expected"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, (2, 0, 0, 0)),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, (1, 1, 0, 0)),
        ({"a": 1, "b": 2}, {"a": 1}, (1, 0, 1, 0)),
        ({"a": 1}, {"a": 1, "b": 2, "c": [3, 4]}, (1, 0, 0, 3)),
        ({"a": None}, {}, (0, 0, 1, 0)),
        ({}, {"a": None}, (0, 0, 0, 1)),
        ({"A": 1}, {"a": 1}, (0, 0, 1, 1)),
        ([1, 2, 3], [1, 3, 2], (1, 2, 0, 0)),  # by position
        ([1, 2], [1, 2, 3], (2, 0, 0, 1)),
        ([1, 2, 3], [1], (1, 0, 2, 0)),
        ({"a": {"b": 1, "c": 2}}, {"a": 5}, (0, 0, 2, 1)),  # another kind: all missing, all invented
        ({"a": 5}, {"a": {"b": 1, "c": 2}}, (0, 0, 1, 2)),
        ({"a": [1, 2]}, {"a": {"0": 1, "1": 2}}, (0, 0, 2, 2)),
        ({"a": []}, {"a": []}, (1, 0, 0, 0)),
        ({"a": []}, {"a": [1]}, (0, 0, 0, 1)),
        ({"a": [1]}, {"a": []}, (0, 0, 1, 0)),
        ({"a": []}, {}, (0, 0, 1, 0)),
        ({"a": []}, {"a": {}}, (0, 0, 1, 1)),
        ({}, {}, (1, 0, 0, 0)),
        ({"a": []}, {"a": None}, (0, 0, 1, 1)),
    ],
)
def test_containers_field_by_field(gold, value, expected):
    assert counts(gold, value) == expected


def test_precision_recall_f1_over_leaves():
    result = compare({"a": 1, "b": 2, "c": 3, "d": 4}, {"a": 1, "b": 2, "c": 0, "e": 5, "f": 6}, OPTIONS)
    assert result.precision == pytest.approx(2 / 5)
    assert result.recall == pytest.approx(2 / 4)
    assert result.f1 == pytest.approx(2 * (2 / 5) * (2 / 4) / (2 / 5 + 2 / 4))
    assert not result.perfect
    nothing = compare({"a": 1}, {"b": 1}, OPTIONS)
    assert (nothing.precision, nothing.recall, nothing.f1) == (0.0, 0.0, 0.0)


def test_paths_name_the_fields():
    result = compare({"items": [{"price": 1, "x.y": 2}]}, {"items": [{"price": 2, "new": 1}]}, OPTIONS)
    assert [dotted(path) for path in result.wrong] == ["items.0.price"]
    assert [dotted(path) for path in result.missing] == ["items.0.x\\.y"]
    assert [dotted(path) for path in result.invented] == ["items.0.new"]
    assert dotted(("items", 0, "price"), any_index=True) == "items.*.price"
    assert dotted(()) == "$"


DAY = "2025-03-03"
UTC, PARIS = "2025-03-03T00:00:00Z", "2025-03-03T01:00:00+01:00"


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"d": {"format": "date-time"}}},
        {"properties": {"d": {"anyOf": [{"type": "null"}, {"type": "string", "format": "date-time"}]}}},
        {"properties": {"d": {"$ref": "#/$defs/moment"}}, "$defs": {"moment": {"format": "date-time"}}},
        {"allOf": [{"properties": {"d": {"type": "string"}}}, {"additionalProperties": {"format": "date-time"}}]},
        {
            "$ref": "#/$defs/a",
            "$defs": {
                "a": {"allOf": [{"$ref": "#/$defs/b"}]},
                "b": {"properties": {"d": {"format": "date-time"}}, "$ref": "#/$defs/a"},
            },
        },
    ],
)
def test_dates_by_normal_form_where_the_schema_says_so(schema):
    assert equal({"d": UTC}, {"d": PARIS}, schema=schema)
    assert not equal({"d": UTC}, {"d": "2025-03-03T01:00:00Z"}, schema=schema)


def test_dates_in_arrays_by_items_and_prefix():
    schema = {"prefixItems": [{"type": "string"}], "items": {"format": "date-time"}}
    assert counts([UTC, UTC], [PARIS, PARIS], schema=schema) == (1, 1, 0, 0)


def test_dates_elsewhere_are_strings_unless_asked():
    schema = {"properties": {"other": {"format": "date"}, "d": {"type": "string"}}}
    assert not equal({"d": UTC}, {"d": PARIS}, schema=schema)
    assert not equal({"d": UTC}, {"d": PARIS})
    assert equal({"d": UTC}, {"d": PARIS}, CompareOptions(dates=True))


def test_an_unnormalized_date_is_wrong_unless_its_spelling_is_allowed():
    schema = {"properties": {"d": {"format": "date"}}}
    assert not equal({"d": DAY}, {"d": "3 March 2025"}, schema=schema)
    assert not equal({"d": DAY}, {"d": "3 March 2025"}, CompareOptions(dates=True))
    lenient = CompareOptions(date_formats=("%d %B %Y",))
    assert equal({"d": DAY}, {"d": "3 March 2025"}, lenient, schema)
    assert not equal({"d": DAY}, {"d": "4 March 2025"}, lenient, schema)
    assert not equal({"d": DAY}, {"d": "3 March 2025"}, lenient)  # nothing says that it is a date


def test_options_reach_the_fields():
    assert equal("a", "A", CompareOptions(casefold=True))
    assert not equal("a", " a", CompareOptions(collapse_whitespace=False))
    assert not equal("Ａ", "A", CompareOptions(nfkc=False))
    assert equal(100.0, 101.0, CompareOptions(relative_tolerance=0.01))
    assert equal(1.0, 1.4, CompareOptions(absolute_tolerance=0.5))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="absolute_tolerance"):
            CompareOptions(absolute_tolerance=bad)


values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["a", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(values, values)
def test_swapping_the_sides_swaps_missing_and_invented(one, other):
    right, wrong, missing, invented = counts(one, other)
    assert counts(other, one) == (right, wrong, invented, missing)
    assert (missing + invented + wrong == 0) == (compare(one, other, OPTIONS).perfect)


@settings(deadline=None)
@given(values)
def test_a_value_equals_itself_leaf_for_leaf(value):
    result = compare(value, value, OPTIONS)
    assert result.perfect and result.right == leaves(value)
    assert (result.precision, result.recall, result.f1) == (1.0, 1.0, 1.0)
