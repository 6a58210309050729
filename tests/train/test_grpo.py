"""The GRPO learner: its losses against plain ones, its ratios against the engine, what it leaves out."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from transformers import TrainerCallback

from ember_ray.assets import tiny_model_path
from ember_ray.engine.llm import LLM
from ember_ray.engine.options import EngineOptions
from ember_ray.train.grpo import GrpoLearner, GrpoOptions, LearnerError
from ember_ray.train.options import LoraOptions
from tests.support import plain_grpo
from tests.support.scored_groups import extraction_groups, group, scored

pytestmark = pytest.mark.slow  # each one trains

LORA = LoraOptions(r=4, lora_alpha=8)
VERSIONS = itertools.count(1)
LENGTHS = (7, 3, 1, 5)
REWARDS = ((1.0, 0.0, 0.25, 0.25), (0.0, 0.5, 0.0, 1.0), (0.7, 0.1, None, 0.4))


class Gradients(TrainerCallback):
    """What each optimizer step is given."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def make_learner(model_path, lora=LORA, scale=0.2, **options):
    """A learner whose adapter does something."""
    learner = GrpoLearner(model_path, lora, GrpoOptions(mismatch_candidates=0, **options))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in learner.model.named_parameters():
        if "lora_B" in name and ".default." in name:
            parameter.data.normal_(0.0, scale, generator=generator)
    return learner


def make_batch(model, noise, temperature=1.0):
    """Groups of unequal answers; the recorded log-probabilities are the model's own and noise."""
    numbers = random.Random(4)
    groups = []
    for place, rewards in enumerate(REWARDS):
        prompt = [numbers.randrange(3, 200) for _ in range(4 + 3 * place)]
        candidates = []
        for index, reward in enumerate(rewards):
            answer = [numbers.randrange(3, 200) for _ in range(LENGTHS[(index + place) % 4] + place)]
            known = plain_grpo.logprobs(model, prompt, answer, temperature).tolist()
            candidates.append(scored(index, reward, answer, [v + numbers.gauss(0, noise) for v in known]))
        groups.append(group(*candidates, prompt=prompt, row=f"row-{place}"))
    return groups


def plain(model, groups, per_token, loss_type="grpo", scale=True, temperature=1.0, longest=512):
    """The plain loss of the batch and its gradients; ``per_token(now, recorded, advantage)`` is a row's loss."""
    rows = []
    for one in groups:
        used = [c for c in one.candidates if c.reward is not None]
        for chosen, advantage in zip(used, plain_grpo.advantages([c.reward for c in used], scale), strict=True):
            tokens = chosen.candidate.token_ids
            now = plain_grpo.logprobs(model, one.prompt_token_ids, tokens, temperature)
            rows.append(per_token(now, torch.tensor(chosen.candidate.logprobs), advantage))
    loss = plain_grpo.total(loss_type, rows, longest)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def learn_and_compare(learner, groups, wanted):
    """One round of one optimizer step against the plain loss and gradients."""
    loss, gradients = wanted
    seen = Gradients()
    learner._trainer.add_callback(seen)
    metrics = learner.learn(groups)
    (step,) = seen.steps
    assert metrics["steps"] == 1 and metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert step.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=1e-5 * largest)
    return metrics


