"""Reads a configuration class: which keys there are, and types and limits in words for help and error texts."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_SCALARS = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Key:
    """One leaf of the configuration: its dotted path, its type in words, its default and what it means."""

    path: str
    type_words: str
    default: Any
    description: str


def section_class(field: FieldInfo) -> type[BaseModel] | None:
    """The model class of a field that is a section, None for a leaf."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def keys_of(cls: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """All leaves of a configuration class, in order of declaration."""
    for name, field in cls.model_fields.items():
        nested = section_class(field)
        if nested is not None:
            yield from keys_of(nested, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            yield Key(f"{prefix}{name}", field_words(field), default, field.description or "")


def section_paths(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, description) of every section."""
    for name, field in cls.model_fields.items():
        nested = section_class(field)
        if nested is not None:
            yield f"{prefix}{name}", field.description or ""
            yield from section_paths(nested, f"{prefix}{name}.")


def find_field(cls: type[BaseModel], path: str) -> tuple[FieldInfo | None, str]:
    """The deepest field on a dotted path and what is left of the path after it.

    ``lora.rank_pattern.layers.0.q_proj`` gives the field ``rank_pattern`` and ``layers.0.q_proj``.
    An unknown name gives (None, the path from that name on).
    """
    head, _, rest = path.partition(".")
    field = cls.model_fields.get(head)
    if field is None:
        return None, path
    nested = section_class(field)
    return find_field(nested, rest) if nested is not None and rest else (field, rest)


def is_mapping(field: FieldInfo) -> bool:
    """Whether a leaf holds names of the user's own (``dict[str, ...]``)."""
    return get_origin(field.annotation) is dict


def is_text(field: FieldInfo) -> bool:
    """Whether every value of a leaf is text (or null), so that a command line needs no quotes."""
    return set(_members(field.annotation)) - {type(None)} == {str}


def field_words(field: FieldInfo) -> str:
    """A field's type and limits, e.g. ``integer >= 1 or null``."""
    return _words(field.annotation, field.metadata)


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _words(annotation: Any, metadata: Any = ()) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        return _words(inner, [*metadata, *extra])
    if origin in (Union, types.UnionType):
        return " or ".join(
            _words(member, metadata if member is not type(None) else ()) for member in get_args(annotation)
        )
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in get_args(annotation))}"
    if origin is list:
        (item,) = get_args(annotation)
        least = "non-empty " if any(getattr(m, "min_length", 0) for m in _flat(metadata)) else ""
        return f"{least}list of {_plural(_words(item))}"
    if origin is dict:
        _, value = get_args(annotation)
        return f"name: {_words(value)} pairs"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    if annotation is Any:
        return "anything"
    words = _SCALARS.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return words + _limits(metadata)


def _plural(words: str) -> str:
    """``integer >= 1`` in a list."""
    head, space, rest = words.partition(" ")
    return f"{head}s{space}{rest}" if head in ("integer", "number") else words.removeprefix("one of ")


def _flat(metadata: Any) -> Iterator[Any]:
    """Constraint objects, also those that pydantic keeps inside a FieldInfo."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _flat(item.metadata)
        else:
            yield item


def _limits(metadata: Any) -> str:
    text = ""
    for item in _flat(metadata):
        if isinstance(item, annotated_types.Ge):
            text += f" >= {item.ge}"
        elif isinstance(item, annotated_types.Gt):
            text += f" > {item.gt}"
        elif isinstance(item, annotated_types.Le):
            text += f" and <= {item.le}" if text else f" <= {item.le}"
        elif isinstance(item, annotated_types.Lt):
            text += f" and < {item.lt}" if text else f" < {item.lt}"
        elif getattr(item, "pattern", None):
            text += (
                " of letters, digits, '.', '_' and '-'" if "A-Za-z0-9" in item.pattern else f" matching {item.pattern}"
            )
        elif getattr(item, "min_length", 0):
            text += ", not empty"
    return text


def nested_values(cfg: BaseModel) -> Mapping[str, Any]:
    """Every leaf's value by dotted path."""
    values: dict[str, Any] = {}
    for key in keys_of(type(cfg)):
        value: Any = cfg
        for part in key.path.split("."):
            value = getattr(value, part)
        values[key.path] = value
    return values
