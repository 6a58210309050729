"""Preference pairs out of scored groups.

``best_worst`` and ``all_margin`` pair candidates that the model itself sampled. ``oracle`` prefers the gold answer,
which the model need not have found: an upper line for comparison, and marked as such in the counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.train.batch import Demonstration
from ember_ray.train.usable import USABLE_COUNTS, usable_candidates

PAIR_CHOICES = ("best_worst", "all_margin", "oracle")

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
        policy_version: the adapter version that made both; the older one if they differ. A gold answer has none.
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

    Every group is counted once: it gave pairs, or it is in one of the last four.

    Attributes:
        groups, pairs: how many came in and went out.
        oracle: pairs whose chosen answer is the gold one.
        candidates: candidates of all groups.
        candidates_failed: left out, the verifier gave no reward (None, NaN or infinite).
        candidates_aborted: left out, generation was aborted.
        candidates_empty: left out, no token was generated.
        candidates_repeated: left out, the same tokens as an earlier candidate of the group.
        groups_paired: gave at least one pair.
        groups_without_spread: fewer than two answers left, or all have the same reward.
        groups_below_margin: the rewards differ, by less than the margin.
        groups_identical: the margin is there, only between identical texts.
        groups_without_gold: ``oracle`` has no gold answer for the prompt.
    """

    groups: int = 0
    pairs: int = 0
    oracle: int = 0
    candidates: int = 0
    candidates_failed: int = 0
    candidates_aborted: int = 0
    candidates_empty: int = 0
    candidates_repeated: int = 0
    groups_paired: int = 0
    groups_without_spread: int = 0
    groups_below_margin: int = 0
    groups_identical: int = 0
    groups_without_gold: int = 0


@dataclass(frozen=True)
class _Answer:
    """A candidate or the gold answer."""

    reward: float
    index: int  # among the candidates; the gold answer comes before them
    token_ids: tuple[int, ...]
    text: str
    version: float  # infinite for the gold answer


def make_pairs(
    groups: Iterable[ScoredGroup],
    min_margin: float,
    pairs_per_prompt: int = 1,
    pair_choice: str = "best_worst",
    gold: Mapping[str, Demonstration] | None = None,
) -> tuple[list[PreferencePair], PairCounts]:
    """Makes the pairs of each group.

    Candidates are ranked by reward, equal rewards by candidate index. The two of a pair differ in text and in tokens,
    and in reward by at least ``min_margin`` (and at all, if the margin is 0).

    - ``best_worst``: the best with the worst, the second best with the second worst, and so on; each is used once at
      most. The partner of a candidate is the worst one left that it may be paired with.
    - ``all_margin``: all pairs that the margin admits, those with the largest difference first.
    - ``oracle``: the gold answer with the worst candidates, worst first.

    Args:
        groups: judged rollouts, in any order; the pairs come out in the same order.
        min_margin: least difference of the two rewards, in units of the reward.
        pairs_per_prompt: most pairs to make of one group; 0 sets no limit.
        pair_choice: see above.
        gold: request id to gold answer, for ``oracle`` alone.

    Raises:
        ValueError: ``min_margin`` is negative or not finite, ``pairs_per_prompt`` is below 0, there is no such
            ``pair_choice``, or a gold answer belongs to other prompt tokens than its group.
    """
    if not (math.isfinite(min_margin) and min_margin >= 0):
        raise ValueError(f"min_margin must be finite and at least 0, not {min_margin}")
    if pairs_per_prompt < 0:
        raise ValueError(f"pairs_per_prompt must be at least 0, not {pairs_per_prompt}")
    if pair_choice not in PAIR_CHOICES:
        raise ValueError(f"pair_choice must be one of {', '.join(PAIR_CHOICES)}, not '{pair_choice}'")
    pairs: list[PreferencePair] = []
    count = dict.fromkeys(PairCounts.__dataclass_fields__, 0)
    assert set(USABLE_COUNTS) <= count.keys()
    for group in groups:
        count["groups"] += 1
        ranked = [_answer(reward, scored) for reward, scored in usable_candidates(group, count)]
        if pair_choice == "oracle":
            best = _gold_answer(group, gold or {})
            if best is None:
                count["groups_without_gold"] += 1
                continue
            found: Iterable[tuple[_Answer, _Answer]] = _gold_first(best, ranked, min_margin)
            ranked = [best, *ranked]
        else:
            found = (_inwards if pair_choice == "best_worst" else _all_wide)(ranked, min_margin)
        made = [_pair(group, chosen, rejected) for chosen, rejected in found][: pairs_per_prompt or None]
        pairs += made
        count["pairs"] += len(made)
        count["oracle"] += len(made) * (pair_choice == "oracle")
        spread = ranked[0].reward - ranked[-1].reward if ranked else 0.0
        if made:
            count["groups_paired"] += 1
        elif spread <= _ROUNDING:
            count["groups_without_spread"] += 1
        elif not _wide_enough(spread, min_margin):
            count["groups_below_margin"] += 1
        else:
            count["groups_identical"] += 1
    return pairs, PairCounts(**count)


