"""What the learner learns: checked against the formulas, written out in plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from ember_ray.model.lora import check_adapter, load_peft_adapter
from ember_ray.train.dpo import DpoLearner, DpoOptions, LoraOptions
from ember_ray.train.pairs import PreferencePair

LORA = LoraOptions(r=4, lora_alpha=8)
SHAPES = {
    "q_proj": (32, 32),
    "k_proj": (16, 32),
    "v_proj": (16, 32),
    "o_proj": (32, 32),
    "gate_proj": (64, 32),
    "up_proj": (64, 32),
    "down_proj": (32, 64),
}


def base_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def answer_logps(model, prompt, answer):
    """Log-probability of each token of the answer, [len(answer)]."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0].float()
    logps = F.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(answer)[:, None])[:, 0]


def fold_in(model, update):
    """Adds s B A to the weights of a base model by hand."""
    layers = check_adapter(update, SHAPES, num_layers=2)
    with torch.no_grad():
        for index, pairs in layers.items():
            for name, pair in pairs.items():
                layer = model.model.layers[index]
                linear = getattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name)
                linear.weight += pair.scale * pair.b @ pair.a
    return model


def two_rounds(make_pair):
    first = [make_pair(f"name: {n}", f'{{"name": "{n}"}}', f"{n}, it is", n) for n in ("Ada", "Bob", "Cyd", "Dee")]
    second = [make_pair(f"city: {n}", f'{{"city": "{n}"}}', f"in {n}", n) for n in ("Oslo", "Rome", "Lima")]
    return first, second


def test_trains_on_the_sampled_tokens_and_starts_at_the_reference(tiny_qwen3):
    """Ids that no text encodes to: a special token in the middle, no end token, an odd split of two bytes."""
    prompt, chosen, rejected = (9, 1, 8, 200), (50, 2, 51, 1, 240), (60, 61)
    pair = PreferencePair("row", prompt, chosen, rejected, "", "a", "b", 1.0, 0.0, 0)
    metrics = DpoLearner(tiny_qwen3, LORA, DpoOptions()).learn([pair])
    with torch.no_grad():
        model = base_model(tiny_qwen3)
        good, bad = answer_logps(model, prompt, chosen), answer_logps(model, prompt, rejected)
    assert metrics["logps/chosen"] == pytest.approx(float(good.sum()), abs=1e-4)
    assert metrics["logps/rejected"] == pytest.approx(float(bad.sum()), abs=1e-4)
    assert metrics["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)  # B is 0: the policy is the reference
    assert metrics["loss"] == pytest.approx(math.log(2) - float(good.mean()), abs=1e-4)
    assert (metrics["steps"], metrics["pairs"], metrics["num_tokens"]) == (1, 1, 2 * 4 + 5 + 2)
    assert metrics["seconds"] > 0


def test_the_reference_stays_the_base_model(tiny_qwen3, make_pair):
    learner = DpoLearner(tiny_qwen3, LORA, DpoOptions(learning_rate=1e-2, beta=0.3))
    pair = make_pair()
    for _ in range(3):
        metrics = learner.learn([pair])
    with torch.no_grad():
        reference = float(answer_logps(base_model(tiny_qwen3), pair.prompt_token_ids, pair.chosen_token_ids).sum())
    assert metrics["logps/chosen"] - reference > 1  # it has moved, so that a snapshot would show
    assert metrics["rewards/chosen"] == pytest.approx(0.3 * (metrics["logps/chosen"] - reference), rel=1e-3)
    fresh = base_model(tiny_qwen3).state_dict()
    for name, tensor in learner.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, fresh[name.replace(".base_layer", "")]), name


