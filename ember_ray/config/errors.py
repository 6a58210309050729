"""Faults that the person at the keyboard can mend: one line, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something outside the code is wrong: an input, a file, a folder, a setting.

    The text is one sentence that says what is wrong, where, and what to do; the command line
    prints it as ``error: ...`` and exits with status 2.
    """


class ConfigError(UserError):
    """A configuration file, an override or an option that cannot be used."""


@contextmanager
def user_faults(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turns the named exceptions of the block into ``UserError``, with ``prefix`` before their text.

    For calls that report a bad setting with a plain exception, e.g.
    ``with user_faults(ValueError, prefix="engine.stages: "): plan_stages(...)``.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as fault:
        raise UserError(f"{prefix}{fault}") from fault
