"""Which candidates become preference pairs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.train.batch import Demonstration
from ember_ray.train.pairs import make_pairs


def scored(index, reward, text=None, tokens=None, finish_reason="stop", version=3):
    text = f"answer {index}" if text is None else text
    tokens = list(text.encode()) + [0] if tokens is None else tokens
    logprobs = [-1.0] * len(tokens)
    candidate = Candidate("row-1", index, tokens, logprobs, logprobs, text, finish_reason, version)
    return ScoredCandidate(candidate, reward)


def group(*candidates, request_id="row-1"):
    return ScoredGroup(request_id, "the prompt", (5, 6, 7), list(candidates))


def pairs_of(*candidates, min_margin=0.1, pairs_per_prompt=1):
    return make_pairs([group(*candidates)], min_margin, pairs_per_prompt)


def test_best_against_worst():
    pairs, counts = pairs_of(scored(0, 0.5), scored(1, 1.0), scored(2, 0.0))
    (pair,) = pairs
    assert (pair.chosen_text, pair.rejected_text) == ("answer 1", "answer 2")
    assert (pair.chosen_reward, pair.rejected_reward) == (1.0, 0.0)
    assert pair.prompt_token_ids == (5, 6, 7)
    assert pair.chosen_token_ids == tuple(b"answer 1") + (0,)
    assert (pair.request_id, pair.prompt, pair.policy_version) == ("row-1", "the prompt", 3)
    assert (counts.groups, counts.pairs, counts.candidates, counts.groups_paired) == (1, 1, 3, 1)


def test_equal_rewards_are_told_apart_by_index():
    pairs, _ = pairs_of(scored(3, 1.0), scored(2, 0.0), scored(1, 1.0), scored(0, 0.0))
    assert (pairs[0].chosen_text, pairs[0].rejected_text) == ("answer 1", "answer 0")


def test_several_pairs_use_each_candidate_once():
    candidates = [scored(i, r) for i, r in enumerate([0.2, 0.9, 0.5, 0.0, 1.0])]
    pairs, counts = pairs_of(*candidates, pairs_per_prompt=5)
    assert [(p.chosen_text, p.rejected_text) for p in pairs] == [("answer 4", "answer 3"), ("answer 1", "answer 0")]
    assert counts.pairs == 2 and counts.groups_paired == 1


@pytest.mark.parametrize(("difference", "made"), [(0.1, 1), (0.0999, 0), (0.2, 1)])
def test_margin(difference, made):
    pairs, counts = pairs_of(scored(0, 0.5 + difference), scored(1, 0.5), min_margin=0.1)
    assert len(pairs) == made
    assert counts.groups_below_margin == 1 - made


def test_margin_holds_in_decimal():
    assert 0.6 - 0.5 < 0.1  # what the tolerance is for
    assert len(pairs_of(scored(0, 0.6), scored(1, 0.5), min_margin=0.1)[0]) == 1


def test_no_spread_no_pair_even_without_margin():
    pairs, counts = pairs_of(scored(0, 0.7), scored(1, 0.7), min_margin=0.0)
    assert pairs == [] and counts.groups_without_spread == 1
    pairs, counts = pairs_of(scored(0, 0.7), min_margin=0.0)
    assert pairs == [] and counts.groups_without_spread == 1
    pairs, counts = pairs_of(min_margin=0.0)
    assert pairs == [] and counts.groups_without_spread == 1


def test_identical_texts_never_pair():
    pairs, counts = pairs_of(scored(0, 1.0, "same", [1, 2]), scored(1, 0.0, "same", [3]))
    assert pairs == [] and counts.groups_identical == 1


def test_an_identical_worst_one_gives_way_to_the_next():
    pairs, _ = pairs_of(scored(0, 1.0, "same", [1]), scored(1, 0.0, "same", [2]), scored(2, 0.3))
    assert (pairs[0].chosen_text, pairs[0].rejected_text) == ("same", "answer 2")


def test_a_best_one_without_partner_gives_way_to_the_next():
    pairs, _ = pairs_of(scored(0, 1.0, "same", [1]), scored(1, 0.8), scored(2, 0.0, "same", [2]), min_margin=0.5)
    assert (pairs[0].chosen_text, pairs[0].rejected_text) == ("answer 1", "same")


def test_identical_tokens_count_once():
    same = {"text": "same", "tokens": [1, 2]}
    candidates = [scored(0, 1.0, **same), scored(1, 1.0, **same), scored(2, 0.0), scored(3, 0.1)]
    pairs, counts = pairs_of(*candidates, pairs_per_prompt=2)
    assert len(pairs) == 1 and counts.candidates_repeated == 1


def test_unusable_candidates_are_left_out_and_counted():
    pairs, counts = pairs_of(
        scored(0, None),
        scored(1, math.nan),
        scored(2, math.inf),
        scored(3, 1.0, finish_reason="abort"),
        scored(4, 1.0, text="", tokens=[]),
        scored(5, 0.6),
        scored(6, 0.2),
    )
    assert [(p.chosen_text, p.rejected_text) for p in pairs] == [("answer 5", "answer 6")]
    assert (counts.candidates, counts.candidates_failed) == (7, 3)
    assert (counts.candidates_aborted, counts.candidates_empty) == (1, 1)


def test_the_older_version_is_named():
    assert pairs_of(scored(0, 1.0, version=4), scored(1, 0.0, version=3))[0][0].policy_version == 3


@pytest.mark.parametrize(
    ("margin", "most", "word"), [(-0.1, 1, "min_margin"), (math.nan, 1, "min_margin"), (0.1, -1, "pairs_per_prompt")]
)
def test_bad_arguments(margin, most, word):
    with pytest.raises(ValueError, match=word):
        make_pairs([], margin, most)


REWARDS = st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 1.0]), st.floats(0, 1))
FINISH = st.sampled_from(["stop", "abort"])
CANDIDATES = st.lists(st.tuples(REWARDS, st.sampled_from("abcde"), st.integers(0, 2), FINISH), max_size=8)


def may_be_used(scored_candidate):
    return scored_candidate.reward is not None and scored_candidate.candidate.finish_reason == "stop"


@given(CANDIDATES, st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 4), st.randoms())
def test_rules_hold_for_any_group(rows, margin, most, shuffler):
    candidates = [scored(i, r, t, [ord(t), k], f) for i, (r, t, k, f) in enumerate(rows)]
    pairs, counts = pairs_of(*candidates, min_margin=margin, pairs_per_prompt=most)

    own = {tuple(c.candidate.token_ids) for c in candidates if may_be_used(c)}
    used = [ids for pair in pairs for ids in (pair.chosen_token_ids, pair.rejected_token_ids)]
    assert len(pairs) <= most and len(used) == len(set(used)) and set(used) <= own
    for pair in pairs:
        assert pair.chosen_reward > pair.rejected_reward
        assert pair.chosen_reward - pair.rejected_reward >= margin - 1e-6
        assert pair.chosen_text != pair.rejected_text
    assert [p.chosen_reward for p in pairs] == sorted((p.chosen_reward for p in pairs), reverse=True)

    unpaired = counts.groups_without_spread + counts.groups_below_margin + counts.groups_identical
    assert counts.groups_paired + unpaired == counts.groups == 1 and counts.pairs == len(pairs)
    assert (counts.groups_paired == 1) == bool(pairs)
    if not pairs:  # nothing that could have been paired was missed
        first = {}
        for c in candidates:
            if may_be_used(c):
                first.setdefault(tuple(c.candidate.token_ids), c)
        rest = list(first.values())
        assert not any(
            a.candidate.text != b.candidate.text and a.reward - b.reward > max(margin, 1e-6) for a in rest for b in rest
        )

    mixed = list(candidates)
    shuffler.shuffle(mixed)
    assert make_pairs([group(*mixed)], margin, most) == (pairs, counts)  # their order does not matter


def test_groups_are_counted_one_by_one():
    groups = [
        group(scored(0, 1.0), scored(1, 0.0), request_id="a"),
        group(scored(0, 0.4), scored(1, 0.4), request_id="b"),
        group(scored(0, 0.42), scored(1, 0.4), request_id="c"),
        group(scored(0, 0.9), scored(1, 0.1), request_id="d"),
    ]
    pairs, counts = make_pairs(groups, 0.1)
    assert [p.request_id for p in pairs] == ["a", "d"]
    assert (counts.groups, counts.groups_paired) == (4, 2)
    assert (counts.groups_without_spread, counts.groups_below_margin, counts.groups_identical) == (1, 1, 0)


def demonstration(request_id="row-1", text="gold", prompt=(5, 6, 7), reward=1.0):
    return Demonstration(request_id, prompt, tuple(text.encode()) + (0,), text, reward)


def named(pairs):
    return [(pair.chosen_text[-1], pair.rejected_text[-1]) for pair in pairs]


def test_all_pairs_of_a_margin_widest_first():
    one = group(scored(0, 1.0), scored(1, 0.5), scored(2, 0.0), scored(3, 0.45))
    pairs, counts = make_pairs([one], 0.5, 0, "all_margin")
    assert named(pairs) == [("0", "2"), ("0", "3"), ("0", "1"), ("1", "2")]
    assert (counts.pairs, counts.groups_paired, counts.oracle) == (4, 1, 0)
    assert named(make_pairs([one], 0.5, 2, "all_margin")[0]) == [("0", "2"), ("0", "3")]


@given(CANDIDATES, st.sampled_from([0.0, 0.1, 0.5]), st.integers(0, 4))
def test_all_margin_misses_no_pair(rows, margin, most):
    candidates = [scored(i, r, t, [ord(t), k], f) for i, (r, t, k, f) in enumerate(rows)]
    pairs, counts = make_pairs([group(*candidates)], margin, most, "all_margin")
    first = {}
    for c in candidates:
        if may_be_used(c):
            first.setdefault(tuple(c.candidate.token_ids), c)
    wanted = {
        (tuple(a.candidate.token_ids), tuple(b.candidate.token_ids))
        for a in first.values()
        for b in first.values()
        if a.reward - b.reward > max(margin - 1e-9, 1e-9) - 1e-15 and a.candidate.text != b.candidate.text
    }
    found = [(pair.chosen_token_ids, pair.rejected_token_ids) for pair in pairs]
    assert len(found) == len(set(found)) == (min(most, len(wanted)) if most else len(wanted))
    assert set(found) <= wanted
    widths = [pair.chosen_reward - pair.rejected_reward for pair in pairs]
    assert widths == sorted(widths, reverse=True)
    unpaired = counts.groups_without_spread + counts.groups_below_margin + counts.groups_identical
    assert counts.groups_paired + unpaired == 1


def test_the_gold_answer_against_the_worst():
    groups = [
        group(scored(0, 0.9), scored(1, 0.2), scored(2, 0.4)),
        group(scored(0, 0.0), request_id="none"),
        group(scored(0, 1.0), scored(1, 1.0), request_id="right"),
        group(scored(0, 0.0, "gold", [9]), request_id="same"),
    ]
    gold = {name: demonstration(name) for name in ("row-1", "right", "same")}
    pairs, counts = make_pairs(groups, 0.5, 0, "oracle", gold)
    assert [(pair.chosen_text, pair.rejected_text) for pair in pairs] == [("gold", "answer 1"), ("gold", "answer 2")]
    assert (pairs[0].chosen_token_ids, pairs[0].chosen_reward) == (tuple(b"gold") + (0,), 1.0)
    assert pairs[0].policy_version == 3  # the candidate's
    assert (counts.pairs, counts.oracle, counts.groups_paired) == (2, 2, 1)
    assert (counts.groups_without_gold, counts.groups_without_spread, counts.groups_identical) == (1, 1, 1)
    assert counts.candidates == 7
    assert len(make_pairs(groups, 0.5, 1, "oracle", gold)[0]) == 1


def test_a_gold_answer_of_another_prompt_is_refused():
    with pytest.raises(ValueError, match="gold answer of 'row-1' belongs to other prompt tokens"):
        make_pairs([group(scored(0, 0.0))], 0.1, 1, "oracle", {"row-1": demonstration(prompt=(5, 6))})
    with pytest.raises(ValueError, match="pair_choice must be one of best_worst, all_margin, oracle, not 'worst'"):
        make_pairs([], 0.1, 1, "worst")
