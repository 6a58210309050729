"""Held-out quality with intervals: the unit that is drawn again is the prompt, not the sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.tracking.bootstrap import PerPrompt, interval, measured

MEASURES = ("reward_mean", "exact_match_sampled", "exact_match_greedy", "f1", "rows")
"""What ``summarize`` measures; ``f1`` of JSON fields and ``rows``, the overlap of results, where a task has them."""


def summarize(groups_sampled: Sequence[ScoredGroup], groups_greedy: Sequence[ScoredGroup], seed: int) -> dict[str, Any]:
    """Means over held-out candidates and their 95 % intervals.

    The interval is a percentile bootstrap over prompts, 2,000 resamples (``bootstrap.py``). A candidate on which
    the verifier failed (``reward`` None) is left out and counted.

    Args:
        groups_sampled: candidates drawn at the rollout temperature; give all measures but ``exact_match_greedy``.
        groups_greedy: one greedy candidate a prompt; gives ``exact_match_greedy``.
        seed: of the resampling.

    Returns:
        For each of ``MEASURES`` the mean and ``<measure>_interval: [low, high]`` (both None without a
        judged candidate), and ``prompts``, ``samples``, ``verifier_failures``. A measure whose component the
        verifier does not give is left out.
    """
    result: dict[str, Any] = {}
    for measure, values in _per_prompt(groups_sampled, groups_greedy).items():
        result |= measured(measure, values, seed)
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
        ``<measure>`` and ``<measure>_interval`` for each of ``MEASURES`` that both have.

    Raises:
        ValueError: the prompts differ.
    """
    for earlier, later in zip(before, after, strict=True):
        if [group.request_id for group in earlier] != [group.request_id for group in later]:
            raise ValueError("before and after were measured on different prompts")
    result: dict[str, Any] = {}
    old, new = _per_prompt(*before), _per_prompt(*after)
    for measure in (name for name in MEASURES if name in old and name in new):
        means = old[measure].mean, new[measure].mean
        result[measure] = None if None in means else means[1] - means[0]  # type: ignore[operator]
        first, second = old[measure].resampled(seed), new[measure].resampled(seed)
        result[f"{measure}_interval"] = None if first is None or second is None else interval(second - first)
    return result


def component_means(groups: Sequence[ScoredGroup], name: str) -> PerPrompt | None:
    """Sum and number of a component over each prompt's judged candidates.

    Returns:
        None if there are judged candidates and none has the component: the task does not know it.
    """
    values = collect(groups, lambda scored: scored.components.get(name))
    judged = any(scored.reward is not None for group in groups for scored in group.candidates)
    return values if values.counts.any() or not judged else None


def collect(groups: Sequence[ScoredGroup], value: Callable[[ScoredCandidate], float | None]) -> PerPrompt:
    """Sum and number of a value over each prompt's judged candidates that have it."""
    rows = [
        [found for scored in group.candidates if scored.reward is not None and (found := value(scored)) is not None]
        for group in groups
    ]
    return PerPrompt(np.array([sum(row) for row in rows], float), np.array([len(row) for row in rows], float))


def _per_prompt(sampled: Sequence[ScoredGroup], greedy: Sequence[ScoredGroup]) -> dict[str, PerPrompt]:
    """Each measure that the task has, of each prompt."""
    found = {
        "reward_mean": collect(sampled, lambda scored: scored.reward),
        "exact_match_sampled": component_means(sampled, "exact_match"),
        "exact_match_greedy": component_means(greedy, "exact_match"),
        "f1": component_means(sampled, "f1"),
        "rows": component_means(sampled, "rows"),
    }
    return {measure: values for measure, values in found.items() if values is not None}
