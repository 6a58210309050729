"""Which candidates GRPO learns from, how they are dealt to steps, and what is said of them."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_ray.train.grpo_rows import deal, make_groups, round_metrics, zero_spread
from tests.support.scored_groups import group, scored


def everything_fits(num_tokens):
    return True


def test_what_cannot_be_learnt_from_is_left_out_and_counted():
    groups = [
        group(
            scored(0, 1.0),
            scored(1, None),
            scored(2, math.nan),
            scored(3, 0.5, finish_reason="abort"),
            scored(4, 0.5, tokens=()),
            scored(5, 0.5, tokens=range(3, 40)),
            scored(6, 0.0, tokens=(7, 8), finish_reason="length"),
            scored(7, 1.0),  # drawn twice counts twice
        ),
        group(scored(0, None, finish_reason="abort"), scored(1, None)),
    ]
    made, counts = make_groups(groups, fits=lambda num_tokens: num_tokens <= 20)
    assert counts == {
        "groups": 2,
        "candidates": 10,
        "candidates_failed": 3,
        "candidates_aborted": 2,
        "candidates_empty": 1,
        "candidates_too_long": 1,
        "candidates_learnt": 3,
    }
    (only,) = made
    assert only.prompt_token_ids == (10, 11, 12) and only.num_tokens == 3 * 3 + 3 + 2 + 3
    assert [(answer.reward, answer.is_truncated) for answer in only.answers] == [(1, False), (0, True), (1, False)]
    assert only.answers[1].token_ids == (7, 8) and only.answers[1].logprobs == (-1.0, -1.0)


def test_log_probabilities_of_the_distribution_drawn_from():
    one = scored(0, 1.0)
    one.candidate.sampling_logprobs = [-0.5, -0.25, -0.125]
    (made,), _ = make_groups([group(one)], everything_fits, use_sampling_logprobs=True)
    assert made.answers[0].logprobs == (-0.5, -0.25, -0.125)


def test_groups_without_spread():
    groups = [
        group(scored(0, 0.3), scored(1, 0.1 + 0.2)),
        group(scored(0, 0.3), scored(1, 0.4)),
        group(scored(0, 0.3), scored(1, None), scored(2, 0.9, finish_reason="abort")),
        group(scored(0, None)),
        group(),
    ]
    assert zero_spread(groups) == (0, 2, 3, 4)
    assert zero_spread([]) == ()


@given(st.lists(st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.3, 0.1 + 0.2, 1.0])), max_size=5), max_size=6))
def test_a_group_has_spread_where_an_advantage_is(rewards):
    groups = [group(*(scored(index, reward) for index, reward in enumerate(row))) for row in rewards]
    useless = zero_spread(groups)
    for position, row in enumerate(rewards):
        known = [reward for reward in row if reward is not None]
        advantages = [abs(reward - statistics.fmean(known)) for reward in known]
        assert (position in useless) == (max(advantages, default=0.0) < 1e-6)


@given(st.integers(1, 2000), st.integers(1, 70), st.integers(1, 40))
def test_rows_are_dealt_evenly(rows, batch, accumulation):
    dealt = deal(rows, batch, accumulation)
    passes = dealt.steps * dealt.accumulation
    assert dealt.size <= batch and dealt.accumulation <= accumulation
    assert dealt.steps == math.ceil(rows / (batch * accumulation))
    assert rows <= passes * dealt.size < rows + passes  # fewer empty rows than passes
    if rows % (batch * accumulation) == 0:
        assert (dealt.accumulation, dealt.size) == (accumulation, batch)


def test_metrics_of_a_round():
    groups, _ = make_groups(
        [
            group(scored(0, 1.0, tokens=(5, 2)), scored(1, 0.0, tokens=(5, 6, 7, 8), finish_reason="length")),
            group(scored(0, 0.5), scored(1, 0.5)),
        ],
        everything_fits,
    )
    assert round_metrics(groups) == {
        "reward": 0.5,
        "reward_std": pytest.approx(math.sqrt(0.5 / 3)),
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": 3.0,
        "completions/min_length": 2.0,
        "completions/max_length": 4.0,
        "completions/clipped_ratio": 0.25,
        "completions/mean_terminated_length": pytest.approx(8 / 3),
        "completions/min_terminated_length": 2.0,
        "completions/max_terminated_length": 3.0,
    }
    assert round_metrics([]) == {}
    cut, _ = make_groups([group(scored(0, 1.0, finish_reason="length"))], everything_fits)
    assert round_metrics(cut)["completions/mean_terminated_length"] == 0.0
    assert round_metrics(cut)["reward_std"] == 0.0
