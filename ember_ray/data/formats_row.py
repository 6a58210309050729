"""One row as it was written, in any format, to an ``Example``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ember_ray.data.example import Example
from ember_ray.data.faults import kind_of
from ember_ray.data.formats_chat import read_turns

TURN_KEYS = ("prompt", "messages", "completion", "chosen", "rejected")
KEYS = ("id", *TURN_KEYS, "gold", "schema", "template", "difficulty", "databases")
"""Keys with a meaning of ours; every other one is a column for reward functions."""

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
"""What reward functions get beside the columns, so no column may have these names."""

TEMPLATE_INPUTS = ("tools", "images", "image", "videos", "chat_template_kwargs")
"""Columns by which TRL changes prompts. Nothing here reads them, and to skip them silently would be another prompt."""

TYPO_CUTOFF = 0.82
"""Least ratio of difflib at which an unknown key is held for a misspelt one: ``promt``, but not ``prompt_id``."""

Task = Literal["extract", "sql", "sft", "preference"]


@dataclass
class Row:
    """A row of a data file and what became of it.

    Attributes:
        file: the file or folder, as faults name it.
        number: line (JSONL) or row of the file or folder, from 1.
        default_id: the row's id if it names none.
        raw: the row as written; None where it could not be read.
        faults: what is wrong with it, without the place.
        example: None where the row is faulty.
        form: TRL's name of the row's format, e.g. ``prompt-completion, conversational``.
    """

    file: str
    number: int
    default_id: str
    raw: dict | None
    faults: list[str] = field(default_factory=list)
    example: Example | None = None
    form: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


def read_example(row: Row, folder: Path) -> None:
    """Fills ``example`` and ``form``, or ``faults``.

    Args:
        folder: where the paths in ``databases`` start.
    """
    if row.raw is None:
        return
    wrong = row.faults
    raw = {key: value for key, value in row.raw.items() if value is not None or key not in KEYS}
    columns = {key: value for key, value in raw.items() if key not in KEYS}
    meant = _check_columns(columns, raw, wrong)
    turns = None if meant & set(TURN_KEYS) else read_turns(raw, wrong)
    gold = raw.get("gold")
    if fault := _json_fault(gold):
        wrong.append(f"'gold' has {fault}")
    schema = raw.get("schema")
    if schema is not None and not isinstance(schema, dict):
        wrong.append(f"'schema' must be an object, not {kind_of(schema)}")
    name = raw.get("id", row.default_id)
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name:
        wrong.append(f"'id' must be a string that is not empty, not {kind_of(name)}")
    labels: dict[str, str | None] = {"template": None, "difficulty": None}
    for label in labels:
        if isinstance(raw.get(label), str):
            labels[label] = raw[label]
        elif label in raw:  # a user's own, e.g. a level as a number
            columns[label] = raw[label]
    if "databases" in raw:
        columns["databases"] = _databases(raw["databases"], folder, wrong)
    if wrong or turns is None:
        return
    row.form = turns.form
    row.example = Example(
        id=str(name),
        messages=turns.messages,
        gold=gold,
        schema=schema,
        columns=columns,
        completion=turns.completion,
        chosen=turns.chosen,
        rejected=turns.rejected,
        is_text=turns.is_text,
        **labels,
    )


def fit_task(example: Example, task: Task) -> tuple[Example, list[str]]:
    """The example with all that the task needs of it, and what is missing.

    A row without ``gold`` is taken by its demonstration: for ``extract`` where that is a JSON object or list and
    nothing else, for ``sql`` as the gold query.
    """
    missing: list[str] = []
    if task == "extract" and example.gold is None:
        example = replace(example, gold=parse_json_text(example.completion))
        if example.gold is None:
            missing.append("'gold' is missing")
    if task == "sql":
        if example.gold is None:
            example = replace(example, gold=example.completion)
        if example.gold is None:
            missing.append("'gold' is missing, the SQL query to compare with")
        elif not isinstance(example.gold, str) or not example.gold.strip():
            missing.append(f"'gold' must be a SQL query, not {kind_of(example.gold)}")
        if "databases" not in example.columns:
            missing.append("'databases' is missing, the paths of the SQLite files that the query is run on")
    if task == "sft" and example.completion is None:
        missing.append("'completion' is missing, or a last message of the assistant's in 'messages'")
    if task == "preference" and example.chosen is None:
        missing.append("'chosen' and 'rejected' are missing")
    return example, missing


def guess_task(example: Example) -> Task | None:
    """The task that a row has the fields of; None for prompts alone."""
    if example.chosen is not None:
        return "preference"
    if "databases" in example.columns:
        return "sql"
    if example.gold is not None:
        return "extract"
    return None if example.completion is None else "sft"


def parse_json_text(text: object) -> object:
    """The JSON object or list that a text is; None where it is something else."""
    if not isinstance(text, str) or not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None


def refuse_constant(name: str) -> object:
    """``parse_constant`` of ``json.loads``: NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is no JSON number")


def _check_columns(columns: Mapping[str, object], raw: Mapping[str, object], wrong: list[str]) -> set[str]:
    """Tells columns that may not be; returns the keys that misspelt ones seem to mean."""
    meant: set[str] = set()
    absent = tuple(key for key in KEYS if key not in raw and len(key) > 3)
    for key, value in columns.items():
        close = _close_key(key, absent)
        if key in ARGUMENTS:
            wrong.append(f"a column may not be called '{key}', reward functions get that already; rename it")
        elif key in TEMPLATE_INPUTS and value is not None:
            wrong.append(f"'{key}' is not supported, prompts are texts and messages only; take the column out")
        elif close:
            wrong.append(f"unknown key '{key}'; did you mean '{close}'? Otherwise rename the column")
            meant.add(close)
    return meant


@lru_cache(maxsize=4096)  # a dataset has the same few columns in all rows
def _close_key(key: str, absent: tuple[str, ...]) -> str | None:
    return next(iter(get_close_matches(key.lower(), absent, n=1, cutoff=TYPO_CUTOFF)), None)


def _databases(value: object, folder: Path, wrong: list[str]) -> tuple[str, ...]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
        wrong.append(f"'databases' must be a path or a list of paths of SQLite files, not {kind_of(value)}")
        return ()
    found = tuple(os.path.abspath(folder / path) for path in paths)  # other processes may have other folders
    wrong += [f"'databases': there is no file '{path}'" for path in found if not os.path.isfile(path)]
    return found


def _json_fault(value: object) -> str | None:
    """What keeps a value from being JSON."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return next((fault for part in parts if (fault := _json_fault(part))), None)
    if isinstance(value, float) and not math.isfinite(value):
        return "a number beyond the range of a double"
    if value is None or isinstance(value, str | int | float | bool):
        return None
    return f"{kind_of(value)}, which is not JSON"
