"""Reward functions with TRL's signature: two of our own, and finding a user's by name.

A reward function is called as TRL's GRPOTrainer calls it, so one written for TRL works here unchanged and ours work
there (``GRPOTrainer(reward_funcs=json_extraction, ...)``, with settings through ``functools.partial``)::

    def reward_func(prompts, completions, completion_ids=None, trainer_state=None, **columns) -> list[float | None]

Everything comes by keyword, one entry a candidate: ``prompts`` and ``completions`` as message lists if the row's prompt
is one (a completion is then one assistant message), else as text; ``completion_ids`` as lists of token ids; every
column of the rows as a list under its name; beside them ``trainer_state``, whose ``global_step`` is the round, and
TRL's callables ``log_extra(column, values)`` and ``log_metric(name, value)``. So a function needs ``**kwargs`` for
what it does not use. None as result means that the function does not apply to the candidate. It may be async.

Instead of a number an entry of the result may be a verdict: any object with the attributes ``reward`` (a number or
None), ``components`` (numbers by name) and ``reason`` (a text or None).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verifiers import sql
from verifiers.json_extraction import CompareOptions, RewardDesign, Verdict, verify
from verifiers.sql import SqlLimits, SqlRewardDesign

RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Names of arguments that every reward function gets; no setting may have one."""

NOT_COLUMNS = frozenset(("prompt", "completion", *RESERVED))
"""Columns of a row that are not handed on, because they come under other names."""

Completion = str | list[dict[str, Any]]


@dataclass(frozen=True)
class RewardFunction:
    """A reward function by name, and how much it counts.

    Attributes:
        name: ``json_extraction``, ``sql_execution``, ``package.module:function`` or ``path/to/file.py:function``; a
            path is made absolute here, so that other processes find it.
        weight: the function's score is multiplied by it; 0 for a score that is only to be seen.
        settings: further keyword arguments of each call, e.g. ``{"design": "binary"}``.

    Raises:
        ValueError: the weight is not a finite number, or a setting has the name of an argument that the call has.
    """

    name: str
    weight: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not math.isfinite(self.weight):
            raise ValueError(f"the weight of reward function '{self.name}' must be a finite number, not {self.weight}")
        taken = [name for name in RESERVED if name in self.settings]
        if taken:
            raise ValueError(f"reward function '{self.name}' gets '{taken[0]}' from the rollout: give no such setting")
        place, colon, function = self.name.rpartition(":")
        if colon and place.endswith(".py"):
            object.__setattr__(self, "name", f"{Path(place).expanduser().absolute()}:{function}")

    @property
    def short_name(self) -> str:
        """The function's own name, without its module or file."""
        return self.name.rpartition(":")[2]


def json_extraction(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    gold: Sequence[object],
    schema: Sequence[dict[str, Any] | None] | None = None,
    design: RewardDesign | str = "decomposed",
    options: CompareOptions = CompareOptions(),  # noqa: B008 (frozen)
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float]:
    """The JSON verifier (`verifiers.json_extraction`) as a reward function, for TRL too.

    Args:
        prompts: not looked at.
        completions: the answers, as text or message lists.
        gold: the column of parsed gold answers. (In a dataset of `datasets` whose rows have different keys the
            column's feature must be ``Json()``, or missing keys come back as nulls.)
        schema: the column of JSON Schemas, None for rows without one.
        design: how the reward is made; a name stands for the design without weights.
        options: how fields are compared.
        log_metric: TRL's; gets the mean of every component as ``json_extraction/<component>``.

    Returns:
        A reward between 0 and 1 for each completion.

    Raises:
        ValueError: a gold or a schema is at fault; never for anything in a completion.
    """
    verdicts = json_extraction_verdicts(prompts, completions, gold, schema, design, options)
    _log_means("json_extraction", verdicts, log_metric)
    return [verdict.reward for verdict in verdicts]


def json_extraction_verdicts(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    gold: Sequence[object],
    schema: Sequence[dict[str, Any] | None] | None = None,
    design: RewardDesign | str = "decomposed",
    options: CompareOptions = CompareOptions(),  # noqa: B008 (frozen)
    **columns: Any,
) -> list[Verdict]:
    """`json_extraction` with components and reasons."""
    design = RewardDesign(design) if isinstance(design, str) else design  # type: ignore[arg-type]
    schemas = schema if schema is not None else [None] * len(completions)
    return [
        verify(completion_text(completion), row_gold, row_schema, design, options)
        for completion, row_gold, row_schema in zip(completions, gold, schemas, strict=True)
    ]


