"""The configuration of each recipe; together with the sections the only place where settings are declared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ember_ray.config.learning import DpoSection
from ember_ray.config.sections import (
    EngineSection,
    LoraSection,
    ModelSection,
    PositiveInt,
    RaySection,
    RolloutSection,
    Section,
)
from ember_ray.config.task_sections import DataSection, ExtractDataSection, ExtractRewardSection, RewardSection

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

    rounds: PositiveInt = Field(6, description="Rounds of rollout, learning and publication.")
    model: ModelSection = Field(default_factory=ModelSection, description="The policy's base model.")
    ray: RaySection = Field(default_factory=RaySection, description="The cluster.")
    engine: EngineSection = Field(default_factory=EngineSection, description="The rollout engine.")
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="How candidates are drawn and judged.")
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
        if self.data.train_path is None and self.rollout.prompts_per_round > self.data.train_examples:
            raise ValueError(
                f"rollout.prompts_per_round={self.rollout.prompts_per_round} is more than "
                f"data.train_examples={self.data.train_examples}, so prompts would repeat in a round; raise it"
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

    data: ExtractDataSection = Field(default_factory=ExtractDataSection, description="Training and held-out prompts.")
    reward: ExtractRewardSection = Field(
        default_factory=ExtractRewardSection, description="How a candidate's JSON becomes one number."
    )


class DpoExtractConfig(ExtractConfig):
    """DPO on JSON extraction: candidates from the engine, pairs by the verifier, a LoRA adapter that is swapped in."""

    name: Name = Field("dpo_extract", description=NAME_MEANS)
    dpo: DpoSection = Field(default_factory=DpoSection, description="Learning from pairs (TRL's names).")

    @model_validator(mode="after")
    def _enough_candidates(self) -> DpoExtractConfig:
        if self.rollout.num_candidates < 2:
            raise ValueError("rollout.num_candidates is 1, but a pair needs two candidates of a prompt; set at least 2")
        return self
