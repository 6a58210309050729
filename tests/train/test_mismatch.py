"""The engine's log-probabilities against the learner's."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.train.mismatch import mismatch_metrics, sampled_answers
from ember_ray.train.options import LoraOptions

numbers = st.floats(-30, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=60))
def test_metrics_are_those_of_numpy(pairs):
    import numpy

    engine, learner = zip(*pairs, strict=True)
    found = mismatch_metrics(engine, learner)
    apart = numpy.array(learner) - numpy.array(engine)
    assert found["mismatch/mean"] == pytest.approx(abs(apart).mean(), abs=1e-12)
    assert found["mismatch/max"] == abs(apart).max()
    assert found["mismatch/p95"] == numpy.quantile(abs(apart), 0.95, method="inverted_cdf")
    outside = (apart < math.log(0.9)) | (apart > math.log(1.1))
    assert (found["mismatch/outside"], found["mismatch/tokens"]) == (outside.mean(), len(pairs))


def test_the_bounds_of_the_ratio():
    apart = [math.log(ratio) for ratio in (0.899, 0.901, 1.0, 1.099, 1.101)]
    assert mismatch_metrics([0.0] * 5, apart)["mismatch/outside"] == 2 / 5
    found = mismatch_metrics([-1.0, -1.0], [-1.0, -math.inf])
    assert (found["mismatch/max"], found["mismatch/mean"], found["mismatch/outside"]) == (math.inf, math.inf, 0.5)
    assert mismatch_metrics([], []) == {"mismatch/tokens": 0}


def group(name, *lengths):
    candidates = [
        Candidate(name, index, list(range(3, 3 + n)), [-1.0] * n, [-1.0] * n, "", "stop", 0)
        for index, n in enumerate(lengths)
    ]
    return ScoredGroup(name, name, (5, 6), [ScoredCandidate(candidate, 1.0) for candidate in candidates])


def test_one_of_each_group_comes_before_the_second_of_any():
    groups = [group("a", 1, 2), group("b", 0, 3), group("c", 4)]
    lengths = [len(answer) for _, answer, _ in sampled_answers(groups, None)]
    assert lengths == [1, 4, 2, 3]
    assert [len(answer) for _, answer, _ in sampled_answers(groups, 3)] == [1, 4, 2]
    groups[0].candidates[0].candidate.finish_reason = "abort"
    assert [len(answer) for _, answer, _ in sampled_answers(groups, 2)] == [2, 4]
    groups[1].candidates[1].candidate.logprobs.pop()
    with pytest.raises(ValueError, match="candidate 1 of prompt 'b' has 3 tokens and 2"):
        sampled_answers(groups, None)


@pytest.mark.slow
def test_learner_and_engine_agree_on_every_token(tmp_path):
    """float32 CPU, tokens drawn by the engine under a random adapter; a twin with another scale is seen."""
    from ember_ray.engine.llm import LLM
    from ember_ray.engine.options import EngineOptions
    from ember_ray.engine.sampling_params import SamplingParams
    from ember_ray.train.dpo import DpoLearner, DpoOptions
    from tests.support.qwen3 import make_qwen3, random_prompts

    model, lora = tmp_path / "model", LoraOptions(r=4, lora_alpha=8)
    make_qwen3(model, seed=3)
    options = DpoOptions(learning_rate=1e-9, mismatch_candidates=5, loss_type=("sigmoid",))
    learner = DpoLearner(model, lora, options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    llm = LLM(EngineOptions(str(model), num_kv_blocks=256))
    llm.publish(learner.adapter_update(1))
    prompts = random_prompts([5, 37, 20, 61], seed=2)
    params = SamplingParams(temperature=0.8, max_tokens=24, seed=9)
    groups = [
        ScoredGroup(
            one.request_id, "", one.prompt_token_ids, [ScoredCandidate(c, float(c.index)) for c in one.candidates]
        )
        for one in llm.generate(prompts, 3, params)
    ]
    found = learner.mismatch(groups)
    assert found["mismatch/tokens"] == sum(len(s.candidate.token_ids) for g in groups for s in g.candidates) > 100
    assert found["mismatch/max"] < 1e-4 and found["mismatch/outside"] == 0
    learnt = learner.learn(groups)
    assert learnt["mismatch/max"] < 1e-4 and 0 < learnt["mismatch/tokens"] < found["mismatch/tokens"]
    assert learner.model.training
    assert learner.mismatch(groups, 0) == {}

    twin = learner.adapter_update(2)
    llm.publish(replace(twin, scaling={name: 1.01 * scale for name, scale in twin.scaling.items()}))
    off = [s for g in groups for s in g.candidates]
    scores = llm.score([g.prompt_token_ids + tuple(s.candidate.token_ids) for g in groups for s in g.candidates],
                       [len(g.prompt_token_ids) for g in groups for _ in g.candidates])  # fmt: skip
    for scored, logprobs in zip(off, scores, strict=True):
        scored.candidate.logprobs = logprobs
    assert learner.mismatch(groups)["mismatch/max"] > 1e-3
