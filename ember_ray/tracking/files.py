"""Files of a run, written whole or not at all; a full disk is told in one line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ember_ray.config.errors import UserError


@contextmanager
def told_plainly(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` of the block into a ``UserError`` that names the path."""
    try:
        yield
    except OSError as fault:
        reason = fault.strerror or str(fault)
        raise UserError(f"cannot write '{path}': {reason}; free the disk or choose another output_dir") from fault


def write_text(path: Path, text: str) -> None:
    """Writes a file whole: into a temporary file beside it, then moved over it.

    Raises:
        UserError: the disk is full or the folder cannot be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with told_plainly(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON value a line, whole (see ``write_text``)."""
    write_text(path, "".join(json_line(row) for row in rows))


def json_line(row: Any) -> str:
    """One line of strict JSON: NaN and infinities become null, tensors and numpy numbers plain ones.

    Write it with ``errors="backslashreplace"``: a lone surrogate, which UTF-8 does not have, then becomes
    the escape that JSON has for it.
    """
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """A value as JSON types only."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    return str(value)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a JSONL file; [] when there is none.

    A last line without its end is what a killed process leaves: it is left out.

    Raises:
        UserError: another line is not JSON; the text names file and line.
    """
    if not path.is_file():
        return []
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as fault:
                raise UserError(f"{path}:{number}: not a line of JSON ({fault.msg}); the file was changed") from None
    return rows
