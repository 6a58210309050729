"""The quick reader and the strict one tell the same of every text."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from verifiers import limits
from verifiers.parse_json import Budget, MalformedJson, OverLimit, _Reader, parse_json
from verifiers.parse_json_quick import read_quickly

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "é"]), inner, max_size=3),
    max_leaves=10,
)
PIECES = st.sampled_from(
    [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        '"a"',
        '"a":',
        '"\\u0061":',
        "1",
        "-0",
        "1e999",
        "1.5",
        "01",
        "NaN",
        "-Infinity",
    ]
    + ["true", "null", " ", "\n", "\u00a0", "\\", '"\\ud800"', '"\\ud83d\\ude00"', '"\ud800"', '"\t"', "'a'", "x"]
)


def told(read, values):
    """All that a reader tells: value, end and values spent, or how it failed."""
    budget = Budget(values)
    try:
        value, end = read(budget)
        return repr(value), end, budget.left
    except MalformedJson as fault:
        return str(fault), fault.position, fault.depth, fault.serious, budget.left
    except OverLimit as fault:
        return str(fault)


def agree(text):
    for values in (12, 100):
        quick = told(lambda budget: parse_json(text, 0, budget), values)
        strict = told(lambda budget: _Reader(text, 0, budget).read(), values)
        assert quick == strict


@settings(deadline=None)
@given(VALUES, st.lists(st.tuples(st.integers(0, 60), PIECES), max_size=2))
def test_they_agree_on_json_with_a_few_changes(value, changes):
    text = json.dumps([value], ensure_ascii=False)
    for position, piece in changes:
        text = text[:position] + piece + text[position + 1 :]
    agree(text)


@settings(deadline=None, max_examples=200)
@given(st.lists(PIECES, max_size=12).map("".join))
@example('{"a":1,"a":1}')
@example('{"\ud800":1}')
def test_they_agree_on_pieces_of_json(text):
    agree(text)
    agree("[" + text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * limits.MAX_DEPTH + "]" * limits.MAX_DEPTH,
        "[" * (limits.MAX_DEPTH + 1) + "]" * (limits.MAX_DEPTH + 1),
        "[" * 100_000,
        "[1e999]",
        "[1, -1e999]",
        "[NaN]",
        '["\ud800"]',
        '["\\ud800"]',
        '{"a": {"b": 1, "b": 1}}',
        "[" + "1" * limits.MAX_NUMBER_CHARS + "]",
        "[0." + "1" * (limits.MAX_NUMBER_CHARS - 2) + "]",
        "[0." + "1" * (limits.MAX_NUMBER_CHARS - 1) + "]",
        "[" + "1" * 5_000 + "]",
        f"[{2**1024 - 2**970}, {-(2**1024) + 2**970}]",  # the greatest double
        f"[{2**1024 - 2**970 + 1}]",  # rounds to it
        f"[{2**1024}]",
        '{"' + "k" * limits.MAX_KEY_CHARS + '": 1}',
        '{"' + "k" * (limits.MAX_KEY_CHARS + 1) + '": 1}',
        '["' + "x" * (limits.MAX_JSON_CHARS - 4) + '"]',
        '["' + "x" * (limits.MAX_JSON_CHARS - 3) + '"]',
        "[" + ",".join(["1"] * 11) + "]",
        "[" + ",".join(["1"] * 12) + "]",
    ],
    ids=lambda text: f"{text[:12]!a} {len(text)}",
)
def test_they_agree_at_the_caps_and_on_what_only_other_readers_take(text):
    agree(text)


def test_what_is_sound_is_read_quickly():
    text = ' {"a": [1, 2.5, "é", null], "b": {}}'
    assert read_quickly(text, 1, 100) == ({"a": [1, 2.5, "é", None], "b": {}}, len(text), 7)
    assert read_quickly(text, 1, 7) is not None and read_quickly(text, 1, 6) is None
    assert read_quickly("1", 0, 100) is None and read_quickly("", 0, 100) is None
