"""The configuration of an evaluation: which model, on which held-out rows, by how many samples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ember_ray.config.endpoint_section import EndpointSection
from ember_ray.config.schema import NAME_MEANS, Name
from ember_ray.config.sections import (
    EngineSection,
    ModelSection,
    PositiveInt,
    RaySection,
    SamplingSection,
    Section,
    Weight,
)


class EvaluateDataSection(Section):
    """``data.*`` of an evaluation."""

    eval: str | None = Field(
        None, description="Own held-out rows (JSONL, Parquet or a Hugging Face folder); null = generated."
    )
    chat_template: bool = Field(
        True, description="Put a row's text prompt into the chat template as the user's turn; false = as it is."
    )
    eval_prompts: PositiveInt = Field(256, description="Held-out prompts.")
    eval_samples: PositiveInt = Field(
        16, description="Sampled candidates of each held-out prompt (one greedy comes on top)."
    )
    difficulty: Literal["easy", "hard", "hard_rule"] = Field(
        "easy", description="Which documents the generator makes; for task=extract."
    )
    levels: Annotated[list[Literal[1, 2, 3, 4]], Field(min_length=1)] = Field(
        [1, 2, 3, 4], description="Difficulty of the generated questions; for task=sql."
    )
    databases: str | None = Field(
        None, description="Folder of the generated SQLite databases; null = <output_dir>/databases; for task=sql."
    )


class EvaluateRewardSection(Section):
    """``reward.*`` of an evaluation."""

    design: Literal["binary", "weighted", "decomposed"] = Field(
        "decomposed", description="How a candidate becomes one number, as in training; measured beside exact match."
    )
    weights: dict[str, Weight] = Field({}, description="Weights of the design, as in training.")
    functions: dict[str, Weight] = Field(
        {}, description="Reward functions and their weights, as in training; empty = the task's own verifier."
    )


class EvaluateConfig(Section):
    """Held-out quality of a base model, a model with an adapter, or a model behind an endpoint."""

    name: Name = Field("evaluate", description=NAME_MEANS)
    task: Literal["extract", "sql"] = Field("extract", description="What is asked: JSON extraction or text-to-SQL.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of generated rows, of sampling and of the intervals.")
    output_dir: str = Field("runs", min_length=1, description="Folder in which the folder of the evaluation is made.")
    resume: str | None = Field(
        None,
        description="Folder of an unfinished evaluation of an endpoint: only what is missing is asked, then everything "
        "is judged; give its own settings: --config FOLDER/config.yaml.",
    )
    model: ModelSection = Field(default_factory=ModelSection, description="The model in our own engine.")
    endpoint: EndpointSection = Field(
        default_factory=EndpointSection, description="A model behind an OpenAI-compatible server instead."
    )
    ray: RaySection = Field(default_factory=RaySection, description="The cluster.")
    engine: EngineSection = Field(default_factory=EngineSection, description="The rollout engine.")
    rollout: SamplingSection = Field(
        default_factory=SamplingSection, description="How candidates are drawn and judged."
    )
    data: EvaluateDataSection = Field(default_factory=EvaluateDataSection, description="Held-out prompts.")
    reward: EvaluateRewardSection = Field(
        default_factory=EvaluateRewardSection, description="How a candidate becomes one number."
    )

    @model_validator(mode="after")
    def _one_model(self) -> EvaluateConfig:
        if self.endpoint.base_url is not None and (self.model.path or self.model.adapter):
            which = "path" if self.model.path else "adapter"
            raise ValueError(
                f"model.{which} and endpoint.base_url are both set, but one model is evaluated at a time; drop one"
            )
        if self.resume is not None and self.endpoint.base_url is None:
            raise ValueError("resume goes on with an evaluation of an endpoint; one of our own engine starts anew")
        return self
