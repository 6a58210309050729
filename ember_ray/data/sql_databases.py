"""SQLite databases for generated questions: several instances a schema, the same to the byte on every machine."""

from __future__ import annotations

import os
import random
import sqlite3
import tempfile
from pathlib import Path

from ember_ray.data.sql_schemas import SCHEMAS, Column, Schema

INSTANCES = 3
CHILD_ROWS, PARENT_ROWS = 30, 8

_VERSION_AT = 96
"""Where the header of a SQLite file tells which version of the library wrote it; readers ignore it."""
_VERSION = (3_040_000).to_bytes(4, "big")


def _cells(column: Column, rows: int, rng: random.Random) -> list:
    return rng.choices(column.values, k=rows) if column.kind == "word" else rng.sample(column.values, rows)


def _definition(column: Column) -> str:
    return f"{column.name} {'INTEGER' if column.kind == 'number' else 'TEXT'} NOT NULL"


def build_instance(schema: Schema, instance: int) -> bytes:
    """The content of one database file; instances of a schema differ in all cells that are drawn."""
    rng = random.Random(f"sql database/{schema.name}/{instance}")  # a string seed goes through SHA-512
    child, parent, key = schema.child, schema.parent, schema.key
    keys = list(range(1, PARENT_ROWS + 1))
    parent_rows = zip(keys, *(_cells(column, PARENT_ROWS, rng) for column in parent.columns), strict=True)
    child_rows = zip(
        *(_cells(column, CHILD_ROWS, rng) for column in child.columns), rng.choices(keys, k=CHILD_ROWS), strict=True
    )
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute(
            f"CREATE TABLE {parent.name} ({key} INTEGER PRIMARY KEY, {', '.join(map(_definition, parent.columns))})"
        )
        connection.execute(
            f"CREATE TABLE {child.name} ({', '.join(map(_definition, child.columns))}, "
            f"{key} INTEGER NOT NULL REFERENCES {parent.name} ({key}))"
        )
        for table, rows in ((parent, parent_rows), (child, child_rows)):
            marks = ", ".join("?" * (len(table.columns) + 1))
            connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})", rows)
        connection.commit()
        content = connection.serialize()
    finally:
        connection.close()
    return content[:_VERSION_AT] + _VERSION + content[_VERSION_AT + len(_VERSION) :]


def write_databases(folder: str | Path) -> dict[str, list[str]]:
    """Makes all instances of all schemas in a folder and returns their paths, by the schema's name.

    A file that is there with the right content is left as it is. Files are written under another name first, so
    several processes may do this at the same time.

    Raises:
        OSError: the folder or a file in it cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, list[str]] = {}
    for schema in SCHEMAS:
        for instance in range(INSTANCES):
            path = folder / f"{schema.name}_{instance}.sqlite"
            content = build_instance(schema, instance)
            if not (path.is_file() and path.read_bytes() == content):
                _write_whole(path, content)
            paths.setdefault(schema.name, []).append(str(path))
    return paths


def _write_whole(path: Path, content: bytes) -> None:
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
