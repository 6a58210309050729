"""A schema may be hostile as well: refused when it is compiled, or a verdict within 50 ms of CPU time."""

import json
import time

import pytest

from verifiers import limits
from verifiers.json_extraction import verify
from verifiers.schema import compile_schema

VERDICT_S = 0.050
COMPILE_S = 5.0  # about 1 on the machine that the caps were chosen on; once a schema

REPEATED = "a" * 900 + "!"
WORDS = "word " * 190 + "!"


def patterned(pattern):
    return {"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}}


def doubling(leaf, **top):
    definitions = {f"d{index}": {"allOf": [{"$ref": f"#/$defs/d{index + 1}"}] * 2} for index in range(30)}
    return {"$defs": {**definitions, "d30": leaf}, "properties": {"x": {"$ref": "#/$defs/d0"}}, **top}


def nested(key, depth, wrap=lambda schema: schema):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {key: wrap(schema)}
    return {"properties": {"x": schema}}


NUMBERS = list(range(1_900))
KEYS = {f"k{index}": 0 for index in range(900)}
MANY = [f"value {index}" for index in range(6_000)]

# What a model could answer, with the schema: {"x": value}.
PATTERNS = {
    "nested plus": (r"^(a+)+$", REPEATED),
    "nested star": (r"^(a*)*$", REPEATED),
    "alternatives that overlap": (r"^(a|aa)+$", REPEATED),
    "alternatives that are equal": (r"^(a|a)*$", REPEATED),
    "alternatives of classes": (r"^([a-z]|[a-y])+$", REPEATED),
    "optional in a repetition": (r"^(a?b?c?)*$", REPEATED),
    "many optional": (r"^(?:a?){60}a{60}$", "a" * 59),
    "words": (r"^(\w+\s?)*$", WORDS),
    "words and dots": (r"^([\w.]+[ .]?)+$", WORDS),
    "three stars": (r"(.*)(.*)(.*)=$", REPEATED),
    "five stars": (r"^.*.*.*.*.*=$", REPEATED),
    "dots in dots": (r"^(.+)+=(.+)+$", REPEATED),
    "back-reference": (r"^(a*)*\1b$", REPEATED),
    "back-references": (r"^(a+)(a+)(a+)\1\2\3b$", REPEATED),
    "look-ahead": (r"^(?=(a+))*(a|aa)+$", REPEATED),
    "look-ahead of a repetition": (r"^(?:(?=(a|aa)+!b)a)+$", REPEATED),
    "negative look-ahead": (r"^(?:(?!(a|aa)+b).)*$", REPEATED),
    "e-mail": (r"^([a-zA-Z0-9])(([\-.]|[_]+)?([a-zA-Z0-9]+))*(@){1}[a-z0-9]+$", REPEATED),
    "address": (r"^(([a-z0-9]+)(-|\.|_)?)*@example$", REPEATED),
    "quoted": (r'^"(?:[^"\\]|\\.|[^"])*"$', '"' + "a" * 900),
    "unanchored pairs": (r"(x+x+)+y", "x" * 900),
    "unanchored whitespace": (r"\s+$", " " * 998 + "."),
    "quadratic search": (r"\d+-\d+", "1" * 1_000),
    "large counted": (r"^(a{1,90}){1,90}$", REPEATED),
    "ignoring case": (r"(?i)^(ß|ss|s)+$", "s" * 900 + "!"),
    "lazy": (r"^(a+?)+?$", REPEATED),
    "two groups": (r"^((ab)*|(a|b)*)*$", "ab" * 450 + "!"),
    "conditional": (r"^((a)|(b))+(?(2)c|d)+$", REPEATED),
}
REFUSED_PATTERNS = {
    "counted in counted": "(a{1000}){1000}",
    "counted four times": "((((a{99}){99}){99}){99}){99}",
    "counted beyond any": "a{4294967296}",
    "a count of many digits": "a{" + "9" * 1_000 + "}",
    "deep groups": "(" * 900 + "a" + ")" * 900,
    "deep repetitions": "(?:" * 450 + "a" + ")*" * 450,
    "a long one": "a|" * 2_000,
    "an open group": "(",
    "a wild repetition": "*",
}
SCHEMAS = {
    "references that double": (doubling({"type": "string"}), "x"),
    "references that double, unevaluated": (
        {**doubling({"properties": {"x": True}}), "$ref": "#/$defs/d0", "unevaluatedProperties": False},
        1,
    ),
    "references in a circle": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        1,
    ),
    "a reference to all": ({"allOf": [{"$ref": "#"}] * 3}, 1),
    "a dynamic reference to all": ({"$dynamicAnchor": "n", "anyOf": [{"$dynamicRef": "#n"}] * 3}, 1),
    "a circle with many ways": (
        {"$defs": {"d": {"anyOf": [{"$ref": "#/$defs/d"}] * 100}}, "properties": {"x": {"$ref": "#/$defs/d"}}},
        1,
    ),
    "deep items": (nested("items", 45), [[1]]),
    "deep alternatives": (nested("anyOf", 45, lambda schema: [schema, {"type": "null"}]), 3),
    "deep negations": (nested("not", 90), 3),
    "many alternatives": ({"properties": {"x": {"anyOf": [{"maxLength": 1}] * 3_000}}}, "x" * 60_000),
    "many of one of": ({"properties": {"x": {"oneOf": [{"type": "object"}] * 2_000}}}, KEYS),
    "a large enum for each": (
        {"$defs": {"e": {"enum": MANY}}, "properties": {"x": {"items": {"not": {"$ref": "#/$defs/e"}}}}},
        NUMBERS,
    ),
    "a large enum that holds nothing": (
        {"$defs": {"e": {"enum": MANY}}, "properties": {"x": {"contains": {"$ref": "#/$defs/e"}}}},
        NUMBERS,
    ),
    "an enum of large arrays": (
        {"properties": {"x": {"contains": {"enum": [[*range(200), index] for index in range(90)]}}}},
        [[*range(200), -1]] * 9,
    ),
    "a large constant": ({"properties": {"x": {"contains": {"const": MANY}}}}, [["value 0"]] * 900),
    "many required": ({"properties": {"x": {"contains": {"required": MANY}}}}, [{}] * 1_900),
    "many properties": (
        {"properties": {"x": {"items": {"properties": dict.fromkeys(MANY[:4_000], True)}}}},
        [{"a": 1}] * 900,
    ),
    "many dependents": (
        {"properties": {"x": {"dependentRequired": {key: [f"{key}x"] for key in MANY[:3_000]}}}},
        dict.fromkeys(MANY[:900], 0),
    ),
    "many patterns of keys": (
        {"properties": {"x": {"patternProperties": {f"a*{index}$": {} for index in range(400)}}}},
        {f"{'a' * 100}{index}": 0 for index in range(450)},
    ),
    "slow patterns of keys": (
        {"properties": {"x": {"patternProperties": {"^(a|aa)+$": {}}, "additionalProperties": False}}},
        {"a" * 100 + "!": 1},
    ),
    "slow patterns of names": (
        {"properties": {"x": {"propertyNames": {"pattern": "^(a|aa)+$"}}}},
        {"a" * 100 + "!": 1},
    ),
    "slow patterns beside unevaluated": (
        {"properties": {"x": {"patternProperties": {"^(a|aa)+$": {}}, "unevaluatedProperties": False}}},
        {"a" * 100 + "!": 1},
    ),
    "slow patterns that match each of many": (
        {"properties": {"x": {"items": {"pattern": r"^(?:(a|aa)+b|a+!)$"}}}},
        ["a" * 22 + "!"] * 400,
    ),
    "unique, over and over": ({"properties": {"x": {"allOf": [{"uniqueItems": True}] * 1_000}}}, NUMBERS),
    "unique inside, over and over": (
        {"properties": {"x": {"allOf": [{"uniqueItems": True}] * 1_000}}},
        [NUMBERS[:1_800]],
    ),
    "unevaluated items": (
        {"properties": {"x": {"allOf": [{"contains": {"type": "integer"}}] * 300, "unevaluatedItems": False}}},
        NUMBERS,
    ),
    "unevaluated in unevaluated": (
        {
            "$defs": {"u": {"anyOf": [{"$ref": "#/$defs/u"}, {"type": "object"}], "unevaluatedProperties": False}},
            "properties": {"x": {"$ref": "#/$defs/u"}},
        },
        KEYS,
    ),
    "contains": ({"properties": {"x": {"contains": {"const": -1}, "minContains": 1}}}, NUMBERS),
    "dates everywhere": ({"properties": {"x": {"allOf": [{"format": "date-time"}] * 900}}}, "2025-03-03T00:00:00Z"),
    "a long date": ({"properties": {"x": {"format": "date-time"}}}, "2025-03-03T00:00:00." + "0" * 60_000 + "Z"),
    "a date in many places": (
        {"properties": {"x": {"allOf": [{"items": {"anyOf": [{"format": "date"}] * 40}}] * 40}}},
        ["2025-03-03"] * 900,
    ),
    "multiples of nearly nothing": ({"properties": {"x": {"items": {"multipleOf": 1e-300}}}}, [1e300] * 900),
    "multiples of a large number": ({"properties": {"x": {"items": {"multipleOf": 10**300}}}}, [10**300 + 1] * 150),
    "if and then": (
        {"properties": {"x": {"allOf": [{"if": {"items": {"type": "integer"}}, "then": {"maxItems": 9_999}}] * 99}}},
        NUMBERS,
    ),
    "negations that print all": ({"properties": {"x": {"contains": {"not": {"enum": [["x"], MANY]}}}}}, [["x"]] * 900),
    "a schema of 1 MB": ({"enum": ["x" * 1_000_000]}, 1),
    "a schema of 10,000 levels": (None, 1),
    "10,000 patterns": ({"patternProperties": {f"a{index}": {} for index in range(5_000)}}, 1),
    "a remote reference": ({"$ref": "https://example.com/schema.json"}, 1),
    "a reference to a file": ({"$ref": "file:///etc/passwd"}, 1),
    "references to one another's names": (
        {
            "$defs": {
                f"d{index}": {"$id": f"http://x/{index}", "$ref": f"http://x/{index // 2}"} for index in range(300)
            }
        },
        1,
    ),
}


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def outcome(schema, value):
    """A verdict and its CPU seconds, the best of three; or the error that compiling gave, and None."""
    text = json.dumps({"x": value})
    start = time.process_time()
    try:
        compile_schema(schema)
    except ValueError as refused:
        assert time.process_time() - start < COMPILE_S
        return refused, None
    assert time.process_time() - start < COMPILE_S
    gold = {"x": value} if compile_schema(schema).fault({"x": value}) is None else None
    seconds = []
    for _ in range(3):
        start = time.process_time()
        try:
            verdict = verify(text, gold, schema)
        except ValueError as refused:  # the gold null does not satisfy the schema either: the user is told
            verdict = refused
        seconds.append(time.process_time() - start)
    return verdict, min(seconds)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_hostile_schema_is_refused_or_judged_in_time(name):
    schema, value = SCHEMAS[name]
    verdict, seconds = outcome(deep(10_000) if schema is None else schema, value)
    assert str(verdict)
    if seconds is not None:
        assert seconds < VERDICT_S, f"{seconds * 1e3:.1f} ms"


