"""The JSON-extraction verifier: a model's output in, a reward and its parts out.

**What counts as found.** The whole output if it is one JSON value; else the last code fence whose whole content is
one value of the gold's kind (object, array, scalar); else the last object or array in the text, of the gold's kind if
there is one; else nothing. `find_json.py` has the fine print. JSON is strict (RFC 8259 and I-JSON, RFC 7493): a
duplicate key, NaN, Infinity, a number beyond a double, a lone surrogate, a comma too many, single quotes and
truncation all make it *not* JSON: every component is 0 and the reason says where it broke.

**What is exact.** `exact_match` judges the value that was found: every field right, none missing, none invented, and
the schema holds. Chatter around it does not change `exact_match`; the component `clean` is 1 only when nothing but
the JSON stands in the output (white space and one code fence aside).

**How fields compare.** By type; a value of another type is wrong, also a number in a string ("12.50" is not 12.5)
and true for 1. Numbers by value within a tolerance, integers exactly. Strings in Unicode form NFKC with white space
collapsed, case kept. null must be null: a key left out is missing even if its gold is null. Arrays by position.
`CompareOptions` has the defaults and what can be changed.

**Dates.** Strings for which the schema says ``format: date`` or ``date-time`` compare by normal form: the same date,
or the same instant, in *valid ISO spellings* is equal (``2025-03-03T00:00:00Z`` and ``2025-03-03T01:00:00+01:00``).
"3 March 2025" for 2025-03-03 is wrong, and violates the format too: to write the normal form is what the model must
learn. Without the format, dates are strings like any others, unless `CompareOptions.dates` is on.

**Bounds.** For any text and any schema: a verdict within 50 ms of CPU time. The caps are counts (`limits.py`), so a
reward does not depend on the clock; the one exception is a `pattern` that backtracks exponentially, which is given up
after 10 ms of CPU time, of which ordinary patterns need microseconds (`patterns.py`). Nothing in a text raises. Faults
of what the user wrote do raise ValueError: a gold that is not JSON or violates its schema, a schema that is not valid,
refers to another document, or is too large or deep to be compiled in about a second. A gold of thousands of fields
takes longer, and is the user's own.
"""

from __future__ import annotations

import hashlib
import marshal
import math
from dataclasses import dataclass, field
from typing import Any, cast

from verifiers import limits
from verifiers.compare import CompareOptions, Comparison, Path, compare, dotted
from verifiers.find_json import NotFound, find_json, kind_of
from verifiers.rewards import RewardDesign
from verifiers.schema import CompiledSchema, compile_schema

__all__ = ["CompareOptions", "RewardDesign", "Verdict", "check_gold", "verify"]

# Golds that were found sound, each with its schema.
_GOLDS_REMEMBERED = 4_096

COMPONENTS = ("parse", "schema", "fields", "precision", "recall", "f1", "exact_match", "clean")


@dataclass
class Verdict:
    """What the verifier says about one output.

    Attributes:
        reward: the scalar of the reward design, 0 to 1.
        components: each 0 to 1: ``parse`` (JSON was found), ``schema`` (it satisfies the schema; without a schema
            equal to parse), ``fields`` (right fields over all of the gold plus invented ones, weighted if the design
            is), ``precision``, ``recall`` and ``f1`` over leaf fields, ``exact_match``, ``clean``.
        reason: why it is no exact match, one sentence; None if it is.
        value: the parsed JSON; None if none was found (or it was null).
        missing, invented, wrong: dotted paths of leaf fields (``items.0.price``), at most 200 of each.
    """

    reward: float
    components: dict[str, float]
    reason: str | None = None
    value: Any = None
    missing: tuple[str, ...] = field(default=())
    invented: tuple[str, ...] = field(default=())
    wrong: tuple[str, ...] = field(default=())


def check_gold(gold: object, schema: dict[str, Any] | None = None) -> None:
    """Check a gold answer once, when the data set is loaded.

    Raises ValueError, naming the fault, if `gold` is not JSON (only dict, list, str, int, float, bool and None;
    finite numbers; string keys), is over a cap of `limits.py`, or does not satisfy `schema`; also if `schema` is not
    a valid JSON Schema or refers outside itself.
    """
    _prepare(gold, schema)


