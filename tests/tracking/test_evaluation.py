"""Held-out numbers: means by hand, intervals that cover as often as they say, pairs that pair."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.tracking.evaluation import gains, summarize
from ember_ray.tracking.metrics import rollout_metrics
from ember_ray.tracking.samples import changed_samples, draw, verdict
from ember_ray.tracking.summary import build_summary, git_state, versions

JSON_MEASURES = ("reward_mean", "exact_match_sampled", "exact_match_greedy", "f1")


def group(
    name: str,
    rewards: list[float | None],
    exact: list[float],
    texts: list[str] | None = None,
    reason: str | None = None,
) -> ScoredGroup:
    candidates = []
    for index, (reward, right) in enumerate(zip(rewards, exact, strict=True)):
        text = texts[index] if texts else f"answer {index}"
        finish = "length" if index == 0 else "stop"
        made = Candidate(name, index, [1] * (index + 2), [-0.1] * (index + 2), [-0.1] * (index + 2), text, finish, 0)
        components = {} if reward is None else {"exact_match": right, "f1": (1 + right) / 2}
        candidates.append(ScoredCandidate(made, reward, components, reason))
    return ScoredGroup(name, f"prompt {name}", (1, 2), candidates)


def test_means_are_over_candidates_and_failures_are_left_out_and_counted() -> None:
    sampled = [group("a", [1.0, 0.0, None], [1, 0, 0]), group("b", [0.5, 0.5, 0.6], [0, 0, 1])]
    greedy = [group("a", [1.0], [1]), group("b", [None], [0])]
    result = summarize(sampled, greedy, seed=0)
    assert result["reward_mean"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 0.6) / 5)
    assert result["exact_match_sampled"] == pytest.approx(2 / 5)
    assert result["f1"] == pytest.approx((1 + 0.5 + 0.5 + 0.5 + 1) / 5)
    assert result["exact_match_greedy"] == 1.0
    assert (result["prompts"], result["samples"], result["verifier_failures"]) == (2, 6, 2)


def test_the_same_seed_gives_the_same_interval() -> None:
    rng = random.Random(0)
    sampled = [group(str(i), [rng.random() for _ in range(4)], [rng.randrange(2) for _ in range(4)]) for i in range(40)]
    first, again, other = (summarize(sampled, sampled, seed) for seed in (1, 1, 2))
    assert first == again and first != other
    for measure in JSON_MEASURES:
        low, high = first[f"{measure}_interval"]
        assert low < first[measure] < high


def test_the_interval_is_over_prompts_not_over_samples() -> None:
    """Samples of one prompt that are all alike carry the information of one: eight times as many change nothing."""
    rng = random.Random(0)
    rights = [rng.randrange(2) for _ in range(60)]
    few = summarize([group(str(i), [r], [r]) for i, r in enumerate(rights)], [], 0)
    many = summarize([group(str(i), [r] * 8, [r] * 8) for i, r in enumerate(rights)], [], 0)
    assert many["exact_match_sampled_interval"] == few["exact_match_sampled_interval"]
    low, high = few["exact_match_sampled_interval"]
    share = fmean(rights)
    assert (high - low) / 2 == pytest.approx(1.96 * (share * (1 - share) / 60) ** 0.5, rel=0.15)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """100 evaluations of 60 prompts whose difficulty varies: about 95 of the intervals must hold the truth."""
    rng, hits = random.Random(3), 0
    for trial in range(100):
        groups = []
        for index in range(60):
            skill = rng.betavariate(1.0, 1.5)  # mean 0.4
            groups.append(group(str(index), [1.0] * 4, [float(rng.random() < skill) for _ in range(4)]))
        low, high = summarize(groups, [], trial)["exact_match_sampled_interval"]
        hits += low <= 0.4 <= high
    assert 88 <= hits <= 99


def test_nothing_judged_gives_none_and_not_a_number_out_of_the_air() -> None:
    result = summarize([group("a", [None], [0])], [], 0)
    assert result["reward_mean"] is None and result["reward_mean_interval"] is None
    assert gains(([], []), ([], []), 0)["f1"] is None


def test_a_gain_is_measured_prompt_by_prompt() -> None:
    """Every prompt gains 0.1: the difference is certain, however much the prompts differ among themselves."""
    rng = random.Random(1)
    levels = [rng.random() for _ in range(50)]
    before = [group(str(i), [level], [0]) for i, level in enumerate(levels)]
    after = [group(str(i), [level + 0.1], [0]) for i, level in enumerate(levels)]
    gain = gains((before, before), (after, after), seed=0)
    assert gain["reward_mean"] == pytest.approx(0.1)
    assert np.ptp(gain["reward_mean_interval"]) < 1e-9
    assert np.ptp(summarize(before, before, 0)["reward_mean_interval"]) > 0.1


def test_a_gain_over_different_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="different prompts"):
        gains(([group("a", [1.0], [1])], []), ([group("b", [1.0], [1])], []), 0)


def test_round_metrics_by_hand() -> None:
    metrics = rollout_metrics(
        [group("a", [1.0, 0.0], [1, 0]), group("b", [0.5, 0.5], [0, 0]), group("c", [None, 0.2], [0, 0])]
    )
    assert metrics["reward"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 0.2) / 5)
    assert metrics["reward_std"] == pytest.approx((0.5 + 0 + 0) / 3)
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert metrics["exact_match"] == metrics["rewards/exact_match/mean"] == pytest.approx(1 / 5)
    assert metrics["completions/mean_length"] == 2.5
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (2, 3)
    assert metrics["completions/clipped_ratio"] == 0.5
    assert metrics["verifier_failures"] == 1
    assert rollout_metrics([]) == {"verifier_failures": 0}


def test_changed_samples_are_those_whose_text_changed() -> None:
    before = [
        group("a", [0.4], [0], ["x"], "total: missing"),
        group("b", [1.0], [1], ["same"]),
        group("c", [None], [0], ["y"]),
    ]
    after = [group("c", [1.0], [1], ["z"]), group("b", [1.0], [1], ["same"]), group("a", [1.0], [1], ["x2"])]
    first, second = changed_samples(before, after)
    assert (first.request_id, first.prompt, first.before, first.after) == ("a", "prompt a", "x", "x2")
    assert (first.before_verdict, first.after_verdict) == ("reward 0.40: total: missing", "exact match, reward 1.00")
    assert second.before_verdict == "not judged"
    assert verdict(group("b", [0.3], [0]).candidates[0]) == "reward 0.30"


def test_shown_samples_are_drawn_by_the_seed_and_keep_their_order() -> None:
    before = [group(str(i), [0.0], [0], ["x"]) for i in range(50)]
    after = [group(str(i), [0.0], [0], ["y"]) for i in range(50)]
    samples = changed_samples(before, after)
    drawn = draw(samples, 3, seed=1)
    assert drawn == draw(samples, 3, seed=1) != draw(samples, 3, seed=2)
    assert [int(one.request_id) for one in drawn] == sorted(int(one.request_id) for one in drawn)
    assert len(draw(samples[:2], 3, seed=1)) == 2


def test_the_summary_has_the_promised_keys(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    for part in ("before", "after"):
        for measure in JSON_MEASURES:
            assert isinstance(summary[part][measure], float)
            assert len(summary[part][f"{measure}_interval"]) == 2
    counted = {"rounds", "seconds", "generated_tokens", "prefill_tokens", "prefix_hit_tokens"}
    expected = counted | {"policy_version", "seed", "git_commit", "status", "gain"}
    assert expected <= summary.keys()
    assert summary["generated_tokens"] == 180_322 and summary["policy_version"] == 6


def test_further_keys_go_into_the_summary() -> None:
    summary = build_summary(
        name="x", seed=1, status="interrupted", rounds=0, before=None, after=None, gain=None, seconds={"a": 1.23456},
        counters={}, policy_version=0, pairs=7,
    )  # fmt: skip
    assert (summary["pairs"], summary["before"], summary["seconds"], summary["prefill_tokens"]) == (
        7,
        None,
        {"a": 1.235},
        0,
    )


def test_the_commit_is_that_of_the_code_only_where_the_code_is_tracked(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert git_state(tmp_path) == (None, None)
    package = tmp_path / "ember_ray" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    git("init", "-q")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-qm", "another project")
    assert git_state(tmp_path) == (None, None)  # installed inside a repository that is not ours
    git("add", "ember_ray")
    git("commit", "-qm", "ours")
    head = git("rev-parse", "HEAD").strip()
    assert git_state(tmp_path) == (head, False)
    package.write_text("changed")
    assert git_state(tmp_path) == (head, True)


def test_versions_name_what_decides_the_numbers() -> None:
    assert {"python", "torch", "numpy"} <= versions().keys()
