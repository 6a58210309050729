"""Which candidates of a group may be learnt from."""

from __future__ import annotations

import math
from collections.abc import MutableMapping

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup

USABLE_COUNTS = (
    "candidates",
    "candidates_failed",
    "candidates_aborted",
    "candidates_empty",
    "candidates_repeated",
)
"""What `usable_candidates` counts: all candidates; and left out: without a reward (None, NaN or infinite), aborted,
without a token, the same tokens as an earlier candidate of the group."""


def usable_candidates(group: ScoredGroup, count: MutableMapping[str, int]) -> list[tuple[float, ScoredCandidate]]:
    """(reward, candidate) of all that may be learnt from, best first, equal rewards in order of index.

    Args:
        count: has `USABLE_COUNTS` as keys; they are added to.
    """
    seen: set[tuple[int, ...]] = set()
    usable: list[tuple[float, ScoredCandidate]] = []
    for scored in sorted(group.candidates, key=lambda scored: scored.candidate.index):
        count["candidates"] += 1
        tokens = tuple(scored.candidate.token_ids)
        if scored.candidate.finish_reason == "abort":
            count["candidates_aborted"] += 1
        elif scored.reward is None or not math.isfinite(scored.reward):
            count["candidates_failed"] += 1
        elif not tokens:
            count["candidates_empty"] += 1
        elif tokens in seen:
            count["candidates_repeated"] += 1
        else:
            seen.add(tokens)
            usable.append((float(scored.reward), scored))
    return sorted(usable, key=lambda entry: -entry[0])  # a stable sort
