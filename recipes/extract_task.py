"""From the configuration of an extraction run to the parts it names: model, engine options, rows, reward."""

from __future__ import annotations

from actors.messages import PromptRow
from ember_ray.assets import tiny_model_path
from ember_ray.config.errors import UserError, user_faults
from ember_ray.config.plan import render_plan, stage_plans
from ember_ray.config.schema import DpoExtractConfig
from ember_ray.data.example import Example
from ember_ray.data.extraction import generate_examples
from ember_ray.data.jsonl import load_jsonl
from ember_ray.engine.options import CPU_KV_BLOCKS, EngineOptions
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.model.plan import plan_stages, stage_bytes
from ember_ray.model.qwen3_config import read_model_config
from ember_ray.model.tokenizer import Tokenizer
from verifiers.json_extraction import RewardDesign, check_gold


def model_path(config: DpoExtractConfig) -> str:
    """The model's folder: the user's own or the shipped tiny one."""
    return config.model.path or str(tiny_model_path())


def engine_options(config: DpoExtractConfig) -> EngineOptions:
    """The engine's options; how the layers are cut is settled here.

    Raises:
        UserError: the model or the split cannot be served.
    """
    engine = config.engine
    with user_faults(ValueError):
        split = plan_stages(read_model_config(model_path(config)), engine.stages)
        return EngineOptions(
            model=model_path(config),
            dtype=config.model.dtype,
            device=config.model.device,
            layer_split=split,
            block_size=engine.block_size,
            num_kv_blocks=engine.num_kv_blocks,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_model_len=engine.max_model_len,
            prefix_sharing=engine.prefix_sharing,
            micro_batches=engine.micro_batches,
            gpu_memory_utilization=engine.gpu_memory_utilization,
            lora_mode=engine.lora_mode,
            enforce_eager=engine.enforce_eager,
            num_scheduler_steps=engine.num_scheduler_steps,
            prefill_attention=engine.prefill_attention,
            seed=config.seed,
        )


def plan(config: DpoExtractConfig) -> str:
    """What ``--dry-run`` prints below the configuration."""
    options, shape = engine_options(config), read_model_config(model_path(config))
    blocks = options.num_kv_blocks or (CPU_KV_BLOCKS if options.device == "cpu" else None)
    stages = stage_plans(
        options.layer_split,
        stage_bytes(shape, options.layer_split, options.dtype),
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        dtype=options.dtype,
        kv_tokens=None if blocks is None else blocks * options.block_size,
    )
    return render_plan(config, stages)


def sampling_params(config: DpoExtractConfig) -> SamplingParams:
    """How rollouts and sampled evaluation draw."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        max_tokens=rollout.max_tokens,
    )


def reward_design(config: DpoExtractConfig) -> RewardDesign:
    """How the verifier makes one number; empty weights are the design's own."""
    return RewardDesign(config.reward.design, config.reward.weights)


def load_rows(config: DpoExtractConfig) -> tuple[list[PromptRow], list[PromptRow]]:
    """Training and held-out rows: tokenized, their gold checked against its schema, none too long.

    Raises:
        UserError: a row cannot be used; the text names it.
    """
    data = config.data
    if data.train_path is not None and data.eval_path is not None:
        train, held_out = load_jsonl(data.train_path), load_jsonl(data.eval_path)
    else:
        train = generate_examples("train", data.difficulty, data.train_examples, config.seed)
        held_out = generate_examples("test", data.difficulty, data.eval_prompts, config.seed)
    options = engine_options(config)
    limit = options.max_model_len or read_model_config(options.model).max_position_embeddings
    tokenizer = Tokenizer(options.model)
    rows: dict[str, list[PromptRow]] = {}
    for name, examples in (("training", train), ("held-out", held_out[: data.eval_prompts])):
        rows[name] = [_row(example, name, tokenizer, limit, config.rollout.max_tokens) for example in examples]
    return rows["training"], rows["held-out"]


def _row(example: Example, name: str, tokenizer: Tokenizer, limit: int, max_tokens: int) -> PromptRow:
    try:
        check_gold(example.gold, example.schema)
    except ValueError as fault:
        raise UserError(f"{name} row '{example.id}': {fault}") from fault
    tokens = tuple(tokenizer.encode_chat(example.messages))
    if len(tokens) + max_tokens > limit:
        raise UserError(
            f"{name} row '{example.id}': its prompt has {len(tokens)} tokens, and with rollout.max_tokens={max_tokens} "
            f"that is more than the context of {limit}; shorten it, lower rollout.max_tokens or raise "
            "engine.max_model_len"
        )
    return PromptRow(example, tokens)
