"""The report of a comparison: CSV, Markdown and figures, made from its rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ember_ray.config.compare_schema import CompareConfig
from ember_ray.tracking.comparison_cells import plan_cells
from ember_ray.tracking.comparison_figures import write_figures
from ember_ray.tracking.comparison_lines import NAMES, TASK_NAMES, Row, lines_of
from ember_ray.tracking.comparison_tables import (
    budget_table,
    cells_csv,
    design_table,
    improvement_sentences,
    mismatch_table,
    quality_table,
    selector_table,
    summary_csv,
)
from ember_ray.tracking.evaluation_curves import SELECTORS, SIZES
from ember_ray.tracking.files import write_text

HOW_TO_READ = (
    "Held-out prompts, answers sampled at temperature 1 unless said otherwise. {spread} *Gain* is over the checkpoint "
    "that the learner starts from: the base model for SFT, the SFT checkpoint of the same seed for best-of-N, DPO and "
    "GRPO. *Beyond its interval* counts the seeds for which the 95 % interval of the paired gain (bootstrap over "
    "prompts) lies above 0."
)
ONE_SEED = "Brackets are 95 % intervals (bootstrap over prompts)."
SEVERAL_SEEDS = "Numbers are means over seeds; brackets reach from the least to the greatest seed."

CAPTIONS = {
    "learners": "Every learner on held-out prompts.",
    "quality_over_tokens": "Quality over generated tokens, the budget that all learners share.",
    "quality_over_seconds": "Quality over seconds of training.",
    "quality_over_dollars": "Quality over dollars.",
    "best_of_n_inference": "Choosing one of N samples at inference time. The oracle sees the gold answer: no selector "
    "can do better.",
    "reward_designs": "The reward ablation.",
}


def write_comparison(
    folder: Path, rows: Sequence[Row], config: CompareConfig, failures: Mapping[str, str]
) -> list[Path]:
    """Writes ``report.md``, ``table2.csv`` (a row a cell), ``summary.csv`` (over seeds) and ``figures/``.

    Args:
        folder: of the comparison.
        rows: of finished cells; of several for one cell the last counts.
        config: which cells there should be, and the order of tasks and designs.
        failures: reasons of failed cells, by the cell's id.

    Returns:
        What was written, the report first.
    """
    latest = {row["cell"]: row for row in rows}
    order = [cell.id for cell in plan_cells(config)]
    rows = [latest[name] for name in dict.fromkeys([*order, *latest]) if name in latest]
    tasks, designs = list(config.tasks), list(config.designs)
    figures = write_figures(folder / "figures", rows, tasks, designs)
    texts = {
        "report.md": report_text(rows, config, failures, [path.relative_to(folder).as_posix() for path in figures]),
        "table2.csv": cells_csv(rows),
        "summary.csv": summary_csv(rows, tasks, designs),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [*(folder / name for name in texts), *figures]


def report_text(rows: Sequence[Row], config: CompareConfig, failures: Mapping[str, str], figures: Sequence[str]) -> str:
    """The report as Markdown."""
    designs = list(config.designs)
    seeds = sorted({row["seed"] for row in rows})
    parts = ["# Comparison of learners", _facts(rows, config)]
    spread = ONE_SEED if len(seeds) < 2 else SEVERAL_SEEDS
    parts += [f"## Table 2: learners under equal budgets ({designs[0]} reward)", HOW_TO_READ.format(spread=spread)]
    for task in config.tasks:
        lines = lines_of(rows, task, designs[:1])
        if lines:
            sentences = "\n".join(f"- {sentence}" for sentence in improvement_sentences(lines))
            parts += [f"### {TASK_NAMES[task]}", quality_table(lines), sentences]
    parts += [_figure(name, figures) for name in CAPTIONS if name.startswith(("learners", "quality_over"))]
    if len(designs) > 1:
        parts.append("## Reward designs")
        parts += [f"{TASK_NAMES[task]}:\n\n{design_table(rows, task, designs)}" for task in config.tasks]
        parts.append(_figure("reward_designs", figures))
    parts += _inference(rows, config, figures)
    parts += ["## Equal budgets", _budgets(rows, config), budget_table(rows)]
    mismatch = mismatch_table([line for task in config.tasks for line in lines_of(rows, task, designs)])
    if mismatch:
        words = (
            "Absolute difference between trainer's and engine's log-probabilities of sampled tokens: of the last "
            "round, and of held-out answers after SFT, which samples nothing to learn from."
        )
        parts += ["## Train/inference mismatch", words, mismatch]
    parts += ["## Missing cells", _missing(rows, config, failures)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _facts(rows: Sequence[Row], config: CompareConfig) -> str:
    machines = sorted({row["machine"] for row in rows})
    commits = sorted(
        {f"`{(row['git_commit'] or 'unknown')[:10]}`{' with changes' * bool(row['git_dirty'])}" for row in rows}
    )
    versions = sorted({", ".join(f"{name} {v}" for name, v in row["versions"].items()) for row in rows})
    gpus = max((row.get("gpus", 0) for row in rows), default=0)
    shared = sorted({_shared(row["at_once"], row.get("gpus", 0)) for row in rows})
    facts = [
        f"- {len(rows)} cells: {', '.join(NAMES[name] for name in ('base', *config.algorithms))}; "
        f"seeds {', '.join(map(str, config.seeds))}; reward {', '.join(config.designs)}",
        f"- machine: {'; '.join(machines) or 'none'}; {' or '.join(shared) or 'no cells'} at a time with "
        f"OMP_NUM_THREADS={config.threads}; {sum(row['wall_seconds'] for row in rows):,.0f} s of wall time over all "
        "cells. Seconds were measured with the others at work: alone a cell is faster",
        f"- price: {config.gpu_price_per_hour:g} dollars an hour of {'a GPU' if gpus else 'the machine'}; a cell pays "
        "for its share of the seconds in which it trains, evaluations not counted",
        f"- commit {', '.join(commits) or 'unknown'}; {'; '.join(versions)}",
    ]
    return "\n".join(facts)


def _shared(at_once: int, gpus: int) -> str:
    return f"{at_once} cells" + (f" on {gpus} GPU{'s'[: gpus > 1]}" if gpus else "")


def _inference(rows: Sequence[Row], config: CompareConfig, figures: Sequence[str]) -> list[str]:
    parts = []
    for task in config.tasks:
        for line in lines_of(rows, task, config.designs[:1]):
            sizes = [size for size in SIZES if line.best_of("oracle", size) is not None]
            if line.algorithm == "sft" and sizes:
                parts.append(f"{TASK_NAMES[task]}:\n\n{selector_table(line, sizes, SELECTORS)}")
    if not parts:
        return []
    words = (
        "Exact match of one answer chosen from N samples of the SFT checkpoint, in expectation over all subsets of the "
        "samples that were drawn. Selectors do not see the gold answer; the oracle does and is their upper bound."
    )
    return ["## Best-of-N at inference time", words, *parts, _figure("best_of_n_inference", figures)]


def _budgets(rows: Sequence[Row], config: CompareConfig) -> str:
    # + 0.0 makes a 0 of -0.0
    shares = [round(r["generated_tokens"] / r["token_budget"] - 1, 3) + 0.0 for r in rows if r["token_budget"]]
    if not shares:
        return "No cell that learns from candidates is finished."
    return (
        f"Each of best-of-N, DPO and GRPO may learn from {config.token_budget:,} generated tokens; they took "
        f"{min(shares):+.1%} to {max(shares):+.1%} of that (the last round is cut to whole prompts). Held-out answers "
        "are not counted."
    )


def _missing(rows: Sequence[Row], config: CompareConfig, failures: Mapping[str, str]) -> str:
    have = {row["cell"] for row in rows}
    missing = [cell.id for cell in plan_cells(config) if cell.id not in have]
    lines = [f"- `{name}`: {failures.get(name, 'not run yet')}" for name in missing]
    return "\n".join(lines) or "None."


def _figure(name: str, figures: Sequence[str]) -> str:
    path = next((path for path in figures if Path(path).stem == name), None)
    return f"![{CAPTIONS[name]}]({path})\n\n*{CAPTIONS[name]}*" if path else ""
