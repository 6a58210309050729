"""The dry run's plan says what the run will do, in numbers that follow from the configuration."""

from __future__ import annotations

from ember_ray.config.plan import format_bytes, render_plan, stage_plans
from ember_ray.config.schema import DpoExtractConfig
from ember_ray.config.sections import RolloutSection


def test_kv_cache_is_counted_for_keys_and_values_of_the_stage_layers() -> None:
    stages = stage_plans((1, 3), (100, 200), kv_heads=2, head_dim=8, dtype="bfloat16", kv_tokens=10)
    assert [stage.kv_bytes for stage in stages] == [2 * 1 * 2 * 8 * 2 * 10, 2 * 3 * 2 * 8 * 2 * 10]
    assert [(stage.first_layer, stage.num_layers, stage.weight_bytes) for stage in stages] == [(0, 1, 100), (1, 3, 200)]


def test_the_plan_counts_batches_and_steps() -> None:
    config = DpoExtractConfig(
        rounds=3,
        rollout=RolloutSection(prompts_per_round=20, num_candidates=4, max_tokens=50),
    )
    stages = stage_plans((1, 2), (2**20, 2**21), kv_heads=1, head_dim=1, dtype="float32", kv_tokens=2**17)
    text = render_plan(config, stages, "at most 40 pairs a round")
    assert "2 on cpu, float32, 6.0 MiB in all" in text
    assert "stage 0    layer 0, embedding: 1.0 MiB weights, 1.0 MiB KV cache" in text
    assert "stage 1    layers 1 to 2, LM head: 2.0 MiB weights, 2.0 MiB KV cache" in text
    assert "3 rounds of 20 prompts x 4 candidates = 80 a round, each at most 50 tokens" in text
    assert "learning     at most 40 pairs a round\n" in text
    assert "256 held-out prompts x 4 sampled = 1,024, and 256 greedy" in text
    assert "runs/dpo_extract_<timestamp>/" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_control_experiment_is_called_one() -> None:
    config = DpoExtractConfig(rollout=RolloutSection(publish=False))
    stages = stage_plans((2,), (1,), kv_heads=1, head_dim=1, dtype="float32", kv_tokens=1)
    assert "off (control experiment" in render_plan(config, stages, "nothing")


def test_bytes_are_told_in_the_fitting_unit() -> None:
    assert [format_bytes(count) for count in (12, 2048, 3 * 2**20, 5 * 2**30)] == [
        "12 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]


def test_a_cache_that_is_sized_on_the_gpu_is_said_to_be_so() -> None:
    config = DpoExtractConfig()
    stages = stage_plans((2,), (2**20,), kv_heads=1, head_dim=1, dtype="bfloat16", kv_tokens=None)
    text = render_plan(config, stages, "nothing")
    assert "1.0 MiB in all without KV cache" in text
    assert "what fits in 60% of the GPU KV cache" in text
