"""The report's texts: held-out answers before and after, and the candidates of the last round."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ember_ray.tracking.report_diff import marked
from ember_ray.tracking.report_page import card
from ember_ray.tracking.rows import prompt_text
from ember_ray.tracking.samples import verdict_text

SHOWN = 12
GROUPS = 3

Row = Mapping[str, Any]


def samples_section(before: Sequence[Row], after: Sequence[Row], seed: int) -> str:
    """Greedy answers that changed, drawn at random, side by side; counts say how the others fared."""
    later = {row["request_id"]: row for row in after if row.get("kind") == "greedy"}
    pairs = [
        (row, later[row["request_id"]]) for row in before if row.get("kind") == "greedy" and row["request_id"] in later
    ]
    pairs = [(old, new) for old, new in pairs if old["candidates"] and new["candidates"]]
    if not pairs:
        return ""
    changed = [(old, new) for old, new in pairs if _first(old)["text"] != _first(new)["text"]]
    fixed = sum(not _exact(_first(old)) and _exact(_first(new)) for old, new in changed)
    broken = sum(_exact(_first(old)) and not _exact(_first(new)) for old, new in changed)
    drawn = sorted(random.Random(seed).sample(range(len(changed)), min(SHOWN, len(changed))))
    text = (
        f"{len(changed)} of {len(pairs)} greedy answers changed: {fixed} became an exact match, {broken} were one "
        f"and are not any more, {len(changed) - fixed - broken} changed otherwise."
    )
    if len(drawn) < len(changed):
        text += f" Shown are {len(drawn)}, drawn at random."
    cards = [_sample(*changed[index]) for index in drawn]
    shown, rest = "".join(cards[:4]), "".join(cards[4:])
    more = f"<details><summary>{len(cards) - 4} more</summary><div>{rest}</div></details>" if rest else ""
    return f'<h2>Answers before and after</h2><p class="soft">{escape(text)}</p>{shown}{more}'


def candidates_section(rows: Sequence[Row]) -> str:
    """All candidates of a few prompts of the last round, best first, as the learner saw them."""
    shown = [row for row in rows if len({c["reward"] for c in row["candidates"]}) > 1][:GROUPS]
    if not shown:
        return ""
    cards = []
    for row in shown:
        items = []
        for one in sorted(row["candidates"], key=lambda c: -1.0 if c["reward"] is None else -c["reward"]):
            items.append(f'<div class="side"><pre>{escape(one["text"])}</pre>{_verdict(one)}</div>')
        prompt = f'<pre class="prompt">{escape(prompt_text(row["prompt"]))}</pre>'
        cards.append(card("", f'{prompt}<div class="sides">{"".join(items)}</div>', "sample"))
    number = rows[0].get("round")
    return (
        f"<h2>What the learner chose from</h2><details><summary>{len(cards)} groups of round {escape(str(number))}, "
        f"best candidate first</summary><div>{''.join(cards)}</div></details>"
    )


def _sample(old: Row, new: Row) -> str:
    first, second = _first(old), _first(new)
    left, right = marked(first["text"], second["text"])
    sides = "".join(
        f'<div class="side"><h3>{name}</h3><div class="answer">{text or "(nothing)"}</div>{_verdict(one)}</div>'
        for name, text, one in (("before", left, first), ("after", right, second))
    )
    prompt = f'<pre class="prompt">{escape(prompt_text(old["prompt"]))}</pre>'
    return card("", f'{prompt}<div class="sides">{sides}</div>', "sample")


def _verdict(candidate: Row) -> str:
    text = verdict_text(candidate.get("reward"), candidate.get("rewards") or {}, candidate.get("reason"))
    return f'<div class="verdict {"good" if _exact(candidate) else "bad"}">{escape(text)}</div>'


def _first(row: Row) -> Row:
    return row["candidates"][0]


def _exact(candidate: Row) -> bool:
    return (candidate.get("rewards") or {}).get("exact_match") == 1.0
