"""YAML as people expect it: line numbers are kept, ``1e-4`` is a number, ``yes`` is text, a key comes once."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ember_ray.config.errors import ConfigError

# YAML 1.2's core schema. PyYAML follows 1.1, where 1e-4 is text, `no` is false, 12:30 is 750 and 010 is 8.
_CORE = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Keeps the 1.1 rules beside ours, so that any reader gets the same values back."""


for _tag, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 10))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(re.sub(r"\.(?=[a-z])", "", node.value.lower())),
)


def parse(text: str, where: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """Reads one YAML document.

    Args:
        text: the document.
        where: its name in error texts, a file or an override.

    Returns:
        The value, and the line (from 1) of every key by its path.

    Raises:
        ConfigError: not YAML, a key given twice, a key that is not text, a tag, nesting without end.
    """
    lines: dict[tuple[str, ...], int] = {}
    try:
        loader = _Loader(text)
    except yaml.YAMLError as fault:  # control characters
        raise ConfigError(f"{where}: not YAML, it holds a character that text does not have") from fault
    try:
        node = loader.get_single_node()
        return (None if node is None else _value(loader, node, (), lines, where)), lines
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        at = f":{mark.line + 1}" if mark is not None and "\n" in text else ""
        what = fault.problem or fault.context or "cannot be read"
        raise ConfigError(f"{where}{at}: not valid YAML, {what}") from fault
    except yaml.YAMLError as fault:
        raise ConfigError(f"{where}: not valid YAML, {' '.join(str(fault).split())}") from fault
    except RecursionError as fault:
        raise ConfigError(f"{where}: nested too deeply for a configuration") from fault
    finally:
        loader.dispose()


def _value(
    loader: _Loader, node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int], where: str
) -> Any:
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{where}:{line}: a key must be a name, not a list or a mapping")
            name = key_node.value
            if name in result:
                first = lines[(*path, name)]
                raise ConfigError(f"{where}:{line}: '{'.'.join((*path, name))}' is given twice (first in line {first})")
            lines[(*path, name)] = line
            result[name] = _value(loader, value_node, (*path, name), lines, where)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, path, lines, where) for item in node.value]
    return loader.construct_object(node)


def dump(value: Any) -> str:
    """A value as YAML text; lists and maps of scalars on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)


def dump_inline(value: Any) -> str:
    """A value as one line of YAML, text always in double quotes."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=True,
        default_style='"' if isinstance(value, str) else None,
        width=1_000_000,
        allow_unicode=True,
    )
    return text.removesuffix("\n").removesuffix("\n...")
