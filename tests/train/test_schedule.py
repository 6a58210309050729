"""The learning-rate schedule over the whole run."""

import pytest

from ember_ray.train.schedule import learning_rate_factor


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_same_curve_as_transformers(kind, warmup):
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        assert learning_rate_factor(kind, step, warmup, 20) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_beyond_the_plan_the_last_planned_rate_stays(kind):
    last = learning_rate_factor(kind, 19, 0, 20)
    assert 0 < last < 0.1
    assert [learning_rate_factor(kind, step, 0, 20) for step in (20, 30, 1000)] == [last] * 3


def test_constant():
    assert [learning_rate_factor("constant", step, 0, None) for step in (0, 5, 500)] == [1.0] * 3
    for kind in ("constant", "constant_with_warmup"):
        assert [learning_rate_factor(kind, step, 4, None) for step in (0, 1, 4, 500)] == [0.0, 0.25, 1.0, 1.0]
