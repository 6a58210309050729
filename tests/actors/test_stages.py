"""Rollouts, publication and recovery on real stage actors of a local Ray."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors import cluster as clusters
from actors.messages import Progress, RewardFunction, VerifierSettings
from actors.rollouts import Rollouts
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.model.lora import AdapterError
from ember_ray.model.qwen3_config import ModelError

pytestmark = pytest.mark.slow

SHORT = SamplingParams(max_tokens=24)
LONG = SamplingParams(max_tokens=300, ignore_eos=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[clusters.Cluster]:
    import ray

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # for the odd verifier
        with clusters.start(2, run="test") as made:
            yield made
    assert not ray.is_initialized()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.fixture(scope="module")
def rollouts(cluster, make_settings) -> Iterator[Rollouts]:
    """Two stages of 1 and 3 layers."""
    made = Rollouts(cluster, make_settings((1, 3)))
    made.ready()
    yield made


@pytest.fixture(autouse=True)
def base_policy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test that uses the shared stages begins with the base model."""
    if "rollouts" in request.fixturenames:
        request.getfixturevalue("rollouts").rollback(0)
    yield


@pytest.fixture(scope="module")
def expected(tiny_model, make_rows):
    """Tokens of the engine in one process, of all layers, with an adapter or without."""
    from actors.rollout import build_requests
    from ember_ray.engine.llm import LLM
    from ember_ray.engine.options import EngineOptions

    llm = LLM(EngineOptions(tiny_model, num_kv_blocks=1024))

    def tokens(rows: int, candidates: int, params: SamplingParams, round_number: int, update=None):
        if update is not None:
            llm.engine.stage_adapter(update)
            llm.engine.commit_adapter(update.version)
        requests = build_requests(make_rows(rows), candidates, params, 11, round_number)
        found = [candidate for batch in llm.engine.rollout(requests) for candidate in batch]
        llm.engine.commit_adapter(0)
        return {(c.request_id, c.index): c.token_ids for c in found}

    return tokens


def only_tokens(found):
    return {key: tokens for key, (_, tokens, _) in found.items()}


def same(first, second) -> bool:
    """Equal tokens and versions, log-probabilities within float32 noise."""
    return first.keys() == second.keys() and all(
        first[key][:2] == second[key][:2] and first[key][2] == pytest.approx(second[key][2], abs=1e-4) for key in first
    )


def test_two_stages_give_the_tokens_of_one_process(rollouts, make_rows, tokens_of, expected) -> None:
    seen: list[Progress] = []
    result = rollouts.rollout(make_rows(12), 4, SHORT, 0, seen.append)
    found = tokens_of(result)
    assert only_tokens(found) == expected(12, 4, SHORT, 0)
    assert [group.request_id for group in result.groups] == [f"row-{number}" for number in range(12)]
    assert [len(group.candidates) for group in result.groups] == [4] * 12
    assert result.groups[3].prompt == [{"role": "user", "content": "prompt 3"}]
    assert all(scored.reward == 0.0 and scored.reason for group in result.groups for scored in group.candidates)
    stats = result.stats
    assert stats.candidates == 48 and stats.recoveries == 0 and stats.verifier_failures == 0
    assert stats.generated_tokens == sum(len(tokens) for _, tokens, _ in found.values())
    assert stats.prefill_tokens == sum(len(row.prompt_token_ids) for row in make_rows(12))
    assert 0 < stats.seconds_generating <= stats.seconds
    assert rollouts.progress() == Progress(policy_version=0, recoveries=rollouts.progress().recoveries)


def test_another_round_draws_other_tokens(rollouts, make_rows, tokens_of) -> None:
    rounds = [tokens_of(rollouts.rollout(make_rows(3), 4, SHORT, number)) for number in (0, 1, 0)]
    assert same(rounds[0], rounds[2])
    assert only_tokens(rounds[0]) != only_tokens(rounds[1])


def test_candidates_are_scored_while_others_are_generated(rollouts, make_rows) -> None:
    rows, seen = make_rows(64), []
    rollouts.rollout(rows, 4, SamplingParams(max_tokens=60, ignore_eos=True), 0, seen.append)
    assert any(0 < step.candidates_scored and step.candidates_done < 256 for step in seen)
    assert all(step.candidates_scored <= step.candidates_done for step in seen)


def test_an_aborted_request_ends_alone(rollouts, make_rows) -> None:
    killed = threading.Event()

    def abort(progress: Progress) -> None:
        if progress.phase == "generating" and not killed.is_set():
            killed.set()
            rollouts.abort("row-1")

    result = rollouts.rollout(make_rows(3), 2, LONG, 0, abort)
    assert killed.is_set()
    reasons = [[scored.candidate.finish_reason for scored in group.candidates] for group in result.groups]
    assert reasons == [["length"] * 2, ["abort"] * 2, ["length"] * 2]


