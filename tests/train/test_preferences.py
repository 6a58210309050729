"""What a DPO batch may hold, and the reference's log-probabilities from the engine."""

import pytest
import torch

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.train.batch import Demonstration
from ember_ray.train.dpo import DpoLearner, DpoOptions, LearnerError, LoraOptions
from ember_ray.train.preferences import answers_to_score, batch_pairs, reference_scores

LORA = LoraOptions(r=4, lora_alpha=8)


def ids(text):
    return tuple(3 + byte for byte in text.encode())


def scored(index, reward, text):
    tokens = [*ids(text), 2]
    logprobs = [-1.0] * len(tokens)
    return ScoredCandidate(Candidate("row", index, tokens, logprobs, logprobs, text, "stop", 0), reward)


def group(name, *texts):
    """The earlier a text, the better."""
    candidates = [scored(index, 1.0 - index / len(texts), text) for index, text in enumerate(texts)]
    return ScoredGroup(name, name, ids(f"name: {name}"), candidates)


def test_each_answer_of_the_pairs_is_scored_once():
    options = DpoOptions(pair_choice="all_margin", pairs_per_prompt=0, max_length=16)
    batch = [group("Ada", "aa", "b", "c"), group("Bob", "aa", "b" * 10)]
    found = answers_to_score(batch, options)
    assert [bytes(token - 3 for token in answer[:-1]).decode() for _, answer in found] == ["aa", "c", "b", "aa"]
    assert {prompt for prompt, _ in found} == {ids("name: Ada"), ids("name: Bob")}
    (first, *_) = reference_scores(found, [[-0.5, -0.25, -1.0], [-1.0] * 2, [-1.0] * 2, [-1.0] * 3])
    assert (first.prompt_token_ids, first.completion_token_ids, first.logprob) == (*found[0], -1.75)


def test_a_batch_may_hold_pairs_beside_groups(make_pair):
    pairs, counts = batch_pairs([make_pair(), group("Ada", "a", "b")], DpoOptions())
    assert [pair.request_id for pair in pairs] == ["row-1", "Ada"] and counts["pairs/pairs"] == 1
    assert batch_pairs([make_pair()], DpoOptions())[1] == {}


def test_batches_that_make_no_sense_are_refused():
    gold = Demonstration("Ada", ids("name: Ada"), (3, 2), "x")
    with pytest.raises(LearnerError, match="gold answers are for dpo.pair_choice 'oracle', not 'best_worst'"):
        batch_pairs([group("Ada", "a", "b"), gold], DpoOptions())
    with pytest.raises(LearnerError, match="needs the gold answers"):
        batch_pairs([group("Ada", "a", "b")], DpoOptions(pair_choice="oracle"))
    with pytest.raises(LearnerError, match="belongs to other prompt tokens"):
        batch_pairs([group("Bob", "a"), Demonstration("Bob", (3,), (3, 2), "x")], DpoOptions(pair_choice="oracle"))
    with pytest.raises(LearnerError, match="not from str"):
        batch_pairs(["a pair"], DpoOptions())


@pytest.mark.slow
def test_the_gold_answer_is_learnt_and_told(tiny_qwen3):
    learner = DpoLearner(tiny_qwen3, LORA, DpoOptions(pair_choice="oracle", learning_rate=1e-2))
    one = group("Ada", "a", "b")
    gold = Demonstration("Ada", one.prompt_token_ids, (*ids("gold"), 2), "gold")
    first, second = learner.learn([one, gold]), learner.learn([one, gold])
    assert (first["pairs"], first["pairs/oracle"], first["pairs/candidates"]) == (1, 1, 2)
    assert second["rewards/margins"] > first["rewards/margins"] + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("started", [False, True], ids=["from-the-base", "from-an-adapter"])
def test_the_engines_reference_is_the_trainers(tmp_path, make_pair, started):
    """Three rounds with the one reference and with the other: the same losses, rewards and adapter."""
    from ember_ray.engine.llm import LLM
    from ember_ray.engine.options import EngineOptions
    from ember_ray.model.lora import load_peft_adapter
    from tests.support.qwen3 import make_qwen3, random_prompts

    model = tmp_path / "model"
    make_qwen3(model, seed=3, num_hidden_layers=2)
    init = None
    if started:
        learner = DpoLearner(model, LORA, DpoOptions())
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in learner.model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, 0.2, generator=generator)
        learner.save_adapter(init := tmp_path / "adapter")
    llm = LLM(EngineOptions(str(model), num_kv_blocks=64))
    if init:
        llm.publish(load_peft_adapter(init, 1))

    prompts, answers = random_prompts([5, 20, 11], seed=1), random_prompts([7, 12, 3, 9, 15, 4], seed=2)
    batch = []
    for number, prompt in enumerate(prompts):
        texts = [scored(i, float(i == 0), "") for i in range(2)]
        for i, one in enumerate(texts):
            one.candidate.token_ids, one.candidate.text = list(answers[2 * number + i]), str(i)
        batch.append(ScoredGroup(str(number), "", prompt, texts))

    learners = []
    for reference in ("trainer", "engine"):
        options = DpoOptions(
            learning_rate=1e-3, reference=reference, mismatch_candidates=0, loss_type=("sigmoid",),
            per_device_train_batch_size=2,
        )  # fmt: skip
        learners.append(DpoLearner(model, LORA, options, init_adapter=init))
    scores = reference_scores(
        wanted := answers_to_score(batch, options),
        llm.score([prompt + answer for prompt, answer in wanted], [len(prompt) for prompt, _ in wanted]),
    )
    with pytest.raises(LearnerError, match="has no reference log-probabilities in the batch"):
        learners[1].learn(batch)
    forwards = []
    learners[1].model.register_forward_hook(lambda *_: forwards.append(1))
    for _ in range(3):
        own, engines = learners[0].learn(batch), learners[1].learn([*batch, *scores])
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
            assert engines[name] == pytest.approx(own[name], abs=1e-4), name
    assert len(forwards) == 3 * 2  # one a batch of pairs: the reference is not run
    assert abs(own["rewards/margins"]) > 0.05
    one, other = (learner.adapter_update(1).tensors for learner in learners)
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
