"""Imports one module with a fault in it, in this process and in all that it starts (Ray's workers too).

Python runs this file at start-up when its folder is on PYTHONPATH, as `tests/mutants/run.py` puts it there. The fault
comes in the environment variable EMBER_MUTANT as JSON: {"module": ..., "old": ..., "new": ...}. No file is changed:
the module's source is read, the text is replaced and the result compiled.
"""

import json
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader


class MutantLoader(SourceFileLoader):
    """Compiles the source with `old` replaced by `new`; bytecode caches are neither read nor written."""

    def __init__(self, fullname: str, path: str, old: str, new: str) -> None:
        super().__init__(fullname, path)
        self._old, self._new = old, new

    def get_code(self, fullname: str):
        with open(self.path, encoding="utf-8") as file:
            source = file.read()
        if source.count(self._old) != 1:
            raise ImportError(f"mutant of {fullname}: its old text is there {source.count(self._old)} times, not once")
        return compile(source.replace(self._old, self._new), self.path, "exec", dont_inherit=True)


class MutantFinder(MetaPathFinder):
    """Finds the one module that gets the fault and leaves all others to Python."""

    def __init__(self, module: str, old: str, new: str) -> None:
        self._module, self._old, self._new = module, old, new

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return None
        spec.loader = MutantLoader(fullname, spec.origin, self._old, self._new)
        return spec


if "EMBER_MUTANT" in os.environ:
    sys.meta_path.insert(0, MutantFinder(**json.loads(os.environ["EMBER_MUTANT"])))
