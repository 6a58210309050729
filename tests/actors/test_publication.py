"""Publication to two real stages, driven from this process so that each blow falls where it is aimed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from actors import cluster as clusters
from actors.adapter_wire import pack_adapter
from actors.calls import ActorLost, StageLost, UpdateLost
from actors.messages import Limits, Progress
from actors.pipeline import Pipeline
from actors.policy_server import PolicyServer
from actors.rollouts import Patience, Rollouts
from ember_ray.model.lora import AdapterError
from tests.support import tensor_process as there
from tests.support.adapters import random_adapter
from tests.support.tensor_process import TensorProcess

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[clusters.Cluster]:
    with clusters.start(2, run="test", dashboard=False) as made:
        yield made


class Saboteur(Pipeline):
    """A pipeline whose stage 1 comes to harm just before a call."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.kill_before: str | None = None
        self.spoiled = None

    def call_all(self, method, *arguments, limit_s=None):
        if method == self.kill_before:
            self.kill_before = None
            os.kill(self.call_each("pid", [()] * 2)[1], signal.SIGKILL)
        if method == "stage_adapter" and self.spoiled is not None:
            return self.call_each(method, [arguments, (self.spoiled,)])
        return super().call_all(method, *arguments, limit_s=limit_s)


@pytest.fixture(scope="module")
def server(cluster, make_settings) -> Iterator[PolicyServer]:
    limits = Limits()
    pipeline = Saboteur(make_settings((2, 2), limits=limits), cluster.placement)
    made = PolicyServer(pipeline, limits.failures)
    made.start()
    yield made
    made.close()


@pytest.fixture
def learner() -> Iterator[TensorProcess]:
    """A process with an adapter's tensors and their outbox; it may be killed."""
    with TensorProcess(OMP_NUM_THREADS="1") as process:
        yield process


@pytest.mark.parametrize("before", ["stage_adapter", "commit_adapter"])
def test_a_stage_dies_and_one_version_is_left_everywhere(server, make_update, learner, tiny_model, before: str) -> None:
    for shared in (False, True):
        version = server.highest + 1
        server.pipeline.kill_before = before
        update = learner(there.write_adapter, tiny_model, version, version) if shared else make_update(version)
        assert server.publish(update) == version
        assert server.pipeline.kill_before is None
        assert server.official == version
        assert server.pipeline.call_all("policy_version") == [version, version]


def test_stages_read_the_learners_memory_and_keep_what_it_published_when_it_is_killed(
    server, learner, tiny_model
) -> None:
    answers = [((3, 4, 5), (6, 7, 8))]
    first = server.highest + 1
    by_value = replace(random_adapter(Path(tiny_model), seed=5), version=first)
    server.publish(by_value)
    wanted = server.score(answers)
    notice = learner(there.write_adapter, tiny_model, first + 1, 5)
    server.prepare(notice)
    assert server.pipeline.call_all("policy_version") == [first, first]  # it is held only
    server.publish(notice)
    assert server.score(answers) == wanted
    server.publish(learner(there.write_adapter, tiny_model, first + 2, 6))
    assert server.score(answers) != wanted
    other = server.score(answers)
    server._finish_copies()
    learner.kill()
    server.recover(StageLost("for the test"))
    assert server.score(answers) == other
    server.rollback(first + 1)
    assert server.score(answers) == wanted


def test_a_learner_killed_before_its_update_was_read_changes_nothing(server, learner, tiny_model, make_update) -> None:
    before, version = server.official, server.highest + 1
    notice = learner(there.write_adapter, tiny_model, version, 5)
    learner.kill()
    with pytest.raises(UpdateLost, match=f"policy version {version} cannot be read: process .* has ended"):
        server.publish(notice)
    assert server.official == before
    assert server.pipeline.call_all("policy_version") == [before, before]
    assert server.publish(make_update(version)) == version  # a fresh learner's, which learnt the same again


def test_a_stage_dies_at_a_switch_within_a_batch(server, make_update) -> None:
    version = server.highest + 1
    assert not server.publish_in_flight(pack_adapter(make_update(version)))  # there is no batch
    server.begin_batch()
    server.pipeline.kill_before = "switch_in_flight"
    assert server.publish_in_flight(pack_adapter(make_update(version)))
    server.end_batch()
    assert server.official == version
    assert server.pipeline.call_all("policy_version") == [version, version]


def test_an_update_that_was_written_over_is_refused(server, learner, tiny_model) -> None:
    before, version = server.official, server.highest + 1
    notices = [learner(there.write_adapter, tiny_model, version + number, number) for number in range(3)]
    with pytest.raises(AdapterError, match=f"adapter version {version}: the checksum of .* is not the published one"):
        server.publish(notices[0])
    assert server.pipeline.call_all("policy_version") == [before, before]
    assert server.publish(notices[1]) == version + 1


