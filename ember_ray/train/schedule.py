"""One learning-rate schedule for the whole run, whatever the rounds bring."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


def learning_rate_factor(kind: str, step: int, warmup_steps: int, planned_steps: int | None) -> float:
    """What the peak learning rate is multiplied with at an optimizer step.

    The same curves as transformers' ``get_scheduler``: after a linear warm-up, ``linear`` falls to 0 at
    ``planned_steps``, ``cosine`` along half a cosine. The step is the count of optimizer steps really made: a run
    whose rounds yield fewer pairs than planned ends before the curve does, with a rate above 0. Steps beyond the
    plan keep the rate of the last planned one, where transformers would give 0 or let the cosine rise again. Every
    kind has the warm-up that is asked for, ``constant`` too.

    Args:
        kind: one of ``SCHEDULES``.
        step: optimizer steps made before this one, from 0.
        warmup_steps: length of the warm-up; step 0 of a warm-up has rate 0.
        planned_steps: length of the whole curve, warm-up included; the constant ones do not use it.
    """
    if kind.startswith("constant"):
        return min(1.0, step / warmup_steps) if warmup_steps else 1.0
    assert planned_steps is not None
    step = min(step, planned_steps - 1)
    if step < warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps) / max(1, planned_steps - warmup_steps)
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
