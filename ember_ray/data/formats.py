"""Datasets of all formats by one call: JSONL, Parquet, and folders of Hugging Face datasets.

``docs/data.md`` shows the formats with an example each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ember_ray.data.example import Example
from ember_ray.data.faults import DataError
from ember_ray.data.formats_arrow import dataset_root, hub_files, is_saved, read_parquet, read_saved, saved_split
from ember_ray.data.formats_row import Row, Task, fit_task, read_example
from ember_ray.data.jsonl import read_jsonl

PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class Source:
    """A dataset on the disk.

    Attributes:
        kind: ``jsonl``, ``parquet``, ``saved`` (``Dataset.save_to_disk``) or ``files`` (a folder of data files).
        path: the file, or the folder of the split that is read.
        root: where relative paths in the rows start: the file's folder, or the folder of the whole dataset.
        files: the data files, in order; the folder itself of ``saved``.
    """

    kind: str
    path: Path
    root: Path
    files: tuple[Path, ...]


def load_dataset_rows(path: str | Path, task: Task | None = None) -> list[Example]:
    """Reads a dataset in any of TRL's formats.

    Args:
        path: a JSONL or Parquet file; a folder that ``save_to_disk`` wrote, or one with data files that
            ``datasets.load_dataset`` reads. One of several splits is named as ``folder/split``.
        task: what the rows are for; they must have the fields for it (``fit_task``). None asks for a prompt only.

    Returns:
        The rows in order; those without ``id`` are named ``<file name>:<line or row>``.

    Raises:
        DataError: the data are missing, unreadable or empty, or rows are faulty; all faults are told at once.
    """
    examples: list[Example] = []
    faults: list[str] = []
    for row in read_rows(find_source(path), task):
        faults += [f"{row.place}: {what}" for what in row.faults]
        if row.example is not None:
            examples.append(row.example)
    if not examples and not faults:
        faults.append(f"{path}: the file has no rows")
    if faults:
        raise DataError(faults)
    return examples


def find_source(path: str | Path) -> Source:
    """What a path names.

    Raises:
        DataError: nothing that can be read.
    """
    path = Path(path)
    if path.is_dir() and is_saved(path):
        split = saved_split(path)
        return Source("saved", split, dataset_root(split), (split,))
    if path.is_dir() or _may_be_split(path):
        found = hub_files(path)
        return Source("files", path, found.root, found.files)
    return Source(_file_kind(path), path, path.parent, (path,))


def read_rows(source: Source, task: Task | None = None) -> Iterator[Row]:
    """The rows of a dataset, one at a time, each with its example or its faults.

    Raises:
        DataError: a file cannot be read.
    """
    places: dict[str, tuple[str, int]] = {}
    for file in source.files:
        for row in _read_file(source, file):
            read_example(row, source.root)
            if row.example is not None:
                file_of_id, first = places.setdefault(row.example.id, (row.file, row.number))
                if (file_of_id, first) != (row.file, row.number):
                    where = f"line {first}" if file_of_id == row.file else f"{file_of_id}:{first}"
                    row.faults.append(f"id '{row.example.id}' is that of {where} already")
            if row.example is not None and task is not None:
                row.example, missing = fit_task(row.example, task)
                row.faults += missing
            if row.faults:
                row.example = None
            yield row


def _read_file(source: Source, file: Path) -> Iterator[Row]:
    if source.kind == "saved":
        return read_saved(file, file.name)
    name = file.relative_to(source.root).as_posix() if file.is_relative_to(source.root) else file.name
    kind = _file_kind(file) if source.kind == "files" else source.kind
    return read_parquet(file, name) if kind == "parquet" else read_jsonl(file, name)


def _may_be_split(path: Path) -> bool:
    """Whether a path that does not exist could be ``folder/split``."""
    return not path.exists() and not path.suffix and len(path.parts) > 1 and path.parent.is_dir()


def _file_kind(path: Path) -> str:
    """Parquet files are known by their first bytes; all others are held for JSONL, the faults then say the line."""
    try:
        with path.open("rb") as file:
            return "parquet" if file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC else "jsonl"
    except OSError:
        return "jsonl"  # reading it tells the fault
