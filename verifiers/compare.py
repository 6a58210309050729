"""Compares a parsed JSON value with the gold answer, leaf field by leaf field.

A leaf is a string, number, boolean or null, or an object or array that is empty on one side and empty or absent on
the other. Objects are compared by key, arrays **by position**. Each leaf of the gold is right, wrong or missing; each
leaf of the answer is right, wrong or invented. Where one side has an object and the other an array or a scalar, all
leaves of the gold there are missing and all of the answer are invented.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verifiers.normalize import normal_date, normal_string, numbers_equal, too_long_to_equal
from verifiers.schema import CompiledSchema

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class CompareOptions:
    """How two fields are compared.

    Attributes:
        relative_tolerance, absolute_tolerance: two numbers, at least one of them not an integer literal, are equal if
            they differ by at most ``max(relative_tolerance * |gold|, absolute_tolerance)``. The defaults, 1e-9 and
            1e-9, forgive floating-point noise only. Two integers must be equal exactly.
        nfkc: compare strings in Unicode form NFKC (default on).
        collapse_whitespace: runs of white space equal one space, none count at the ends (default on).
        casefold: upper and lower case are equal (default off).
        dates: compare every string whose gold is an ISO 8601 date or time by normal form, even where the schema does
            not say ``format: date`` or ``date-time`` (default off).
        date_formats: further spellings of a date (`datetime.strptime`), such as ``%d %B %Y``, taken as equal wherever
            dates are compared by normal form. The schema's format check stays strict. Default none.

    Raises ValueError for a tolerance that is negative or not finite.
    """

    relative_tolerance: float = 1e-9
    absolute_tolerance: float = 1e-9
    nfkc: bool = True
    collapse_whitespace: bool = True
    casefold: bool = False
    dates: bool = False
    date_formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("relative_tolerance", "absolute_tolerance"):
            tolerance = getattr(self, name)
            if not 0 <= tolerance < float("inf"):
                raise ValueError(f"CompareOptions.{name} must be a finite number of at least 0, not {tolerance!r}")


@dataclass
class Comparison:
    """The paths of the leaves, sorted into four lists, each in the order of its document."""

    right: list[Path] = field(default_factory=list)
    wrong: list[Path] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    invented: list[Path] = field(default_factory=list)

    @property
    def precision(self) -> float:
        """Right leaves among the answer's; 0 if it has none."""
        return _share(len(self.right), len(self.wrong) + len(self.invented))

    @property
    def recall(self) -> float:
        """Right leaves among the gold's; 0 if it has none."""
        return _share(len(self.right), len(self.wrong) + len(self.missing))

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, ``2 right / (leaves of the gold + leaves of the answer)``."""
        both = 2 * len(self.right)
        return _share(both, 2 * len(self.wrong) + len(self.missing) + len(self.invented))

    @property
    def perfect(self) -> bool:
        """Every field right, none missing, none invented."""
        return not (self.wrong or self.missing or self.invented)


def _share(right: int, others: int) -> float:
    return right / (right + others) if right else 0.0


def dotted(path: Path, any_index: bool = False) -> str:
    """``("items", 0, "price")`` as ``items.0.price``, or ``items.*.price``; the top level is ``$``.

    A dot or backslash inside a key is escaped with a backslash.
    """
    if not path:
        return "$"
    return ".".join(
        ("*" if any_index else str(step)) if isinstance(step, int) else step.replace("\\", "\\\\").replace(".", "\\.")
        for step in path
    )


def compare(gold: object, value: object, options: CompareOptions, schema: CompiledSchema | None = None) -> Comparison:
    """Compare `value` with `gold`; `schema` says where dates stand. Both must be JSON within the caps of `limits`."""
    comparer = _Comparer(options, schema if schema is not None and schema.has_dates else None)
    comparer.compare(gold, value, (), (schema.schema,) if comparer.schema is not None and schema is not None else ())
    return comparer.result


class _Comparer:
    def __init__(self, options: CompareOptions, schema: CompiledSchema | None) -> None:
        self.options = options
        self.schema = schema
        self.result = Comparison()

    def compare(self, gold: Any, value: Any, path: Path, schemas: tuple[Any, ...]) -> None:
        if isinstance(gold, dict) and isinstance(value, dict):
            members: Any = {key: (key in gold, key in value) for key in (*gold, *value)}.items()
        elif isinstance(gold, list) and isinstance(value, list):
            members = ((index, (index < len(gold), index < len(value))) for index in range(max(len(gold), len(value))))
        elif isinstance(gold, dict | list) or isinstance(value, dict | list):
            _add_leaves(gold, path, self.result.missing)
            _add_leaves(value, path, self.result.invented)
            return
        else:
            right = self._equal(gold, value, schemas)
            (self.result.right if right else self.result.wrong).append(path)
            return
        if not gold and not value:
            self.result.right.append(path)
        for key, (in_gold, in_value) in members:
            below = (*path, key)
            if in_gold and in_value:
                inner = self.schema.children(schemas, key) if self.schema is not None and schemas else ()
                self.compare(gold[key], value[key], below, inner)
            elif in_gold:
                _add_leaves(gold[key], below, self.result.missing)
            else:
                _add_leaves(value[key], below, self.result.invented)

    def _equal(self, gold: Any, value: Any, schemas: tuple[Any, ...]) -> bool:
        if gold is None or isinstance(gold, bool):
            return gold is value
        if isinstance(gold, str):
            return isinstance(value, str) and (gold == value or self._strings_equal(gold, value, schemas))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return numbers_equal(gold, value, self.options.relative_tolerance, self.options.absolute_tolerance)

    def _strings_equal(self, gold: str, value: str, schemas: tuple[Any, ...]) -> bool:
        options = self.options
        if options.dates or (self.schema is not None and self.schema.is_date(schemas)):
            gold_date = normal_date(gold)
            if gold_date is not None and gold_date == normal_date(value, options.date_formats):
                return True
        gold = self._normal(gold)
        if options.nfkc and not value.isascii() and too_long_to_equal(value, gold):
            return False
        return gold == self._normal(value)

    def _normal(self, text: str) -> str:
        options = self.options
        return normal_string(
            text, nfkc=options.nfkc, collapse_whitespace=options.collapse_whitespace, casefold=options.casefold
        )


def leaves(value: Any) -> list[Path]:
    """The paths of all leaves of a JSON value, in its order; an empty object or array is a leaf."""
    found: list[Path] = []
    _add_leaves(value, (), found)
    return found


def _add_leaves(value: Any, path: Path, to: list[Path]) -> None:
    if isinstance(value, dict) and value:
        for key, member in value.items():
            _add_leaves(member, (*path, key), to)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            _add_leaves(item, (*path, index), to)
    else:
        to.append(path)
