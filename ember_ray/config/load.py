"""A configuration from a YAML file and ``key=value`` overrides, with faults told by file, line and key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ember_ray.config import yaml_text
from ember_ray.config.describe import (
    field_words,
    find_field,
    is_mapping,
    is_text,
    keys_of,
    nested_values,
    section_class,
)
from ember_ray.config.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)


def load_config(cls: type[Config], yaml_path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults of ``cls``, then the YAML file, then the overrides, checked as a whole.

    Args:
        cls: a pydantic class whose sections are pydantic classes (see ``schema.Section``).
        yaml_path: the file; None takes defaults only.
        overrides: ``a.b=value``, the value in YAML; for a key that holds text the value is taken as it
            is unless it stands in quotes or is ``null``. ``a.names.x=1`` sets one entry of a key that
            holds names. The last of several for one key counts.

    Raises:
        ConfigError: one sentence (or several, by ``; ``) that says where, which key, what is wrong.
    """
    draft = _Draft(cls)
    if yaml_path is not None:
        draft.add_file(Path(yaml_path))
    for override in overrides:
        draft.add_override(override)
    try:
        return cls.model_validate(draft.values)
    except ValidationError as fault:
        raise ConfigError("; ".join(draft.explain(fault))) from None


def dump_yaml(cfg: BaseModel) -> str:
    """All values of a configuration as YAML that ``load_config`` reads back to an equal one."""
    return yaml_text.dump(cfg.model_dump(mode="json"))


def as_overrides(cfg: BaseModel) -> list[str]:
    """A configuration as the overrides that make it from any other."""
    return [f"{path}={yaml_text.dump_inline(value)}" for path, value in nested_values(cfg).items()]


class _Draft:
    """Values gathered so far, and where each was written (dotted path -> ``file:line`` or the override)."""

    def __init__(self, cls: type[BaseModel]) -> None:
        self.cls = cls
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def add_file(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"no configuration file '{path}'; give an existing one with --config") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not a text file in UTF-8; write YAML") from None
        except OSError as fault:
            raise ConfigError(f"configuration file '{path}' cannot be read: {fault.strerror or fault}") from None
        document, lines = yaml_text.parse(text, str(path))
        if document is None:
            return
        if not isinstance(document, dict):
            raise ConfigError(f"{path}: must hold lines of 'key: value', not {_short(document)}")
        self._merge(self.cls, document, (), self.values, lambda keys: f"{path}:{lines[keys]}")

    def add_override(self, override: str) -> None:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not path or path.startswith("-"):
            raise ConfigError(f"cannot use '{override}'; settings are written key=value, e.g. seed=1")
        where = f"override '{_cut(override)}'"
        field, rest = find_field(self.cls, path)
        if field is None or (rest and not is_mapping(field)):
            raise ConfigError(f"{where}: unknown key '{path}'{self._nearest(path)}")
        text = text.strip()
        if is_text(field) and text not in ("", "null", "~") and text[0] not in "\"'":
            value: Any = text
        else:
            value = yaml_text.parse(text, where)[0]
        parents = path.removesuffix(f".{rest}").split(".") if rest else path.split(".")[:-1]
        into = self.values
        for name in parents:
            child = into.get(name)
            into = into.setdefault(name, {}) if isinstance(child, dict) or child is None else into
        leaf = rest or path.split(".")[-1]
        nested = section_class(field)
        if nested is None:
            into[leaf] = value
            self.origins[path] = where
        else:
            keys = tuple(path.split("."))
            self._merge_section(nested, value, keys, into, lambda _: where)

    def _merge(
        self,
        cls: type[BaseModel],
        new: dict[str, Any],
        at: tuple[str, ...],
        into: dict[str, Any],
        where: Callable[[tuple[str, ...]], str],
    ) -> None:
        """Puts a mapping into nested values, section by section; refuses unknown keys where they stand."""
        for name, value in new.items():
            keys = (*at, name)
            dotted = ".".join(keys)
            field = cls.model_fields.get(name)
            if field is None:
                raise ConfigError(f"{where(keys)}: unknown key '{dotted}'{self._nearest(dotted)}")
            nested = section_class(field)
            if nested is not None:
                self._merge_section(nested, value, keys, into, where)
            else:
                into[name] = value
                self.origins[dotted] = where(keys)

    def _merge_section(
        self,
        nested: type[BaseModel],
        value: Any,
        keys: tuple[str, ...],
        into: dict[str, Any],
        where: Callable[[tuple[str, ...]], str],
    ) -> None:
        if isinstance(value, dict):
            self._merge(nested, value, keys, into.setdefault(keys[-1], {}), where)
        elif value is not None:  # a section with nothing under it keeps its defaults
            known = ", ".join(nested.model_fields)
            raise ConfigError(
                f"{where(keys)}: {'.'.join(keys)} is a section with the keys {known}, not {_short(value)}"
            )

    def _nearest(self, unknown: str) -> str:
        """``; did you mean 'lora.r'?``, or the keys that there are."""
        known = [key.path for key in keys_of(self.cls)]
        tail = unknown.split(".")[-1]

        def likeness(path: str) -> float:
            whole = difflib.SequenceMatcher(None, unknown, path).ratio()
            last = difflib.SequenceMatcher(None, tail, path.split(".")[-1]).ratio()
            return max(whole, 0.98 * last)

        best = max(known, key=likeness)
        if likeness(best) >= 0.6:
            return f"; did you mean '{best}'?"
        return f"; known keys of this level are {', '.join(self._siblings(unknown))}; --help lists all"

    def _siblings(self, unknown: str) -> list[str]:
        cls: type[BaseModel] = self.cls
        for name in unknown.split(".")[:-1]:
            field = cls.model_fields.get(name)
            nested = section_class(field) if field is not None else None
            if nested is None:
                break
            cls = nested
        return list(cls.model_fields)

    def explain(self, fault: ValidationError) -> list[str]:
        """One sentence for each key at fault."""
        sentences: dict[str, str] = {}
        for error in fault.errors(include_url=False):
            loc = error["loc"]
            if error["type"] in ("value_error", "assertion_error"):
                text = str(error["ctx"]["error"])
                path = next((p for p in sorted(self.origins, key=len, reverse=True) if p in text), "")
                sentence = text
            else:
                path, field = self._leaf(loc)
                if field is None:
                    sentence = f"unknown key '{path}'{self._nearest(path)}"
                elif error["type"] == "missing":
                    sentence = f"{path} is needed ({field_words(field)}); set {path}=..."
                else:
                    sentence = f"{path} must be {field_words(field)}, not {_short(self._value(path))}"
            where = self.origins.get(path) or next(
                (origin for known, origin in self.origins.items() if path and known.startswith(path + ".")), ""
            )
            sentences.setdefault(path or sentence, f"{where}: {sentence}" if where else sentence)
        return list(sentences.values())

    def _leaf(self, loc: tuple[int | str, ...]) -> tuple[str, Any]:
        """The dotted path of the key that pydantic's location lies in, and its field."""
        cls: type[BaseModel] = self.cls
        keys: list[str] = []
        for part in loc:
            field = cls.model_fields.get(str(part))
            keys.append(str(part))
            if field is None:
                return ".".join(keys), None
            nested = section_class(field)
            if nested is None:
                return ".".join(keys), field
            cls = nested
        return ".".join(keys), self.cls.model_fields.get(keys[0]) if keys else None

    def _value(self, path: str) -> Any:
        value: Any = self.values
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value


def _short(value: Any) -> str:
    return _cut(yaml_text.dump_inline(value))


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."
