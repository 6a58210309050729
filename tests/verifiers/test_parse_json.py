"""The strict reader agrees with the standard library on JSON and refuses what only other readers take."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers import limits
from verifiers.parse_json import Budget, MalformedJson, OverLimit, parse_json

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)


@settings(deadline=None)
@given(json_values, st.sampled_from([None, 2]), st.booleans(), st.sampled_from(["", " trailing", "]", "\n}"]))
def test_reads_what_the_standard_library_writes(value, indent, ascii_only, after):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    if after == " trailing" or not text[-1].isdigit():
        read, end = parse_json(f"x {text}{after}", 1, Budget())
        assert end == 2 + len(text)
        assert read == value and json.dumps(read) == json.dumps(value)


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet='[]{}",:\\ntruefalse0123.5eE+- \n\u00e9u', max_size=24))
def test_takes_a_document_only_if_the_standard_library_does(text):
    try:
        value, end = parse_json(text, 0, Budget())
    except MalformedJson as error:
        assert 0 <= error.position <= len(text)
        return
    assert json.dumps(json.loads(text[:end])) == json.dumps(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "duplicate key 'a' at character 9"),
        ('{"a": {"b": 1, "\\u0062": 2}}', "duplicate key 'b'"),
        ('{"a": NaN}', "NaN is not JSON, at character 6"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ('{"a": 1e999}', "number out of range at character 6"),
        (f"[{'1' * 500}]", "number out of range"),
        ('["\\ud800"]', "lone surrogate"),
        ('["\\x"]', "bad escape in the string at character 1"),
        ('["a\nb"]', "control character in a string at character 3"),
        ('{"a": 1', "truncated: the output ends inside the JSON"),
        ('{"a": "x', "truncated: the output ends inside a string"),
        ('{"a": "x\\', "truncated: the output ends inside a string"),
        ('{"a"', "truncated"),
        ("[1,]", "expected a value at character 3, found ']'"),
        ('{"a": 1,}', "expected a key in double quotes at character 8"),
        ("{'a': 1}", "expected a key or }"),
        ("[01]", "malformed: expected a value"),
        ("[1.]", "malformed"),
        ("[.5]", "malformed"),
        ("[+1]", "malformed"),
        ("[1 2]", "expected a comma or ] at character 3"),
        ("[truely]", "malformed"),
        ('{"a" 1}', "expected a colon"),
        ("[\u0661]", "malformed"),  # a digit, but not an ASCII one
        ("[1\u00a0]", "malformed"),  # white space, but not JSON's
    ],
)
def test_says_where_and_why_a_text_is_not_json(text, reason):
    with pytest.raises(MalformedJson) as caught:
        parse_json(text, 0, Budget())
    assert reason in str(caught.value)


def test_a_bracket_in_prose_is_no_attempt_at_json():
    for text, serious in [
        ("[see below", False),
        ("{hello}", False),
        ("[[[ and", False),
        ("[1 2", True),
        ("{'a': 1}", True),
        ("{a: 1}", True),
        ("[NaN]", True),
        ('{"a', True),
    ]:
        with pytest.raises(MalformedJson) as caught:
            parse_json(text, 0, Budget())
        assert caught.value.serious is serious, text


def test_caps_hold_exactly():
    depth, values = limits.MAX_DEPTH, limits.MAX_VALUES
    assert parse_json("[" * depth + "]" * depth, 0, Budget())[1] == 2 * depth
    with pytest.raises(OverLimit, match=f"deeper than {depth}"):
        parse_json("[" * (depth + 1) + "]" * (depth + 1), 0, Budget())
    assert len(parse_json("[" + ",".join(["1"] * (values - 1)) + "]", 0, Budget())[0]) == values - 1
    with pytest.raises(OverLimit, match=f"more than {values} JSON values"):
        parse_json("[" + ",".join(["1"] * values) + "]", 0, Budget())
    with pytest.raises(OverLimit, match="key of more than"):
        parse_json('{"' + "k" * (limits.MAX_KEY_CHARS + 1) + '": 1}', 0, Budget())
    with pytest.raises(OverLimit, match="JSON value of more than"):
        parse_json('["' + "x" * limits.MAX_JSON_CHARS + '"]', 0, Budget())
