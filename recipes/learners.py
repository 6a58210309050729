"""The algorithms: which learner learns, from which section of the configuration, and from how much a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ember_ray.config.errors import UserError, user_faults
from ember_ray.config.schema import LearnConfig
from ember_ray.data.example import Example
from ember_ray.train.grpo_options import GrpoOptions
from ember_ray.train.options import DpoOptions, LearnerOptions, LoraOptions, SftOptions
from recipes.session import LEARNER_GPU
from recipes.setup import context_length, highest_reward, model_path
from recipes.tasks import task_of

GOOD_ENOUGH = 0.999
"""Best-of-N learns from answers without a fault; rewards are sums of decimal weights, so not quite 1."""


@dataclass(frozen=True)
class Algorithm:
    """A way to learn.

    Attributes:
        name: which; as the summary tells it.
        kind: of the learner, see ``actors.learner``.
        section: of the configuration; its settings are the learner's options by the same names.
        options: class of the options.
        rows: most rows of a round that are learnt from.
        rolls_out: whether it learns from candidates of the engine; then training rows need what judges them.
        unit: what it learns from, in words.
        advice: why there may be none of it, and what to do then.
    """

    name: str
    kind: str
    section: str
    options: type[LearnerOptions]
    rows: Callable[[Any], int]
    rolls_out: bool
    unit: str
    advice: str

    @property
    def learnt_nothing(self) -> str:
        """What is said of a run without an optimizer step. It is no failure: a policy may be beyond teaching."""
        return (
            f"NOTHING WAS LEARNT: no round gave {self.unit} to learn from, so the policy is what the run started from; "
            f"metrics.jsonl counts what was left out. Likely {self.advice}."
        )

    def steps_a_round(self, config: LearnConfig) -> int:
        """Most optimizer steps of a round."""
        section = getattr(config, self.section)
        per_step = section.per_device_train_batch_size * section.gradient_accumulation_steps
        passes = getattr(section, "epochs_per_round", 1) * getattr(section, "num_iterations", 1)
        return math.ceil(self.rows(config) / per_step) * passes

    def prompts_a_round(self, config: Any) -> int:
        """Training rows of a round."""
        return int(config.rollout.prompts_per_round)

    def learner_options(self, config: LearnConfig) -> LearnerOptions:
        """The learner's options, with the length of the schedule and the run's seed.

        Raises:
            UserError: settings do not fit each other.
        """
        section = getattr(config, self.section).model_dump()
        if section.get("reference") == "engine":  # what it cannot score is left out, and counted, by the learner
            limit = context_length(config)
            section["max_length"] = min(section["max_length"] or limit, limit)
        if section.get("min_reward", 0.0) is None:
            section["min_reward"] = GOOD_ENOUGH * highest_reward(config)
        known = {field.name for field in fields(self.options)}
        # what the rollout decides
        section |= {"temperature": config.rollout.temperature, "max_completion_length": config.rollout.max_tokens}
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in section.items() if name in known
        }
        with user_faults(ValueError):
            return self.options(**values, planned_steps=config.rounds * self.steps_a_round(config), seed=config.seed)

    def plan(self, config: LearnConfig) -> str:
        """The line of the plan about learning.

        Raises:
            UserError: see `learner_options`.
        """
        self.learner_options(config)
        steps, section = self.steps_a_round(config), getattr(config, self.section)
        per_step = section.per_device_train_batch_size * section.gradient_accumulation_steps
        return (
            f"at most {self.rows(config):,} {self.unit} a round, {per_step} a step: "
            f"at most {steps:,} steps a round and {steps * config.rounds:,} in all"
        )

    def prepare(self, config: LearnConfig, examples: Sequence[Example]) -> list[Example]:
        """Training rows with what the algorithm needs of them."""
        return list(examples)


@dataclass(frozen=True)
class Demonstrations(Algorithm):
    """Learning from answers that the rows bring; generated rows get answers of mixed quality."""

    def prompts_a_round(self, config: Any) -> int:
        return int(config.sft.rows_per_round)

    def prepare(self, config: LearnConfig, examples: Sequence[Example]) -> list[Example]:
        faults = config.sft.faults  # type: ignore[attr-defined]
        for example in examples:
            if example.completion is None and example.gold is None:
                raise UserError(f"training row '{example.id}' has neither 'completion' nor 'gold' to learn from")
        # rows that bring their own answer keep it; the others of a user's are learnt with their gold
        return task_of(config).demonstrate(examples, faults if config.data.train is None else 0.0, config.seed)


def _candidates(config: Any) -> int:
    return config.rollout.prompts_per_round * config.rollout.num_candidates


def _pairs(config: Any) -> int:
    candidates, asked = config.rollout.num_candidates, config.dpo.pairs_per_prompt
    most = {"best_worst": candidates // 2, "all_margin": math.comb(candidates, 2), "oracle": candidates}
    return config.rollout.prompts_per_round * min(asked or math.inf, most[config.dpo.pair_choice])


def _chosen(config: Any) -> int:
    candidates = config.rollout.num_candidates
    return config.rollout.prompts_per_round * min(config.best_of_n.per_prompt or candidates, candidates)


SPREAD = "raise rollout.num_candidates or rollout.temperature, or grade the reward (reward.design)"

SFT = Demonstrations(
    "sft",
    "sft",
    "sft",
    SftOptions,
    lambda c: c.sft.rows_per_round,
    rolls_out=False,
    unit="demonstrations",
    advice="all rows are longer than sft.max_length; raise it",
)
BEST_OF_N = Algorithm(
    "best_of_n",
    "sft",
    "best_of_n",
    SftOptions,
    _chosen,
    rolls_out=True,
    unit="chosen candidates",
    advice="no answer got best_of_n.min_reward; lower it, or raise rollout.num_candidates",
)
DPO = Algorithm(
    "dpo",
    "dpo",
    "dpo",
    DpoOptions,
    _pairs,
    rolls_out=True,
    unit="pairs",
    advice=f"no two answers to a prompt differed in reward by dpo.min_margin; lower it, {SPREAD}",
)
GRPO = Algorithm(
    "grpo",
    "grpo",
    "grpo",
    GrpoOptions,
    _candidates,
    rolls_out=True,
    unit="candidates",
    advice=f"all answers to a prompt got the same reward; {SPREAD}",
)


def shares_base(config: LearnConfig, stages_are_here: bool) -> bool:
    """Whether the learner is to learn on the engine's base weights.

    Raises:
        UserError: it cannot, and the configuration says that it must.
    """
    choice = config.learner.base
    if choice == "shared" and not stages_are_here:
        raise UserError(
            "learner.base=shared needs all stages on the node where the run was started, and a stage is on another "
            "one; use learner.base=auto, or start the run there"
        )
    return choice != "own" and stages_are_here and config.model.dtype != "float16"


def start_learner(config: LearnConfig, algorithm: Algorithm, folder: Path, shared_base: bool = False) -> Any:
    """A learner actor; its ``start`` must be waited for. It shares the cores with the stages, which rest meanwhile.

    It is on the driver's node, where the run folder is, unless only another node has a GPU left for it; then the two
    nodes have to share the folder. A float16 model learns in float32, since gradients leave float16's range.

    Args:
        shared_base: its model will be on the GPUs of the stages, whose shares of them are counted already.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from actors.learner import LearnerActor, LearnerSettings

    lora = config.lora.model_dump()
    for name in ("target_modules", "layers_to_transform"):
        lora[name] = lora[name] and tuple(lora[name])
    settings = LearnerSettings(
        kind=algorithm.kind,  # type: ignore[arg-type]
        model_path=model_path(config),
        lora=LoraOptions(**lora),
        options=algorithm.learner_options(config),
        dtype="float32" if config.model.dtype == "float16" else config.model.dtype,
        device=config.model.device,
        output_dir=str(folder),
        init_adapter=config.model.adapter and str(Path(config.model.adapter).resolve()),
    )
    resources: dict[str, Any] = {"num_cpus": 0}
    if shared_base:
        resources["runtime_env"] = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}  # it names them itself
    elif config.model.device == "cuda":
        resources["num_gpus"] = LEARNER_GPU
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=not shared_base)
    actor: Any = LearnerActor
    # no name: a lost learner's may still be taken when the next one comes up
    return actor.options(scheduling_strategy=here, **resources).remote(settings)