def test_rounds_equal_one_adamw_loop_in_plain_torch(tiny_qwen3, make_pair):
    """The whole of it: loss, clipping, Adam's moments and the schedule go on from round to round."""
    rounds = [*two_rounds(make_pair), *two_rounds(make_pair)]
    options = DpoOptions(learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=1, planned_steps=6, beta=0.2)
    learner = DpoLearner(tiny_qwen3, LORA, options)
    start = learner.adapter_update(0)
    rates = [learner.learn(pairs)["learning_rate"] for pairs in rounds]
    learned = learner.adapter_update(1)
    assert rates == pytest.approx([3e-3 * f for f in (0.0, 1.0, 0.904508, 0.654508)], rel=1e-5)

    kept = plain_loop(tiny_qwen3, start, rounds, rates, beta=0.2)
    restarted = plain_loop(tiny_qwen3, start, rounds, rates, beta=0.2, forget=True)
    error = max(float((learned.tensors[n] - kept[n]).abs().max()) for n in kept)
    wrong = max(float((learned.tensors[n] - restarted[n]).abs().max()) for n in kept)
    assert error < 1e-6
    assert wrong > 1e-3  # a learner that forgets its moments would be seen


def plain_loop(folder, start, rounds, rates, beta, forget=False):
    names = {n: t.clone().requires_grad_() for n, t in start.tensors.items()}
    base = base_model(folder).requires_grad_(False)
    optimizer = None
    for pairs, rate in zip(rounds, rates, strict=True):
        if optimizer is None or forget:
            optimizer = torch.optim.AdamW(names.values(), lr=rate, weight_decay=0.0)
        optimizer.param_groups[0]["lr"] = rate
        weights = {}
        for path, scale in start.scaling.items():
            prefix = f"base_model.model.{path}"
            delta = scale * names[f"{prefix}.lora_B.weight"] @ names[f"{prefix}.lora_A.weight"]
            weights[f"{path}.weight"] = base.get_parameter(f"{path}.weight") + delta

        def policy(ids, weights=weights):
            return torch.func.functional_call(base, weights, (ids,))

        losses, chosen_logps = [], []
        for pair in pairs:
            ratios = []
            for answer in (pair.chosen_token_ids, pair.rejected_token_ids):
                logps = answer_logps(policy, pair.prompt_token_ids, answer)
                with torch.no_grad():
                    reference = answer_logps(base, pair.prompt_token_ids, answer)
                ratios.append(logps.sum() - reference.sum())
                if answer is pair.chosen_token_ids:
                    chosen_logps.append(logps)
            losses.append(-F.logsigmoid(beta * (ratios[0] - ratios[1])))
        loss = torch.stack(losses).mean() - torch.cat(chosen_logps).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(names.values(), 1.0)
        optimizer.step()
    return {n: t.detach() for n, t in names.items()}


def test_adapter_update_is_what_the_model_computes(tiny_qwen3, make_pair):
    lora = LoraOptions(r=4, lora_alpha=8, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3.0})
    learner = DpoLearner(tiny_qwen3, lora, DpoOptions(learning_rate=1e-2))
    for _ in range(4):
        learner.learn([make_pair()])
    update = learner.adapter_update(7)
    assert update.version == 7
    assert update.scaling["model.layers.0.self_attn.q_proj"] == pytest.approx(8 / math.sqrt(2))
    assert update.scaling["model.layers.1.mlp.up_proj"] == pytest.approx(3 / math.sqrt(4))
    for tensor in update.tensors.values():
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not tensor.requires_grad

    ids = torch.tensor([make_pair().prompt_token_ids])
    learner.model.eval()
    with torch.no_grad():
        peft = learner.model(ids).logits
        base = base_model(tiny_qwen3)(ids).logits
        mine = fold_in(base_model(tiny_qwen3), update)(ids).logits
    assert (peft - base).abs().max() > 0.5
    assert (peft - mine).abs().max() < 1e-5 * base.abs().max()

    before = {name: tensor.clone() for name, tensor in update.tensors.items()}
    learner.learn([make_pair()])
    assert all(torch.equal(before[name], update.tensors[name]) for name in before)  # copies, not views


