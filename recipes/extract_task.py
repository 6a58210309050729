"""JSON extraction: seeded documents or the user's own rows, judged by the JSON verifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ember_ray.assets import tiny_model_path
from ember_ray.config.schema import ExtractConfig
from ember_ray.data.demonstrations import DemonstrationMix, with_demonstrations
from ember_ray.data.example import Example
from ember_ray.data.extraction import generate_examples
from ember_ray.data.splits import Split
from recipes.tasks import Task
from verifiers.json_extraction import RewardDesign, check_gold
from verifiers.reward_functions import RewardFunction

PRETRAINING_MIX = DemonstrationMix(
    raw_date=0.15,
    wrong_key=0.12,
    dropped_field=0.11,
    text_number=0.12,
    extra_field=0.11,
    broken_json=0.10,
    chatter=0.15,
)
"""Faults of the demonstrations that the shipped model was pretrained on (see configs/pretrain_tiny.yaml)."""


def _generate(config: ExtractConfig, split: Split, count: int) -> list[Example]:
    return generate_examples(split, config.data.difficulty, count, config.seed)


def _demonstrate(examples: Sequence[Example], faults: float, seed: int) -> list[Example]:
    rates = {name: faults * rate for name, rate in dataclasses.asdict(PRETRAINING_MIX).items()}
    return with_demonstrations(examples, DemonstrationMix(**rates), seed)


def _check(example: Example) -> None:
    check_gold(example.gold, example.schema)


def _reward_function(config: ExtractConfig) -> RewardFunction:
    design = RewardDesign(config.reward.design, config.reward.weights)
    return RewardFunction("json_extraction", settings={"design": design})


TASK = Task(tiny_model_path, _generate, _demonstrate, _check, _reward_function)
