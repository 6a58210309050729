"""Answers read without their gold, and their fields counted as the verdict counts them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifiers.json_answers import count_fields, read_json
from verifiers.json_extraction import verify

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-50, 50), st.sampled_from([0.5, 2.0, "a", "b c", "ü"]))
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("xyz"), inner, max_size=3)),
    max_leaves=6,
)
SCHEMA = {"type": "object", "required": ["x"], "properties": {"x": {"type": "integer"}}}


def turned(value: Any) -> Any:
    """The same value with its keys in another order and its whole numbers spelled otherwise."""
    if isinstance(value, dict):
        return {key: turned(value[key]) for key in reversed(list(value))}
    if isinstance(value, list):
        return [turned(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        return value
    return int(value) if isinstance(value, float) else float(value)


@given(JSON)
def test_another_spelling_is_the_same_answer(value: Any) -> None:
    plain, other = read_json(json.dumps(value)), read_json(json.dumps(turned(value), indent=1))
    assert plain == other and plain.valid and plain.key is not None


@given(JSON, JSON)
def test_equal_keys_are_equal_answers_and_the_other_way_round(first: Any, second: Any) -> None:
    same = read_json(json.dumps(first)).key == read_json(json.dumps(second)).key
    assert same == (verify(json.dumps(second), first).components["exact_match"] == 1.0)


@given(JSON, JSON)
def test_counts_give_the_verdicts_precision_recall_and_f1(gold: Any, value: Any) -> None:
    right, answered, expected = count_fields(json.dumps(value), gold)
    components = verify(json.dumps(value), gold).components
    if not components["parse"]:
        assert (right, answered) == (0, 0) and expected >= 1
        return
    assert components["precision"] == pytest.approx(right / max(1, answered))
    assert components["recall"] == pytest.approx(right / max(1, expected))
    assert components["f1"] == pytest.approx(2 * right / max(1, answered + expected))


def test_counts_of_an_answer_that_is_none() -> None:
    assert count_fields("no idea", {"a": 1, "b": [1, 2]}) == (0, 0, 3)


def test_validity_is_the_schemas_and_the_schema_says_what_to_look_for() -> None:
    assert read_json('so: {"x": 1}', SCHEMA) == read_json('{"x": 1.0}', SCHEMA) == (True, '{"x": 1}')
    assert read_json('{"x": "1"}', SCHEMA) == (False, '{"x": "1"}')
    assert read_json('{"x": 1} as in [1]', SCHEMA).valid  # the list behind it is no object
    assert read_json("{broken", SCHEMA) == (False, None)