@pytest.mark.parametrize("name", PATTERNS)
def test_a_hostile_pattern_is_judged_in_time(name):
    pattern, value = PATTERNS[name]
    schema = patterned(pattern)
    start = time.process_time()
    compile_schema(schema)
    assert time.process_time() - start < COMPILE_S
    text, gold = json.dumps({"x": value}), {}
    seconds, faults = [], set()
    for _ in range(3):
        start = time.process_time()
        verdict = verify(text, gold, schema)
        seconds.append(time.process_time() - start)
        faults.add(verdict.components["schema"])
    assert faults == {0.0} and verdict.components["parse"] == 1.0
    assert min(seconds) < VERDICT_S, f"{min(seconds) * 1e3:.1f} ms"


@pytest.mark.parametrize("name", REFUSED_PATTERNS)
def test_a_hostile_pattern_that_cannot_be_compiled_is_refused_in_time(name):
    pattern = REFUSED_PATTERNS[name]
    for schema in (patterned(pattern), {"patternProperties": {pattern: {}}}):
        start = time.process_time()
        with pytest.raises(ValueError, match="pattern|not a 'regex'"):
            compile_schema(schema)
        assert time.process_time() - start < COMPILE_S


def test_hostile_neighbours_do_not_change_what_ordinary_patterns_say():
    schema = {"properties": {"x": {"pattern": r"^[A-Z]{2}\d{2}( ?[A-Z0-9]{4}){3,7}$"}}}
    assert verify('{"x": "DE89 3704 0044 0532 0130"}', {"x": "DE89 3704 0044 0532 0130"}, schema).reward == 1.0
    assert verify('{"x": "DE8 3704"}', {"x": "DE89 3704 0044 0532 0130"}, schema).components["schema"] == 0.0
    slow = verify(json.dumps({"x": REPEATED}), {}, patterned(r"^(a|aa)+$"))
    assert slow.components["schema"] == 0.0 and "backtracks for too long" in slow.reason
    # Every validation has the whole time again.
    assert verify('{"x": "aaa"}', {"x": "aaa"}, patterned(r"^(a|aa)+$")).reward == 1.0
    assert limits.MAX_PATTERN_SECONDS < VERDICT_S