def test_an_abort_is_not_lost_with_the_stages(rollouts, make_rows) -> None:
    """Asked for while the stages are being made anew: they come up, begin the batch again, and are told then."""
    victim = rollouts.stage_processes()[0][1]
    asked = threading.Event()

    def harm(progress: Progress) -> None:
        if progress.phase == "generating" and progress.recoveries == before and psutil.pid_exists(victim):
            os.kill(victim, signal.SIGKILL)
        if progress.phase == "recovering" and not asked.is_set():
            asked.set()
            rollouts.abort("row-1")

    before = rollouts.progress().recoveries
    result = rollouts.rollout(make_rows(3), 2, LONG, 0, harm)
    assert asked.is_set() and result.stats.recoveries == 1
    reasons = [[scored.candidate.finish_reason for scored in group.candidates] for group in result.groups]
    assert reasons == [["length"] * 2, ["abort"] * 2, ["length"] * 2]
    # and the next rollout has the same ids
    again = rollouts.rollout(make_rows(3), 2, SHORT, 0)
    assert not any(scored.candidate.finish_reason == "abort" for group in again.groups for scored in group.candidates)


def test_a_published_adapter_changes_the_tokens_and_rolls_back_exactly(
    rollouts, make_rows, make_update, tokens_of, expected
) -> None:
    rows = make_rows(6)
    version = rollouts.versions()[-1] + 10
    before = tokens_of(rollouts.rollout(rows, 3, SHORT, 0))
    assert rollouts.publish(make_update(version)) == version
    assert rollouts.policy_version == version and rollouts.stage_versions() == [version, version]
    after = tokens_of(rollouts.rollout(rows, 3, SHORT, 0))
    assert {made_by for made_by, _, _ in after.values()} == {version}
    assert only_tokens(after) != only_tokens(before)
    assert only_tokens(after) == expected(6, 3, SHORT, 0, make_update(version))
    assert rollouts.rollback(0) == 0 and rollouts.stage_versions() == [0, 0]
    assert same(tokens_of(rollouts.rollout(rows, 3, SHORT, 0)), before)
    assert rollouts.rollback(version) == version
    assert same(tokens_of(rollouts.rollout(rows, 3, SHORT, 0)), after)


def test_a_refused_update_changes_nothing(rollouts, make_rows, make_update, tokens_of) -> None:
    rows, version = make_rows(2), rollouts.versions()[-1] + 10
    rollouts.publish(make_update(version))
    before = tokens_of(rollouts.rollout(rows, 2, SHORT, 0))
    with pytest.raises(AdapterError, match="has NaN or Inf"):
        rollouts.publish(make_update(version + 1, fault=float("nan")))
    wrong = make_update(version + 2)
    name = next(iter(wrong.tensors))
    wrong.tensors[name] = wrong.tensors[name][:, :-1]
    with pytest.raises(AdapterError, match="do not fit"):
        rollouts.publish(wrong)
    with pytest.raises(AdapterError, match=f"policy version {version} is not new"):
        rollouts.publish(make_update(version))
    with pytest.raises(AdapterError, match=f"policy version {version + 1} cannot be served"):
        rollouts.rollback(version + 1)
    assert rollouts.policy_version == version and rollouts.stage_versions() == [version, version]
    assert same(tokens_of(rollouts.rollout(rows, 2, SHORT, 0)), before)


def test_a_fault_in_one_stage_is_told_as_itself_and_nobody_waits_for_it(rollouts, make_rows, make_update) -> None:
    """Finite values whose product is not: only the last stage sees it, its peer waits for tokens."""
    overflowing = make_update(rollouts.versions()[-1] + 10)
    for tensor in overflowing.tensors.values():
        tensor.fill_(1e30)
    rollouts.publish(overflowing)
    begun, recoveries = time.monotonic(), rollouts.progress().recoveries
    with pytest.raises(ModelError, match=f"version {overflowing.version} gives logits that are not finite"):
        rollouts.rollout(make_rows(2), 2, SHORT, 0)
    assert time.monotonic() - begun < 30 and rollouts.progress().recoveries == recoveries
    rollouts.rollback(0)
    assert len(rollouts.rollout(make_rows(2), 2, SHORT, 0).groups) == 2


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_killed_in_a_rollout_costs_no_candidate(
    rollouts, make_rows, make_update, tokens_of, stage: int
) -> None:
    rows, params = make_rows(48), SamplingParams(max_tokens=60, ignore_eos=True)
    version = rollouts.versions()[-1] + 10
    rollouts.publish(make_update(version))
    undisturbed = tokens_of(rollouts.rollout(rows, 4, params, 5))
    victim = rollouts.stage_processes()[stage][1]
    killed_at: list[Progress] = []

    def kill(progress: Progress) -> None:
        if progress.phase == "generating" and progress.candidates_done > 0 and not killed_at:
            killed_at.append(progress)
            os.kill(victim, signal.SIGKILL)

    result = rollouts.rollout(rows, 4, params, 5, kill)
    assert killed_at and killed_at[0].candidates_done < 192
    assert result.stats.recoveries == 1
    assert same(tokens_of(result), undisturbed)
    assert rollouts.stage_versions() == [version, version]
    assert victim not in [process for _, process in rollouts.stage_processes()]
    assert all(scored.reward is not None for group in result.groups for scored in group.candidates)
    rollouts.rollback(0)


