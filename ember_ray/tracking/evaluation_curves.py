"""The whole evaluation of a model on a task: what ``summarize`` gives, validity, fields, pass@k, best-of-N curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.tracking.bootstrap import PerPrompt, interval, measured
from ember_ray.tracking.evaluation import collect, component_means, summarize
from ember_ray.tracking.selection import best_ranked, majority, pass_at_k

SIZES = (1, 2, 4, 8, 16)
"""k of pass@k and N of best-of-N, as far as samples were drawn."""

SELECTORS = {
    "valid_logprob": "valid first, then mean log-probability",
    "majority": "most frequent valid answer",
    "oracle": "oracle (sees the gold answer)",
}


@dataclass(frozen=True)
class Reading:
    """What can be read off a candidate without knowing the right answer: all that a selector may see of it.

    Attributes:
        valid: it has the right form (JSON that satisfies the schema; a query that executes).
        key: equal for equal answers, whatever their spelling; None if there is no answer in it.
    """

    valid: bool
    key: Hashable | None


@dataclass(frozen=True)
class FieldCounts:
    """Leaf fields of one candidate: right ones, all of the answer's, all of the gold's."""

    right: int
    answered: int
    expected: int


@dataclass(frozen=True)
class TaskReader:
    """What the evaluation has to know of a task.

    Attributes:
        validity: components of the verdict that say whether the form is right, e.g. ``("parse", "schema")``.
        read: a reading of each of some candidates of a group, in their order; it must not look at the reward, nor at
            components that compare with the gold answer.
        count_fields: for micro-averaged fields; None if the task has none.
    """

    validity: tuple[str, ...]
    read: Callable[[ScoredGroup, Sequence[ScoredCandidate]], Sequence[Reading]]
    count_fields: Callable[[ScoredGroup, ScoredCandidate], FieldCounts] | None = None


def evaluate(
    sampled: Sequence[ScoredGroup], greedy: Sequence[ScoredGroup], reader: TaskReader, seed: int
) -> dict[str, Any]:
    """Everything that is measured on held-out prompts, with 95 % intervals (bootstrap over prompts).

    Candidates on which the verifier failed are left out and counted.

    Args:
        sampled: n candidates a prompt.
        greedy: one greedy candidate a prompt.
        reader: of the task.
        seed: of the bootstrap.

    Returns:
        What ``summarize`` gives, and, each with ``<name>_interval``: ``reward_greedy``; ``<component>_sampled`` and
        ``<component>_greedy`` for each validity component; ``field_precision``, ``field_recall``, ``field_f1``, over
        all fields of all sampled candidates (micro average), and ``field_f1_greedy``. Then ``pass_at_k``, a list of
        points ``{"n", "mean", "interval", "prompts"}``, and ``best_of_n``, by selector (``SELECTORS``) ``{"selector",
        "gold_free", "points"}``: the exact match of the candidate chosen from n, in expectation over all subsets of
        the samples (``selection.py``). A prompt with fewer than n judged candidates is not in the point of n.
        ``has_logprobs`` says whether candidates had log-probabilities; without them ``valid_logprob`` chooses among
        the valid ones at random.
    """
    result = summarize(sampled, greedy, seed)
    result |= measured("reward_greedy", collect(greedy, lambda scored: scored.reward), seed)
    for component in reader.validity:
        for kind, groups in (("sampled", sampled), ("greedy", greedy)):
            values = component_means(groups, component)
            if values is not None:
                result |= measured(f"{component}_{kind}", values, seed)
    if reader.count_fields is not None and "exact_match_sampled" in result:
        for name, values in field_scores(sampled, reader.count_fields).items():
            result |= measured(name, values, seed)
        result |= measured("field_f1_greedy", field_scores(greedy, reader.count_fields)["field_f1"], seed)
    if "exact_match_sampled" in result:
        result["pass_at_k"] = _points(lambda size: pass_rates(sampled, size), sampled, seed)
        readings = [reader.read(group, _judged(group)) for group in sampled]
        result["best_of_n"] = {
            name: {
                "selector": words,
                "gold_free": name != "oracle",
                "points": _points(selection_rates(sampled, readings, name), sampled, seed),
            }
            for name, words in SELECTORS.items()
        }
        result["has_logprobs"] = any(scored.candidate.logprobs for group in sampled for scored in group.candidates)
    return result


def pass_rates(groups: Sequence[ScoredGroup], k: int) -> PerPrompt:
    """pass@k of each prompt by the unbiased estimator; nothing where fewer than k candidates were judged."""
    found: list[float | None] = []
    for group in groups:
        right = [scored.components["exact_match"] == 1.0 for scored in _judged(group)]
        found.append(pass_at_k(len(right), sum(right), k) if len(right) >= k else None)
    return PerPrompt.of_means(found)


def selection_rates(
    groups: Sequence[ScoredGroup], readings: Sequence[Sequence[Reading]], selector: str
) -> Callable[[int], PerPrompt]:
    """Expected exact match of the candidate that a selector of ``SELECTORS`` takes out of n, as a function of n.

    Args:
        readings: of the judged candidates of each group.
    """
    pick = majority if selector == "majority" else best_ranked
    prepared: list[tuple[list[float], list[Any]]] = []
    for group, read in zip(groups, readings, strict=True):
        judged = _judged(group)
        scores = [scored.components["exact_match"] for scored in judged]
        if selector == "oracle":
            by: list[Any] = scores
        elif selector == "majority":
            by = [one.key if one.valid else None for one in read]
        else:
            by = [(one.valid, _mean_logprob(scored)) for one, scored in zip(read, judged, strict=True)]
        prepared.append((scores, by))

    def rates(size: int) -> PerPrompt:
        return PerPrompt.of_means(pick(scores, by, size) if len(scores) >= size else None for scores, by in prepared)

    return rates


def field_scores(
    groups: Sequence[ScoredGroup], count_fields: Callable[[ScoredGroup, ScoredCandidate], FieldCounts]
) -> dict[str, PerPrompt]:
    """``field_precision``, ``field_recall`` and ``field_f1`` over all leaf fields of all judged candidates."""
    counts = np.zeros((3, len(groups)))
    for index, group in enumerate(groups):
        for scored in _judged(group):
            found = count_fields(group, scored)
            counts[:, index] += found.right, found.answered, found.expected
    right, answered, expected = counts
    return {
        "field_precision": PerPrompt(right, answered),
        "field_recall": PerPrompt(right, expected),
        "field_f1": PerPrompt(2 * right, answered + expected),
    }


def _judged(group: ScoredGroup) -> list[ScoredCandidate]:
    return [scored for scored in group.candidates if scored.reward is not None and "exact_match" in scored.components]


def _mean_logprob(scored: ScoredCandidate) -> float:
    logprobs = scored.candidate.logprobs
    return fmean(logprobs) if logprobs else -math.inf


def _points(
    rates: Callable[[int], PerPrompt], groups: Sequence[ScoredGroup], seed: int, sizes: Iterable[int] = SIZES
) -> list[dict[str, Any]]:
    most = max((len(group.candidates) for group in groups), default=0)
    points = []
    for size in (size for size in sizes if size <= most):
        values = rates(size)
        points.append(
            {
                "n": size,
                "mean": values.mean,
                "interval": interval(values.resampled(seed)),
                "prompts": int(values.counts.sum()),
            }
        )
    return points
