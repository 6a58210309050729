"""Normal forms in which strings, dates and numbers are compared."""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import UTC, date, datetime, timedelta

from verifiers import limits

_DATE = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})")
_DATE_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,30}))?)?"
    r"(?:([Zz])|([+-])([0-9]{2}):?([0-9]{2}))?"
)
# RFC 3339, section 5.6: seconds and an offset are not optional there, and T is a T.
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,30})?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_MAX_DATE_CHARS = 64
_CHUNK = 256

# Characters that normalization may have to sort: combining marks, which end before plane 2, and the five characters
# (Tibetan vowels, half-width katakana sound marks) that are none themselves but decompose into them.
_MARKS = "".join(char for char in map(chr, range(0x300, 0x20000)) if unicodedata.combining(char)) + (
    "\u0f73\u0f75\u0f81\uff9e\uff9f"
)
# A mark that no mark goes before, then the rest: a run is tried from its beginning only, so the search is linear.
_LONG_RUN = re.compile(f"[{_MARKS}](?<![{_MARKS}]{{2}})[{_MARKS}]{{{limits.MAX_COMBINING_RUN}}}")


def is_full_date(text: str) -> bool:
    """True for an RFC 3339 full-date that exists (``2025-03-03``): JSON Schema's ``format: date``."""
    match = _DATE.fullmatch(text)
    if match is None:
        return False
    try:
        date(int(match[1]), int(match[2]), int(match[3]))
    except ValueError:
        return False
    return True


def is_date_time(text: str) -> bool:
    """True for an RFC 3339 date-time that exists: JSON Schema's ``format: date-time``."""
    return _RFC3339.fullmatch(text) is not None and normal_date(text) is not None


def normal_date(text: str, formats: tuple[str, ...] = ()) -> tuple[str, str] | None:
    """The normal form of an ISO 8601 date or date-time, or None if `text` is neither.

    ``("date", "2025-03-03")`` for a date, ``("instant", ...)`` in UTC for a time with an offset, ``("local", ...)``
    for a time without one; the three never equal one another. Fractions of a second lose trailing zeros. `formats`
    are further spellings of a date for ``datetime.strptime``, tried in order.
    """
    if len(text) > _MAX_DATE_CHARS:
        return None
    if is_full_date(text):
        return "date", text
    match = _DATE_TIME.fullmatch(text)
    if match is not None:
        return _normal_date_time(match)
    for spelling in formats:
        try:
            return "date", datetime.strptime(text, spelling).date().isoformat()
        except ValueError:
            continue
    return None


def _normal_date_time(match: re.Match[str]) -> tuple[str, str] | None:
    day, hour, minute, second, fraction, zulu, sign, offset_hours, offset_minutes = match.groups()
    if not is_full_date(day):
        return None
    leap = second == "60"
    try:
        moment = datetime.fromisoformat(f"{day}T{hour}:{minute}:{'59' if leap else second or '00'}")
        if sign is not None:
            if int(offset_hours) > 23 or int(offset_minutes) > 59:
                return None
            offset = timedelta(hours=int(offset_hours), minutes=int(offset_minutes))
            moment = moment - offset if sign == "+" else moment + offset
    except (ValueError, OverflowError):
        return None
    if leap and (moment.hour, moment.minute) != (23, 59):  # leap seconds end a UTC day
        return None
    kind = "instant" if zulu or sign else "local"
    digits = (fraction or "").rstrip("0")
    return kind, f"{moment.replace(tzinfo=UTC):%Y-%m-%dT%H:%M}:{60 if leap else moment.second:02d}.{digits}"


def normal_string(text: str, *, nfkc: bool, collapse_whitespace: bool, casefold: bool) -> str:
    """`text` in Unicode form NFKC, runs of white space as one space and none at the ends, case folded: each if asked.

    A text with a run of more than `limits.MAX_COMBINING_RUN` combining marks keeps its Unicode form: sorting such a
    run takes quadratic time, and nothing but an attack has one.
    """
    if nfkc and not text.isascii() and _LONG_RUN.search(text) is None:
        text = unicodedata.normalize("NFKC", text)
    if collapse_whitespace:
        text = " ".join(text.split())
    return text.casefold() if casefold else text


def too_long_to_equal(text: str, normal: str) -> bool:
    """True if `text` in NFKC cannot be as short as `normal`, read only as far as it takes to know.

    NFKC is slow and makes up to 18 characters of one, so a long text is not worth normalizing to find it unequal.
    Composing makes one character of four at most (UAX #15: no canonical decomposition is longer), and white space is
    not counted because it may collapse: a quarter of the decomposed letters is the least that can be left.
    """
    letters, allowed = 0, 4 * len(normal)
    for start in range(0, len(text), _CHUNK):
        chunk = text[start : start + _CHUNK]
        if not chunk.isascii() and _LONG_RUN.search(chunk) is None:
            chunk = unicodedata.normalize("NFKD", chunk)
        letters += len("".join(chunk.split()))
        if letters > allowed:
            return True
    return False


def numbers_equal(gold: int | float, number: int | float, relative: float, absolute: float) -> bool:
    """Equality by value: ``|gold - number| <= max(relative * |gold|, absolute)``; two integers must be equal.

    Integers are exact because they are counts and identifiers, whose last digit matters whatever their size.
    Both must be within the range of a double.
    """
    if gold == number:
        return True
    if isinstance(gold, int) and isinstance(number, int):
        return False
    difference = abs(float(gold) - float(number))
    return math.isfinite(difference) and difference <= max(relative * abs(float(gold)), absolute)