def test_a_request_that_can_never_be_served_is_an_error_and_not_a_loss(rollouts, make_rows) -> None:
    rows = make_rows(2)
    rows[1] = dataclasses.replace(rows[1], prompt_token_ids=tuple([5] * 600))
    recoveries = rollouts.progress().recoveries
    with pytest.raises(ValueError, match="row-1"):
        rollouts.rollout(rows, 2, SHORT, 0)
    assert rollouts.progress().recoveries == recoveries
    assert len(rollouts.rollout(make_rows(2), 2, SHORT, 0).groups) == 2


def test_metrics_and_names_are_there_for_the_dashboard(rollouts, make_rows) -> None:
    from ray.util import list_named_actors

    rollouts.rollout(make_rows(4), 2, SHORT, 0)
    assert sorted(list_named_actors()) == [
        "ember-coordinator",
        "ember-stage-0",
        "ember-stage-1",
        "ember-verifier-0",
    ]
    totals = ("generated_tokens_total", "prefill_tokens_total", "prefix_hit_tokens_total")
    wanted = {
        "kv_blocks_used",
        "kv_blocks_total",
        "tokens_per_s",
        "prefix_hit_rate",
        "requests_running",
        "requests_waiting",
        "policy_version",
        *totals,
    }
    values: dict[str, set[float]] = {}
    missing = ["not read"]
    end = time.monotonic() + 30
    while missing and time.monotonic() < end:
        values = metrics()
        missing = [f"{name} {stage}" for name in wanted for stage in "01" if f"{name} {stage}" not in values]
        missing += [name for name in ("reward", "verifier_queue", "candidates_total") if name not in values]
        time.sleep(0.5)
    assert not missing
    assert values["kv_blocks_total 0"] == {1024} and all(0 <= rate < 1 for rate in values["prefix_hit_rate 1"])
    assert set(rollouts.versions()) >= values["policy_version 0"] | values["policy_version 1"]


def metrics() -> dict[str, set[float]]:
    """Our metrics as the node exports them: name, with the stage where there is one, to the values of all processes.

    Ray goes on for a while with the last values of a process that has died.
    """
    import ray

    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    found: dict[str, set[float]] = {}
    for line in urllib.request.urlopen(address, timeout=5).read().decode().splitlines():
        match = re.match(r"ray_ember_(\w+)\{(.*)\} (\S+)$", line)
        if match:
            stage = re.search(r'stage="(\d)"', match[2])
            found.setdefault(f"{match[1]} {stage[1]}" if stage else match[1], set()).add(float(match[3]))
    return found


def test_the_reward_that_is_left_is_that_of_the_whole_rollout(rollouts, cluster, make_settings, make_rows) -> None:
    rollouts.stop()
    odd = VerifierSettings((RewardFunction("odd_verifier:verify", settings={"reward": 0.75}),))
    made = Rollouts(cluster, make_settings((4,), verifier=odd))
    made.ready()
    rows = make_rows(4, gold="good")
    rows[0] = dataclasses.replace(rows[0], example=dataclasses.replace(rows[0].example, gold="fail"))
    result = made.rollout(rows, 2, SHORT, 0)
    assert result.stats.verifier_failures == 2
    end = time.monotonic() + 30
    while 0.75 not in (values := metrics()).get("reward", ()) and time.monotonic() < end:
        time.sleep(0.5)
    assert 0.75 in values["reward"] and 0 in values["verifier_queue"]
    made.stop()


def test_a_missing_model_and_an_unknown_verifier_are_errors_at_the_start(cluster, make_settings) -> None:
    settings = make_settings((1, 3))
    missing = dataclasses.replace(settings, engine=dataclasses.replace(settings.engine, model="/no/such/model"))
    unknown = dataclasses.replace(settings, verifier=VerifierSettings((RewardFunction("nonsense"),)))
    for wrong, message in ((missing, "/no/such/model"), (unknown, "no reward function 'nonsense'")):
        made = Rollouts(cluster, wrong)
        with pytest.raises(ValueError, match=message):
            made.ready()
        made.stop()
