"""Scores of given answers through the coordinator: under the version that is asked for, on one stage and on two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from actors import cluster as clusters
from actors.rollouts import Rollouts
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.engine.scheduler import RequestError
from ember_ray.model.lora import AdapterError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[clusters.Cluster]:
    with clusters.start(2, run="test", dashboard=False) as made:
        yield made


@pytest.fixture
def rollouts(request: pytest.FixtureRequest, cluster, make_settings) -> Iterator[Rollouts]:
    made = Rollouts(cluster, make_settings(request.param))
    made.ready()
    yield made
    made.stop()


@pytest.mark.parametrize("rollouts", [(4,), (1, 3)], ids=["one-stage", "two-stages"], indirect=True)
def test_a_kept_version_scores_and_the_official_one_serves_on(rollouts, make_rows, make_update, tokens_of) -> None:
    params, rows = SamplingParams(max_tokens=12), make_rows(3)
    assert [rollouts.publish(make_update(version)) for version in (1, 2)] == [1, 2]
    result = rollouts.rollout(rows, 2, params, 1)
    answers, logprobs = [], []
    for group in result.groups:
        for scored in group.candidates:
            answers.append((group.prompt_token_ids, tuple(scored.candidate.token_ids)))
            logprobs.append(scored.candidate.logprobs)

    def furthest(scores: list[list[float]]) -> float:
        assert list(map(len, scores)) == list(map(len, logprobs))
        flat = [value for row in scores for value in row], [value for row in logprobs for value in row]
        return max(abs(a - b) for a, b in zip(*flat, strict=True))

    assert furthest(rollouts.score(answers)) < 1e-4
    assert furthest(rollouts.score(answers, 2)) < 1e-4
    under_first = rollouts.score(answers, 1)
    assert furthest(under_first) > 0.1
    assert furthest(rollouts.score(answers, 0)) > 0.1
    assert rollouts.policy_version == 2 and set(rollouts.stage_versions()) == {2}
    assert tokens_of(rollouts.rollout(rows, 2, params, 1)) == tokens_of(result)
    assert rollouts.score([]) == []

    with pytest.raises(AdapterError, match="version 7 cannot be served"):
        rollouts.score(answers, 7)
    with pytest.raises(RequestError, match="row 1 to score: it has 600 tokens"):
        rollouts.score([answers[0], (answers[0][0], (1,) * (600 - len(answers[0][0])))], 1)
    assert set(rollouts.stage_versions()) == {2}  # also after a refusal

    for version in range(3, 13):  # more than are kept; the reference is in use and stays
        rollouts.publish(make_update(version))
        rollouts.score(answers[:1], 1)
    assert rollouts.score(answers, 1) == under_first
    assert 2 not in rollouts.versions()


@pytest.mark.parametrize("rollouts", [(1, 3)], ids=["two-stages"], indirect=True)
def test_scores_survive_the_loss_of_a_stage(rollouts, make_rows, make_update) -> None:
    import os
    import signal

    for version in (1, 2):
        rollouts.publish(make_update(version))
    answers = [(row.prompt_token_ids, (5, 6, 7, 0)) for row in make_rows(2)]
    wanted = rollouts.score(answers, 1)
    os.kill(rollouts.stage_processes()[1][1], signal.SIGKILL)
    assert rollouts.score(answers, 1) == wanted
    assert rollouts.stage_versions() == [2, 2]
