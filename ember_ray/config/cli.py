"""The command line that all recipes share: options, overrides, help, dry run, and how faults and signals end a run."""

from __future__ import annotations

import errno
import importlib.resources
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from ember_ray.config import signals
from ember_ray.config.describe import nested_values
from ember_ray.config.errors import ConfigError, UserError
from ember_ray.config.help_text import help_text
from ember_ray.config.load import dump_yaml, load_config

Config = TypeVar("Config", bound=BaseModel)

# Faults of the machine that the user can mend. Others (a lost connection, a broken pipe) are for a traceback.
_USER_ERRNOS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
# Faults of the input whose classes live where a help text must not import from: looked up only if loaded.
_LAZY_USER_ERRORS = (
    "ember_ray.engine.scheduler:RequestError",
    "ember_ray.model.lora:AdapterError",
    "ember_ray.model.qwen3_config:ModelError",
)


@dataclass
class Arguments:
    """A command line taken apart."""

    config: str | None = None
    dry_run: bool = False
    help: bool = False
    overrides: list[str] = field(default_factory=list)


def run_cli(
    config_class: type[Config],
    *,
    prog: str,
    description: str,
    main: Callable[[Config], int | None],
    default_config: str | None = None,
    plan: Callable[[Config], str] | None = None,
    user_errors: Sequence[type[BaseException] | str] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a recipe from the command line.

    Args:
        config_class: what the run is configured by.
        prog: how it is called, e.g. ``python -m recipes.dpo_extract``.
        description: what it does, for ``--help``.
        main: the run itself. It cleans up in ``finally`` blocks; Ctrl-C and SIGTERM reach it as
            ``KeyboardInterrupt``. After ``ray.init`` it calls ``signals.reinstall()``.
        default_config: name of a YAML file in the installed ``configs`` folder, used without ``--config``.
        plan: text that ``--dry-run`` prints below the configuration; it starts nothing.
        user_errors: exceptions that are faults of the input beside ``UserError``, as classes or as
            ``"module:Class"`` (looked up only when the module is loaded).
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0 (or what ``main`` returned), 2 after a fault of the input, which one line
        on stderr tells, 130 after Ctrl-C or SIGTERM. Any other exception is a bug and is raised.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not end a run
    stop = signals.begin()
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        config_path = find_config(arguments.config or default_config)
        if arguments.help:
            shipped = find_config(default_config)
            defaults = nested_values(load_config(config_class, shipped)) if shipped else {}
            return _print(help_text(config_class, prog, description, default_config, defaults))
        config = load_config(config_class, config_path, arguments.overrides)
        if arguments.dry_run:
            return _print(dump_yaml(config) + ("\n" + plan(config).rstrip() + "\n" if plan is not None else ""))
        status = main(config) or 0
        return 130 if stop.received is not None else status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as request:
        if stop.received is not None or request.code in (15, 143):  # Ray's own SIGTERM handler leaves this way
            return 130
        raise
    except Exception as fault:
        line = user_fault_line(fault, user_errors)
        if line is None or os.environ.get("EMBER_RAY_TRACEBACK"):
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    finally:
        signals.end(stop)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Options and ``key=value`` in any order.

    Raises:
        ConfigError: an unknown option, or one without its value.
    """
    found = Arguments()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            found.help = True
        elif word == "--dry-run":
            found.dry_run = True
        elif name in ("--config", "--tracker"):
            if not equals:
                if not rest or rest[0].startswith("-"):
                    raise ConfigError(
                        f"option {name} needs a value, e.g. {name} {'PATH' if name == '--config' else 'none'}"
                    )
                value = rest.pop(0)
            if name == "--config":
                found.config = value
            else:
                found.overrides.append(f"tracker={value}")
        elif word.startswith("-"):
            hint = f"; write {word.lstrip('-')} without dashes" if equals else "; --help lists the options"
            raise ConfigError(f"unknown option '{word}'{hint}")
        else:
            found.overrides.append(word)
    return found


def find_config(name: str | None) -> Path | None:
    """A file of this path, else a shipped configuration of this name (``.yaml`` may be left out).

    Raises:
        ConfigError: neither exists; the text names the shipped ones.
    """
    if name is None:
        return None
    if Path(name).exists():
        return Path(name)
    folder = _configs_folder()
    for candidate in (folder / name, folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = sorted(path.name for path in folder.glob("*.yaml"))
    raise ConfigError(
        f"no configuration file '{name}'; give an existing path or one of the shipped {', '.join(shipped)}"
    )


def _configs_folder() -> Path:
    """The ``configs`` folder beside this package, in a checkout and when installed alike."""
    import ember_ray

    beside = Path(ember_ray.__file__).resolve().parent.parent / "configs"
    if beside.is_dir():
        return beside
    try:
        return Path(str(importlib.resources.files("configs")))
    except ModuleNotFoundError:
        return beside


def user_fault_line(fault: BaseException, user_errors: Sequence[type[BaseException] | str] = ()) -> str | None:
    """The one line for a fault that the user can mend, None for a bug.

    A fault that happened in another process arrives wrapped (Ray's ``RayTaskError`` has it as ``cause``).
    """
    cause = getattr(fault, "cause", None)
    if isinstance(cause, BaseException):
        return user_fault_line(cause, user_errors)
    kinds: list[type[BaseException]] = [UserError]
    for kind in (*_LAZY_USER_ERRORS, *user_errors):
        if isinstance(kind, str):
            module, _, name = kind.partition(":")
            loaded = getattr(sys.modules.get(module), name, None)
            kinds += [loaded] if loaded is not None else []
        else:
            kinds.append(kind)
    if isinstance(fault, tuple(kinds)):
        return " ".join(str(fault).split()) or type(fault).__name__
    if isinstance(fault, OSError) and fault.errno in _USER_ERRNOS:
        where = f"'{fault.filename}': " if fault.filename is not None else ""
        return f"{where}{fault.strerror}"
    return None


def _print(text: str) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
