"""The fixed-shape optimizer step of pretraining against the plain one, and its captured form against itself."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from ember_ray.train.captured_step import WARM_UP, CapturedStep
from ember_ray.train.pretrain import Phase, answer_loss, learn_captured, new_optimizers, rate_factors

PHASE = Phase("clean", 0, 4, 0.01, 4e-3, 0.1, 0.05, 1.0)


def new_model(seed: int = 0) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": 300}
    return Qwen3ForCausalLM(
        Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0)
    )


def new_samples(count: int) -> list[tuple[list[int], int]]:
    rng = random.Random(0)
    return [([rng.randrange(1, 300) for _ in range(length)], 5) for length in rng.choices(range(8, 20), k=count)]


def apart(one: Any, other: Any) -> float:
    """Distance of all weights of two models."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return math.sqrt(sum(float((a.detach().cpu() - b.detach().cpu()).square().sum()) for a, b in pairs))


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [4, 2]])
def test_a_step_is_that_of_the_plain_loop_at_every_rate(chosen: list[int]) -> None:
    samples, plain, fixed = new_samples(6), new_model(), new_model()
    step = CapturedStep(fixed, samples, 4, new_optimizers(fixed, PHASE), PHASE.grad_clip, capture=False)
    optimizers = new_optimizers(plain, PHASE)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    for factor in (0.25, 1.0):
        for group, peak in zip([g for o in optimizers for g in o.param_groups], peaks, strict=True):
            group["lr"] = factor * peak
        loss = answer_loss(plain, [samples[index] for index in chosen], 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), PHASE.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        plain.zero_grad()
        assert float(step(chosen, factor)) == pytest.approx(loss.item(), abs=1e-4)
        # Muon orthogonalizes in bfloat16, where the last bit of a sum may decide
        assert apart(plain, fixed) < 0.03 * apart(plain, new_model())


def test_rates_rise_and_fall() -> None:
    factor = rate_factors(100, 0.1)
    values = [factor(step) for step in range(100)]
    assert values[:10] == sorted(values[:10]) and values[10] == 1.0 and values[10:] == sorted(values[10:], reverse=True)
    assert values[99] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.gpu
def test_replays_are_the_steps_that_they_were_captured_from() -> None:
    samples = new_samples(4 * (WARM_UP + 5) - 1)
    captured, eager = new_model().cuda(), new_model().cuda()
    for model, capture in ((captured, True), (eager, False)):
        assert learn_captured(model, samples, PHASE, capture) == WARM_UP + 5
    assert apart(captured, eager) < 0.1 * apart(captured, new_model())