@pytest.mark.parametrize(
    "lora",
    [
        LoraOptions(r=2, lora_alpha=2, target_modules=("q_proj", "v_proj")),
        LoraOptions(r=3, lora_alpha=7, layers_to_transform=(1,), target_modules=("down_proj",)),
        LoraOptions(r=4, lora_alpha=8, rank_pattern={r"layers\.1\.mlp\.up_proj": 1}, use_rslora=True),
    ],
    ids=["subset", "one-layer", "patterns"],
)
def test_adapter_shapes_are_the_same_in_memory_and_on_disk(tiny_qwen3, make_pair, tmp_path, lora):
    learner = DpoLearner(tiny_qwen3, lora, DpoOptions(learning_rate=1e-2))
    learner.learn([make_pair()])
    update = learner.adapter_update(1)
    learner.save_adapter(tmp_path / "adapter")
    from_disk = load_peft_adapter(tmp_path / "adapter", 1)
    assert dict(from_disk.scaling) == pytest.approx(dict(update.scaling))
    assert set(from_disk.tensors) == set(update.tensors)
    assert all(torch.equal(from_disk.tensors[name], update.tensors[name]) for name in update.tensors)
    layers = check_adapter(update, SHAPES, num_layers=2)
    assert {p for pairs in layers.values() for p in pairs} == set(lora.target_modules)
    assert set(layers) == set(lora.layers_to_transform or (0, 1))


@pytest.mark.slow
def test_margins_rise_over_the_rounds(tiny_qwen3, make_pair):
    first, _ = two_rounds(make_pair)
    learner = DpoLearner(tiny_qwen3, LORA, DpoOptions(learning_rate=3e-3, per_device_train_batch_size=2))
    rounds = [learner.learn(first) for _ in range(6)]
    margins = [metrics["rewards/margins"] for metrics in rounds]
    assert margins == sorted(margins) and margins[-1] > margins[0] + 0.5
    assert rounds[-1]["rewards/accuracies"] == 1.0
    assert rounds[-1]["loss"] < rounds[0]["loss"]
    assert [metrics["steps"] for metrics in rounds] == [2] * 6 and learner.steps == 12


def test_the_schedule_counts_the_steps_really_made(tiny_qwen3, make_pair):
    first, second = two_rounds(make_pair)
    options = DpoOptions(
        learning_rate=1.0e-3,
        lr_scheduler_type="linear",
        planned_steps=10,
        per_device_train_batch_size=2,
        epochs_per_round=2,
    )
    learner = DpoLearner(tiny_qwen3, LORA, options)
    assert learner.learn(first)["steps"] == 4
    assert learner.learning_rate == pytest.approx(0.6e-3)
    metrics = learner.learn([])  # a round without pairs takes nothing from the schedule
    assert (metrics["steps"], metrics["pairs"]) == (0, 0) and "loss" not in metrics
    assert learner.learning_rate == pytest.approx(0.6e-3)
    assert learner.learn(second[:1])["learning_rate"] == pytest.approx((0.6e-3 + 0.5e-3) / 2)
    assert (learner.steps, learner.rounds) == (6, 3)


def test_accumulated_batches_equal_one_batch(tiny_qwen3, make_pair):
    first, _ = two_rounds(make_pair)
    tensors = []
    for batch, accumulation in ((4, 1), (2, 2)):
        options = DpoOptions(
            learning_rate=1e-2,
            loss_type=("sigmoid",),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        learner = DpoLearner(tiny_qwen3, LORA, options)
        metrics = [learner.learn(first) for _ in range(3)]
        assert [m["steps"] for m in metrics] == [1, 1, 1]
        tensors.append(learner.adapter_update(1).tensors)
    assert all(torch.allclose(tensors[0][n], tensors[1][n], atol=1e-4) for n in tensors[0])
    assert any(float(t.abs().max()) > 1e-3 for n, t in tensors[0].items() if "lora_B" in n)


def test_losses_and_weights_are_passed_on(tiny_qwen3, make_pair):
    pair = make_pair()
    options = DpoOptions(loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5))
    metrics = DpoLearner(tiny_qwen3, LORA, options).learn([pair])
    nll = -metrics["logps/chosen"] / len(pair.chosen_token_ids)
    assert metrics["loss"] == pytest.approx(math.log(2) + 0.5 * nll, abs=1e-4)
