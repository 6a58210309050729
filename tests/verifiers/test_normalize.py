"""Normal forms of dates, strings and numbers."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers.normalize import (
    _MARKS,
    is_date_time,
    is_full_date,
    normal_date,
    normal_string,
    numbers_equal,
    too_long_to_equal,
)

STRING = {"nfkc": True, "collapse_whitespace": True, "casefold": False}


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("2025-03-03", True),
        ("2024-02-29", True),
        ("2025-02-29", False),
        ("2025-13-01", False),
        ("20250303", False),
        ("2025-3-3", False),
        ("2025-W10-1", False),
        (" 2025-03-03", False),
        ("2025-03-03\n", False),
        ("3 March 2025", False),
        ("0000-01-01", False),
        ("\u0662025-03-03", False),
        ("2025-03-03T00:00:00Z", False),
    ],
)
def test_full_date_is_rfc3339(text, valid):
    assert is_full_date(text) is valid


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("2025-03-03T10:00:00Z", True),
        ("2025-03-03t10:00:00z", True),
        ("2025-03-03T10:00:00.25+01:00", True),
        ("2025-03-03T10:00:00", False),
        ("2025-03-03 10:00:00Z", False),
        ("2025-03-03T10:00Z", False),
        ("2025-03-03T24:00:00Z", False),
        ("2025-03-03T10:00:00+24:00", False),
        ("2025-02-30T10:00:00Z", False),
        ("2016-12-31T23:59:60Z", True),
        ("2017-01-01T00:59:60+01:00", True),
        ("2025-03-03T10:00:60Z", False),
        ("2025-03-03", False),
        ("2025-03-03T10:00:00+0100", False),
    ],
)
def test_date_time_is_rfc3339(text, valid):
    assert is_date_time(text) is valid


def test_equal_instants_have_one_normal_form():
    same = [
        "2025-03-03T00:00:00Z",
        "2025-03-03T00:00:00+00:00",
        "2025-03-03T01:30:00+01:30",
        "2025-03-02T22:00:00-02:00",
        "2025-03-03t00:00:00.000z",
        "2025-03-03 00:00Z",
    ]
    assert len({normal_date(text) for text in same}) == 1
    different = [
        "2025-03-03T00:00:01Z",
        "2025-03-03T00:00:00.5Z",
        "2025-03-03T00:00:00",
        "2025-03-03",
        "2025-03-03T00:00:00+01:00",
    ]
    assert len({normal_date(text) for text in [*different, same[0]]}) == len(different) + 1


@pytest.mark.parametrize(
    "text", ["", "March", "0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00", "1" * 70, "2025-02-29"]
)
def test_no_date_has_no_normal_form(text):
    assert normal_date(text) is None


def test_further_spellings_are_tried_only_if_asked():
    assert normal_date("3 March 2025") is None
    assert normal_date("3 March 2025", ("%d/%m/%Y", "%d %B %Y")) == ("date", "2025-03-03")


def test_strings_lose_form_and_white_space_but_not_case():
    assert normal_string("Cafe\u0301\u00a0 du\n Nord ", **STRING) == normal_string("Café du Nord", **STRING)
    assert normal_string("ＡＢＣ", **STRING) == "ABC"
    assert normal_string("abc", **STRING) != normal_string("ABC", **STRING)
    assert normal_string("STRASSE", **{**STRING, "casefold": True}) == normal_string(
        "Straße", **{**STRING, "casefold": True}
    )
    assert normal_string(" a", **{**STRING, "collapse_whitespace": False}) == " a"
    assert normal_string("ＡＢＣ", **{**STRING, "nfkc": False}) == "ＡＢＣ"


def test_every_character_that_decomposes_into_a_mark_first_is_a_mark():
    characters = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert {char for char in characters if unicodedata.combining(unicodedata.normalize("NFKD", char)[0])} == set(_MARKS)


def test_a_run_of_combining_marks_keeps_its_form_only_when_absurd():
    out_of_order, in_order = "e\u0301\u0316", "e\u0316\u0301"
    assert normal_string(out_of_order, **STRING) == normal_string(in_order, **STRING)
    assert normal_string("e" + "\u0301\u0316" * 15, **STRING) == normal_string("e" + "\u0316\u0301" * 15, **STRING)
    absurd = "e" + "\u0301\u0316" * 16
    assert normal_string(absurd, **STRING) == absurd


unicode_text = st.text(
    st.characters(blacklist_categories=["Cs"])
    | st.sampled_from("\u1e69\u0301\u0316\ufdfa\u1fa7\uac01\u1100\u1161\u11a8\u3000 "),
    max_size=40,
)


@settings(deadline=None, max_examples=300)
@given(unicode_text, st.booleans())
def test_no_text_is_too_long_to_equal_its_own_normal_form(text, casefold):
    assert not too_long_to_equal(text, normal_string(text, **{**STRING, "casefold": casefold}))


def test_a_text_is_too_long_if_a_quarter_of_it_is():
    assert too_long_to_equal("é" * 9, "éééé")
    assert not too_long_to_equal("é" * 8, "éééé")
    assert too_long_to_equal("\ufdfa" * 2, "abc")  # 15 letters each, once decomposed


@pytest.mark.parametrize(
    ("gold", "number", "equal"),
    [
        (12.5, 12.50, True),
        (12, 12.0, True),
        (0.3, 0.1 + 0.2, True),
        (0.0, 1e-10, True),
        (0.0, 1e-8, False),
        (100.0, 100.00000005, True),
        (100.0, 100.0000002, False),
        (1e300, -1e300, False),
        (1e308, -1e308, False),
        (4500123456789, 4500123456790, False),  # integers are exact: identifiers differ in the last digit
        (4500123456789, 4500123456789.0, True),
        (12.5, 12.51, False),
        (1234.56, 1234.57, False),
        (-1.5, 1.5, False),
    ],
)
def test_numbers_by_value_with_tolerance(gold, number, equal):
    assert numbers_equal(gold, number, 1e-9, 1e-9) is equal


def test_tolerance_is_relative_to_the_gold_or_absolute():
    assert numbers_equal(100.0, 101.0, 0.01, 0.0)
    assert not numbers_equal(100.0, 101.1, 0.01, 0.0)
    assert numbers_equal(100.0, 100.4, 0.0, 0.5)
    assert not numbers_equal(100.0, 100.6, 0.0, 0.5)
    assert not numbers_equal(100.0, 100.1, 0.0, 0.0)