@pytest.mark.parametrize(
    "loss_type, options",
    [
        ("grpo", {}),
        ("grpo", {"beta": 0.3, "use_bias_correction_kl": False}),
        ("dr_grpo", {"scale_rewards": "none", "max_completion_length": 20}),
        ("dapo", {"epsilon_high": 0.28}),
    ],
)
def test_loss_and_gradients_are_those_of_the_papers(tiny_qwen3, loss_type, options):
    """Old policy = rollout policy, clipped; 11 candidates in 3 forward passes, one more has no reward."""
    learner = make_learner(
        tiny_qwen3,
        loss_type=loss_type,
        vllm_importance_sampling_correction=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        max_grad_norm=0,
        **options,
    )
    model, settings = learner.model, learner.options
    groups = make_batch(model, noise=0.3)
    references = []
    if settings.beta:
        with torch.no_grad(), model.disable_adapter():
            references = [
                plain_grpo.logprobs(model, one.prompt_token_ids, c.candidate.token_ids)
                for one in groups
                for c in one.candidates
                if c.reward is not None
            ]
    places = iter(range(11))

    def per_token(now, recorded, advantage):
        loss = plain_grpo.policy_loss(now, recorded, advantage, 0.2, options.get("epsilon_high", 0.2))
        place = next(places)
        return loss + settings.beta * plain_grpo.kl(now, references[place]) if settings.beta else loss

    longest = settings.max_completion_length
    wanted = plain(model, groups, per_token, loss_type, settings.scale_rewards == "group", longest=longest)
    metrics = learn_and_compare(learner, groups, wanted)
    assert metrics["candidates_failed"] == 1 and metrics["candidates_learnt"] == 11
    assert metrics["clip_ratio/region_mean"] > 0.05
    assert ("kl" in metrics) == bool(settings.beta)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights_are_against_the_rollout(tiny_qwen3, mode):
    """Truncated and masked importance sampling, per token and per sequence (ratio 1, weights apart)."""
    low, high = 0.6, 1.5
    learner = make_learner(
        tiny_qwen3,
        loss_type="dapo",
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
        max_grad_norm=0,
    )
    groups = make_batch(learner.model, noise=0.2 if mode.startswith("sequence") else 0.4)
    weights = []

    def per_token(now, recorded, advantage):
        difference = (now - recorded).detach()
        weight = (difference.sum() if mode.startswith("sequence") else difference).exp()
        outside = (weight < low) | (weight > high)
        weight = weight.clamp(low, high) if mode.endswith("truncate") else weight.masked_fill(outside, 0.0)
        weights.extend(weight.reshape(-1).tolist())
        return weight * plain_grpo.policy_loss(now, now.detach(), advantage, 0.2, 0.2)

    wanted = plain(learner.model, groups, per_token, "dapo")
    metrics = learn_and_compare(learner, groups, wanted)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(min(weights), abs=1e-4)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(max(weights), abs=1e-4)
    assert min(weights) < 0.8 and max(weights) > 1.2
    assert metrics["sampling/sampling_logp_difference/mean"] > 0.1


def test_rollouts_at_another_temperature(tiny_qwen3):
    learner = make_learner(
        tiny_qwen3, temperature=0.7, vllm_importance_sampling_correction=False, loss_type="grpo", max_grad_norm=0
    )
    groups = make_batch(learner.model, noise=0.0, temperature=0.7)
    for one in groups:
        for chosen in one.candidates:  # at temperature 1 they are others, and not looked at
            chosen.candidate.logprobs = [-9.0] * len(chosen.candidate.token_ids)

    def per_token(now, recorded, advantage):
        return plain_grpo.policy_loss(now, now.detach(), advantage, 0.2, 0.2)

    metrics = learn_and_compare(learner, groups, plain(learner.model, groups, per_token, temperature=0.7))
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_truncated_candidates_count_in_the_mean_and_not_in_the_loss(tiny_qwen3):
    learner = make_learner(
        tiny_qwen3,
        loss_type="dapo",
        mask_truncated_completions=True,
        vllm_importance_sampling_correction=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        max_grad_norm=0,
    )
    groups = make_batch(learner.model, noise=0.1)
    groups[0].candidates[0].candidate.finish_reason = "length"
    groups[1].candidates[1].candidate.finish_reason = "stop_sequence"  # no EOS either, and complete
    rows = iter(range(11))

    def per_token(now, recorded, advantage):
        loss = plain_grpo.policy_loss(now, recorded, advantage, 0.2, 0.2)
        return loss[:0] if next(rows) == 0 else loss

    metrics = learn_and_compare(learner, groups, plain(learner.model, groups, per_token, "dapo"))
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 / 11)


def test_what_is_left_out_might_not_have_been_drawn(tiny_qwen3):
    """Failed, aborted and too long candidates, a group without any other, and (asked for) one without spread."""
    learners = [
        make_learner(tiny_qwen3, loss_type="grpo", learning_rate=1e-2, skip_zero_std_groups=skip, max_length=40)
        for skip in (True, False)
    ]
    groups = make_batch(learners[0].model, noise=0.1)
    groups[2].candidates.pop(2)
    alike = [scored(index, 0.5, (4 + index, 9)) for index in range(3)]
    more = [
        group(*groups[0].candidates, scored(4, None, (7, 8)), scored(5, 0.9, (7, 8), finish_reason="abort")),
        group(*groups[1].candidates, scored(4, 1.0, range(3, 50))),
        groups[2],
        group(scored(0, None), scored(1, None)),
        group(*alike),
    ]
    for one, other in zip(more, groups, strict=False):
        one.prompt_token_ids = other.prompt_token_ids
    metrics, few = learners[0].learn(more), learners[1].learn(groups)
    left_out = ("failed", "aborted", "too_long")
    assert [metrics[f"candidates_{name}"] for name in left_out] == [3, 1, 1]
    assert (metrics["groups_zero_std"], metrics["groups_skipped"]) == (1, 1)
    assert metrics["frac_reward_zero_std"] == 0.25  # of the four that have candidates
    assert metrics["loss"] == few["loss"] and metrics["grad_norm"] == few["grad_norm"]
    one, other = (learner.adapter_update(1).tensors for learner in learners)
    assert all(torch.equal(one[name], other[name]) for name in one)

    empty = learners[0].learn([group(*alike), group(scored(0, None))])
    assert empty["steps"] == 0 and "loss" not in empty and empty["reward"] == 0.5


