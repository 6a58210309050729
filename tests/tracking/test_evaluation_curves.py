"""The whole evaluation: selectors that see no gold, curves, fields, and intervals around them."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.tracking.bootstrap import PerPrompt, measured
from ember_ray.tracking.evaluation import gains, summarize
from ember_ray.tracking.evaluation_curves import FieldCounts, Reading, TaskReader, evaluate


def candidate(name: str, index: int, text: str, logprob: float | None, right: bool, judged: bool = True):  # noqa: ANN201
    """``text`` starting with ``!`` is an invalid answer."""
    logprobs = [] if logprob is None else [logprob] * 3
    made = Candidate(name, index, [1, 2, 3], logprobs, logprobs, text, "stop", 0)
    components = {"execute": float(not text.startswith("!")), "exact_match": float(right)}
    return ScoredCandidate(made, float(right) if judged else None, components)


def group(name: str, *answers: tuple) -> ScoredGroup:
    made = [candidate(name, index, *answer) for index, answer in enumerate(answers)]
    return ScoredGroup(name, f"prompt {name}", (), made)


READER = TaskReader(
    ("execute",),
    lambda group, some: [Reading(not one.candidate.text.startswith("!"), one.candidate.text) for one in some],
)


def means(result: dict, selector: str) -> list[float]:
    return [point["mean"] for point in result["best_of_n"][selector]["points"]]


def test_curves_by_hand() -> None:
    groups = [group("a", ("x", -0.5, True), ("y", -0.1, False), ("!z", -0.01, False), ("x", -0.6, True))]
    result = evaluate(groups, groups, READER, seed=0)
    assert [point["n"] for point in result["pass_at_k"]] == [1, 2, 4]
    assert [point["mean"] for point in result["pass_at_k"]] == pytest.approx([1 / 2, 5 / 6, 1])
    assert means(result, "oracle") == pytest.approx([1 / 2, 5 / 6, 1])
    # of the six pairs: xy y, xz x, xx x, yz y, yx y, zx x; of all four, y is the likeliest valid one
    assert means(result, "valid_logprob") == pytest.approx([1 / 2, 1 / 2, 0])
    # xy tie, xz x, xx x, yz y, yx tie, zx x
    assert means(result, "majority") == pytest.approx([1 / 2, 4 / 6, 1])
    assert [one["gold_free"] for one in result["best_of_n"].values()] == [True, True, False]
    assert result["execute_sampled"] == 3 / 4 and result["has_logprobs"] and "field_f1" not in result


def test_selectors_do_not_see_the_gold() -> None:
    """Right and wrong exchanged: what is chosen stays, so the curves are mirrored."""
    rng = random.Random(0)
    answers = [[(rng.choice("abc"), -rng.random(), rng.random() < 0.4) for _ in range(8)] for _ in range(20)]
    plain = evaluate([group(str(i), *row) for i, row in enumerate(answers)], [], READER, 0)
    turned = [[(text, logprob, not right) for text, logprob, right in row] for row in answers]
    mirror = evaluate([group(str(i), *row) for i, row in enumerate(turned)], [], READER, 0)
    for selector in ("valid_logprob", "majority"):
        assert means(plain, selector) == pytest.approx([1 - mean for mean in means(mirror, selector)])
    assert means(plain, "oracle") != pytest.approx([1 - mean for mean in means(mirror, "oracle")])


def test_failed_verifications_are_left_out_and_a_prompt_with_too_few_is_not_in_the_point() -> None:
    groups = [
        group("a", ("x", -0.5, True), ("y", -0.1, False, False)),
        group("b", ("x", -0.5, False), ("y", -0.1, True)),
        group("c", ("x", -0.5, True, False), ("y", -0.1, False, False)),
    ]
    result = evaluate(groups, [], READER, 0)
    assert [(point["mean"], point["prompts"]) for point in result["pass_at_k"]] == [(0.75, 2), (1.0, 1)]
    assert result["verifier_failures"] == 3 and result["exact_match_sampled"] == pytest.approx(2 / 3)
    assert result["execute_sampled"] == 1.0 and result["execute_greedy"] is None


def test_without_logprobs_the_choice_among_valid_ones_is_random() -> None:
    groups = [group("a", ("x", None, True), ("y", None, False), ("!z", None, False), ("!u", None, False))]
    result = evaluate(groups, [], READER, 0)
    assert means(result, "valid_logprob")[-1] == 0.5 and not result["has_logprobs"]


def test_fields_are_averaged_over_fields_not_over_candidates() -> None:
    counts = {"a": FieldCounts(9, 10, 12), "b": FieldCounts(0, 0, 4), "c": FieldCounts(1, 2, 1)}
    groups = [group(name, (name, -1.0, False)) for name in counts]
    reader = TaskReader((), READER.read, lambda group, scored: counts[scored.candidate.text])
    result = evaluate(groups, groups[:1], reader, 0)
    assert result["field_precision"] == pytest.approx(10 / 12)
    assert result["field_recall"] == pytest.approx(10 / 17)
    assert result["field_f1"] == pytest.approx(20 / 29)
    assert result["field_f1_greedy"] == pytest.approx(18 / 22)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([1, 3, 4, 16]))
def test_curves_stay_in_bounds_the_oracle_rises_and_intervals_hold_the_mean(seed: int, prompts: int, n: int) -> None:
    rng = random.Random(seed)
    skills = [rng.random() for _ in range(prompts)]
    groups = [
        group(str(i), *((rng.choice(["a", "b", "!c"]), -rng.random(), rng.random() < skill) for _ in range(n)))
        for i, skill in enumerate(skills)
    ]
    result = evaluate(groups, groups, READER, seed)
    curves = {name: one["points"] for name, one in result["best_of_n"].items()} | {"pass": result["pass_at_k"]}
    for points in curves.values():
        assert [point["n"] for point in points] == [size for size in (1, 2, 4, 8, 16) if size <= n]
        assert points[0]["mean"] == pytest.approx(result["exact_match_sampled"])
        for point in points:
            low, high = point["interval"]
            assert -1e-9 <= low <= point["mean"] + 1e-9 and point["mean"] - 1e-9 <= high <= 1 + 1e-9
    oracle = [point["mean"] for point in curves["oracle"]]
    assert oracle == pytest.approx([point["mean"] for point in curves["pass"]])
    assert all(earlier <= later + 1e-12 for earlier, later in zip(oracle, oracle[1:], strict=False))
    assert all(point["mean"] <= best + 1e-9 for point, best in zip(curves["majority"], oracle, strict=True))


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=20), st.integers(0, 100))
def test_an_interval_holds_its_mean(values: list[float | None], seed: int) -> None:
    found = measured("m", PerPrompt.of_means(values), seed)
    there = [value for value in values if value is not None]
    if not there:
        assert found == {"m": None, "m_interval": None}
        return
    low, high = found["m_interval"]  # type: ignore[misc]
    assert found["m"] == pytest.approx(fmean(there)) and low - 1e-9 <= found["m"] <= high + 1e-9  # type: ignore[operator]


def test_a_task_without_fields_has_no_f1_and_its_own_measures() -> None:
    def sql(name: str, right: bool) -> ScoredGroup:
        made = group(name, ("select 1", -1.0, right))
        made.candidates[0].components["rows"] = 0.5 + 0.5 * right
        return made

    before, after = [sql("a", False), sql("b", False)], [sql("a", True), sql("b", False)]
    part, gain = summarize(before, before, 0), gains((before, before), (after, after), 0)
    assert "f1" not in part and "f1_interval" not in part and part["rows"] == 0.5
    assert "f1" not in gain and gain["rows"] == 0.25 and gain["exact_match_greedy"] == 0.5
    assert math.isclose(part["exact_match_sampled"], 0.0)


def test_a_verifier_without_exact_match_has_no_curves() -> None:
    made = group("a", ("x", -1.0, True))
    made.candidates[0].components = {"length": 0.3}
    result = evaluate([made], [made], READER, 0)
    assert result["reward_mean"] == 1.0 and not {"pass_at_k", "best_of_n", "exact_match_sampled"} & result.keys()
