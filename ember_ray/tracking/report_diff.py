"""Two texts side by side, the parts that differ marked."""

from __future__ import annotations

import difflib
import re
from html import escape

_PIECES = re.compile(r"\w+|\s+|[^\w\s]")


def marked(before: str, after: str) -> tuple[str, str]:
    """Both texts as HTML with ``<del>`` around what only the first has and ``<ins>`` around what only the second has.

    Texts are compared by words and signs. Everything is escaped.
    """
    old, new = _PIECES.findall(before), _PIECES.findall(after)
    left, right = [], []
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        first, second = escape("".join(old[i1:i2])), escape("".join(new[j1:j2]))
        left.append(first if tag == "equal" or not first else f"<del>{first}</del>")
        right.append(second if tag == "equal" or not second else f"<ins>{second}</ins>")
    return "".join(left), "".join(right)
