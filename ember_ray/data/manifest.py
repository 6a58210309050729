"""The manifest of a dataset: which files it is made of, to the bit, and what is in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ember_ray.config.errors import UserError
from ember_ray.data.findings import Survey
from ember_ray.data.formats import Source
from ember_ray.data.formats_arrow import saved_files
from ember_ray.tracking.files import write_text

VERSION = 1


def dataset_entry(source: Source, survey: Survey) -> dict[str, object]:
    """What the manifest says of one dataset whose rows were all surveyed.

    Raises:
        UserError: a file cannot be read any more.
    """
    if source.kind == "saved":
        files = saved_files(source.path)
        described = [source.path / name for name in ("dataset_info.json", "state.json")]
        entries = [_file_entry(file, rows) for file, rows in files] + [_file_entry(file) for file in described]
    else:
        entries = [_file_entry(file, survey.rows_of_file[str(file)]) for file in source.files]
    entry: dict[str, object] = {
        "path": str(source.path),
        "kind": source.kind,
        "rows": survey.rows,
        "usable_rows": survey.usable,
        "task": survey.task,
        "row_formats": dict(survey.forms),
        "columns": {name: dict(kinds) for name, kinds in survey.columns.items()},
        "files": entries,
        "findings": {finding.title: finding.count for finding in survey.findings()},
    }
    if survey.databases:
        entry["databases"] = [_file_entry(Path(path)) for path in sorted(survey.databases)]
    return entry


def write_manifest(path: Path, datasets: Mapping[str, object], faults: int) -> None:
    """Writes the manifest whole; the same data give the same bytes.

    Raises:
        UserError: it cannot be written there.
    """
    manifest = {"version": VERSION, "faults": faults, "datasets": dict(datasets)}
    write_text(path, json.dumps(manifest, indent=2) + "\n")


def _file_entry(path: Path, rows: int | None = None) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            digest, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except OSError as fault:
        raise UserError(f"data file '{path}' cannot be read: {fault.strerror or fault}") from fault
    return {"path": str(path), "sha256": digest, "bytes": size} | ({} if rows is None else {"rows": rows})