def verify(
    text: str,
    gold: object,
    schema: dict[str, Any] | None = None,
    design: RewardDesign = RewardDesign(),  # noqa: B008 (frozen)
    options: CompareOptions = CompareOptions(),  # noqa: B008 (frozen)
) -> Verdict:
    """Score `text` against `gold` by the rules in this module's docstring.

    Args:
        text: a model's output, anything at all.
        gold: the parsed gold answer. It is checked like in `check_gold`; the schema's part of that is remembered.
        schema: a JSON Schema (any draft that jsonschema knows; 2020-12 if it does not say), or None for none.
        design: how the reward is made.
        options: how fields are compared.

    Raises ValueError for a fault in gold, schema or weights; never for anything in `text`.
    """
    compiled = _prepare(gold, schema)
    design.check_gold(gold)
    found = find_json(text, kind_of(gold))
    if isinstance(found, NotFound):
        return Verdict(0.0, dict.fromkeys(COMPONENTS, 0.0), found.reason)
    fault = compiled.fault(found.value) if compiled is not None else None
    comparison = compare(gold, found.value, options, compiled)
    components = {
        "parse": 1.0,
        "schema": 1.0 if fault is None else 0.0,
        "fields": design.fields_score(comparison),
        "precision": comparison.precision,
        "recall": comparison.recall,
        "f1": comparison.f1,
        "exact_match": 1.0 if comparison.perfect and fault is None else 0.0,
        "clean": 1.0 if found.clean else 0.0,
    }
    return Verdict(
        reward=design.reward(components),
        components=components,
        reason=_reason(comparison, fault),
        value=found.value,
        missing=_listed(comparison.missing),
        invented=_listed(comparison.invented),
        wrong=_listed(comparison.wrong),
    )


def _prepare(gold: object, schema: dict[str, Any] | None) -> CompiledSchema | None:
    compiled = None if schema is None else compile_schema(schema)
    try:
        # Version 2 of the format: equal values of equal types have equal bytes.
        key = compiled, hashlib.blake2b(marshal.dumps(cast(Any, gold), 2), digest_size=16).digest()
    except ValueError:  # not plain Python; the check below says what
        key = None
    if key in _golds:
        return compiled
    _check_json(gold)
    if compiled is not None:
        compiled.check_gold(gold)
    if key is not None:
        if len(_golds) >= _GOLDS_REMEMBERED:
            _golds.clear()
        _golds.add(key)
    return compiled


_golds: set[tuple[CompiledSchema | None, bytes]] = set()


def _check_json(gold: object) -> None:
    waiting: list[tuple[object, Path]] = [(gold, ())]
    values = 0
    while waiting:
        node, path = waiting.pop()
        values += 1
        if values > limits.MAX_VALUES:
            raise ValueError(f"the gold answer has more than {limits.MAX_VALUES} values, which no output may have")
        if isinstance(node, dict | list) and len(path) >= limits.MAX_DEPTH:
            raise ValueError(f"the gold answer is nested deeper than {limits.MAX_DEPTH} levels at {dotted(path)[:80]}")
        if isinstance(node, dict):
            for key, member in node.items():
                if not isinstance(key, str):
                    raise ValueError(f"the gold answer has the key {key!r} at {dotted(path)}: keys must be strings")
                waiting.append((member, (*path, key)))
        elif isinstance(node, list):
            waiting.extend((item, (*path, index)) for index, item in enumerate(node))
        elif isinstance(node, float | int) and not isinstance(node, bool):
            if not _is_double(node):
                raise ValueError(f"the gold answer has a number that JSON or a double cannot hold at {dotted(path)}")
        elif not (node is None or isinstance(node, str | bool)):
            raise ValueError(f"the gold answer has a {type(node).__name__} at {dotted(path)}, which is not JSON")


def _is_double(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _listed(paths: list[Path]) -> tuple[str, ...]:
    return tuple(dotted(path) for path in paths[: limits.MAX_REPORTED_PATHS])


def _reason(comparison: Comparison, fault: str | None) -> str | None:
    parts = []
    for name in ("wrong", "missing", "invented"):
        paths: list[Path] = getattr(comparison, name)
        if paths:
            shown = ", ".join(dotted(path)[:60] for path in paths[:3]) + (", …" if len(paths) > 3 else "")
            parts.append(f"{len(paths)} {name} ({shown})")
    if fault is not None:
        parts.append(fault)
    return "; ".join(parts) or None
