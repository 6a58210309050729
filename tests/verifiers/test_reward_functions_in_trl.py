"""Our reward functions in TRL's own trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

GOLDS = [{"a": 1}, {"b": [2, 3]}]


@pytest.mark.slow
def test_a_step_of_trls_grpo_trainer_is_rewarded_by_our_verifier(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Json, List, Value
    from trl import GRPOConfig, GRPOTrainer

    from ember_ray.assets import tiny_model_path
    from verifiers.reward_functions import json_extraction

    rows = {"prompt": [[{"role": "user", "content": "Say a as JSON: 1"}]] * 2, "gold": GOLDS, "schema": [None, None]}
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"prompt": List(message), "gold": Json(), "schema": Json()})
    seen: list[object] = []

    def spy(prompts, completions, gold, **kwargs):
        seen.extend(gold)
        return [None] * len(completions)

    trainer = GRPOTrainer(
        str(tiny_model_path()),
        reward_funcs=[partial(json_extraction, design="binary"), spy],
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=2,
            max_completion_length=8, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            logging_steps=1, save_strategy="no",
        ),
        train_dataset=Dataset.from_dict(rows, features=features),
    )  # fmt: skip
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert 0.0 <= log["reward"] <= 1.0 and log["reward"] == log["rewards/json_extraction/mean"]
    assert 0.0 <= log["json_extraction/clean"] <= 1.0
    assert all(gold in GOLDS for gold in seen) and len(seen) == 4
