"""Applies one fault at a time, in memory, and checks that the tests fail: `python tests/mutants/run.py [NAME ...]`.

The chosen tests run once without a fault and must be green; then once for each mutant, each in a process of its own.
A mutant is killed when a test fails (pytest's exit status 1, and a failed test, not a failed import), it survives when
all pass. Exit status: 0 all killed, 1 one or more survived, 2 something is wrong with a mutant or with the tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from mutant import Mutant

HERE = Path(__file__).resolve().parent
FAILED_TEST = re.compile(r"^(?:FAILED|ERROR) (\S+::\S+)", re.MULTILINE)


class HarnessError(Exception):
    """A mutant or a test run that says nothing about the suite; the text names what is wrong."""


@dataclass(frozen=True)
class TestRun:
    """How one pytest process ended."""

    exit_status: int
    output: str
    seconds: float


def load_mutants(registry: Path) -> list[Mutant]:
    """Reads MUTANTS from a registry file."""
    spec = importlib.util.spec_from_file_location("mutants_registry", registry)
    if spec is None or spec.loader is None:
        raise HarnessError(f"'{registry}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = [mutant.name for mutant in module.MUTANTS]
    for name in names:
        if names.count(name) > 1:
            raise HarnessError(f"'{registry}' has two mutants named '{name}'")
    return module.MUTANTS


def source_of(module: str, root: Path) -> Path:
    """The file of a module below root, found without importing anything."""
    folder = [str(root)]
    parts = module.split(".")
    for depth, _ in enumerate(parts):
        spec = PathFinder.find_spec(".".join(parts[: depth + 1]), folder)
        if spec is None:
            raise HarnessError(f"no module '{module}' below '{root}'")
        folder = list(spec.submodule_search_locations or [])
    if spec.origin is None:
        raise HarnessError(f"'{module}' has no source file")
    return Path(spec.origin)


def check_mutant(mutant: Mutant, root: Path) -> None:
    """Refuses a mutant that cannot be applied, changes nothing or is not valid Python."""
    path = source_of(mutant.module, root)
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise HarnessError(
            f"mutant '{mutant.name}': its old text is {source.count(mutant.old)} times in '{path.relative_to(root)}', "
            "it must be there exactly once; fit it to the code as it is now"
        )
    if mutant.old == mutant.new:
        raise HarnessError(f"mutant '{mutant.name}' changes nothing")
    try:
        compile(source.replace(mutant.old, mutant.new), str(path), "exec")
    except SyntaxError as fault:
        raise HarnessError(f"mutant '{mutant.name}' is not valid Python: {fault}") from fault


def run_tests(tests: tuple[str, ...], root: Path, mutant: Mutant | None, limit: float) -> TestRun:
    """Runs pytest in a process group of its own, which ends with it or at the limit (seconds)."""
    paths = [str(HERE / "site"), str(root), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("EMBER_MUTANT", None)
    if mutant is not None:
        fault = {key: value for key, value in asdict(mutant).items() if key in ("module", "old", "new")}
        environment["EMBER_MUTANT"] = json.dumps(fault)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", *tests]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired as fault:
        raise HarnessError(f"the tests were not done after {limit:.0f} s: {' '.join(tests)}") from fault
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return TestRun(process.returncode, output, time.monotonic() - start)


def killer(run: TestRun) -> str | None:
    """The test that noticed the fault; None when all passed.

    Raises:
        HarnessError: the tests did not run, so nothing is known.
    """
    failed = FAILED_TEST.search(run.output)
    if run.exit_status == 0:
        return None
    if run.exit_status == 1 and failed:
        return failed[1]
    raise HarnessError(f"pytest ended with exit status {run.exit_status} and no failed test:\n{run.output[-3000:]}")


def run_all(mutants: list[Mutant], root: Path, limit: float) -> bool:
    """Runs checked mutants and prints one line for each; True when all were killed."""
    width = max(len(mutant.name) for mutant in mutants)
    for tests in dict.fromkeys(mutant.tests for mutant in mutants):
        print(f"without a fault: {' '.join(tests)} ... ", end="", flush=True)
        run = run_tests(tests, root, None, limit)
        if run.exit_status != 0:
            print("red")
            raise HarnessError(
                f"the tests must pass before a fault can be seen (exit status {run.exit_status}):\n{run.output[-3000:]}"
            )
        print(f"green ({run.seconds:.0f} s)")
    survivors = []
    for mutant in mutants:
        print(f"{mutant.name:{width}}  ", end="", flush=True)
        run = run_tests(mutant.tests, root, mutant, limit)
        test = killer(run)
        if test is None:
            survivors.append(mutant.name)
            print(f"SURVIVED ({run.seconds:.0f} s): no test of {' '.join(mutant.tests)} noticed it")
        else:
            print(f"killed ({run.seconds:.0f} s) by {test}")
    print(f"{len(mutants) - len(survivors)} killed, {len(survivors)} survived")
    return not survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run; all when none is named")
    parser.add_argument("--registry", type=Path, default=HERE / "registry.py", help="Python file with MUTANTS")
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="folder of the code and its tests")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one run of the tests may take")
    parser.add_argument("--list", action="store_true", help="only check that each fits the code, and name it")
    options = parser.parse_args()
    try:
        mutants = load_mutants(options.registry)
        unknown = set(options.names) - {mutant.name for mutant in mutants}
        if unknown:
            raise HarnessError(f"no mutant '{min(unknown)}'; there are {', '.join(mutant.name for mutant in mutants)}")
        chosen = [mutant for mutant in mutants if not options.names or mutant.name in options.names]
        for mutant in chosen:
            check_mutant(mutant, options.root.resolve())
        if options.list:
            print("\n".join(mutant.name for mutant in chosen))
            return 0
        return 0 if run_all(chosen, options.root.resolve(), options.limit) else 1
    except HarnessError as fault:
        print(f"mutants: {fault}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
