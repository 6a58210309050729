"""Held-out quality with intervals: the unit that is drawn again is the prompt, not the sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup

RESAMPLES = 2000
CONFIDENCE = 0.95

MEASURES = ("reward_mean", "exact_match_sampled", "exact_match_greedy", "f1")


def summarize(groups_sampled: Sequence[ScoredGroup], groups_greedy: Sequence[ScoredGroup], seed: int) -> dict[str, Any]:
    """Means over held-out candidates and their 95 % intervals.

    Samples of one prompt are alike, so the interval is a percentile bootstrap over prompts (the
    cluster bootstrap; Cameron and Miller 2015, section VI.C), 2,000 resamples. A candidate on which
    the verifier failed (``reward`` None) is left out and counted.

    Args:
        groups_sampled: candidates drawn at the rollout temperature; give ``reward_mean``,
            ``exact_match_sampled`` and ``f1``.
        groups_greedy: one greedy candidate a prompt; gives ``exact_match_greedy``.
        seed: of the resampling.

    Returns:
        For each of ``MEASURES`` the mean and ``<measure>_interval: [low, high]`` (both None without a
        judged candidate), and ``prompts``, ``samples``, ``verifier_failures``.
    """
    result: dict[str, Any] = {}
    for measure, (sums, counts) in _per_prompt(groups_sampled, groups_greedy).items():
        result[measure] = _ratio(sums, counts)
        result[f"{measure}_interval"] = _interval(_resampled(sums, counts, seed))
    result["prompts"] = len(groups_sampled)
    result["samples"] = sum(len(group.candidates) for group in groups_sampled)
    result["verifier_failures"] = sum(
        scored.reward is None for group in (*groups_sampled, *groups_greedy) for scored in group.candidates
    )
    return result


def gains(
    before: tuple[Sequence[ScoredGroup], Sequence[ScoredGroup]],
    after: tuple[Sequence[ScoredGroup], Sequence[ScoredGroup]],
    seed: int,
) -> dict[str, Any]:
    """Differences after minus before on the same prompts, with intervals (the bootstrap draws pairs).

    Pairing takes out what makes one prompt harder than another, so these intervals are narrower
    than those of ``summarize`` would suggest.

    Args:
        before, after: (sampled groups, greedy groups) of the same prompts, in the same order.
        seed: of the resampling.

    Returns:
        ``<measure>`` and ``<measure>_interval`` for each of ``MEASURES``.

    Raises:
        ValueError: the prompts differ.
    """
    for earlier, later in zip(before, after, strict=True):
        if [group.request_id for group in earlier] != [group.request_id for group in later]:
            raise ValueError("before and after were measured on different prompts")
    result: dict[str, Any] = {}
    old, new = _per_prompt(*before), _per_prompt(*after)
    for measure in MEASURES:
        means = _ratio(*old[measure]), _ratio(*new[measure])
        result[measure] = None if None in means else means[1] - means[0]  # type: ignore[operator]
        first, second = _resampled(*old[measure], seed), _resampled(*new[measure], seed)
        result[f"{measure}_interval"] = None if first is None or second is None else _interval(second - first)
    return result


def _per_prompt(
    sampled: Sequence[ScoredGroup], greedy: Sequence[ScoredGroup]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per measure, the sum and the number of judged candidates of each prompt, float64 [prompts] each."""

    def collect(
        groups: Sequence[ScoredGroup], value: Callable[[ScoredCandidate], float]
    ) -> tuple[np.ndarray, np.ndarray]:
        values = [[value(scored) for scored in group.candidates if scored.reward is not None] for group in groups]
        return np.array([sum(row) for row in values], float), np.array([len(row) for row in values], float)

    return {
        "reward_mean": collect(sampled, lambda scored: float(scored.reward or 0.0)),
        "exact_match_sampled": collect(sampled, lambda scored: scored.components["exact_match"]),
        "exact_match_greedy": collect(greedy, lambda scored: scored.components["exact_match"]),
        "f1": collect(sampled, lambda scored: scored.components["f1"]),
    }


def _ratio(sums: np.ndarray, counts: np.ndarray) -> float | None:
    return float(sums.sum() / counts.sum()) if counts.sum() else None


def _resampled(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray | None:
    """Means of resampled prompts, [RESAMPLES]; the same seed draws the same prompts, so differences pair up."""
    if not counts.sum():
        return None
    drawn = np.random.default_rng(seed).integers(0, len(sums), size=(RESAMPLES, len(sums)))
    totals = counts[drawn].sum(axis=1)
    return np.divide(sums[drawn].sum(axis=1), totals, out=np.full(RESAMPLES, np.nan), where=totals > 0)


def _interval(means: np.ndarray | None) -> list[float] | None:
    if means is None:
        return None
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(means, [tail, 100 - tail])
    return [float(low), float(high)]
