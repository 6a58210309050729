"""The cells of a comparison: one training run each, what it starts from and by which settings it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ember_ray.config import schema
from ember_ray.config.cli import find_config
from ember_ray.config.compare_schema import CompareConfig
from ember_ray.config.errors import ConfigError
from ember_ray.config.load import load_config
from ember_ray.config.schema import LearnConfig

LEARNERS = ("best_of_n", "dpo", "grpo")
"""Algorithms that learn from candidates, and so have a reward design, a budget and a checkpoint to start from."""

RECIPES = {"sft": "sft", "sft_clean": "sft", "best_of_n": "best_of_n", "dpo": "dpo", "grpo": "grpo"}
"""The recipe of each algorithm, without the task."""


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        task, algorithm, seed: which.
        design: of the reward; None for SFT, which learns from answers and not from rewards.
        settings: overrides of the recipe that make the run what it is; folders are not among them.
    """

    task: str
    algorithm: str
    design: str | None
    seed: int
    settings: tuple[str, ...]

    @property
    def id(self) -> str:
        """Its name, also that of its folder: ``dpo_sql_binary_s0``."""
        return "_".join([self.algorithm, self.task, *([self.design] if self.design else []), f"s{self.seed}"])

    @property
    def recipe(self) -> str:
        """``dpo_sql``, the module in ``recipes`` and the name of its shipped configuration."""
        return f"{RECIPES[self.algorithm]}_{self.task}"

    @property
    def start(self) -> str | None:
        """The cell whose adapter it starts from; None starts from the base model."""
        return f"sft_{self.task}_s{self.seed}" if self.algorithm in LEARNERS else None

    def arguments(self, output_dir: Path, start_run: Path | None) -> list[str]:
        """The command line behind ``python``.

        Args:
            output_dir: of the comparison.
            start_run: run folder of the cell that it starts from.
        """
        more = [f"output_dir={runs_of(output_dir, self.id)}", "tracker=none", "ray.dashboard=false"]
        if self.task == "sql":
            more.append(f"data.databases={output_dir / 'databases'}")
        if start_run is not None:
            more.append(f"model.adapter={start_run / 'adapter'}")
        return ["-m", f"recipes.{self.recipe}", *self.settings, *more]


def runs_of(output_dir: Path, cell_id: str) -> Path:
    """The folder in which a cell's run folder is made."""
    return output_dir / "runs" / cell_id


def plan_cells(config: CompareConfig) -> list[Cell]:
    """All cells in the order in which they are to be begun.

    Table 2 first: all of the first design, seed by seed, so that an interrupted comparison is one of fewer seeds. A
    seed begins with the checkpoints that others start from and ends with the upper lines, which need nothing. The
    other designs follow, one after the other.
    """
    learners = [name for name in config.algorithms if name in LEARNERS]

    def cells(algorithm: str, design: str | None, seed: int) -> list[Cell]:
        return [
            Cell(task, algorithm, design, seed, _settings(config, task, algorithm, design, seed))
            for task in config.tasks
        ]

    found: list[Cell] = []
    for design in config.designs:
        first = design == config.designs[0]
        for seed in config.seeds:
            if first:
                found += cells("sft", None, seed)
            for algorithm in learners:
                found += cells(algorithm, design, seed)
            if first and "sft_clean" in config.algorithms:
                found += cells("sft_clean", None, seed)
    return found


def _settings(config: CompareConfig, task: str, algorithm: str, design: str | None, seed: int) -> tuple[str, ...]:
    recipe = RECIPES[algorithm]
    groups = dict.fromkeys(["all", task, recipe, algorithm, f"{recipe}_{task}", f"{algorithm}_{task}"])
    settings = [override for group in groups for override in config.settings.get(group, [])]
    if algorithm == "sft_clean":
        settings.append("sft.faults=0.0")
    settings.append(f"seed={seed}")
    if design is not None:
        settings += [f"reward.design={design}", f"rollout.token_budget={config.token_budget}"]
    return tuple(settings)


def recipe_class(cell: Cell) -> type[LearnConfig]:
    """What the cell's recipe is configured by: ``DpoSqlConfig`` of ``dpo_sql``."""
    found: type[LearnConfig] = getattr(schema, "".join(map(str.capitalize, cell.recipe.split("_"))) + "Config")
    return found


def check_cell(cell: Cell) -> None:
    """Finds out now what its recipe would say of the settings.

    Raises:
        ConfigError: a setting of the comparison is no setting of the recipe, or the budget cannot be reached.
    """
    try:
        config = load_config(recipe_class(cell), find_config(cell.recipe), cell.settings)
    except ConfigError as fault:
        raise ConfigError(f"cell {cell.id}: {fault}") from None
    rollout = config.rollout
    most = config.rounds * rollout.prompts_per_round * rollout.num_candidates * rollout.max_tokens
    if rollout.token_budget is not None and most < rollout.token_budget:
        raise ConfigError(
            f"cell {cell.id}: rounds={config.rounds} of {rollout.prompts_per_round} prompts x "
            f"{rollout.num_candidates} candidates generate at most {most:,} tokens, less than "
            f"token_budget={rollout.token_budget:,}; raise rounds"
        )
