"""Users' own datasets: one JSON object a line, checked on loading with file and line of each fault.

A row has ``prompt`` (a string) or ``messages`` (a chat that ends with the user's turn), ``gold`` (any JSON value) and
may have ``schema`` (a JSON Schema), ``id``, ``template`` and ``difficulty``. Blank lines are skipped.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ember_ray.config.errors import UserError
from ember_ray.data.example import Example

MAX_FAULTS = 20
ROLES = ("system", "user", "assistant")
FIELDS = ("id", "prompt", "messages", "gold", "schema", "template", "difficulty")


class DataError(UserError):
    """A dataset that cannot be used.

    Attributes:
        faults: ``file:line: what is wrong`` each, all of them; the text shows the first 20.
    """

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        more = len(faults) - MAX_FAULTS
        super().__init__("; ".join(faults[:MAX_FAULTS]) + (f"; and {more} more" if more > 0 else ""))


def load_jsonl(path: str | Path) -> list[Example]:
    """Reads a dataset; rows without ``id`` get ``<file name>:<line>``.

    Raises:
        DataError: the file is missing, unreadable or empty, or rows are faulty; all faults are told at once.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError([f"no data file '{path}'"]) from None
    except OSError as fault:
        raise DataError([f"data file '{path}' cannot be read: {fault.strerror or fault}"]) from None
    examples: list[Example] = []
    faults: list[str] = []
    lines_of_ids: dict[str, int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):  # JSON strings may hold other line separators
        if not line.strip():
            continue
        example, wrong = _read_row(line, default_id=f"{path.name}:{number}")
        if example is not None:
            first = lines_of_ids.setdefault(example.id, number)
            if first != number:
                wrong.append(f"id '{example.id}' is that of line {first} already")
        if wrong:
            faults += [f"{path}:{number}: {what}" for what in wrong]
        elif example is not None:
            examples.append(example)
    if not examples and not faults:
        faults.append(f"{path}: the file has no rows")
    if faults:
        raise DataError(faults)
    return examples


def save_jsonl(path: str | Path, examples: Iterable[Example]) -> None:
    """Writes rows that ``load_jsonl`` reads back equal; the file appears whole or not at all.

    Raises:
        OSError: the folder is missing or full.
        ValueError: a gold value is not JSON (NaN, Infinity).
    """
    path = Path(path)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for example in examples:
                row = {"id": example.id, "messages": example.messages, "gold": example.gold}
                for name in ("schema", "template", "difficulty"):
                    if getattr(example, name) is not None:
                        row[name] = getattr(example, name)
                file.write(json.dumps(row, allow_nan=False) + "\n")
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _read_row(line: bytes, default_id: str) -> tuple[Example | None, list[str]]:
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as fault:
        return None, [f"not UTF-8 at byte {fault.start + 1} of the line"]
    except RecursionError:
        return None, ["nested too deeply to be read"]
    except json.JSONDecodeError as fault:
        return None, [f"not JSON: {fault.msg} at column {fault.colno}"]
    except ValueError as fault:
        return None, [f"not JSON: {fault}"]
    if not isinstance(row, dict):
        return None, [f"a row must be an object, not {_kind(row)}"]

    wrong: list[str] = []
    unknown = [key for key in row if key not in FIELDS]
    if unknown:
        wrong.append(f"unknown key '{unknown[0]}' (known: {', '.join(FIELDS)})")
    messages = _messages(row, wrong)
    if "gold" not in row:
        wrong.append("'gold' is missing")
    elif not _finite(row["gold"]):
        wrong.append("'gold' has a number beyond the range of a double")
    for name in ("id", "template", "difficulty"):
        value = row.get(name)
        if value is not None and (not isinstance(value, str) or not value):
            wrong.append(f"'{name}' must be a string that is not empty, not {_kind(value)}")
    schema = row.get("schema")
    if schema is not None and not isinstance(schema, dict):
        wrong.append(f"'schema' must be an object, not {_kind(schema)}")
    if wrong:
        return None, wrong
    return (
        Example(
            id=row.get("id") or default_id,
            messages=messages,
            gold=row["gold"],
            schema=schema,
            template=row.get("template"),
            difficulty=row.get("difficulty"),
        ),
        [],
    )


def _messages(row: dict, wrong: list[str]) -> list[dict[str, str]]:
    """The chat of a row; what is wrong with it goes to ``wrong``."""
    if ("prompt" in row) == ("messages" in row):
        wrong.append("a row needs either 'prompt' or 'messages'" + (", not both" if "prompt" in row else ""))
        return []
    if "prompt" in row:
        prompt = row["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            wrong.append(f"'prompt' must be a text that is not empty, not {_kind(prompt)}")
            return []
        return [{"role": "user", "content": prompt}]
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        wrong.append(f"'messages' must be a list that is not empty, not {_kind(messages)}")
        return []
    before = len(wrong)
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            wrong.append(f"messages[{place}] must be an object with 'role' and 'content' only")
        elif message["role"] not in ROLES:
            wrong.append(f"messages[{place}].role must be one of {', '.join(ROLES)}")
        elif not isinstance(message["content"], str):
            wrong.append(f"messages[{place}].content must be a string, not {_kind(message['content'])}")
    if len(wrong) == before and messages[-1]["role"] != "user":
        wrong.append(f"the last message must be the user's, not the {messages[-1]['role']}'s")
    return messages


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{twice}' is there twice")
    return row


def _finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(_finite(part) for part in value.values())
    if isinstance(value, list):
        return all(_finite(part) for part in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return True


def _kind(value: object) -> str:
    """A JSON value's kind in words, for faults."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string" if value.strip() else "an empty string"
    return "an empty list" if value == [] else "a list" if isinstance(value, list) else "an object"
