"""Finds the query in a model's output.

A query is one statement that begins with SELECT or WITH. What counts as found, in this order:

1. The whole output, white space, comments and a closing semicolon aside, is one statement, and it begins with SELECT
   or WITH: that statement. No statement goes on behind an empty line, unless with a word such as FROM or WHERE, in
   capitals or small letters, a bracket, a comma or a comment.
2. Otherwise the **last code fence** (three backticks, with ``sql``, ``sqlite`` or no language behind them, up to the
   next line of three backticks or the end of the output) whose whole content is one such statement.
3. Otherwise the **last** such statement in the text. It begins at the start of a line, or on a line behind a colon or
   a backtick, in capitals or small letters ("Select the rows" is prose; so is "with" without a name and AS behind
   it), and it ends at a semicolon or backtick outside quotes, at an empty line (see 1), at a line of three
   backticks or at the end of the output.
4. Otherwise nothing.

The last one, because drafts come before the answer; never the best of several, because then spraying guesses would
pay. Whether a statement is SQL at all is decided by running it, not here. Statements beside the one that is found
are never run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from verifiers.sql_limits import MAX_SQL_CHARS, MAX_TEXT_CHARS

# No group is possessive: before Python 3.11.5 one that fails half way keeps what it took (python/cpython#106052).
_COMMENT = r"--[^\n]*+|/\*[^*]*+(?:\*(?!/)[^*]*+)*(?:\*/|\Z)"
_LEADING = re.compile(rf"(?:[ \t\r\n]++|{_COMMENT})*")
_WITH = r"""WITH[ \t\r\n]+(?:RECURSIVE[ \t\r\n]+)?(?:\w+|"[^"\n]*+"|`[^`\n]*+`|\[[^\]\n]*+\])[ \t\r\n]*(?:\(|AS\b)"""
_BEGIN = re.compile(rf"SELECT\b|{_WITH}", re.IGNORECASE)
_BEGIN_IN_TEXT = re.compile(
    rf"(?:^[ \t]*|(?<=:)[ \t]*|(?<=`)[ \t]*)(?=(?P<word>SELECT|select|WITH|with)\b)(?P<query>(?i:SELECT\b|{_WITH}))",
    re.MULTILINE,
)
# What may stand behind an empty line inside a statement.
_CLAUSES = "FROM WHERE GROUP HAVING ORDER LIMIT UNION INTERSECT EXCEPT JOIN INNER LEFT CROSS NATURAL ON AND OR WINDOW"
_GOES_ON = rf"(?:{'|'.join(f'{word}|{word.lower()}' for word in _CLAUSES.split())})\b|[(),]|--|/\*"
# What a statement consists of. An unfinished quote or comment reaches to the end of the text.
_PART = re.compile(
    rf"""(?P<quoted>'[^']*+(?:''[^']*+)*(?:'|\Z)|"[^"]*+(?:""[^"]*+)*(?:"|\Z)|\[[^\]\n]{{0,128}}+\]|{_COMMENT})"""
    r"|(?P<semicolon>;)|(?P<fence>\n[ \t]*+```)|(?P<backtick>`)"
    rf"|(?P<blank>\n[ \t\r]*+\n[ \t\r\n]{{0,200}}+(?!{_GOES_ON}))"
)
_FENCE_LINE = re.compile(r"^[ \t]*+```[^\n`]*+$", re.MULTILINE)
_FENCE_LANGUAGES = ("", "sql", "sqlite")


@dataclass(frozen=True)
class FoundSql:
    """The query, without its closing semicolon, and whether nothing else stands in the output (one fence aside)."""

    query: str
    clean: bool


@dataclass(frozen=True)
class NoSql:
    """No query, and why: one sentence."""

    reason: str


def find_sql(text: str) -> FoundSql | NoSql:
    """Find the query in `text` by the rules of this module's docstring. Never raises, and takes linear time."""
    if len(text) > MAX_TEXT_CHARS:
        return NoSql(f"output of {len(text)} characters, more than {MAX_TEXT_CHARS}")
    found = _find(text)
    if found is None:
        return NoSql("no statement that begins with SELECT or WITH in the output")
    if len(found.query) > MAX_SQL_CHARS:
        return NoSql(f"a query of {len(found.query)} characters, more than {MAX_SQL_CHARS}")
    return found


def _find(text: str) -> FoundSql | None:
    whole = _statement(text)
    if whole is not None:
        return FoundSql(whole, True)
    fences = list(_FENCE_LINE.finditer(text))
    for index in range((len(fences) - 1) // 2 * 2, -1, -2):
        opening = fences[index]
        end = fences[index + 1].start() if index + 1 < len(fences) else len(text)
        if opening.group().strip().lstrip("`").strip().lower() not in _FENCE_LANGUAGES:
            continue
        inside = _statement(text[opening.end() : end])
        if inside is not None:
            behind = fences[index + 1].end() if index + 1 < len(fences) else len(text)
            return FoundSql(inside, not (text[: opening.start()].strip() or text[behind:].strip()))
    return _last_in_text(text)


def _statement(text: str) -> str | None:
    """The one statement that `text` consists of; None if it is something else."""
    if "```" in text:
        return None
    begin = _leading(text)
    if _BEGIN.match(text, begin) is None:
        return None
    for part in _PART.finditer(text, begin):
        if part["semicolon"]:
            rest = text[part.end() :]
            return text[begin : part.start()].strip() if _leading(rest.replace(";", " ")) == len(rest) else None
        if part["blank"] and part.end() < len(text):
            return None
    return text[begin:].strip()


def _last_in_text(text: str) -> FoundSql | None:
    last: str | None = None
    begin = _BEGIN_IN_TEXT.search(text)
    while begin is not None:
        start = begin.start("query")
        end = len(text)
        in_backticks = text[:start].rstrip(" \t").endswith("`")
        for part in _PART.finditer(text, start):
            if part["quoted"] or (part["backtick"] and not in_backticks):
                continue
            end = part.start()
            break
        last = text[start:end].strip()
        begin = _BEGIN_IN_TEXT.search(text, max(end, begin.end()))
    return None if last is None else FoundSql(last, False)


def _leading(text: str) -> int:
    match = _LEADING.match(text)
    return match.end() if match else 0
