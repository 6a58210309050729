"""The settings of a task: its data and how an answer becomes one number. One pair of sections a task."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ember_ray.config.sections import PositiveInt, Section, Weight


class DataSection(Section):
    """``data.*``, whatever the task."""

    train_examples: PositiveInt = Field(2048, description="Training rows that the generator makes.")
    train: str | None = Field(
        None, description="Own training rows (JSONL, Parquet or a Hugging Face folder); null = generated."
    )
    eval: str | None = Field(
        None, description="Own held-out rows; null = a fifth of data.train, at most data.eval_prompts."
    )
    chat_template: bool = Field(
        True, description="Put a row's text prompt into the chat template as the user's turn; false = as it is."
    )
    eval_prompts: PositiveInt = Field(256, description="Held-out prompts on which before and after are measured.")
    eval_samples: PositiveInt = Field(
        4, description="Sampled candidates of each held-out prompt (one greedy comes on top)."
    )

    @model_validator(mode="after")
    def _same_task(self) -> DataSection:
        if self.train is None and self.eval is not None:
            raise ValueError(
                "data.eval is set but data.train is not, so training and held-out prompts would be of different tasks; "
                "set data.train too"
            )
        return self


class ExtractDataSection(DataSection):
    """``data.*`` of JSON extraction."""

    difficulty: Literal["easy", "hard", "hard_rule"] = Field(
        "easy", description="Which documents the generator makes (not used with own files)."
    )


class RewardSection(Section):
    """``reward.*``, whatever the task."""

    parts: ClassVar[dict[str, tuple[str, ...]]]
    """What the weights of a design are for, by design; one that is not there takes dotted paths of fields."""

    design: Literal["binary", "weighted", "decomposed"] = Field(
        "decomposed",
        description="binary: exact or not; weighted: parts of the answer by weight; decomposed: by stages.",
    )
    weights: dict[str, Weight] = Field({}, description="Weights of the design.")
    functions: dict[str, Weight] = Field(
        {},
        description="Reward functions and their weights, e.g. {json_extraction: 1, mine.py:short: 0.2}: package.module:"
        "function or file.py:function with TRL's signature; empty = the task's own verifier.",
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> RewardSection:
        if self.weights and self.design == "binary":
            raise ValueError(
                "reward.weights has no use with reward.design=binary; leave it out or choose another design"
            )
        parts = self.parts.get(self.design)
        unknown = set(self.weights) - set(parts or self.weights)
        if unknown:
            raise ValueError(
                f"reward.weights names '{min(unknown)}'; with reward.design={self.design} it takes "
                f"{', '.join(parts or ())}"
            )
        complete = parts is None or len(self.weights) == len(parts)  # parts left out keep their defaults
        if self.weights and complete and not any(self.weights.values()):
            raise ValueError("reward.weights are all 0, so every reward would be 0; make one positive")
        if self.functions and not any(self.functions.values()):
            raise ValueError("reward.functions have weights of 0 only, so every reward would be 0; make one positive")
        return self


class ExtractRewardSection(RewardSection):
    """``reward.*`` of JSON extraction."""

    parts: ClassVar[dict[str, tuple[str, ...]]] = {"decomposed": ("parse", "schema", "fields", "clean")}

    design: Literal["binary", "weighted", "decomposed"] = Field(
        "decomposed", description="binary: exact or not; weighted: fields by weight; decomposed: parse, schema, fields."
    )
    weights: dict[str, Weight] = Field(
        {}, description="Weights of fields by dotted path (weighted), or of parse, schema, fields, clean (decomposed)."
    )


class SqlDataSection(DataSection):
    """``data.*`` of text-to-SQL."""

    levels: Annotated[list[Literal[1, 2, 3, 4]], Field(min_length=1)] = Field(
        [1, 2, 3, 4], description="Difficulty of the generated questions (not used with own files)."
    )
    databases: str | None = Field(
        None, description="Folder of the generated SQLite databases; null = <output_dir>/databases."
    )


class SqlRewardSection(RewardSection):
    """``reward.*`` of text-to-SQL."""

    parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "weighted": ("columns", "rows", "exact_match"),
        "decomposed": ("parse", "execute", "columns", "rows", "exact_match"),
    }

    design: Literal["binary", "weighted", "decomposed"] = Field(
        "decomposed",
        description="binary: right result or not; weighted: columns, rows, exact_match; decomposed: those and whether "
        "it parses and executes.",
    )
    weights: dict[str, Weight] = Field({}, description="Weights of what the design is made of; the rest keep theirs.")
