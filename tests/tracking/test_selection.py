"""Expectations over subsets against enumeration of all of them."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_ray.tracking.selection import best_ranked, majority, pass_at_k

# Few different values, so that there are ties.
SAMPLES = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 2), st.sampled_from([None, "a", "b", "c"])),
    min_size=1,
    max_size=8,
)


def by_rank(chosen: tuple[int, ...], scores: list[float], ranks: list[Any]) -> float:
    best = max(ranks[index] for index in chosen)
    return fmean(scores[index] for index in chosen if ranks[index] == best)


def by_votes(chosen: tuple[int, ...], scores: list[float], votes: list[Any]) -> float:
    cast = [votes[index] for index in chosen if votes[index] is not None]
    if not cast:
        return fmean(scores[index] for index in chosen)
    most = max(cast.count(vote) for vote in cast)
    winners = [vote for vote in set(cast) if cast.count(vote) == most]
    return fmean(fmean(scores[index] for index in chosen if votes[index] == winner) for winner in winners)


@given(SAMPLES, st.data())
def test_expectations_are_the_mean_over_all_subsets(samples: list[tuple[float, int, Any]], data: st.DataObject) -> None:
    scores, ranks, votes = (list(part) for part in zip(*samples, strict=True))
    size = data.draw(st.integers(1, len(samples)))
    subsets = list(combinations(range(len(samples)), size))
    assert best_ranked(scores, ranks, size) == pytest.approx(fmean(by_rank(one, scores, ranks) for one in subsets))
    assert majority(scores, votes, size) == pytest.approx(fmean(by_votes(one, scores, votes) for one in subsets))
    right = [float(score == 1.0) for score in scores]
    passed = fmean(any(right[index] for index in one) for one in subsets)
    assert pass_at_k(len(right), int(sum(right)), size) == pytest.approx(passed)
    assert best_ranked(right, right, size) == pytest.approx(passed)  # the oracle


@given(st.integers(1, 200), st.data())
def test_pass_at_k_never_falls_with_k_and_ends_at_certainty(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    curve = [pass_at_k(samples, correct, k) for k in range(1, samples + 1)]
    assert curve[0] == pytest.approx(correct / samples)
    assert all(0 <= earlier <= later + 1e-12 <= 1 + 1e-12 for earlier, later in zip(curve, curve[1:], strict=False))
    assert curve[-1] == float(correct > 0)


def test_pass_at_k_is_stable_where_binomials_overflow() -> None:
    exact = 1 - Fraction(math.comb(9_990, 1_000), math.comb(10_000, 1_000))
    assert pass_at_k(10_000, 10, 1_000) == pytest.approx(float(exact), rel=1e-12)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(scores: list[float], rng: Any) -> None:
    votes = [rng.choice([None, "a", "b"]) for _ in scores]
    order = rng.sample(range(len(scores)), len(scores))
    for size in range(1, len(scores) + 1):
        for pick in (majority, lambda *given: best_ranked(given[0], [str(vote) for vote in given[1]], given[2])):
            first = pick(scores, votes, size)
            again = pick([scores[index] for index in order], [votes[index] for index in order], size)
            assert first == pytest.approx(again) and -1e-12 <= first <= 1 + 1e-12


def test_majority_by_hand() -> None:
    """Two of three agree: with all three they win, with one each has its chance, a pair is a tie two times in three."""
    scores, votes = [1.0, 1.0, 0.0], ["x", "x", "y"]
    assert [majority(scores, votes, size) for size in (1, 2, 3)] == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert majority([1.0] + [0.0] * 15, ["x", *[None] * 15], 16) == 1.0


@pytest.mark.parametrize("numbers", [(4, 5, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_impossible_numbers_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(*numbers)
