"""From a run's configuration to the parts that it names: model, engine options, rows, reward, plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actors.messages import PromptRow, VerifierSettings
from ember_ray.config.errors import UserError, user_faults
from ember_ray.config.plan import render_plan, stage_plans
from ember_ray.config.schema import LearnConfig
from ember_ray.data.example import Example
from ember_ray.data.formats import load_dataset_rows
from ember_ray.data.splits import hold_out
from ember_ray.data.tokenize import prompt_tokens
from ember_ray.engine.options import CPU_KV_BLOCKS, EngineOptions
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.model.plan import plan_stages, stage_bytes
from ember_ray.model.qwen3_config import read_model_config
from ember_ray.model.tokenizer import Tokenizer
from recipes.tasks import task_of
from verifiers.reward_functions import BUILT_IN, RewardFunction, find_reward_function, required_columns

if TYPE_CHECKING:
    from recipes.learners import Algorithm


def model_path(config: LearnConfig) -> str:
    """The model's folder: the user's own or the task's tiny one."""
    return config.model.path or str(task_of(config).tiny_model())


def context_length(config: LearnConfig) -> int:
    """Most tokens of a prompt with its answer that the engine takes."""
    return config.engine.max_model_len or read_model_config(model_path(config)).max_position_embeddings


def engine_options(config: LearnConfig) -> EngineOptions:
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


def plan(config: LearnConfig, algorithm: Algorithm) -> str:
    """What ``--dry-run`` prints below the configuration."""
    options, shape = engine_options(config), read_model_config(model_path(config))
    if config.data.train is not None:
        load_rows(config, algorithm)  # what is wrong with them is told now; the generator's are made when they are used
    blocks = options.num_kv_blocks or (CPU_KV_BLOCKS if options.device == "cpu" else None)
    stages = stage_plans(
        options.layer_split,
        stage_bytes(shape, options.layer_split, options.dtype),
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        dtype=options.dtype,
        kv_tokens=None if blocks is None else blocks * options.block_size,
    )
    return render_plan(config, stages, algorithm.plan(config), rolls_out=algorithm.rolls_out)


def sampling_params(config: LearnConfig) -> SamplingParams:
    """How rollouts and sampled evaluation draw."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        max_tokens=rollout.max_tokens,
    )


def verifier_settings(config: LearnConfig) -> VerifierSettings:
    """The reward functions with their weights; the task's own verifier where none are named."""
    task = task_of(config)
    own = task.reward_function(config)
    named = config.reward.functions or {own.name: 1.0}
    functions = tuple(
        RewardFunction(name, weight, own.settings if name == own.name else {}) for name, weight in named.items()
    )
    return VerifierSettings(functions, actors=config.rollout.verifier_workers)


def highest_reward(config: LearnConfig) -> float:
    """What an answer without a fault gets: every reward function gives at most 1, times its weight."""
    return sum(function.weight for function in verifier_settings(config).functions)


def load_rows(config: LearnConfig, algorithm: Algorithm) -> tuple[list[PromptRow], list[PromptRow]]:
    """Training and held-out rows: tokenized, checked, none too long.

    Raises:
        UserError: a row cannot be used; the text names it.
    """
    data = config.data
    judged = config.task if _judged_by_task(config) else None
    if data.train is None:
        with user_faults(ValueError, prefix="data.train_examples: "):
            train = task_of(config).generate(config, "train", data.train_examples)
        held_out = held_out_examples(config)
    elif data.eval is not None:
        train = load_dataset_rows(data.train, judged if algorithm.rolls_out else None)  # type: ignore[arg-type]
        held_out = held_out_examples(config)
    else:
        rows = load_dataset_rows(data.train, judged)  # type: ignore[arg-type]
        with user_faults(ValueError, prefix=f"{data.train}: "):
            train, held_out = hold_out(rows, data.eval_prompts, config.seed)
        check_examples(config, "held-out", held_out)
    train = algorithm.prepare(config, train)
    if algorithm.rolls_out:
        check_examples(config, "training", train)
        check_columns(config, "training", train)
    check_columns(config, "held-out", held_out)
    return prompt_rows(config, "training", train), prompt_rows(config, "held-out", held_out)


def held_out_examples(config: LearnConfig) -> list[Example]:
    """Held-out rows, the user's own or generated, at most ``data.eval_prompts``; checked.

    Raises:
        UserError: a row cannot be used; the text names it.
    """
    data = config.data
    if data.eval is not None:
        judged = config.task if _judged_by_task(config) else None
        examples = load_dataset_rows(data.eval, judged)[: data.eval_prompts]  # type: ignore[arg-type]
    else:
        with user_faults(ValueError, prefix="data.eval_prompts: "):
            examples = task_of(config).generate(config, "test", data.eval_prompts)
    check_examples(config, "held-out", examples)
    return examples


def check_examples(config: LearnConfig, name: str, examples: Sequence[Example]) -> None:
    """Makes sure that the task's verifier, if it has a part in the reward, can judge by the rows' gold answers.

    Raises:
        UserError: it cannot; the text names the row.
    """
    if _judged_by_task(config):
        for example in examples:
            with user_faults(ValueError, prefix=f"{name} row '{example.id}': "):
                task_of(config).check(example)


def check_columns(config: LearnConfig, name: str, examples: Sequence[Example]) -> None:
    """Makes sure that reward functions of the user's own get the columns that they cannot do without.

    A row that lacks one gets no reward; if all lack it, there is none to learn from.

    Raises:
        UserError: no row has a column that is needed, or there is no such function.
    """
    for function in verifier_settings(config).functions:
        if function.name in BUILT_IN:
            continue
        with user_faults(ValueError, prefix="reward.functions: "):
            needed = required_columns(find_reward_function(function.name), function.settings)
        for column in needed:
            if not any(column in example.reward_columns() for example in examples):
                raise UserError(
                    f"no {name} row has a column '{column}', which reward function '{function.name}' needs; add it to "
                    "the rows, or give the function's parameter a default"
                )


def prompt_rows(config: LearnConfig, name: str, examples: Sequence[Example]) -> list[PromptRow]:
    """Rows with the tokens that the engine gets.

    Raises:
        UserError: a prompt is too long; the text names the row.
    """
    limit, tokenizer = context_length(config), Tokenizer(model_path(config))
    rows = []
    for example in examples:
        tokens = tuple(prompt_tokens(tokenizer, example, config.data.chat_template))
        if len(tokens) + config.rollout.max_tokens > limit:
            raise UserError(
                f"{name} row '{example.id}': its prompt has {len(tokens)} tokens, and with "
                f"rollout.max_tokens={config.rollout.max_tokens} that is more than the context of {limit}; "
                "shorten it, lower rollout.max_tokens or raise engine.max_model_len"
            )
        rows.append(PromptRow(example, tokens))
    return rows


def _judged_by_task(config: LearnConfig) -> bool:
    """Whether the task's own verifier has a part in the reward, so that rows need its gold answers."""
    own = task_of(config).reward_function(config).name
    return own in {function.name for function in verifier_settings(config).functions}