def test_metrics_of_a_round_are_those_of_trl(tiny_qwen3):
    learner = make_learner(tiny_qwen3)
    groups = make_batch(learner.model, noise=0.1)
    groups[2].candidates[2].reward = 0.4
    for one in groups:
        for place, chosen in enumerate(one.candidates):
            chosen.candidate.finish_reason = "stop" if place % 2 else "length"
            chosen.candidate.token_ids[-1] = 2 if place % 2 else 77
    groups[1] = group(*[dataclasses.replace(c, reward=0.3) for c in groups[1].candidates], prompt=(3, 4), row="row-1")
    metrics = learner.learn(groups)
    (trl,) = learner._watch.steps
    names = [name for name in trl if name.startswith(("reward", "frac", "completions/")) and "recorded" not in name]
    assert len(names) == 10
    for name in names:
        assert metrics[name] == pytest.approx(trl[name], rel=1e-5), name


def test_several_steps_a_round(tiny_qwen3):
    """Two passes over a round in two optimizer steps each; the ratio leaves 1 and is clipped."""
    learner = make_learner(
        tiny_qwen3,
        num_iterations=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=3e-2,
        lr_scheduler_type="linear",
        planned_steps=8,
    )
    groups = make_batch(learner.model, noise=0.0)
    metrics = learner.learn(groups)
    assert metrics["steps"] == learner.steps == 4 and metrics["num_tokens"] == 2 * sum(
        len(one.prompt_token_ids) + len(c.candidate.token_ids)
        for one in groups
        for c in one.candidates
        if c.reward is not None
    )
    assert [step["learning_rate"] for step in learner._watch.steps] == pytest.approx(
        [3e-2 * (1 - k / 8) for k in range(4)]
    )
    clipped = [step["clip_ratio/region_mean"] for step in learner._watch.steps]
    assert clipped[0] == 0.0 and max(clipped[1:]) > 0.0
    assert learner.learn(groups[:1])["steps"] == 2  # a small round is one step each time


def test_rounds_of_any_size_are_learnt_from_whole(tiny_qwen3):
    """11 candidates in two steps of three passes, then 8 in one step of four: the mean loss is that of all of them."""
    learner = make_learner(
        tiny_qwen3,
        loss_type="grpo",
        vllm_importance_sampling_correction=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=1e-30,  # nothing moves
    )
    groups = make_batch(learner.model, noise=0.3)

    def per_token(now, recorded, advantage):
        return plain_grpo.policy_loss(now, recorded, advantage, 0.2, 0.2)

    for some, steps in ((groups, 2), (groups[:2], 1)):
        wanted, _ = plain(learner.model, some, per_token)
        metrics = learner.learn(some)
        assert metrics["steps"] == steps and metrics["loss"] == pytest.approx(wanted, abs=1e-5)


def test_other_losses_learn(tiny_qwen3):
    for options in (
        {"loss_type": "bnpo", "scale_rewards": "batch", "delta": 1.4},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "sapo", "top_entropy_quantile": 0.5},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate", "off_policy_mask_threshold": 0.1},
    ):
        learner = make_learner(tiny_qwen3, learning_rate=3e-2, **options)
        groups = make_batch(learner.model, noise=0.05)
        best, worst = groups[0].candidates[0].candidate, groups[0].candidates[1].candidate

        def margin(learner=learner, prompt=groups[0].prompt_token_ids, answers=(best.token_ids, worst.token_ids)):
            with torch.no_grad():
                good, bad = (plain_grpo.logprobs(learner.model, prompt, tokens).sum() for tokens in answers)
            return float(good - bad)

        before = margin()
        for _ in range(2):
            learner.learn(groups)
        assert margin() > before + 0.3, options


