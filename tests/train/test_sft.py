"""What SFT learns: the answer's tokens and no others, each weighing the same."""

import pytest
import torch
import torch.nn.functional as F

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.train.batch import Demonstration
from ember_ray.train.options import LoraOptions, SftOptions
from ember_ray.train.sft import LearnerError, SftLearner

LORA = LoraOptions(r=4, lora_alpha=8)


def shown(prompt, answer, row="row-1"):
    return Demonstration(row, tuple(prompt), tuple(answer), "text")


def tokens(text):
    return tuple(3 + byte for byte in text.encode())


def some(count=16):
    """Answers of very different lengths: where rows weighed the same instead of tokens, it would show."""
    return [shown(tokens(f"n {n}"), (*tokens("x" * (1 + 5 * (n % 4)) + str(n)), 2), f"row-{n}") for n in range(count)]


def base_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def answer_nll(model, one):
    ids = [*one.prompt_token_ids, *one.completion_token_ids]
    logps = F.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)[len(one.prompt_token_ids) - 1 : -1]
    return -logps.gather(1, torch.tensor(one.completion_token_ids)[:, None])[:, 0]


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_is_over_the_answers_tokens_alone(tiny_qwen3):
    """Ids that no text encodes to: a special token in the middle, no end token, a prompt of one token."""
    rows = [shown((9, 1, 8, 200), (50, 2, 51, 1, 240)), shown((7,), (60,))]
    metrics = SftLearner(tiny_qwen3, LORA, SftOptions()).learn(rows)
    model = base_model(tiny_qwen3)
    nll = torch.cat([answer_nll(model, one) for one in rows])
    assert metrics["loss"] == pytest.approx(float(nll.mean()), abs=1e-4)
    assert (metrics["rows"], metrics["rows_too_long"], metrics["answer_tokens"]) == (2, 0, 6)
    assert (metrics["steps"], metrics["num_tokens"]) == (1, 9 + 2)


@pytest.mark.slow
def test_accumulated_batches_equal_one_batch(tiny_qwen3):
    """4 passes of 4 rows equal one of 16, though answers have 3 to 19 tokens: tokens weigh the same, not passes.

    The last round has 7 rows: passes of 4 and 3 in one step.
    """
    rows = some(16)
    results = []
    for batch, accumulation in ((16, 1), (4, 4)):
        options = SftOptions(
            learning_rate=1e-2, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        learner = SftLearner(tiny_qwen3, LORA, options)
        metrics = [learner.learn(rows) for _ in range(3)] + [learner.learn(rows[:7])]
        assert [one["steps"] for one in metrics] == [1] * 4
        results.append(([one["loss"] for one in metrics], [one["grad_norm"] for one in metrics], learner))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)
    one, other = (learner.adapter_update(1).tensors for *_, learner in results)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    assert any(float(t.abs().max()) > 1e-2 for n, t in one.items() if "lora_B" in n)


@pytest.mark.slow
def test_it_imitates_and_follows_the_schedule(tiny_qwen3):
    options = SftOptions(
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        warmup_steps=2,
        planned_steps=40,
        per_device_train_batch_size=4,
        epochs_per_round=2,
    )
    learner = SftLearner(tiny_qwen3, LORA, options)
    metrics = [learner.learn(some(8)) for _ in range(10)]
    assert [one["steps"] for one in metrics] == [4] * 10
    assert metrics[0]["learning_rate"] == pytest.approx(1e-2 * (0 + 0.5 + 1 + 37 / 38) / 4)
    assert metrics[-1]["learning_rate"] == pytest.approx(1e-2 * (4 + 3 + 2 + 1) / 4 / 38)
    assert metrics[-1]["loss"] < 0.2 * metrics[0]["loss"]
    assert metrics[-1]["mean_token_accuracy"] > metrics[0]["mean_token_accuracy"] + 0.4


@pytest.mark.slow
def test_a_resumed_learner_goes_on_equal_to_the_bit(tiny_qwen3, tmp_path):
    lora = LoraOptions(r=4, lora_alpha=8, lora_dropout=0.2)
    options = SftOptions(
        learning_rate=1e-2, lr_scheduler_type="cosine", planned_steps=30, per_device_train_batch_size=4, seed=3
    )
    rows = some(10)
    learner = SftLearner(tiny_qwen3, lora, options)
    learner.learn(rows)
    learner.learn(rows[:3])
    learner.save_state(tmp_path)
    wanted = [learner.learn(rows), learner.learn(rows[4:])]
    resumed = SftLearner(tiny_qwen3, lora, options)
    resumed.load_state(tmp_path)
    got = [resumed.learn(rows), resumed.learn(rows[4:])]
    for one in (*wanted, *got):
        del one["seconds"]
    assert got == wanted
    assert equal(resumed.adapter_update(1).tensors, learner.adapter_update(1).tensors)


def test_long_rows_are_left_out_and_counted_never_cut(tiny_qwen3):
    learner = SftLearner(tiny_qwen3, LORA, SftOptions(max_length=10))
    fits, long_answer, long_prompt = shown((5,) * 4, (6,) * 6), shown((5,) * 4, (6,) * 7), shown((5,) * 9, (6, 7))
    metrics = learner.learn([long_answer, fits, long_prompt])
    assert (metrics["rows"], metrics["rows_too_long"], metrics["answer_tokens"]) == (1, 2, 6)
    metrics = learner.learn([long_answer])
    assert (metrics["rows"], metrics["rows_too_long"], metrics["steps"]) == (0, 1, 0) and "loss" not in metrics


def test_groups_give_their_best_candidates(tiny_qwen3):
    def scored(index, reward, answer):
        logprobs = [-1.0] * len(answer)
        return ScoredCandidate(Candidate("a", index, list(answer), logprobs, logprobs, "t", "stop", 0), reward)

    group = ScoredGroup("a", "p", (9, 8), [scored(0, 0.2, (5, 2)), scored(1, 1.0, (6, 7, 2)), scored(2, 1.0, (8, 2))])
    learner = SftLearner(tiny_qwen3, LORA, SftOptions(min_reward=0.9))
    metrics = learner.learn([group])
    nll = answer_nll(base_model(tiny_qwen3), shown((9, 8), (6, 7, 2)))
    assert metrics["loss"] == pytest.approx(float(nll.mean()), abs=1e-4)
    assert (metrics["selection/selected"], metrics["selection/candidates_surplus"], metrics["rows"]) == (1, 1, 1)
    assert metrics["mismatch/tokens"] == 7  # of all candidates, learnt from or not


def test_what_cannot_be_learnt_is_refused(tiny_qwen3):
    learner = SftLearner(tiny_qwen3, LORA, SftOptions())
    for prompt, answer in (((), (3,)), ((3,), ())):
        with pytest.raises(LearnerError, match="demonstration of 'row-1' has no tokens"):
            learner.learn([shown(prompt, answer)])
    with pytest.raises(LearnerError, match="vocabulary"):
        learner.learn([shown((3,), (259,))])
    with pytest.raises(LearnerError, match="not from tuple"):
        learner.learn([(1, 2)])
    assert learner.steps == 0


@pytest.mark.slow
def test_dft_weighs_with_the_probability(tiny_qwen3):
    rows = some(3)
    metrics = SftLearner(tiny_qwen3, LORA, SftOptions(loss_type="dft")).learn(rows)
    model = base_model(tiny_qwen3)
    nll = torch.cat([answer_nll(model, one) for one in rows])
    assert metrics["loss"] == pytest.approx(float((nll * (-nll).exp()).mean()), rel=1e-4)
