"""A verifier for tests that does what the gold value says."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field


@dataclass
class Found:
    reward: float
    components: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


def verify(text: str, gold: str, schema: dict | None, reward: float = 1.0) -> Found:
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