def test_the_reference_is_the_starting_adapter(tiny_qwen3, tmp_path):
    first = make_learner(tiny_qwen3, scale=0.3)
    groups = make_batch(first.model, noise=0.0)
    first.save_adapter(tmp_path / "start")
    bare = make_learner(tiny_qwen3, scale=0.3, beta=0.1, learning_rate=1e-2)
    started = GrpoLearner(tiny_qwen3, LORA, GrpoOptions(beta=0.1, learning_rate=1e-2), init_adapter=tmp_path / "start")
    assert bare.learn(groups)["kl"] > 0.1  # the base model is far off
    assert started.learn(groups)["kl"] == pytest.approx(0.0, abs=1e-6)
    assert started.learn(groups)["kl"] > 1e-4


@pytest.fixture(scope="module")
def llm():
    return LLM(EngineOptions(str(tiny_model_path())))


@pytest.mark.parametrize("correction", [True, False])
def test_the_first_step_on_a_fresh_rollout_has_ratio_one(llm, correction):
    learner = make_learner(
        tiny_model_path(),
        LoraOptions(),
        scale=0.02,
        vllm_importance_sampling_correction=correction,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
    )
    version = next(VERSIONS)
    llm.publish(learner.adapter_update(version))
    groups = extraction_groups(llm, num_prompts=4, num_candidates=8, seed=1)
    assert {c.candidate.policy_version for one in groups for c in one.candidates} == {version}
    metrics = learner.learn(groups)
    assert metrics["steps"] == 1
    assert 1 - 1e-4 < metrics["sampling/importance_sampling_ratio/min"]
    assert metrics["sampling/importance_sampling_ratio/max"] < 1 + 1e-4
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert metrics["clip_ratio/region_mean"] == 0.0
    # it is no comparison of the base model with itself
    base = GrpoLearner(tiny_model_path(), LoraOptions(), GrpoOptions(mismatch_candidates=0))
    assert base.learn(groups)["sampling/sampling_logp_difference/max"] > 0.3


@pytest.mark.parametrize("correction", [True, False])
def test_a_rollout_of_an_older_policy_is_corrected_with_what_it_recorded(llm, correction):
    """Lag 1: the learner has taken a step since. The ratio is of its policy to the one that drew the candidates."""
    learner = make_learner(
        tiny_model_path(),
        LoraOptions(),
        scale=0.02,
        learning_rate=3e-3,
        vllm_importance_sampling_correction=correction,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=1e9,
        per_device_train_batch_size=64,
    )
    version = next(VERSIONS)
    llm.publish(learner.adapter_update(version))
    old = extraction_groups(llm, num_prompts=4, num_candidates=8, seed=2)
    learner.learn(old)
    llm.publish(learner.adapter_update(next(VERSIONS)))
    rows = [(one.prompt_token_ids, c.candidate) for one in old for c in one.candidates]
    scores = llm.score(
        [(*prompt, *candidate.token_ids) for prompt, candidate in rows], [len(prompt) for prompt, _ in rows]
    )
    ratios = [
        math.exp(now - recorded)
        for score, (_, candidate) in zip(scores, rows, strict=True)
        for now, recorded in zip(score, candidate.logprobs, strict=True)
    ]
    assert {candidate.policy_version for _, candidate in rows} == {version}
    assert min(ratios) < 0.9 and max(ratios) > 1.1
    metrics = learner.learn(old)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(min(ratios), rel=1e-4)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(max(ratios), rel=1e-4)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert (metrics["clip_ratio/region_mean"] > 0) == (not correction)  # as a weight it is not in the clipped ratio


def test_what_the_engine_cannot_have_made_is_refused(tiny_qwen3):
    with pytest.raises(LearnerError, match="GRPO needs lora_dropout 0, not 0.1"):
        GrpoLearner(tiny_qwen3, LoraOptions(lora_dropout=0.1), GrpoOptions())
    learner = GrpoLearner(tiny_qwen3, LORA, GrpoOptions(mismatch_candidates=0))
    for tokens, logprobs, words in (
        ((5, 6), [-1.0], "'row' has 1 finite log-probabilities for 2 tokens"),
        ((5, 6), [-1.0, math.nan], "'row' has 1 finite log-probabilities for 2 tokens"),
        ((5, 9999), [-1.0, -1.0], "'row' has a token id in token_ids outside"),
    ):
        with pytest.raises(LearnerError, match=words):
            learner.learn([group(scored(0, 1.0, tokens, logprobs), scored(1, 0.0))])
