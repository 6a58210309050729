"""Which candidates best-of-N learns from."""

import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.train.best_of_n import select_best


def scored(index, reward, tokens=None, finish_reason="stop"):
    tokens = [50 + index, 0] if tokens is None else tokens
    logprobs = [-1.0] * len(tokens)
    return ScoredCandidate(Candidate("row", index, tokens, logprobs, logprobs, "text", finish_reason, 1), reward)


def group(*candidates, request_id="row"):
    return ScoredGroup(request_id, "prompt", (5, 6), list(candidates))


def firsts(found):
    return [one.completion_token_ids[0] - 50 for one in found]


def test_the_best_ones_come_first():
    found, counts = select_best([group(scored(0, 0.4), scored(1, 0.9), scored(2, 1.0), scored(3, 0.9))], 0.5, 2)
    assert firsts(found) == [2, 1]
    assert (found[0].request_id, found[0].prompt_token_ids, found[0].reward) == ("row", (5, 6), 1.0)
    assert (counts.selected, counts.candidates_below, counts.candidates_surplus) == (2, 1, 1)
    assert (counts.groups, counts.groups_selected) == (1, 1)


def test_the_threshold_holds_in_decimal():
    assert 0.7 + 0.1 < 0.8
    assert len(select_best([group(scored(0, 0.7 + 0.1))], 0.8)[0]) == 1
    assert select_best([group(scored(0, 0.79))], 0.8)[0] == []


def test_what_is_not_to_be_imitated_is_counted_once():
    candidates = [
        scored(0, None), scored(1, math.nan), scored(2, 1.0, finish_reason="abort"), scored(3, 1.0, []),
        scored(4, 1.0, finish_reason="length"), scored(5, 1.0), scored(6, 1.0, [55, 0]), scored(7, 0.1),
    ]  # fmt: skip
    found, counts = select_best([group(*candidates)], 0.5, 0)
    assert firsts(found) == [5]
    assert asdict(counts) == {
        "groups": 1, "groups_selected": 1, "candidates": 8, "selected": 1, "candidates_failed": 2,
        "candidates_aborted": 1, "candidates_empty": 1, "candidates_repeated": 1, "candidates_below": 1,
        "candidates_cut": 1, "candidates_surplus": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("least", "most", "word"), [(math.nan, 1, "min_reward"), (0.5, -1, "per_prompt")])
def test_bad_arguments(least, most, word):
    with pytest.raises(ValueError, match=word):
        select_best([], least, most)


REWARDS = st.one_of(st.none(), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.floats(0, 1))
CANDIDATES = st.lists(
    st.tuples(REWARDS, st.integers(0, 4), st.sampled_from(["stop", "stop_sequence", "length", "abort"])), max_size=10
)


@given(st.lists(CANDIDATES, max_size=3), st.sampled_from([-math.inf, 0.0, 0.5, 1.0]), st.integers(0, 3), st.randoms())
def test_rules_hold_for_any_groups(rows, least, most, shuffler):
    groups = [
        group(*(scored(i, r, [60 + t], f) for i, (r, t, f) in enumerate(candidates)), request_id=str(number))
        for number, candidates in enumerate(rows)
    ]
    found, counts = select_best(groups, least, most)
    for one in groups:
        mine = [entry for entry in found if entry.request_id == one.request_id]
        good = {}  # by tokens; of equal ones the first that was judged
        for c in one.candidates:
            if c.reward is not None and c.candidate.finish_reason != "abort":
                good.setdefault(tuple(c.candidate.token_ids), c)
        rewards = sorted(
            (c.reward for c in good.values() if c.candidate.finish_reason != "length" and c.reward >= least - 1e-9),
            reverse=True,
        )
        assert [entry.reward for entry in mine] == (rewards[:most] if most else rewards)
        assert len({entry.completion_token_ids for entry in mine}) == len(mine)
    values = asdict(counts)
    left_out = sum(count for name, count in values.items() if name.startswith("candidates_"))
    assert counts.candidates == counts.selected + left_out == sum(map(len, rows))
    assert counts.groups == len(groups) and counts.selected == len(found)
    assert counts.groups_selected == len({entry.request_id for entry in found})
    for one in groups:
        shuffler.shuffle(one.candidates)
    assert select_best(groups, least, most) == (found, counts)  # their order does not matter