def sql_execution(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    gold: Sequence[str],
    databases: Sequence[Sequence[str]],
    design: SqlRewardDesign | str = "decomposed",
    limits: SqlLimits = SqlLimits(),  # noqa: B008 (frozen)
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """The SQL verifier (`verifiers.sql`) as a reward function, for TRL too.

    Args:
        prompts: not looked at.
        completions: the answers, as text or message lists.
        gold: the column of gold queries.
        databases: the column of SQLite files, for each row the paths of one or several instances.
        design: how the reward is made; a name stands for the design with its own weights.
        limits: of one query over all instances.
        log_metric: TRL's; gets the mean of every component as ``sql_execution/<component>``.

    Returns:
        A reward between 0 and 1 for each completion; None where the row's gold query or a database is at fault.
    """
    verdicts = sql_execution_verdicts(prompts, completions, gold, databases, design, limits)
    _log_means("sql_execution", verdicts, log_metric)
    return [verdict.reward for verdict in verdicts]


def sql_execution_verdicts(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    gold: Sequence[str],
    databases: Sequence[Sequence[str]],
    design: SqlRewardDesign | str = "decomposed",
    limits: SqlLimits = SqlLimits(),  # noqa: B008 (frozen)
    **columns: Any,
) -> list[sql.Verdict]:
    """`sql_execution` with components and reasons."""
    design = SqlRewardDesign(design) if isinstance(design, str) else design  # type: ignore[arg-type]
    items = [
        sql.SqlItem(completion_text(completion), row_gold, row_databases)
        for completion, row_gold, row_databases in zip(completions, gold, databases, strict=True)
    ]
    return sql.verify_batch(items, design, limits)


BUILT_IN: dict[str, Callable[..., Any]] = {
    "json_extraction": json_extraction_verdicts,
    "sql_execution": sql_execution_verdicts,
}
"""Reward functions of our own by name, in the form that gives verdicts."""


def find_reward_function(name: str) -> Callable[..., Any]:
    """The function of that name: a built-in one, ``package.module:function`` or ``path/to/file.py:function``.

    Raises:
        ValueError: there is none, its module cannot be imported, or it cannot be called as TRL does.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(
            f"no reward function '{name}' (known: {', '.join(BUILT_IN)}; "
            "or package.module:function, or path/to/file.py:function)"
        )
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        function = operator.attrgetter(attribute)(module)
    except (Exception, SystemExit) as fault:
        raise ValueError(f"reward function '{name}' cannot be loaded: {type(fault).__name__}: {fault}") from fault
    _check_signature(name, function)
    return function


def required_columns(function: Callable[..., Any], settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that rows must have, since the function has parameters for them without a default."""
    return tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.default is parameter.empty
        and name not in RESERVED
        and name not in settings
    )


def completion_text(completion: Completion) -> str:
    """A completion as text: itself, or what the messages' contents say one after the other."""
    if isinstance(completion, str):
        return completion
    parts: list[str] = []
    for message in completion:
        content = message.get("content") or ""
        parts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return "".join(parts)


def _log_means(name: str, verdicts: Sequence[Any], log_metric: Callable[[str, float], None] | None) -> None:
    parts = [verdict.components for verdict in verdicts if verdict.reward is not None]
    if log_metric is not None and parts:
        for part in parts[0]:
            log_metric(f"{name}/{part}", math.fsum(values[part] for values in parts) / len(parts))


def _module_of_file(path: Path) -> Any:
    """The file as a module, imported once a process; it may import its neighbours."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_signature(name: str, function: Any) -> None:
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else f"of type {type(function).__name__}"
        raise ValueError(f"reward function '{name}' is {kind}: name a function, or an instance that can be called")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []  # built in C, without a signature
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(
            f"reward function '{name}' must take **kwargs: as in TRL it is called with {', '.join(RESERVED)} "
            "and every column of the rows"
        )
