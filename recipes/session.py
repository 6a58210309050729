"""What a recipe stands on: Ray, the coordinator with its stages and verifiers, and calls that show their progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from actors import cluster
from actors.calls import wait
from actors.messages import (
    CoordinatorSettings,
    Limits,
    Progress,
    PromptRow,
    RolloutResult,
    RolloutStats,
    VerifierSettings,
)
from ember_ray.assets import tiny_model_path
from ember_ray.config import signals
from ember_ray.config.errors import UserError
from ember_ray.config.plan import render_plan, stage_plans
from ember_ray.config.schema import DpoExtractConfig
from ember_ray.data.example import Example
from ember_ray.data.extraction import generate_examples
from ember_ray.data.jsonl import load_jsonl
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.model.plan import plan_stages, read_model_config, stage_bytes
from ember_ray.model.tokenizer import Tokenizer
from ember_ray.tracking.console import Activity, Console
from verifiers.json_extraction import RewardDesign, check_gold

LONGEST_CALL_S = 6 * 3600.0


def model_path(config: DpoExtractConfig) -> str:
    """The model's folder: the user's own or the shipped tiny one."""
    return config.model.path or str(tiny_model_path())


def engine_options(config: DpoExtractConfig) -> EngineOptions:
    """The engine's options; how the layers are cut is settled here.

    Raises:
        UserError: the model or the split cannot be served.
    """
    engine = config.engine
    try:
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
            seed=config.seed,
        )
    except ValueError as fault:
        raise UserError(str(fault)) from fault


def plan(config: DpoExtractConfig) -> str:
    """What ``--dry-run`` prints below the configuration."""
    options, shape = engine_options(config), read_model_config(model_path(config))
    stages = stage_plans(
        options.layer_split,
        stage_bytes(shape, options.layer_split, options.dtype),
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        dtype=options.dtype,
        kv_tokens=options.num_kv_blocks * options.block_size,
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


class Session:
    """A started Ray with a coordinator; use as a context manager, so that nothing of it is left.

    Attributes:
        totals: counts over all rollouts of the run.
        cluster: addresses to show.
    """

    def __init__(self, config: DpoExtractConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.totals = RolloutStats()
        self.policy_version = 0
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        config = self.config
        options = engine_options(config)
        with self._stack:
            with self.console.stage("starting Ray") as stage:
                self.cluster = self._stack.enter_context(
                    cluster.start(
                        len(options.layer_split),
                        address=config.ray.address,
                        run=config.name,
                        strategy=config.ray.placement_strategy,
                        gpus_per_stage=1.0 if config.model.device == "cuda" else 0.0,
                        num_cpus=config.ray.num_cpus,
                        dashboard=config.ray.dashboard,
                    )
                )
                signals.reinstall()  # Ray has put its own handler in place
                stage.note(f"{self.cluster.nodes} node{'s'[: self.cluster.nodes > 1]} at {self.cluster.address}")
            from actors.coordinator import Coordinator

            settings = CoordinatorSettings(
                options,
                VerifierSettings(settings={"design": reward_design(config)}, actors=config.rollout.verifier_workers),
                seed=config.seed,
                limits=Limits(
                    transport=config.ray.stage_timeout_s,
                    call=config.ray.stage_timeout_s,
                    stall=1.5 * config.ray.stage_timeout_s,
                ),
            )
            actor: Any = Coordinator
            self.coordinator = actor.options(name="ember-coordinator").remote(settings, self.cluster.placement)
            self._starting = self.coordinator.start.remote()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *fault: object) -> None:
        self._stack.close()

    def ready(self) -> None:
        """Waits until stages and verifiers are up; other things may be started meanwhile.

        Raises:
            ValueError: the engine refuses the model or the options.
        """
        split = engine_options(self.config).layer_split
        with self.console.stage("loading the stages") as stage:
            wait(self._starting, "the start of the stages", 600.0)
            stage.note(f"{len(split)} stage{'s'[: len(split) > 1]} of {', '.join(map(str, split))} layers")

    def rollout(
        self, rows: Sequence[PromptRow], num_candidates: int, params: SamplingParams, round_number: int, name: str
    ) -> RolloutResult:
        """Candidates of all rows, scored, with progress on the console under the given name."""
        call = self.coordinator.rollout.remote(rows, num_candidates, params, round_number)
        with self.console.phase(name, total=len(rows) * num_candidates) as phase:
            result = wait(call, "the rollout", LONGEST_CALL_S, on_tick=lambda: self._show(phase))
        self.totals = _added(self.totals, result.stats)
        return result

    def publish(self, update: Any) -> int:
        """Makes an adapter the policy of all stages; returns its version."""
        with self.console.phase("publishing"):
            self.policy_version = wait(self.coordinator.publish.remote(update), "the publication", 600.0)
        return self.policy_version

    def call(self, name: str, ref: Any) -> Any:
        """Waits for an actor's answer in a phase of the console."""
        with self.console.phase(name):
            return wait(ref, name, LONGEST_CALL_S)

    def _show(self, phase: Activity) -> None:
        progress: Progress = wait(self.coordinator.progress.remote(), "the coordinator's progress", 60.0)
        if progress.candidates_total == phase.total:
            self.console.advance(progress.candidates_scored - phase.done)
            numbers: dict[str, Any] = {"policy_version": progress.policy_version}
            if progress.reward_mean is not None:
                numbers["reward"] = progress.reward_mean
            self.console.update(numbers)


def start_learner(config: DpoExtractConfig, planned_steps: int, folder: Path) -> Any:
    """A learner actor; its ``start`` must be waited for. It shares the cores with the stages, which rest meanwhile."""
    from actors.learner import LEARNER_NAME, LearnerActor
    from ember_ray.train.options import DpoOptions, LoraOptions

    lora = config.lora.model_dump()
    dpo = config.dpo.model_dump()
    margin, per_prompt = dpo.pop("min_margin"), dpo.pop("pairs_per_prompt")
    for name in ("target_modules", "layers_to_transform"):
        lora[name] = lora[name] and tuple(lora[name])
    for name in ("loss_type", "loss_weights"):
        dpo[name] = dpo[name] and tuple(dpo[name])
    options = DpoOptions(**dpo, planned_steps=planned_steps, seed=config.seed)
    actor: Any = LearnerActor
    return actor.options(name=LEARNER_NAME, num_cpus=0, num_gpus=0).remote(
        model_path(config), LoraOptions(**lora), options, config.model.dtype, config.model.device, folder,
        min_margin=margin, pairs_per_prompt=per_prompt,
    )  # fmt: skip


def _added(total: RolloutStats, more: RolloutStats) -> RolloutStats:
    summed = {
        field.name: getattr(total, field.name) + getattr(more, field.name)
        for field in dataclasses.fields(RolloutStats)
        if field.name != "policy_version"
    }
    return RolloutStats(**summed, policy_version=more.policy_version)
