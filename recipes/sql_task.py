"""Text-to-SQL: seeded questions over SQLite databases or the user's own rows, judged by the SQL verifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ember_ray.assets import tiny_model_path
from ember_ray.config.schema import SqlConfig
from ember_ray.data.example import Example
from ember_ray.data.splits import Split
from ember_ray.data.sql_demonstrations import SqlDemonstrationMix, with_sql_demonstrations
from ember_ray.data.sql_examples import generate_sql_examples
from recipes.tasks import Task
from verifiers.reward_functions import RewardFunction
from verifiers.sql import check_gold
from verifiers.sql_rewards import SqlRewardDesign

PRETRAINING_MIX = SqlDemonstrationMix(
    wrong_column=0.17,
    missing_filter=0.15,
    wrong_operator=0.15,
    wrong_aggregate=0.15,
    missing_order=0.18,
    broken_syntax=0.12,
    chatter=0.13,
)
"""Faults of the demonstrations that the shipped model was pretrained on (see configs/pretrain_tiny_sql.yaml)."""


def _generate(config: SqlConfig, split: Split, count: int) -> list[Example]:
    folder = Path(config.data.databases or Path(config.output_dir) / "databases").resolve()
    return generate_sql_examples(split, count, config.seed, folder, tuple(config.data.levels))


def _demonstrate(examples: Sequence[Example], faults: float, seed: int) -> list[Example]:
    rates = {name: faults * rate for name, rate in dataclasses.asdict(PRETRAINING_MIX).items()}
    return with_sql_demonstrations(examples, SqlDemonstrationMix(**rates), seed)


def _check(example: Example) -> None:
    check_gold(example.gold, example.columns["databases"])  # type: ignore[arg-type]


def _reward_function(config: SqlConfig) -> RewardFunction:
    design = SqlRewardDesign(config.reward.design, config.reward.weights)
    return RewardFunction("sql_execution", settings={"design": design})


TASK = Task(partial(tiny_model_path, "sql"), _generate, _demonstrate, _check, _reward_function)
