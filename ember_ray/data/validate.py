"""Looks a dataset over before a run: ``python -m ember_ray.data.validate TRAIN [EVAL]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ember_ray.config.errors import UserError
from ember_ray.data.faults import DataError
from ember_ray.data.findings import Survey, report
from ember_ray.data.formats import find_source, read_rows
from ember_ray.data.formats_row import Task
from ember_ray.data.manifest import dataset_entry, write_manifest

DEFAULT_MANIFEST = "data_manifest.json"


def validate(paths: Sequence[str], task: Task | None, manifest: Path) -> tuple[int, list[str]]:
    """Surveys the training and the evaluation data and writes the manifest.

    Args:
        paths: the training data, and the evaluation data if there are any.
        task: what rows must have the fields for; None guesses it from the first row of each.

    Returns:
        How many faults there are, and the report, line by line.

    Raises:
        UserError: a dataset cannot be read at all, or the manifest cannot be written.
    """
    entries: dict[str, object] = {}
    lines: list[str] = []
    faults = 0
    train: Survey | None = None
    for name, path in zip(("train", "eval"), paths, strict=False):
        source = find_source(path)
        survey = Survey(name, task, seen=train)
        for row in read_rows(source):
            survey.add(row)
        if not survey.rows:
            raise DataError([f"{path}: the file has no rows"])
        train = train or survey
        faults += sum(finding.count for finding in survey.findings() if finding.is_fault)
        entries[name] = dataset_entry(source, survey)
        lines += report(survey, path)
    write_manifest(manifest, entries, faults)
    lines.append(f"{faults or 'no'} fault{'' if faults == 1 else 's'}; manifest in {manifest}")
    return faults, lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 if there are faults, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m ember_ray.data.validate",
        description="Reports rows that cannot be used, missing fields, type mismatches, duplicates and prompts that "
        "are in both datasets, with file and row, and writes a manifest with SHA-256 and row counts. "
        "The exit status is 2 if there are faults.",
    )
    parser.add_argument("train", metavar="TRAIN", help="JSONL, Parquet, or a Hugging Face dataset folder[/split]")
    parser.add_argument("eval", metavar="EVAL", nargs="?", help="the same for evaluation")
    parser.add_argument(
        "--task", choices=get_args(Task), help="what the rows are for (default: guessed from the first row)"
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        default=Path(DEFAULT_MANIFEST),
        metavar="PATH",
        help=f"where the manifest goes (default: {DEFAULT_MANIFEST} in the working folder)",
    )
    options = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in a dataset may be no text for this terminal
    paths = [options.train] if options.eval is None else [options.train, options.eval]
    try:
        faults, lines = validate(paths, options.task, options.manifest)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader has seen enough, e.g. `| head`; the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
