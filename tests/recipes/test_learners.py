"""What each algorithm makes of a configuration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ember_ray.assets import tiny_model_path
from ember_ray.config.errors import UserError
from ember_ray.config.learning import DpoSection
from ember_ray.config.schema import (
    BestOfNExtractConfig,
    DpoExtractConfig,
    GrpoExtractConfig,
    LearnConfig,
    SftExtractConfig,
)
from ember_ray.config.sections import RolloutSection
from ember_ray.data.example import Example
from ember_ray.model.qwen3_config import read_model_config
from ember_ray.tracking.console import Console
from ember_ray.train.options import DpoOptions
from recipes import extract_task, sql_task
from recipes.learners import BEST_OF_N, DPO, GRPO, SFT, Algorithm
from recipes.run import Run
from recipes.setup import plan


def test_steps_are_counted_over_the_whole_run() -> None:
    config = DpoExtractConfig(
        rounds=3,
        seed=7,
        rollout=RolloutSection(prompts_per_round=20, num_candidates=4),
        dpo=DpoSection(
            lr_scheduler_type="cosine",
            pairs_per_prompt=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=3,
            epochs_per_round=2,
        ),
    )
    said = "at most 40 pairs a round, 12 a step: at most 8 steps a round and 24 in all"
    assert DPO.plan(config) == said
    options = DPO.learner_options(config)
    assert isinstance(options, DpoOptions)
    assert (options.planned_steps, options.seed, options.lr_scheduler_type) == (24, 7, "cosine")
    assert options.loss_type == ("sigmoid", "sft")


def test_all_candidates_and_all_pairs_are_counted() -> None:
    def planned(algorithm: Algorithm, kind: type[LearnConfig], **settings: object) -> int | None:
        values = {"rounds": 1, "rollout": {"prompts_per_round": 10, "num_candidates": 4}}
        more = {algorithm.section: {"per_device_train_batch_size": 10, **settings}}
        return algorithm.learner_options(kind.model_validate({**values, **more})).planned_steps

    assert [planned(BEST_OF_N, BestOfNExtractConfig, per_prompt=n) for n in (0, 1, 3, 9)] == [4, 1, 3, 4]
    for choice, most in (("best_worst", 2), ("all_margin", 6), ("oracle", 4)):
        found = [planned(DPO, DpoExtractConfig, pair_choice=choice, pairs_per_prompt=n) for n in (0, 1, 9)]
        assert found == [most, 1, most]


def test_rewards_of_own_weights_have_their_own_scale(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(completions, **kwargs): return [0.5 for _ in completions]\n")
    functions = {"json_extraction": 2.0, f"{tmp_path}/mine.py:short": 0.5}
    values = {"output_dir": str(tmp_path), "tracker": "none", "data": {"train_examples": 64, "eval_prompts": 2}}

    def least(**settings: float) -> float:
        given = {**values, "reward": {"functions": functions}, "best_of_n": settings}
        return BEST_OF_N.learner_options(BestOfNExtractConfig.model_validate(given)).min_reward  # type: ignore[attr-defined]

    assert least() == pytest.approx(0.999 * 2.5) and least(min_reward=1.2) == 1.2
    assert BEST_OF_N.learner_options(BestOfNExtractConfig()).min_reward == 0.999  # type: ignore[attr-defined]
    dpo = {"pair_choice": "oracle", "reference": "trainer"}
    run = Run(
        DpoExtractConfig.model_validate({**values, "reward": {"functions": functions}, "dpo": dpo}), DPO, Console()
    )
    assert [gold.reward for gold in run.with_reference([], run.train[:2])] == [2.5, 2.5]


def test_columns_that_a_reward_function_needs_are_missed_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def judged(completions, rubric, **kwargs): return [0.5 for _ in completions]\n")
    functions = {f"{tmp_path}/mine.py:judged": 1.0}
    data = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    config = DpoExtractConfig.model_validate({"data": data, "reward": {"functions": functions}})

    def planned(**columns: dict[str, str]) -> str:
        for name, more in columns.items():
            rows = [{"prompt": f"a is {n}", "gold": {"a": n}, **more} for n in range(2)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return plan(config, DPO)

    for lacking, given, name in (("train", "eval", "training"), ("eval", "train", "held-out")):
        with pytest.raises(UserError, match=f"no {name} row has a column 'rubric'"):
            planned(**{lacking: {}, given: {"rubric": "strict"}})
    assert "pairs a round" in planned(train={"rubric": "strict"}, eval={"rubric": "strict"})
    with pytest.raises(UserError, match="reward.functions: no reward function|cannot be loaded"):
        plan(
            config.model_copy(update={"reward": config.reward.model_copy(update={"functions": {"no:such": 1.0}})}), DPO
        )


def test_sft_asks_for_no_more_prompts_than_there_are() -> None:
    data = {"data": {"train_examples": 8}}  # fewer than rollout.prompts_per_round, which SFT has no use for
    assert SftExtractConfig.model_validate(data).data.train_examples == 8
    with pytest.raises(ValueError, match="prompts would repeat in a round"):
        DpoExtractConfig.model_validate(data)


def test_settings_that_do_not_fit_each_other_are_told_before_anything_starts(tmp_path: Path) -> None:
    config = GrpoExtractConfig.model_validate({"output_dir": str(tmp_path), "grpo": {"loss_type": "cispo"}})
    with pytest.raises(UserError, match="grpo options: loss_type 'cispo' needs epsilon_high"):
        GRPO.plan(config)
    with pytest.raises(UserError, match="needs epsilon_high"):
        Run(config, GRPO, Console())
    assert list(tmp_path.iterdir()) == []


def test_passes_over_a_round_are_steps_of_the_schedule() -> None:
    config = GrpoExtractConfig.model_validate(
        {
            "rounds": 3,
            "rollout": {"prompts_per_round": 4, "num_candidates": 8},
            "grpo": {"num_iterations": 2, "per_device_train_batch_size": 16, "lr_scheduler_type": "linear"},
        }
    )
    assert GRPO.learner_options(config).planned_steps == 3 * 2 * 2


def test_pairs_that_the_engine_cannot_score_are_too_long_for_the_learner() -> None:
    def max_length(dpo: dict[str, object], max_model_len: int | None = 300) -> int | None:
        engine = {"max_model_len": max_model_len}
        return DPO.learner_options(DpoExtractConfig.model_validate({"engine": engine, "dpo": dpo})).max_length

    assert max_length({}) == max_length({"max_length": 400}) == 300
    assert max_length({"max_length": 200}) == 200
    assert max_length({}, None) == read_model_config(tiny_model_path()).max_position_embeddings
    assert max_length({"reference": "trainer"}) is None


def test_demonstrations_with_all_faults_are_those_of_the_shipped_models() -> None:
    for task, key, mix in (
        ("extract", "mix", extract_task.PRETRAINING_MIX),
        ("sql", "sql_mix", sql_task.PRETRAINING_MIX),
    ):
        config = json.loads((tiny_model_path(task) / "training.json").read_text())["config"]
        assert config[key] == dataclasses.asdict(mix)


def test_own_rows_teach_their_own_answer_or_their_gold() -> None:
    config = SftExtractConfig.model_validate({"data": {"train": "mine.jsonl"}})
    turn = [{"role": "user", "content": "Extract a as JSON.\n\na is 1."}]
    own, gold = Example("own", turn, gold={"a": 1}, completion="a: 1"), Example("gold", turn, gold={"a": 1})
    assert [row.completion for row in SFT.prepare(config, [own, gold])] == ["a: 1", '{"a": 1}']
    with pytest.raises(UserError, match="row 'none' has neither"):
        SFT.prepare(config, [Example("none", turn)])
