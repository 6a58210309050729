"""Compares learners: ``python -m recipes.compare [--config PATH] [key=value ...]``.

Trains and evaluates the base model, SFT, best-of-N, DPO and GRPO under the same budget of generated tokens, for each
task, reward design and seed. A cell is one run of a recipe; a finished one is a row of cells.jsonl and is not run
again by a second call, which takes up what is missing and tries failed cells once more. At the end, and by
report=FOLDER alone, tables and figures are made from the rows. The shipped compare_short is for two CPU cores and
compare for a GPU.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from ember_ray.config.cli import run_cli
from ember_ray.config.compare_schema import CompareConfig
from ember_ray.config.errors import UserError
from ember_ray.config.load import dump_yaml, load_config
from ember_ray.tracking.comparison import write_comparison
from ember_ray.tracking.comparison_cells import Cell, check_cell, plan_cells, runs_of
from ember_ray.tracking.files import read_jsonl, write_text
from recipes.compare_run import CELLS, FAILURES, Comparison, locked


def checked_cells(config: CompareConfig) -> list[Cell]:
    """All cells; every one's settings are known to be good before the first begins."""
    cells = plan_cells(config)
    for cell in cells:
        check_cell(cell)
    return cells


def plan(config: CompareConfig) -> str:
    """What ``--dry-run`` prints below the configuration: every cell and its command."""
    cells, folder = checked_cells(config), Path(config.output_dir)
    lines = [f"{len(cells)} cells, {config.at_once} at a time with OMP_NUM_THREADS={config.threads}:"]
    for cell in cells:
        start_run = runs_of(folder, cell.start) / f"sft_{cell.task}_<timestamp>" if cell.start else None
        lines += ["", f"  {cell.id}", f"    {shlex.join(['python', *cell.arguments(folder, start_run)])}"]
    return "\n".join(lines)


def report(folder: Path) -> list[Path]:
    """Makes tables and figures from the rows in the folder of a comparison.

    Raises:
        UserError: there is no comparison.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"report: there is no comparison in '{folder}' (no config.yaml)")
    config = load_config(CompareConfig, folder / "config.yaml")
    failures = {row["cell"]: row["reason"] for row in read_jsonl(folder / FAILURES)}
    return write_comparison(folder, read_jsonl(folder / CELLS), config, failures)


def main(config: CompareConfig) -> int:
    """Runs what is missing, then reports; status 1 if cells are still missing."""
    if config.report is not None:
        print(*report(Path(config.report)), sep="\n")
        return 0
    cells, folder = checked_cells(config), Path(config.output_dir)
    with locked(folder):
        with Comparison(config, cells) as comparison:
            write_text(folder / "config.yaml", dump_yaml(config))
            comparison.run()
        print(*report(folder), sep="\n")
    missing = len(cells) - len(comparison.rows.keys() & {cell.id for cell in cells})
    if missing:
        print(f"{missing} cells are missing; the same call goes on with them", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(
        run_cli(
            CompareConfig,
            prog="python -m recipes.compare",
            description=__doc__.split("\n\n", 1)[1],
            main=main,
            default_config="compare_short",
            plan=plan,
        )
    )
