"""Reward functions for tests that do what the gold value says."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field


@dataclass
class Found:
    reward: float
    components: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


def verify(prompts, completions, gold, reward=1.0, **kwargs) -> list[Found]:
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [_one(text, wish, reward) for text, wish in zip(texts, gold, strict=True)]


def _one(text: str, gold: str, reward: float) -> Found:
    if gold == "hang":
        time.sleep(600)
    if gold == "fail":
        raise KeyError("no such field")
    if gold == "die":
        os._exit(1)
    if gold.startswith("die once "):
        flag = gold.removeprefix("die once ")
        if not os.path.exists(flag):
            with open(flag, "w"):
                pass
            os._exit(1)
    if gold == "slow":
        time.sleep(0.2)
    if gold in ("nan", "inf"):
        reward = float(gold)
    return Found(reward, {"length": float(len(text))}, None)


async def length(completions, completion_ids, trainer_state, log_metric, **kwargs) -> list[float | None]:
    """A user's function in TRL's manner; an answer of no token is none of its business."""
    log_metric("step", trainer_state.global_step)
    return [len(ids) / 10 if ids else None for ids in completion_ids]


def waiting(completions, log_metric, **kwargs) -> list[float]:
    """Takes as long for one as for many, as what asks a server does."""
    time.sleep(0.3)
    log_metric("batch", len(completions))
    return [1.0] * len(completions)
