"""The configuration of the comparison of learners: which cells there are, and under which equal conditions."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from ember_ray.config.sections import PositiveInt, Section

Task = Literal["extract", "sql"]
Algorithm = Literal["sft", "best_of_n", "dpo", "grpo", "sft_clean"]
Design = Literal["binary", "weighted", "decomposed"]

COMPARED_KEYS = (
    "name",
    "seed",
    "output_dir",
    "resume",
    "tracker",
    "ray.dashboard",
    "model.adapter",
    "reward.design",
    "rollout.token_budget",
    "data.databases",
)
"""Settings of the recipes that the comparison itself makes."""


class CompareConfig(Section):
    """Everything that decides a comparison."""

    output_dir: str = Field(
        "runs/compare", min_length=1, description="Folder of the comparison; a second call goes on with what is there."
    )
    tasks: Annotated[list[Task], Field(min_length=1)] = Field(["extract", "sql"], description="Tasks.")
    algorithms: Annotated[list[Algorithm], Field(min_length=1)] = Field(
        ["sft", "best_of_n", "dpo", "grpo", "sft_clean"],
        description="Learners; all but sft_clean (SFT on faultless answers, the upper line) build on sft.",
    )
    designs: Annotated[list[Design], Field(min_length=1)] = Field(
        ["decomposed"], description="Reward designs; tables and curves of learners show the first."
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = Field(
        [0], description="Seeds; each is a cell of its own."
    )
    token_budget: PositiveInt = Field(
        120_000, description="Generated tokens that each of best_of_n, dpo and grpo may learn from."
    )
    at_once: PositiveInt = Field(2, description="Cells that run at the same time.")
    threads: PositiveInt = Field(1, description="OMP_NUM_THREADS of a cell's processes.")
    cell_timeout_s: float = Field(1200.0, gt=0, description="Seconds after which a cell is ended and counts as failed.")
    time_limit_s: float | None = Field(
        None, gt=0, description="Seconds after which the call ends the cells that run and reports; null = none."
    )
    gpu_price_per_hour: float = Field(
        2.0, ge=0, description="Dollars an hour of a GPU, or of a machine without; a cell pays for its share of it."
    )
    settings: dict[str, list[str]] = Field(
        {},
        description="Settings of the recipes, by all, task, algorithm or algorithm_task, the last of them counts, "
        "e.g. {all: [data.eval_prompts=128], dpo_sql: [dpo.learning_rate=3e-4]}.",
    )
    report: str | None = Field(
        None, description="Folder of a comparison whose tables and figures are to be made again; nothing is run."
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> CompareConfig:
        if "sft" not in self.algorithms:
            raise ValueError("algorithms must name sft: the base model is measured before it, the others start from it")
        for key in ("tasks", "algorithms", "designs", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} names something twice; each cell is run once")
        tasks, algorithms = get_args(Task), get_args(Algorithm)
        known = {"all", *tasks, *algorithms, *(f"{algorithm}_{task}" for algorithm in algorithms for task in tasks)}
        for group, overrides in self.settings.items():
            if group not in known:
                raise ValueError(f"settings.{group} belongs to no cell; use one of {', '.join(sorted(known))}")
            for override in overrides:
                key = override.partition("=")[0].strip()
                if key in COMPARED_KEYS:
                    raise ValueError(f"settings.{group} sets {key}, which the comparison itself decides; leave it out")
        return self
