"""Best-of-N: of each prompt's candidates those that the verifier found best, to be imitated.

Rejection-sampling fine-tuning as in Yuan et al. 2023, "Scaling relationship on learning mathematical reasoning",
section 3.3: answers that are right, each different one once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ember_ray.data.scored_group import ScoredGroup
from ember_ray.train.batch import Demonstration
from ember_ray.train.usable import USABLE_COUNTS, usable_candidates

_ROUNDING = 1e-9  # rewards are sums of decimal weights


@dataclass(frozen=True)
class SelectionCounts:
    """What became of the groups and their candidates; every candidate is counted once, as selected or left out.

    Attributes:
        groups: how many came in.
        groups_selected: gave at least one candidate.
        candidates: candidates of all groups.
        selected: candidates to learn from.
        candidates_failed: left out, the verifier gave no reward (None, NaN or infinite).
        candidates_aborted: left out, generation was aborted.
        candidates_empty: left out, no token was generated.
        candidates_repeated: left out, the same tokens as an earlier candidate of the group.
        candidates_below: left out, the reward is below ``min_reward``.
        candidates_cut: left out, it ended at the limit of tokens: imitated, it would teach not to stop.
        candidates_surplus: left out, good enough but behind ``per_prompt`` others.
    """

    groups: int = 0
    groups_selected: int = 0
    candidates: int = 0
    selected: int = 0
    candidates_failed: int = 0
    candidates_aborted: int = 0
    candidates_empty: int = 0
    candidates_repeated: int = 0
    candidates_below: int = 0
    candidates_cut: int = 0
    candidates_surplus: int = 0


def select_best(
    groups: Iterable[ScoredGroup], min_reward: float, per_prompt: int = 1
) -> tuple[list[Demonstration], SelectionCounts]:
    """Takes the best candidates of each group.

    Candidates are ranked by reward, equal rewards by candidate index.

    Args:
        groups: judged rollouts; what is selected comes out in their order, best first within a group.
        min_reward: least reward of a selected candidate; minus infinity takes the best ones whatever they are worth.
        per_prompt: most candidates of one group; 0 sets no limit.

    Raises:
        ValueError: ``min_reward`` is NaN, or ``per_prompt`` below 0.
    """
    if math.isnan(min_reward):
        raise ValueError("min_reward must be a number, not nan")
    if per_prompt < 0:
        raise ValueError(f"per_prompt must be at least 0, not {per_prompt}")
    selected: list[Demonstration] = []
    count = dict.fromkeys(SelectionCounts.__dataclass_fields__, 0)
    assert set(USABLE_COUNTS) <= count.keys()
    for group in groups:
        taken = 0
        for reward, scored in usable_candidates(group, count):
            candidate = scored.candidate
            if reward < min_reward - _ROUNDING:
                count["candidates_below"] += 1
            elif candidate.finish_reason == "length":
                count["candidates_cut"] += 1
            elif per_prompt and taken == per_prompt:
                count["candidates_surplus"] += 1
            else:
                taken += 1
                prompt, tokens = tuple(group.prompt_token_ids), tuple(candidate.token_ids)
                selected.append(Demonstration(group.request_id, prompt, tokens, candidate.text, reward))
        count["groups"] += 1
        count["groups_selected"] += taken > 0
        count["selected"] += taken
    return selected, SelectionCounts(**count)
