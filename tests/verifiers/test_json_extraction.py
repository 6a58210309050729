"""The verdict as a whole."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers import limits
from verifiers.json_extraction import COMPONENTS, CompareOptions, RewardDesign, check_gold, verify

SCHEMA = {
    "type": "object",
    "properties": {
        "number": {"type": "string"},
        "date": {"type": "string", "format": "date"},
        "total": {"type": "number"},
        "items": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["number", "date", "total"],
    "additionalProperties": False,
}
GOLD = {"number": "INV-7", "date": "2025-03-03", "total": 12.5, "items": ["bolt", "nut"]}
DESIGNS = [RewardDesign("binary"), RewardDesign("weighted", {"total": 3}), RewardDesign("decomposed", {"clean": 0.1})]


def answer(**changes):
    return json.dumps({**GOLD, **changes})


def test_an_exact_answer():
    verdict = verify(answer(), GOLD, SCHEMA)
    assert verdict.components == dict.fromkeys(COMPONENTS, 1.0)
    assert (verdict.reward, verdict.reason, verdict.value) == (1.0, None, GOLD)
    assert verdict.missing == verdict.invented == verdict.wrong == ()


def test_chatter_costs_clean_but_not_exact_match():
    verdict = verify(f"Sure! {answer()} Anything else?", GOLD, SCHEMA)
    assert verdict.components == {**dict.fromkeys(COMPONENTS, 1.0), "clean": 0.0}
    assert verdict.reward == 1.0 and verdict.reason is None


def test_a_wrong_missing_and_invented_field():
    text = json.dumps({"number": "INV-7", "total": "12.50", "items": ["bolt", "nut", "saw"]})
    verdict = verify(text, GOLD, SCHEMA)
    assert verdict.wrong == ("total",) and verdict.missing == ("date",) and verdict.invented == ("items.2",)
    assert verdict.components["schema"] == 0.0 and verdict.components["exact_match"] == 0.0
    assert verdict.components["fields"] == pytest.approx(3 / 6)
    assert verdict.components["precision"] == pytest.approx(3 / 5)
    assert verdict.components["recall"] == pytest.approx(3 / 5)
    assert verdict.reason == (
        "1 wrong (total); 1 missing (date); 1 invented (items.2); schema: total: '12.50' is not of type 'number'"
    )


def test_an_unnormalized_date_is_no_exact_match():
    verdict = verify(answer(date="3 March 2025"), GOLD, SCHEMA)
    assert verdict.wrong == ("date",) and verdict.components["exact_match"] == 0.0
    assert verdict.components["schema"] == 0.0
    # A lenient comparison makes the field right, yet the format of the schema still stands in the way.
    lenient = verify(answer(date="3 March 2025"), GOLD, SCHEMA, options=CompareOptions(date_formats=("%d %B %Y",)))
    assert lenient.wrong == () and lenient.components["exact_match"] == 0.0
    assert "is not a 'date'" in lenient.reason


def test_right_fields_that_break_the_schema_are_no_exact_match():
    verdict = verify('{"a": "x  y"}', {"a": "x y"}, {"properties": {"a": {"maxLength": 3}}}, RewardDesign("binary"))
    assert verdict.components["fields"] == 1.0
    assert (verdict.reward, verdict.components["exact_match"]) == (0.0, 0.0)


def test_no_json_scores_zero_with_a_reason():
    for text, reason in [
        ("", "no JSON"),
        ('{"number": "INV', "truncated"),
        ('{"a": 1, "a": 1}', "duplicate key"),
        ('{"total": NaN}', "NaN is not JSON"),
        ("[" * 1_000_000, "more than"),
        ("[" * 1_000 + "]" * 1_000, "nested deeper than"),
    ]:
        verdict = verify(text, GOLD, SCHEMA)
        assert verdict.components == dict.fromkeys(COMPONENTS, 0.0) and verdict.reward == 0.0
        assert reason in verdict.reason and verdict.value is None


def test_without_a_schema_only_parsing_counts_for_it():
    assert verify("{}", {"a": 1}).components["schema"] == 1.0
    assert verify("x", {"a": 1}).components["schema"] == 0.0


def test_gold_of_other_kinds():
    assert verify("The list: [1, 2]", [1, 2]).components["exact_match"] == 1.0
    assert verify("```\n5\n```", 5).components["exact_match"] == 1.0
    assert verify("null", None).components["exact_match"] == 1.0
    assert verify("5", True).components["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ({"a": float("nan")}, "cannot hold at a"),
        ({"a": [1, 10**400]}, "cannot hold at a.1"),
        ({"a": (1, 2)}, "a tuple at a"),
        ({1: 2}, "keys must be strings"),
        ([[]] * limits.MAX_VALUES, "more than"),
        (json.loads("[" * 40 + "]" * 40), "nested deeper"),
        ({"number": "x"}, "does not satisfy its own schema"),
    ],
)
def test_a_faulty_gold_is_refused(gold, message):
    for check in (lambda: check_gold(gold, SCHEMA), lambda: verify(answer(), gold, SCHEMA)):
        with pytest.raises(ValueError, match=message):
            check()
    check_gold(GOLD, SCHEMA)


def test_a_gold_that_contains_itself_is_refused():
    gold = {}
    gold["self"] = gold
    with pytest.raises(ValueError, match="nested deeper"):
        check_gold(gold)


def test_listed_paths_are_capped_but_all_are_counted():
    many = limits.MAX_REPORTED_PATHS + 100
    verdict = verify("{}", {f"k{i}": i for i in range(many)})
    assert len(verdict.missing) == limits.MAX_REPORTED_PATHS
    assert verdict.reason.startswith(f"{many} missing (k0, k1, k2, …)")


def test_a_verdict_and_its_settings_travel_between_processes():
    verdict, design, options = pickle.loads(pickle.dumps((verify("{}", GOLD), DESIGNS[1], CompareOptions(dates=True))))
    assert design == DESIGNS[1] and options == CompareOptions(dates=True)
    assert verdict == verify("{}", GOLD)


numbers = st.integers(-(10**12), 10**12) | st.floats(-1e12, 1e12)
golds = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | numbers | st.text(max_size=12) | st.dates().map(str),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=5,
)
fenced = st.sampled_from(
    [
        "{}",
        " {}\n",
        "```json\n{}\n```",
        "```\n{}",
        "Here you are:\n```json\n{}\n```\nBye.",
        "<think>maybe [1]</think>{}",
        "As {{1}} and [2] say, {}. See [3].",
    ]
)


@settings(deadline=None)
@given(golds, fenced, st.sampled_from([None, 1, 4]), st.booleans(), st.randoms(use_true_random=False))
def test_gold_rendered_in_any_way_is_an_exact_match(gold, template, indent, ascii_only, random):
    def shuffled(value):
        if isinstance(value, dict):
            keys = list(value)
            random.shuffle(keys)
            return {key: shuffled(value[key]) for key in keys}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    text = template.replace("{{1}}", "(1)").replace(
        "{}", json.dumps(shuffled(gold), indent=indent, ensure_ascii=ascii_only)
    )
    for design in (RewardDesign("binary"), RewardDesign("weighted"), RewardDesign("decomposed")):
        verdict = verify(text, gold, design=design)
        assert verdict.components["exact_match"] == 1.0 and verdict.reward == 1.0, verdict.reason


jsonish = st.text(alphabet='{}[]",:.`\\ \nabtruefalsn0123456789-+eE"date"', max_size=120)
broken = st.builds(
    lambda text, cut, junk: text[:cut] + junk + text[cut:], st.just(answer()), st.integers(0, 90), st.text(max_size=3)
)
cut_off = st.integers(0, 90).map(lambda length: answer()[:length])


@settings(deadline=None, max_examples=300)
@given(st.text() | jsonish | broken | cut_off | golds.map(json.dumps), st.sampled_from(DESIGNS), st.booleans())
def test_any_text_gets_a_verdict_within_bounds(text, design, with_schema):
    verdict = verify(text, GOLD, SCHEMA if with_schema else None, design)
    assert 0.0 <= verdict.reward <= 1.0
    assert set(verdict.components) == set(COMPONENTS)
    assert all(0.0 <= score <= 1.0 for score in verdict.components.values())
    assert (verdict.reason is None) == (verdict.components["exact_match"] == 1.0)
    assert verdict.components["parse"] == 1.0 or not any(verdict.components.values())


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_decomposed_reward_rises_with_every_right_field(gold, data):
    order = data.draw(st.permutations(sorted(gold)))
    ways = data.draw(st.lists(st.sampled_from(["wrong", "missing"]), min_size=len(order), max_size=len(order)))
    invented = data.draw(st.integers(0, 3))
    value = {key: "no" for key, way in zip(order, ways, strict=True) if way == "wrong"}
    value.update({f"invented{index}": 1 for index in range(invented)})
    rewards = []
    for count in range(len(order) + 1):
        value.update({key: gold[key] for key in order[:count]})
        rewards.append(verify(json.dumps(value), gold, design=RewardDesign("decomposed")).reward)
    assert rewards == sorted(rewards) and len(set(rewards)) == len(rewards)
    assert (rewards[-1] == 1.0) == (invented == 0)


def test_a_gold_is_checked_against_every_schema_and_as_it_is_now():
    gold = {"a": [1, 2]}
    assert verify("{}", gold, {"type": "object"}).reward < 1.0
    for schema in ({"type": "array"}, {"properties": {"a": {"maxItems": 1}}}):
        with pytest.raises(ValueError, match="its own schema"):
            verify("{}", gold, schema)
    schema = {"properties": {"a": {"maxItems": 2}}}
    check_gold(gold, schema)
    gold["a"].append(3)
    with pytest.raises(ValueError, match="its own schema"):
        check_gold(gold, schema)
    schema["properties"]["a"]["maxItems"] = 3
    check_gold(gold, schema)
    for other in ({"a": (1, 2)}, {"a": [1, 2], 1: 2}):
        with pytest.raises(ValueError, match="not JSON|keys must be strings"):
            check_gold(other)
