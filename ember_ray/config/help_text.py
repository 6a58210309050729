"""The text of ``--help``: every key with type, default and meaning, by section, in 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from ember_ray.config.describe import keys_of, section_paths
from ember_ray.config.yaml_text import dump_inline

WIDTH = 100

_OPTIONS = (
    ("--config PATH", "YAML file to start from, or the name of a shipped one{default}"),
    ("--dry-run", "print the resolved configuration and the plan, and stop"),
    ("--tracker KIND", "short for tracker=KIND"),
    ("-h, --help", "print this and stop"),
)


def help_text(
    cls: type[BaseModel], prog: str, description: str, default_config: str | None, defaults: Mapping[str, Any]
) -> str:
    """Args: ``defaults``: dotted path to the value that holds when nothing is given (the shipped file counted)."""
    lines = [f"usage: {prog} [--config PATH] [--dry-run] [key=value ...]", ""]
    lines += [*textwrap.wrap(description, WIDTH), "", "options:"]
    shipped = f" (default: {default_config})" if default_config else ""
    for name, meaning in _OPTIONS:
        if name.startswith("--tracker") and "tracker" not in cls.model_fields:
            continue
        lines.append(f"  {name:<17}{meaning.format(default=shipped)}")
    lines += ["", "keys, each as key=default (type), set with key=value, e.g. " + _example(cls, defaults)]

    sections = dict(section_paths(cls))
    current: str | None = None
    for key in keys_of(cls):
        section = key.path.rpartition(".")[0]
        if section != current:
            title = f"{section}: {_lower(sections[section])}" if section else "the run:"
            lines += ["", title]
            current = section
        value = defaults.get(key.path, key.default)
        head = f"  {key.path}={dump_inline(value) if not isinstance(value, str) else value}"
        kind = f"({key.type_words})"
        if len(head) + 2 + len(kind) <= WIDTH:
            lines.append(f"{head}  {kind}")
        else:
            lines += textwrap.wrap(head, WIDTH, subsequent_indent="      ", break_on_hyphens=False)
            lines += _indent(kind)
        lines += _indent(key.description)
    lines += ["", "exit status: 0 done, 2 a fault of the input (one line says which), 130 stopped by Ctrl-C or SIGTERM"]
    return "\n".join(lines) + "\n"


def _indent(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)


def _lower(text: str) -> str:
    text = text.rstrip(".")
    return text[:1].lower() + text[1:]


def _example(cls: type[BaseModel], defaults: Mapping[str, Any]) -> str:
    """A number of the deepest section, as people most often change."""
    numbers = [k for k in keys_of(cls) if isinstance(k.default, (int, float)) and not isinstance(k.default, bool)]
    key = next((k for k in numbers if "." in k.path), numbers[0] if numbers else None)
    return f"{key.path}={dump_inline(defaults.get(key.path, key.default))}" if key else "key=value"
