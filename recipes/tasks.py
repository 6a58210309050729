"""A task: where its rows come from, how its answers are judged. The recipes are the same for all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ember_ray.config.schema import LearnConfig
from ember_ray.data.example import Example
from ember_ray.data.splits import Split
from verifiers.reward_functions import RewardFunction


@dataclass(frozen=True)
class Task:
    """What differs between tasks.

    Attributes:
        tiny_model: folder of the shipped model that has learnt the task a little.
        generate: ``(config, split, count)`` gives rows, the same ones for the same seed.
        demonstrate: ``(examples, faults, seed)`` gives them with answers as people write them; ``faults`` is 0 for
            clean ones and 1 for as many faults as the tiny model's pretraining had.
        check: raises ValueError if a row's gold answer cannot be judged by.
        reward_function: the task's own verifier as the configuration wants it.
    """

    tiny_model: Callable[[], Path]
    generate: Callable[[Any, Split, int], list[Example]]
    demonstrate: Callable[[Sequence[Example], float, int], list[Example]]
    check: Callable[[Example], None]
    reward_function: Callable[[Any], RewardFunction]


def task_of(config: LearnConfig) -> Task:
    """The task that a configuration is for."""
    return importlib.import_module(f"recipes.{config.task}_task").TASK
