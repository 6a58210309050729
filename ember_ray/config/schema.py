"""The configuration of each recipe; together with the sections the only place where settings are declared."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ember_ray.config.learning import BestOfNSection, DpoSection, GrpoSection, LearnerSection, SftSection
from ember_ray.config.sections import (
    EngineSection,
    LoraSection,
    ModelSection,
    PositiveInt,
    RaySection,
    RolloutSection,
    Section,
)
from ember_ray.config.task_sections import (
    DataSection,
    ExtractDataSection,
    ExtractRewardSection,
    RewardSection,
    SqlDataSection,
    SqlRewardSection,
)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
NAME_MEANS = "Name of the run; its folder is <output_dir>/<name>_<timestamp>."


class RunConfig(Section):
    """What every recipe has. Recipes derive their own configuration from it."""

    name: Name = Field("run", description=NAME_MEANS)
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of everything random: data, sampling, initial adapter, order of pairs."
    )
    output_dir: str = Field("runs", min_length=1, description="Folder in which the folder of the run is made.")
    resume: str | None = Field(
        None,
        description="Folder of an unfinished run to go on with; give its own settings: --config FOLDER/config.yaml.",
    )
    tracker: Literal["auto", "none", "wandb", "tensorboard"] = Field(
        "auto", description="Where metrics go beside metrics.jsonl; auto = wandb, offline when there is no key."
    )


class LearnConfig(RunConfig):
    """What every run has that learns: all but the algorithm and the task's own settings."""

    task: ClassVar[str]
    """Name of the task, see ``recipes/tasks.py``."""

    rounds: PositiveInt = Field(6, description="Rounds of rollout, learning and publication.")
    model: ModelSection = Field(default_factory=ModelSection, description="The policy's base model.")
    ray: RaySection = Field(default_factory=RaySection, description="The cluster.")
    engine: EngineSection = Field(default_factory=EngineSection, description="The rollout engine.")
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="How candidates are drawn and judged.")
    learner: LearnerSection = Field(default_factory=LearnerSection, description="The learner's process.")
    lora: LoraSection = Field(default_factory=LoraSection, description="The adapter that is learnt (PEFT's names).")
    data: DataSection
    reward: RewardSection

    @model_validator(mode="after")
    def _sections_agree(self) -> LearnConfig:
        if self.engine.max_model_len is not None and self.rollout.max_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"rollout.max_tokens={self.rollout.max_tokens} leaves no room for a prompt in "
                f"engine.max_model_len={self.engine.max_model_len}; lower it"
            )
        if self.learner.base == "shared" and self.model.dtype == "float16":
            raise ValueError(
                "learner.base=shared does not go with model.dtype=float16: gradients leave its range, so the learner "
                "needs a float32 copy of its own; use learner.base=auto, or bfloat16"
            )
        if self.ray.address is not None and self.ray.num_cpus is not None:
            raise ValueError("ray.num_cpus is for a local Ray only; leave it null when ray.address names a cluster")
        several = self.engine.stages > 1 if isinstance(self.engine.stages, int) else len(self.engine.stages) > 1
        if self.ray.address is None and self.ray.placement_strategy == "STRICT_SPREAD" and several:
            raise ValueError(
                "ray.placement_strategy=STRICT_SPREAD wants every stage on its own node, but a local Ray has one node; "
                "use PACK or set ray.address"
            )
        return self


class ExtractConfig(LearnConfig):
    """A run on JSON extraction."""

    task: ClassVar[str] = "extract"

    data: ExtractDataSection = Field(default_factory=ExtractDataSection, description="Training and held-out prompts.")
    reward: ExtractRewardSection = Field(
        default_factory=ExtractRewardSection, description="How a candidate's JSON becomes one number."
    )


class SqlConfig(LearnConfig):
    """A run on text-to-SQL."""

    task: ClassVar[str] = "sql"

    data: SqlDataSection = Field(default_factory=SqlDataSection, description="Training and held-out questions.")
    reward: SqlRewardSection = Field(
        default_factory=SqlRewardSection, description="How a candidate's query becomes one number."
    )


class _Sft(LearnConfig):
    """Learning from demonstrations."""

    rounds: PositiveInt = Field(6, description="Rounds of learning and publication.")
    sft: SftSection = Field(default_factory=SftSection, description="Learning from demonstrations (TRL's names).")


class _FromCandidates(LearnConfig):
    """Learning from candidates of the engine."""

    @model_validator(mode="after")
    def _no_prompt_twice(self) -> _FromCandidates:
        if self.data.train is None and self.rollout.prompts_per_round > self.data.train_examples:
            raise ValueError(
                f"rollout.prompts_per_round={self.rollout.prompts_per_round} is more than "
                f"data.train_examples={self.data.train_examples}, so prompts would repeat in a round; raise it"
            )
        return self


class _BestOfN(_FromCandidates):
    """Learning from the best of N candidates."""

    best_of_n: BestOfNSection = Field(
        default_factory=BestOfNSection, description="Learning from the best candidates (TRL's names)."
    )


class _Dpo(_FromCandidates):
    """Learning from pairs of candidates."""

    dpo: DpoSection = Field(default_factory=DpoSection, description="Learning from pairs (TRL's names).")

    @model_validator(mode="after")
    def _enough_candidates(self) -> _Dpo:
        if self.rollout.num_candidates < 2:
            raise ValueError("rollout.num_candidates is 1, but a pair needs two candidates of a prompt; set at least 2")
        return self


class _Grpo(_FromCandidates):
    """Learning from groups of candidates."""

    grpo: GrpoSection = Field(default_factory=GrpoSection, description="Learning from groups (TRL's names).")

    @model_validator(mode="after")
    def _enough_candidates(self) -> _Grpo:
        if self.rollout.num_candidates < 2:
            raise ValueError(
                "rollout.num_candidates is 1, but GRPO compares the candidates of a prompt; set at least 2"
            )
        return self


class SftExtractConfig(ExtractConfig, _Sft):
    """SFT on JSON extraction."""

    name: Name = Field("sft_extract", description=NAME_MEANS)


class SftSqlConfig(SqlConfig, _Sft):
    """SFT on text-to-SQL."""

    name: Name = Field("sft_sql", description=NAME_MEANS)


class BestOfNExtractConfig(ExtractConfig, _BestOfN):
    """Rejection-sampling fine-tuning on JSON extraction."""

    name: Name = Field("best_of_n_extract", description=NAME_MEANS)


class BestOfNSqlConfig(SqlConfig, _BestOfN):
    """Rejection-sampling fine-tuning on text-to-SQL."""

    name: Name = Field("best_of_n_sql", description=NAME_MEANS)


class DpoExtractConfig(ExtractConfig, _Dpo):
    """DPO on JSON extraction."""

    name: Name = Field("dpo_extract", description=NAME_MEANS)


class DpoSqlConfig(SqlConfig, _Dpo):
    """DPO on text-to-SQL."""

    name: Name = Field("dpo_sql", description=NAME_MEANS)


class GrpoExtractConfig(ExtractConfig, _Grpo):
    """GRPO on JSON extraction."""

    name: Name = Field("grpo_extract", description=NAME_MEANS)


class GrpoSqlConfig(SqlConfig, _Grpo):
    """GRPO on text-to-SQL."""

    name: Name = Field("grpo_sql", description=NAME_MEANS)
