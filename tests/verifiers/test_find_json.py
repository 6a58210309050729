"""What counts as found, rule by rule, and for random surroundings."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers.find_json import Found, NotFound, find_json

WHOLE = '{"a": 1}'


@pytest.mark.parametrize(
    ("text", "value", "clean"),
    [
        # 1. the whole output
        (WHOLE, {"a": 1}, True),
        (f"\n  {WHOLE}\r\n\t", {"a": 1}, True),
        ("[1, 2]", [1, 2], True),
        ("42", 42, True),
        ("null", None, True),
        # 2. fences
        (f"```json\n{WHOLE}\n```", {"a": 1}, True),
        (f"```\n{WHOLE}\n```\n", {"a": 1}, True),
        (f"```json\n{WHOLE}", {"a": 1}, True),  # the output stopped at the fence
        (f"```json {WHOLE} ```", {"a": 1}, True),
        (f"Here:\n```json\n{WHOLE}\n```", {"a": 1}, False),
        (f"```json\n{WHOLE}\n```\nDone.", {"a": 1}, False),
        ('```\n{"a": 0}\n```\nor\n```\n{"a": 2}\n```', {"a": 2}, False),
        (f'```json\n{WHOLE}\n```\nnot {{"a": 3}}', {"a": 1}, False),  # a fence goes before text
        (f'{WHOLE}\n```python\nprint("hi")\n```', {"a": 1}, False),  # a fence without JSON does not
        ('```\n[7]\n```\nso {"a": 4}', {"a": 4}, False),  # nor one of another kind
        ('```\n{"a": 1}\n{"a": 2}\n```', {"a": 2}, False),  # two values are no document, but stand in the text
        # 3. the last one in the text
        (f"The answer is {WHOLE}.", {"a": 1}, False),
        ('{"a": 1} or rather {"a": 2}', {"a": 2}, False),
        ('{"a": 1} as [1] says', {"a": 1}, False),
        ("only [1, 2] here", [1, 2], False),
        ('a {set} of [things], then {"a": 5}', {"a": 5}, False),
        ('say "}" and {"a": 6} and "{"', {"a": 6}, False),
        ('{"a": "}{"} tail', {"a": "}{"}, False),
        ('{"a": "\\"}"} tail', {"a": '"}'}, False),
        ('use {"name": <text>}: {"a": 7}', {"a": 7}, False),  # a broken value is skipped as a whole
        ('{"a": NaN} {"a": 8}', {"a": 8}, False),
        ('{"a": 1, "a": 2} {"a": 9}', {"a": 9}, False),
        ('{"a": 10} then {"a": 11, "b', {"a": 10}, False),  # the last complete one
    ],
)
def test_finds(text, value, clean):
    found = find_json(text, "object")
    assert isinstance(found, Found)
    assert (found.value, found.clean) == (value, clean)
    assert json.loads(text[found.start : found.end]) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON in the output"),
        ("The total is 42 and the name is null.", "no JSON in the output"),
        ("see [above] and {this}", "no JSON in the output"),
        ('{"a": {"b": 1}', "truncated"),  # nothing inside a broken value counts
        ('{"a": {"b": 1}, c: 2}', "expected a key in double quotes"),
        ('[{"a": 1} {"a": 2}]', "expected a comma or ]"),
        ("{'a': [1, 2]}", "expected a key"),
        ("{a: [1, 2]}", "expected a key"),
        ('{"a": "x\ny", "b": {"c": 1}}', "control character"),
        ('```json\n{"a": {"b": 1}\n```', "malformed: expected a comma or }"),
        ('{"a": 1, "a": 2}', "duplicate key"),
    ],
)
def test_finds_nothing_and_says_why(text, reason):
    found = find_json(text, "object")
    assert isinstance(found, NotFound)
    assert reason in found.reason


def test_the_expected_kind_goes_first_and_any_kind_is_better_than_none():
    text = '{"a": 1} and [2]'
    assert find_json(text, "object").value == {"a": 1}
    assert find_json(text, "array").value == [2]
    assert find_json(text).value == [2]
    assert find_json('{"a": 1}', "array").value == {"a": 1}
    assert find_json("```\n3\n```", "scalar").value == 3
    assert isinstance(find_json("it is 3", "scalar"), NotFound)


plain = st.text(alphabet=st.characters(blacklist_characters='{}["`', blacklist_categories=["Cs"]), max_size=60)
objects = st.dictionaries(
    st.text(max_size=8), st.text(max_size=12) | st.integers(-99, 99) | st.lists(st.booleans()), max_size=5
)


@settings(deadline=None)
@given(plain, objects, plain, st.booleans())
def test_finds_the_object_in_any_prose(before, gold, after, fenced):
    text = json.dumps(gold, ensure_ascii=False)
    if fenced:
        text = f"\n```json\n{text}\n```\n"
    found = find_json(before + text + after, "object")
    assert isinstance(found, Found) and found.value == gold
    # JSON's own white space and the wider one of str.strip agree on what is clean
    assert found.clean is (not (before + after).strip())


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet='{}[]",:`\\n a1', max_size=80), objects)
def test_a_final_object_after_balanced_noise_is_found_or_swallowed_but_never_altered(noise, gold):
    text = noise + "\n" + json.dumps(gold)
    found = find_json(text, "object")
    if isinstance(found, Found):
        assert json.loads(text[found.start : found.end]) == found.value
