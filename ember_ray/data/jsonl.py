"""JSONL files: one JSON object a line, UTF-8. Blank lines are skipped.

``ember_ray/data/formats_row.py`` says what a row may hold.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ember_ray.data.example import Example
from ember_ray.data.faults import DataError, kind_of
from ember_ray.data.formats_row import KEYS, Row, refuse_constant


def read_jsonl(path: Path, name: str) -> Iterator[Row]:
    """The rows of a file as they are written, one at a time.

    Args:
        name: what ids of rows without ``id`` begin with.

    Raises:
        DataError: the file is missing or unreadable.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):  # JSON strings may hold other line separators
                if line.strip():
                    raw, faults = _read_line(line)
                    yield Row(str(path), number, f"{name}:{number}", raw, faults)
    except FileNotFoundError:
        raise DataError([f"no data file '{path}'"]) from None
    except OSError as fault:
        raise DataError([f"data file '{path}' cannot be read: {fault.strerror or fault}"]) from None


def save_jsonl(path: str | Path, examples: Iterable[Example]) -> None:
    """Writes rows that ``load_dataset_rows`` reads back equal; the file appears whole or not at all.

    ``databases`` below the file's folder are written relative to it, so the folder can be moved.

    Raises:
        OSError: the folder is missing or full.
        ValueError: a value is not JSON (NaN, Infinity), or a further column has the name of a field.
        TypeError: a further column holds what JSON has no form for.
    """
    path = Path(path)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for example in examples:
                file.write(json.dumps(to_row(example, path.parent), allow_nan=False) + "\n")
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def to_row(example: Example, folder: Path) -> dict[str, object]:
    """The row of a data file in ``folder`` that is read as this example; fields without a value are left out.

    Raises:
        ValueError: a further column has the name of a field.
    """
    row: dict[str, object] = {"id": example.id}
    if example.is_text:
        row["prompt"] = example.messages[0]["content"]
    else:
        row["messages"] = example.messages
    for name in ("completion", "chosen", "rejected", "gold", "schema", "template", "difficulty"):
        if getattr(example, name) is not None:
            row[name] = getattr(example, name)
    for name, value in example.columns.items():
        if name in row or (name in KEYS and name not in ("databases", "template", "difficulty")):
            raise ValueError(f"row '{example.id}': a further column may not be called '{name}'")
        row[name] = _relative(value, folder) if name == "databases" else value
    return row


def _relative(paths: object, folder: Path) -> object:
    if not isinstance(paths, list | tuple):
        return paths
    home = os.path.abspath(folder) + os.sep
    return [os.path.abspath(path).removeprefix(home) for path in paths]


def _read_line(line: bytes) -> tuple[dict | None, list[str]]:
    if line.lstrip().startswith(b"["):  # as a rule a whole file that is one array
        return None, ["a row must be an object, not a list; a file has one object a line"]
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as fault:
        return None, [f"not UTF-8 at byte {fault.start + 1} of the line"]
    except RecursionError:
        return None, ["nested too deeply to be read"]
    except json.JSONDecodeError as fault:
        return None, [f"not JSON: {fault.msg} at column {fault.colno}"]
    except ValueError as fault:
        return None, [f"not JSON: {fault}"]
    if not isinstance(row, dict):
        return None, [f"a row must be an object, not {kind_of(row)}"]
    return row, []


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{twice}' is there twice")
    return row
