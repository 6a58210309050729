"""The plan that ``--dry-run`` prints: stages and their memory, batches, and what the run will leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ember_ray.config.schema import LearnConfig


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage as the engine plans it.

    Attributes:
        first_layer, num_layers: which layers it owns.
        weight_bytes: its weights, embedding and LM head included.
        kv_bytes: its KV blocks; None where their number is found out on the GPU.
    """

    first_layer: int
    num_layers: int
    weight_bytes: int
    kv_bytes: int | None


def stage_plans(
    layer_split: Sequence[int],
    weight_bytes: Sequence[int],
    *,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    kv_tokens: int | None,
) -> list[StagePlan]:
    """Stages from a layer split and the weights of each.

    Args:
        layer_split: layers of each stage.
        weight_bytes: bytes of each stage's weights.
        kv_heads, head_dim: of the model.
        dtype: of the KV cache.
        kv_tokens: tokens that the cache holds (``num_kv_blocks * block_size``); None for what fits on the GPU.
    """
    element = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    plans, first = [], 0
    for layers, size in zip(layer_split, weight_bytes, strict=True):
        kv = None if kv_tokens is None else 2 * layers * kv_heads * head_dim * element * kv_tokens  # K and V
        plans.append(StagePlan(first, layers, size, kv))
        first += layers
    return plans


def render_plan(config: LearnConfig, stages: Sequence[StagePlan], learning: str, rolls_out: bool = True) -> str:
    """The plan in at most 100 columns.

    Args:
        config: the resolved configuration.
        stages: what ``stage_plans`` made of the model.
        learning: the line about the learner.
        rolls_out: whether candidates are learnt from.
    """
    rollout, data = config.rollout, config.data
    per_round = rollout.prompts_per_round * rollout.num_candidates
    sampled = data.eval_prompts * data.eval_samples
    memory = sum(stage.weight_bytes + (stage.kv_bytes or 0) for stage in stages)
    share = f"what fits in {config.engine.gpu_memory_utilization:.0%} of the GPU"
    more = " without KV cache" if any(stage.kv_bytes is None for stage in stages) else ""

    rows = [
        ("stages", f"{len(stages)} on {config.model.device}, {config.model.dtype}, {format_bytes(memory)} in all{more}")
    ]
    for index, stage in enumerate(stages):
        last = stage.first_layer + stage.num_layers - 1
        layers = f"layer {last}" if stage.num_layers == 1 else f"layers {stage.first_layer} to {last}"
        ends = [name for name, here in (("embedding", index == 0), ("LM head", index == len(stages) - 1)) if here]
        rows.append(
            (
                f"  stage {index}",
                f"{', '.join([layers, *ends])}: {format_bytes(stage.weight_bytes)} weights, "
                f"{share if stage.kv_bytes is None else format_bytes(stage.kv_bytes)} KV cache",
            )
        )
    rows += [
        (
            "rollout",
            f"{config.rounds} rounds of {rollout.prompts_per_round} prompts x {rollout.num_candidates} candidates = "
            f"{per_round:,} a round, each at most {rollout.max_tokens} tokens"
            if rolls_out
            else f"for evaluation only, each answer at most {rollout.max_tokens} tokens",
        ),
        (
            "engine",
            f"at most {config.engine.max_num_seqs} candidates and {config.engine.max_num_batched_tokens:,} tokens "
            "at a time",
        ),
        ("learning", learning),
        (
            "publication",
            "after every round"
            if rollout.publish
            else "off (control experiment: the engine keeps the policy that the run starts from)",
        ),
        (
            "evaluation",
            f"before and after: {data.eval_prompts} held-out prompts x {data.eval_samples} sampled = {sampled:,}, "
            f"and {data.eval_prompts} greedy",
        ),
        ("leaves", f"{config.output_dir.rstrip('/')}/{config.name}_<timestamp>/"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "plan:\n" + "\n".join(f"  {name:<{width}}{text}" for name, text in rows) + "\n"


def format_bytes(count: float) -> str:
    """``2.1 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
