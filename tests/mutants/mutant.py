"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault that the suite must notice.

    Attributes:
        name: short, unique; `python tests/mutants/run.py NAME` runs it alone.
        module: the module that gets the fault, as it is imported.
        old: text that is in the module's source exactly once.
        new: what stands there instead.
        tests: pytest's arguments (files, `file::test`, `-k`, `-m`) for the tests expected to catch it; only these run.
    """

    name: str
    module: str
    old: str
    new: str
    tests: tuple[str, ...]
