"""The three designs, by their formulas."""

import pytest

from verifiers.json_extraction import RewardDesign, verify

GOLD = {"a": 1, "b": 2, "items": [{"price": 3}, {"price": 4}]}
HALF = '{"a": 1, "b": 0, "items": [{"price": 3}], "new": 5}'  # 2 right, 1 wrong, 1 missing, 1 invented


def reward(text, name, weights=None, schema=None):
    return verify(text, GOLD, schema, RewardDesign(name, weights or {})).reward


def test_binary_is_exact_match():
    assert reward('{"items": [{"price": 3}, {"price": 4}], "a": 1, "b": 2}', "binary") == 1.0
    assert reward(HALF, "binary") == 0.0


def test_weighted_counts_every_field_of_the_gold_and_the_invented_ones():
    assert reward(HALF, "weighted") == pytest.approx(2 / 5)
    assert reward(HALF, "weighted", {"a": 3}) == pytest.approx(4 / 7)
    assert reward(HALF, "weighted", {"new": 0}) == pytest.approx(2 / 4)
    assert reward(HALF, "weighted", {"items.*.price": 2}) == pytest.approx(3 / 7)
    assert reward(HALF, "weighted", {"items": 2}) == pytest.approx(3 / 7)
    assert reward(HALF, "weighted", {"items.1": 4, "items.*.price": 2, "items.0.price": 5}) == pytest.approx(6 / 10)
    assert reward(HALF, "weighted", {"$": 2}) == pytest.approx(2 / 5)
    assert reward(HALF, "weighted", {"$": 0, "b": 1}) == 0.0


def test_weights_without_a_field_are_the_users_error_whatever_the_text_is():
    for text in ("", "{}", HALF):
        with pytest.raises(ValueError, match="no field of the gold answer has a weight"):
            reward(text, "weighted", {"$": 0})
    # A text that empties the only weighted field of the denominator scores 0.
    design = RewardDesign("weighted", {"$": 0, "list": 1, "list.0": 0})
    assert verify('{"list": [1]}', {"list": []}, None, design).reward == 0.0


def test_decomposed_adds_up_its_shares():
    schema = {"required": ["b"], "additionalProperties": {"type": ["number", "array"]}}
    assert reward(HALF, "decomposed", schema=schema) == pytest.approx(0.1 + 0.2 + 0.7 * 2 / 5)
    assert reward('{"a": 1}', "decomposed", schema=schema) == pytest.approx(0.1 + 0.7 * 1 / 4)
    assert reward(f"Well: {HALF}", "decomposed", {"parse": 1, "schema": 0, "fields": 2, "clean": 1}) == pytest.approx(
        (1 + 2 * 2 / 5) / 4
    )
    assert reward("nothing", "decomposed", schema=schema) == 0.0
    # An extra key that is not weighted away costs a field.
    assert reward(HALF.replace('"new": 5', '"new": "x"'), "decomposed", schema=schema) == pytest.approx(
        0.1 + 0.7 * 2 / 5
    )


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("best", {}, "unknown reward design 'best'"),
        ("binary", {"a": 1}, "takes no weights"),
        ("weighted", {"a": -1}, "weight of 'a'"),
        ("weighted", {"a": float("nan")}, "weight of 'a'"),
        ("weighted", {"a": True}, "weight of 'a'"),
        ("decomposed", {"field": 1}, "unknown share 'field'"),
        ("decomposed", {"parse": 0, "schema": 0, "fields": 0}, "must not all be 0"),
    ],
)
def test_a_faulty_design_is_refused(name, weights, message):
    with pytest.raises(ValueError, match=message):
        RewardDesign(name, weights)
