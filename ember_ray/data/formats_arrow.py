"""Rows of Parquet files and of folders that Hugging Face datasets reads or wrote."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ember_ray.data.faults import DataError
from ember_ray.data.formats_row import Row, parse_json_text

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1000
SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")


@dataclass(frozen=True)
class HubFiles:
    """Data files of one split of a folder, as ``datasets.load_dataset(folder)`` would find them."""

    root: Path
    files: tuple[Path, ...]


def read_parquet(path: Path, name: str) -> Iterator[Row]:
    """The rows of a Parquet file, one batch in memory at a time; ``name`` is what default ids begin with.

    Raises:
        DataError: the file cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _rows(file.iter_batches(BATCH_ROWS), str(path), name)
    except (OSError, ValueError, pyarrow.ArrowException) as fault:
        raise DataError([f"data file '{path}' cannot be read: {fault}"]) from fault


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def dataset_root(folder: Path) -> Path:
    """The folder of the whole dataset where ``folder`` is one split of a saved ``DatasetDict``; else the folder."""
    return folder.parent if (folder.parent / "dataset_dict.json").is_file() else folder


def saved_split(folder: Path) -> Path:
    """The folder of the only split of a saved dataset.

    Raises:
        DataError: there are several; the text says how to name one.
    """
    listing = folder / "dataset_dict.json"
    if not listing.is_file():
        return folder
    try:
        splits = json.loads(listing.read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError) as fault:
        raise DataError([f"data file '{listing}' cannot be read: {fault}"]) from fault
    return folder / _only(folder, splits)


def saved_files(folder: Path) -> list[tuple[Path, int]]:
    """The Arrow files that hold the rows of a saved split, in order, each with the number of its rows."""
    import pyarrow
    from datasets import load_from_disk

    files = [Path(shard["filename"]) for shard in load_from_disk(str(folder)).cache_files]
    rows = [pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all().num_rows for file in files]
    return [(folder / file.name, count) for file, count in zip(files, rows, strict=True)]


def read_saved(folder: Path, name: str) -> Iterator[Row]:
    """The rows of a folder of ``Dataset.save_to_disk``.

    Raises:
        DataError: the folder cannot be read.
    """
    from datasets import load_from_disk

    try:
        tables = load_from_disk(str(folder)).with_format("arrow").iter(batch_size=BATCH_ROWS)
        yield from _rows(tables, str(folder), name)
    except (OSError, ValueError) as fault:  # Arrow's own faults are of these kinds
        raise DataError([f"dataset folder '{folder}' cannot be read: {fault}"]) from fault


def hub_files(path: Path) -> HubFiles:
    """The data files of a dataset folder with one split, or of ``folder/split``.

    Which files belong to which split is left to the rules of Hugging Face datasets (names such as
    ``data/train-00000-of-00001.parquet`` and ``test.jsonl``, or the list in README.md).

    Raises:
        DataError: no such folder or split, no data files, or several splits to choose from.
    """
    from datasets import load_dataset_builder

    folder, split = (path, None) if path.is_dir() else (path.parent, path.name)
    missing = "" if split is None else f"no data file '{path}', and "
    try:
        with tempfile.TemporaryDirectory() as cache:  # the builder leaves a lock there and nothing else
            found = load_dataset_builder(str(folder), cache_dir=cache).config.data_files
    except Exception as fault:  # it raises many kinds, from FileNotFoundError to YAML's
        raise DataError([f"{missing}dataset folder '{folder}' cannot be read: {_first_line(fault)}"]) from fault
    home = os.path.abspath(folder)  # found files are named from there; faults shall name them as the user did
    splits = {
        str(name): tuple(folder / os.path.relpath(file, home) for file in files)
        for name, files in (found or {}).items()
    }
    if not splits:
        raise DataError([f"dataset folder '{folder}' has no data files"])
    split = split or _only(folder, list(splits))
    if split not in splits:
        raise DataError([f"{missing}dataset folder '{folder}' has no split '{split}' (it has: {', '.join(splits)})"])
    unknown = [file for file in splits[split] if file.suffix not in SUFFIXES]
    if unknown:
        raise DataError([f"data file '{unknown[0]}' has none of the formats {', '.join(SUFFIXES)}"])
    return HubFiles(folder, splits[split])


def _only(folder: Path, splits: list[str]) -> str:
    if len(splits) != 1:
        named = ", ".join(str(folder / split) for split in splits) or "none"
        raise DataError([f"dataset folder '{folder}' has {len(splits)} splits; name one as folder/split: {named}"])
    return splits[0]


def _first_line(fault: Exception) -> str:
    return next(iter(str(fault).splitlines()), type(fault).__name__)


def _rows(tables: Any, file: str, name: str) -> Iterator[Row]:
    """The rows of record batches or tables, counted from 1."""
    import pyarrow

    number = 0
    for table in tables:
        parse = [(index, _parser(field.type)) for index, field in enumerate(table.schema)]
        columns = [table.column(index).to_pylist() for index, _ in parse]
        for (index, parser), field in zip(parse, table.schema, strict=True):
            if parser is not None:
                columns[index] = [parser(value) for value in columns[index]]
            if field.name in ("gold", "schema") and not isinstance(field.type, pyarrow.JsonType):
                columns[index] = [_json_value(value) for value in columns[index]]
        names = table.schema.names
        for values in zip(*columns, strict=True):
            number += 1
            yield Row(file, number, f"{name}:{number}", dict(zip(names, values, strict=True)))


def _json_value(value: object) -> object:
    """``gold`` or ``schema`` of a column: a JSON text is parsed, and keys that only other rows have are left out.

    Arrow gives all rows of a struct column the same keys, with null for those that a row does not have.
    """
    if isinstance(value, str):
        parsed = parse_json_text(value)
        return value if parsed is None else parsed
    return _without_nulls(value)


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _parser(kind: pyarrow.DataType) -> Callable[[Any], Any] | None:
    """Parses the values of JSON columns (``arrow.json``, also inside of lists and structs); None for other types."""
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return lambda text: None if text is None else json.loads(text)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        inner = _parser(kind.value_type)
        return None if inner is None else lambda parts: None if parts is None else [inner(part) for part in parts]
    if pyarrow.types.is_struct(kind):
        fields = {field.name: parser for field in kind if (parser := _parser(field.type)) is not None}
        if fields:
            return lambda parts: (
                None
                if parts is None
                else {key: fields[key](part) if key in fields else part for key, part in parts.items()}
            )
    return None
