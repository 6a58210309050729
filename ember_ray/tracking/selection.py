"""What choosing one of N samples is worth: expectations over all subsets of the samples that were drawn.

From n samples of a prompt there are C(n, N) subsets of size N. The mean over all of them is the unbiased estimate with
the least variance of what N fresh samples would give (a U-statistic), and it is computed here exactly, without drawing
any: nothing depends on a seed or on the order of the samples. Ties are broken uniformly at random, in expectation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import groupby
from math import comb
from typing import Any

import numpy as np


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples is right: ``1 - C(n - c, k) / C(n, k)``.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1, as a product, because
    the binomials overflow.

    Args:
        samples: n, drawn.
        correct: c of them were right.
        k: at least 1, at most n.

    Raises:
        ValueError: the numbers do not fit each other.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples with {correct} right")
    if samples - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def best_ranked(scores: Sequence[float], ranks: Sequence[Any], size: int) -> float:
    """Expected score of the best-ranked of ``size`` samples.

    The sample of place i (from 0, best first) is the best of C(n - 1 - i, N - 1) subsets. Samples of equal rank
    share the mean of their scores, which is what a uniform choice among them gives.

    Args:
        scores: of each sample.
        ranks: comparable values, greater is better.
        size: N, at least 1, at most the number of samples.
    """
    total = _check(scores, ranks, size)
    order = sorted(range(total), key=lambda index: ranks[index], reverse=True)
    chance = [size / total]
    for place in range(total - 1):
        chance.append(chance[-1] * (total - size - place) / (total - 1 - place))
    expected, place = 0.0, 0
    for _, tied in groupby(order, key=lambda index: ranks[index]):
        values = [scores[index] for index in tied]
        expected += sum(values) / len(values) * sum(chance[place : place + len(values)])
        place += len(values)
    return expected


def majority(scores: Sequence[float], votes: Sequence[Hashable | None], size: int) -> float:
    """Expected score of the most frequent answer among ``size`` samples (self-consistency; Wang et al. 2023).

    Args:
        scores: of each sample.
        votes: equal for equal answers; None abstains and is chosen only if all of the subset abstain.
        size: N, at least 1, at most the number of samples.
    """
    total = _check(scores, votes, size)
    by_vote: dict[Hashable | None, list[float]] = {}
    for score, vote in zip(scores, votes, strict=True):
        by_vote.setdefault(vote, []).append(score)
    abstaining = by_vote.pop(None, [])
    wins = _plurality(tuple(sorted(map(len, by_vote.values()))), len(abstaining), size)
    expected = sum(sum(values) / len(values) * wins[len(values)] for values in by_vote.values())
    if len(abstaining) >= size:
        expected += sum(abstaining) / len(abstaining) * comb(len(abstaining), size) / comb(total, size)
    return expected


def _check(scores: Sequence[float], others: Sequence[Any], size: int) -> int:
    if len(scores) != len(others) or not 1 <= size <= len(scores):
        raise ValueError(f"{size} of {len(scores)} samples with {len(others)} ranks or votes")
    return len(scores)


@lru_cache(maxsize=4096)
def _plurality(sizes: tuple[int, ...], abstaining: int, drawn: int) -> dict[int, float]:
    """For each size of a class of equal votes, the probability that a given class of that size wins.

    Counts subsets by their generating function: a class that wins with m votes goes with others of fewer votes, or
    with t others of m votes too, among which it wins one time in t + 1.
    """
    subsets = comb(sum(sizes) + abstaining, drawn)
    wins = {}
    for own in set(sizes):
        others = Counter(sizes)
        others[own] -= 1
        favourable = 0.0
        for most in range(1, min(own, drawn) + 1):
            # ways[tied][votes]: numbers of ways to choose so many votes of the others
            ways = [[comb(abstaining, count) for count in range(drawn - most + 1)]]
            for other in others.elements():
                ways = _choose(ways, other, most)
            favourable += comb(own, most) * sum(row[-1] / (tied + 1) for tied, row in enumerate(ways))
        wins[own] = favourable / subsets
    return wins


def _choose(ways: list[list[int]], size: int, most: int) -> list[list[int]]:
    """``ways`` with one class more, of which at most ``most`` votes are chosen; exactly that many is a tie."""
    width = len(ways[0])
    found = [[0] * width for _ in range(len(ways) + 1)]
    for tied, row in enumerate(ways):
        for count in range(min(size, most, width - 1) + 1):
            times, to = comb(size, count), found[tied + (count == most)]
            for before in range(width - count):
                to[before + count] += row[before] * times
    return found if any(found[-1]) else found[:-1]
