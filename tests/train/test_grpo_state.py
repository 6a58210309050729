"""The GRPO learner keeps its state over a crash, and lets nothing into the weights that is not finite."""

from dataclasses import replace

import pytest
import torch

from ember_ray.train.grpo import GrpoLearner, GrpoOptions, LearnerError
from ember_ray.train.options import LoraOptions
from tests.support.scored_groups import group, scored

pytestmark = pytest.mark.slow  # each one trains

LORA = LoraOptions(r=4, lora_alpha=8)
GRPO = GrpoOptions(
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    planned_steps=20,
    per_device_train_batch_size=3,
    num_iterations=2,
    beta=0.1,
    seed=5,
)


def rollouts(round_number):
    """Groups of unequal size and length, other ones each round."""
    numbers = torch.Generator().manual_seed(round_number)
    groups = []
    for row in range(3):
        candidates = []
        for index in range(4 - row % 2):
            answer = torch.randint(3, 200, (2 + index + row,), generator=numbers).tolist()
            candidates.append(scored(index, 0.25 * ((index + row) % 4), answer, [-5.0] * len(answer)))
        groups.append(group(*candidates, prompt=range(10, 14 + row), row=f"row-{row}"))
    return groups


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_learner_goes_on_equal_to_the_bit(tiny_qwen3, tmp_path):
    learner = GrpoLearner(tiny_qwen3, LORA, GRPO)
    learner.learn(rollouts(0))
    learner.learn(rollouts(1)[:1])
    learner.save_state(tmp_path)
    wanted = [learner.learn(rollouts(number)) for number in (2, 3)]

    torch.rand(3)  # other users of the process's generators change nothing
    resumed = GrpoLearner(tiny_qwen3, LORA, GRPO)
    resumed.load_state(tmp_path)
    assert (resumed.rounds, resumed.steps) == (2, 8 + 4)
    got = [resumed.learn(rollouts(number)) for number in (2, 3)]
    for metrics in (*wanted, *got):
        del metrics["seconds"], metrics["step_time"]
    assert got == wanted and got[0]["kl"] > 0
    assert equal(resumed.adapter_update(1).tensors, learner.adapter_update(1).tensors)

    started_over = GrpoLearner(tiny_qwen3, LORA, GRPO)
    started_over.learn(rollouts(2))
    started_over.learn(rollouts(3))
    assert not equal(started_over.adapter_update(1).tensors, learner.adapter_update(1).tensors)


def test_a_state_of_other_options_is_refused_on_resume(tiny_qwen3, tmp_path):
    GrpoLearner(tiny_qwen3, LORA, GRPO).save_state(tmp_path)
    with pytest.raises(LearnerError, match="was made with grpo.beta=0.1, not 0.0"):
        GrpoLearner(tiny_qwen3, LORA, replace(GRPO, beta=0.0)).load_state(tmp_path)


def test_what_is_not_finite_does_not_reach_the_weights(tiny_qwen3):
    learner = GrpoLearner(tiny_qwen3, LORA, GrpoOptions(vllm_importance_sampling_correction=False))
    learner.learn(rollouts(0))
    before = learner.adapter_update(1).tensors
    groups = rollouts(1)
    worst = min(groups[0].candidates, key=lambda chosen: chosen.reward).candidate
    worst.logprobs = [-1000.0] * len(worst.token_ids)  # a ratio of infinity, which is not clipped for bad answers
    with pytest.raises(LearnerError, match="the loss became inf in step 1 of the round"):
        learner.learn(groups)
    assert equal(before, learner.adapter_update(2).tensors)
    assert learner.learn(rollouts(2))["steps"] == 1