def _answer(reward: float, scored: ScoredCandidate) -> _Answer:
    candidate = scored.candidate
    return _Answer(reward, candidate.index, tuple(candidate.token_ids), candidate.text, candidate.policy_version)


def _gold_answer(group: ScoredGroup, gold: Mapping[str, Demonstration]) -> _Answer | None:
    found = gold.get(group.request_id)
    if found is None:
        return None
    if found.prompt_token_ids != tuple(group.prompt_token_ids):
        raise ValueError(f"the gold answer of '{group.request_id}' belongs to other prompt tokens than its candidates")
    return _Answer(found.reward, -1, found.completion_token_ids, found.text, math.inf)


def _wide_enough(difference: float, min_margin: float) -> bool:
    return difference > _ROUNDING and difference >= min_margin - _ROUNDING


def _may_be_paired(best: _Answer, worst: _Answer, min_margin: float) -> bool:
    differ = best.text != worst.text and best.token_ids != worst.token_ids
    return differ and _wide_enough(best.reward - worst.reward, min_margin)


def _worst_first(answers: Iterable[_Answer]) -> list[_Answer]:
    return sorted(answers, key=lambda answer: (answer.reward, answer.index))


def _inwards(ranked: Sequence[_Answer], min_margin: float) -> Iterator[tuple[_Answer, _Answer]]:
    left = list(ranked)
    while left:
        best = left.pop(0)
        for worst in _worst_first(left):
            if _may_be_paired(best, worst, min_margin):
                left.remove(worst)
                yield best, worst
                break  # otherwise the next best may have one: only identical texts stand in the way, or nothing is left


def _all_wide(ranked: Sequence[_Answer], min_margin: float) -> list[tuple[_Answer, _Answer]]:
    pairs = [(best, worst) for best in ranked for worst in ranked if _may_be_paired(best, worst, min_margin)]
    return sorted(pairs, key=lambda pair: (pair[1].reward - pair[0].reward, pair[0].index, pair[1].index))


def _gold_first(best: _Answer, ranked: Sequence[_Answer], min_margin: float) -> list[tuple[_Answer, _Answer]]:
    return [(best, worst) for worst in _worst_first(ranked) if _may_be_paired(best, worst, min_margin)]


def _pair(group: ScoredGroup, chosen: _Answer, rejected: _Answer) -> PreferencePair:
    return PreferencePair(
        request_id=group.request_id,
        prompt_token_ids=tuple(group.prompt_token_ids),
        chosen_token_ids=chosen.token_ids,
        rejected_token_ids=rejected.token_ids,
        prompt=group.prompt,
        chosen_text=chosen.text,
        rejected_text=rejected.text,
        chosen_reward=chosen.reward,
        rejected_reward=rejected.reward,
        policy_version=int(min(chosen.version, rejected.version)),
    )