def test_one_refusal_and_all_forget_the_update(server, make_update) -> None:
    before, version = server.official, server.highest + 1
    server.pipeline.spoiled = pack_adapter(make_update(version, fault=float("inf")))
    with pytest.raises(AdapterError, match="has NaN or Inf"):
        server.publish(make_update(version))
    server.pipeline.spoiled = None
    assert server.official == before
    assert server.pipeline.call_all("policy_version") == [before, before]
    for stage in server.pipeline.stages:  # the one that had not refused does not hold it either
        with pytest.raises(AdapterError, match="not resident"):
            ray.get(stage.commit_adapter.remote(version), timeout=30)
    assert server.publish(make_update(version + 1)) == version + 1


def test_fresh_stages_can_be_rolled_back_too(server, make_update) -> None:
    first = server.publish(make_update(server.highest + 1))
    second = server.publish(make_update(server.highest + 1))
    server.rollback(first)
    server.recover(StageLost("for the test"))
    assert server.pipeline.call_all("policy_version") == [first, first]
    assert server.rollback(second) == second
    assert server.pipeline.call_all("policy_version") == [second, second]
    assert server.publish(make_update(second + 1)) == second + 1


def test_a_version_that_is_scored_with_stays_also_after_a_loss(server, make_update) -> None:
    reference = server.publish(make_update(server.highest + 1))
    answers = [((3, 4, 5), (6, 7))]
    wanted = server.score(answers, reference)
    for _ in range(8):  # as many as stages keep
        server.publish(make_update(server.highest + 1))
        server.score(answers, reference)
    server.recover(StageLost("for the test"))
    server.publish(make_update(server.highest + 1))
    assert server.score(answers, reference) == wanted


def test_a_stage_that_hangs_is_lost_after_the_limit(server) -> None:
    official, victim = server.official, server.pipeline.call_all("pid")[1]
    os.kill(victim, signal.SIGSTOP)
    with pytest.raises(StageLost, match="stage 1 did not answer 'counters' within 0.5 s") as lost:
        server.pipeline.call_all("counters", limit_s=0.5)
    server.recover(lost.value)
    assert victim not in server.pipeline.call_all("pid")
    assert server.pipeline.call_all("policy_version") == [official, official]


def test_losses_without_end_are_an_error(server, cluster, make_settings) -> None:
    server.close()
    limits = Limits(start=0.01, failures=3)
    lost = PolicyServer(Pipeline(make_settings((4,), limits=limits), cluster.placement), limits.failures)
    with pytest.raises(StageLost, match="3 times in a row"):
        lost.start()
    assert lost.pipeline.stages == []


def test_a_lost_maker_of_an_update_is_told_from_a_lost_coordinator(cluster, make_settings, make_update) -> None:
    @ray.remote(num_cpus=0)
    class Maker:
        def update(self) -> None:
            os._exit(1)

    rollouts = Rollouts(cluster, make_settings((4,)))
    with pytest.raises(UpdateLost, match="the update was cut off"):
        rollouts.publish(Maker.remote().update.remote())
    ray.kill(rollouts.handle)
    with pytest.raises(ActorLost) as lost:
        rollouts.publish(ray.put(pack_adapter(make_update(1))))
    assert not isinstance(lost.value, UpdateLost)


def test_a_publication_in_flight_may_wait_for_stages_that_are_made_anew(cluster) -> None:
    @ray.remote(num_cpus=0, max_concurrency=2)
    class Recovering:
        """In the coordinator's place; it switches after it was asked what it is at."""

        def __init__(self) -> None:
            self.asked = threading.Event()

        def progress(self) -> Progress:
            self.asked.set()
            return Progress(phase="recovering")

        def publish_in_flight(self, update: object) -> int:
            assert self.asked.wait(120)
            return 7

    rollouts = object.__new__(Rollouts)
    rollouts.handle, rollouts._limits, rollouts._begun = Recovering.remote(), Limits(call=10.0), {"a rollout"}
    ray.get(rollouts.handle.__ray_ready__.remote())
    assert rollouts.publish(ray.put(None), in_flight=True) == 7


def test_a_publication_may_wait_behind_a_rollout_as_long_as_that_takes() -> None:
    now = 0.0
    patience = Patience("the publication", 10.0, clock=lambda: now)
    for phase in ("idle", "generating", "verifying", "recovering", "scoring"):
        now += 9.0
        patience.look(phase)
    now += 10.0
    patience.look("publishing")
    now += 0.5
    with pytest.raises(ActorLost, match="the publication did not end within 10 s"):
        patience.look("publishing")
