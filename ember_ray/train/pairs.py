"""Preference pairs out of scored groups: the best candidate against the worst.

Both halves of a pair are candidates that the model itself sampled; a gold answer is never part of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup

_ROUNDING = 1e-9  # rewards are sums of decimal weights: 0.6 - 0.5 must count as a margin of 0.1


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, the first preferred.

    Attributes:
        request_id: the id of the prompt's row.
        prompt_token_ids, chosen_token_ids, rejected_token_ids: the very tokens of the rollout,
            stop tokens included; never re-tokenised.
        prompt, chosen_text, rejected_text: the same for people to read.
        chosen_reward, rejected_reward: the verifier's scalars.
        policy_version: the adapter version that made both; the older one if they differ.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    chosen_token_ids: tuple[int, ...]
    rejected_token_ids: tuple[int, ...]
    prompt: list[dict[str, str]] | str
    chosen_text: str
    rejected_text: str
    chosen_reward: float
    rejected_reward: float
    policy_version: int


@dataclass(frozen=True)
class PairCounts:
    """What became of the groups and their candidates.

    Every group is counted once: it gave pairs, or it is in one of the last three.

    Attributes:
        groups, pairs: how many came in and went out.
        candidates: candidates of all groups.
        candidates_failed: left out, the verifier gave no reward (None, NaN or infinite).
        candidates_aborted: left out, generation was aborted.
        candidates_empty: left out, no token was generated.
        candidates_repeated: left out, the same tokens as an earlier candidate of the group.
        groups_paired: gave at least one pair.
        groups_without_spread: fewer than two candidates left, or all have the same reward.
        groups_below_margin: the rewards differ, by less than the margin.
        groups_identical: the margin is there, only between identical texts.
    """

    groups: int = 0
    pairs: int = 0
    candidates: int = 0
    candidates_failed: int = 0
    candidates_aborted: int = 0
    candidates_empty: int = 0
    candidates_repeated: int = 0
    groups_paired: int = 0
    groups_without_spread: int = 0
    groups_below_margin: int = 0
    groups_identical: int = 0


def make_pairs(
    groups: Iterable[ScoredGroup], min_margin: float, pairs_per_prompt: int = 1
) -> tuple[list[PreferencePair], PairCounts]:
    """Pairs the best with the worst, the second best with the second worst, and so on.

    Candidates are ranked by reward, equal rewards by candidate index. Each is used once at most. The partner
    of a candidate is the worst one left that differs from it in text and in tokens and is worse by at least
    ``min_margin`` (and worse at all, if the margin is 0).

    Args:
        groups: judged rollouts, in any order; the pairs come out in the same order.
        min_margin: least difference of the two rewards, in units of the reward.
        pairs_per_prompt: most pairs to make of one group.

    Raises:
        ValueError: ``min_margin`` is negative or not finite, or ``pairs_per_prompt`` is below 1.
    """
    if not (math.isfinite(min_margin) and min_margin >= 0):
        raise ValueError(f"min_margin must be finite and at least 0, not {min_margin}")
    if pairs_per_prompt < 1:
        raise ValueError(f"pairs_per_prompt must be at least 1, not {pairs_per_prompt}")
    pairs: list[PreferencePair] = []
    count = dict.fromkeys(PairCounts.__dataclass_fields__, 0)
    for group in groups:
        usable = _usable(group, count)
        made = _pairs_of_group(group, usable, min_margin, pairs_per_prompt)
        pairs += made
        count["groups"] += 1
        count["pairs"] += len(made)
        spread = usable[0][0] - usable[-1][0] if usable else 0.0
        if made:
            count["groups_paired"] += 1
        elif spread <= _ROUNDING:
            count["groups_without_spread"] += 1
        elif not _wide_enough(spread, min_margin):
            count["groups_below_margin"] += 1
        else:
            count["groups_identical"] += 1
    return pairs, PairCounts(**count)


def _usable(group: ScoredGroup, count: dict[str, int]) -> list[tuple[float, ScoredCandidate]]:
    """(reward, candidate) of all that may be paired, best first."""
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
    return sorted(usable, key=lambda entry: -entry[0])  # a stable sort: equal rewards stay in order of index


def _wide_enough(difference: float, min_margin: float) -> bool:
    return difference > _ROUNDING and difference >= min_margin - _ROUNDING


def _pairs_of_group(
    group: ScoredGroup, ranked: list[tuple[float, ScoredCandidate]], min_margin: float, most: int
) -> list[PreferencePair]:
    pairs: list[PreferencePair] = []
    left = list(ranked)
    while left and len(pairs) < most:
        best_reward, best = left.pop(0)
        partner = _partner(best_reward, best, left, min_margin)
        if partner is None:
            continue  # the next best may have one: only identical texts stand in the way, or nothing is left
        worst_reward, worst = left.pop(partner)
        pairs.append(
            PreferencePair(
                request_id=group.request_id,
                prompt_token_ids=tuple(group.prompt_token_ids),
                chosen_token_ids=tuple(best.candidate.token_ids),
                rejected_token_ids=tuple(worst.candidate.token_ids),
                prompt=group.prompt,
                chosen_text=best.candidate.text,
                rejected_text=worst.candidate.text,
                chosen_reward=best_reward,
                rejected_reward=worst_reward,
                policy_version=min(best.candidate.policy_version, worst.candidate.policy_version),
            )
        )
    return pairs


def _partner(
    best_reward: float, best: ScoredCandidate, left: list[tuple[float, ScoredCandidate]], min_margin: float
) -> int | None:
    """Where in ``left`` the worst one is that may be paired with ``best``; of equally bad ones the lowest index.

    Their tokens differ already, see ``_usable``.
    """
    for place in sorted(range(len(left)), key=lambda place: (left[place][0], left[place][1].candidate.index)):
        reward, worst = left[place]
        if not _wide_enough(best_reward - reward, min_margin):
            return None
        if worst.candidate.text != best.candidate.text:
            return place
    return None
