"""Nobody is ever served by another policy than the one that he is told of: swaps and requests at random moments."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest
import ray

from actors import cluster as clusters
from actors.adapter_wire import pack_adapter
from actors.messages import PromptRow
from actors.rollouts import Rollouts
from ember_ray.engine.sampling_params import SamplingParams
from tests.support.direct_forward import DirectForward

ROLLOUTS = 12
ROUNDING = 1e-3
"""Of sums in float32; a candidate of another version is further away."""


def _prompts(make_rows, dice: random.Random) -> list[PromptRow]:
    """A few prompts that come again and again, and share beginnings: what a cache lives on."""
    first = make_rows(4)
    more = [replace(row, prompt_token_ids=(*row.prompt_token_ids, *dice.choices(range(1, 257), k=20))) for row in first]
    rows = [*first, *more]
    return [replace(row, example=replace(row.example, id=f"row-{place}")) for place, row in enumerate(rows)]


@pytest.mark.slow
def test_candidates_are_of_the_versions_that_they_claim(make_settings, make_rows, make_update, tiny_model) -> None:
    dice, direct = random.Random(5), DirectForward(tiny_model)
    rows = _prompts(make_rows, dice)
    with clusters.start(2, run="stale", dashboard=False) as cluster:
        rollouts = Rollouts(cluster, make_settings((2, 2)))
        rollouts.ready()
        ended = threading.Event()
        faults: list[BaseException] = []

        def swap() -> None:
            own, version = random.Random(6), 0
            try:
                while not ended.is_set():
                    if version and own.random() < 0.2:
                        rollouts.rollback(own.choice(rollouts.versions()))
                    else:
                        version += 1
                        direct.updates[version] = make_update(version)
                        packed = ray.put(pack_adapter(direct.updates[version]))
                        rollouts.publish(packed, in_flight=own.random() < 0.8)
                    time.sleep(own.random() * 0.1)
            except BaseException as fault:
                faults.append(fault)

        thread = threading.Thread(target=swap)
        thread.start()
        results = []
        try:
            for number in range(ROLLOUTS):
                some = dice.sample(rows, dice.randint(1, 5))
                params = SamplingParams(temperature=1.0, max_tokens=dice.choice((1, 12, 60)))
                results.append(rollouts.rollout(some, dice.randint(1, 4), params, number))
                time.sleep(dice.random() * 0.2)
        finally:
            ended.set()
            thread.join()
        assert not faults
        counters = rollouts.counters()[0]
    assert counters["prefix_hit_tokens"] > 0
    seen, mixed = set(), 0
    for result in results:
        for group in result.groups:
            for scored in group.candidates:
                candidate = scored.candidate
                version, answer = candidate.policy_version, candidate.token_ids
                seen.add(version)
                spans = candidate.spans or [(0, len(group.prompt_token_ids) + len(answer) - 1, version)]
                mixed += len(spans) > 1
                wanted = direct.logprobs(group.prompt_token_ids, answer, spans)
                assert candidate.logprobs == pytest.approx(wanted, abs=ROUNDING), spans
    assert len(seen) > 1 and mixed, "versions must have changed between rollouts and in them"
